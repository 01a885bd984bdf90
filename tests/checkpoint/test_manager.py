"""CheckpointManager as a training loop meets it: saving never kills, names mean what they say."""

from __future__ import annotations

import datetime
import errno
import math
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdfast import load
from holdfast.checkpoint import Catalog, EveryMinutes, EverySteps, manager
from holdfast.checkpoint.format import container
from holdfast.checkpoint.manager import CheckpointManager, checkpoint_size
from holdfast.checkpoint.rundir import catalog
from holdfast.checkpoint.save import source
from holdfast.checkpoint.system import filesystem
from holdfast.errors import (
    DamagedCheckpoint,
    RunLocked,
    SaveFailed,
    StateMismatch,
    UnsupportedValue,
)
from tests.support import (
    Broken,
    Toy,
    after,
    assert_same,
    cut,
    damage,
    end_epoch,
    events,
    fail_with,
    in_child,
    listener,
    make_run,
    said,
    snapshot,
)

# ------------------------------------------------------------------------------------------- saving


def test_one_save_has_four_names_and_one_inode(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path) as engine:
        saved = end_epoch(engine, 1, step=10, metrics={"val_loss": 0.5})
    assert saved is not None
    assert list(saved.names) == ["model_epoch_1.pt", "latest.pt", "model.pt", "best_model.pt"]
    assert saved.names == {"model_epoch_1.pt": "file", "latest.pt": "link", "model.pt": "link",
                           "best_model.pt": "link"}  # fmt: skip
    status = saved.path.stat()
    assert status.st_nlink == 4
    assert stat.S_IMODE(status.st_mode) == 0o444, "nobody writes through one name into all"
    assert status.st_size == saved.entry.size
    assert saved.is_best
    assert saved.previous_best is None
    assert saved.seconds > 0


def test_what_is_in_the_file(tmp_path: Path) -> None:
    toy = make_run(tmp_path, 2)
    state = load(tmp_path / "latest.pt")
    assert set(state) == {"epoch", "global_step", "model", "optimizer", "losses", "rng"}
    assert (state["epoch"], state["global_step"], state["losses"]) == (2, 2, toy.losses)
    assert_same(dict(state["model"]), snapshot(toy.model))
    with container.Reader(tmp_path / "latest.pt") as reader:
        said_ = reader.manifest
    assert said_["identity"]["step"] == 2
    assert said_["environment"]["torch"] == str(torch.__version__)
    assert said_["configured"]["optimizer"][0]["lr"] == 0.1


def test_torch_opens_what_the_manager_saved(tmp_path: Path) -> None:
    make_run(tmp_path, 1)
    for name in ("latest.pt", "model.pt", "checkpoint_step_1.pt"):
        ours, theirs = load(tmp_path / name), torch.load(tmp_path / name, weights_only=True)
        assert_same(ours, theirs)


@pytest.mark.parametrize("stop", range(1, 6))
def test_stopped_at_any_step_and_resumed_it_is_bit_identical(tmp_path: Path, stop: int) -> None:
    make_run(tmp_path, stop)
    toy = Toy(seed=77)
    with toy.manager(tmp_path) as engine:
        assert engine.resume() is not None
        while toy.now < 6:
            toy.step()
    assert_same(snapshot(toy.state), snapshot(after(6).state))


def test_nothing_saved_is_nothing_resumed(tmp_path: Path) -> None:
    told, tell = listener()
    with Toy().manager(tmp_path / "a" / "b", on_event=tell) as engine:
        assert engine.resume() is None
        assert engine.list() == []
        assert engine.verify() == {}
        assert engine.saved_step == 0
    assert said(told) == ["began"]


def test_all_files_of_a_run_have_one_size(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, keep_last=0, reserve=100_000) as engine:
        sizes = {checkpoint_size(toy.state, reserve=100_000)}
        for step in range(1, 8):
            toy.step()
            saved = engine.save(step=10**step, metrics={"val_loss": 1 / step})
            assert saved is not None
            sizes.add(saved.path.stat().st_size)
    assert len(sizes) == 1, "the one that was foretold"


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([2.0, 1.0, 3.0], [True, True, False]),
        ([1.0, 1.0, 0.5], [True, False, True]),
        ([math.nan, 2.0, math.nan], [False, True, False]),
        ([2.0, -math.inf, math.inf], [True, False, False]),
        ([None, 2.0, None], [False, True, False]),
    ],
)
def test_the_best_is_the_lowest_finite_score(tmp_path: Path, scores: Any, best: list[bool]) -> None:
    with Toy().manager(tmp_path) as engine:
        for epoch, score in enumerate(scores, 1):
            metrics = {} if score is None else {"val_loss": score}
            saved = end_epoch(engine, epoch, step=epoch, metrics=metrics)
            assert saved is not None
            assert saved.is_best is best[epoch - 1]
            assert ("best_model.pt" in saved.names) is saved.is_best
    winner = max(i for i, is_best in enumerate(best, 1) if is_best)
    assert load(tmp_path / "best_model.pt", only="epoch") == winner


def test_higher_may_be_better(tmp_path: Path) -> None:
    with Toy().manager(tmp_path, metric="accuracy", lower_is_better=False) as engine:
        for epoch, score in enumerate([0.1, 0.9, 0.5], 1):
            end_epoch(engine, epoch, step=epoch, metrics={"accuracy": score, "val_loss": -epoch})
    assert load(tmp_path / "best_model.pt", only="epoch") == 2


def test_metrics_of_any_kind_of_number(tmp_path: Path) -> None:
    metrics: dict[str, Any] = {
        "val_loss": torch.tensor(0.25), "np": np.float32(0.5), "int": 3, "nan": math.nan,
        "inf": torch.tensor(-math.inf), "text": "ok", "none": None, "many": torch.zeros(2),
    }  # fmt: skip
    with Toy().manager(tmp_path) as engine:
        saved = engine.save(step=np.int64(3), epoch=torch.tensor(1), metrics=metrics, strict=True)
        assert saved is not None
    assert saved.is_best
    assert saved.entry.loss == 0.25
    assert saved.entry.metrics == {"val_loss": 0.25, "np": 0.5, "int": 3, "nan": "nan",
                                   "inf": "-inf", "text": "ok", "none": None,
                                   "many": "tensor([0., 0.])"}  # fmt: skip


def test_settings_that_json_cannot_hold_are_saved_all_the_same(tmp_path: Path) -> None:
    toy = Toy()
    toy.optimizer.param_groups[0] |= {"max_norm": math.inf, "pair": (math.nan, torch.zeros(3))}
    with toy.manager(tmp_path) as engine:
        assert engine.save(step=1, strict=True) is not None


def test_the_history_tells_what_happened(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    assert [e["event"] for e in events(tmp_path)] == ["began", *["durable", "verified"] * 2]
    durable = events(tmp_path)[1]
    assert durable["names"] == ["checkpoint_step_1.pt", "latest.pt", "model.pt"]
    assert durable["size"] == (tmp_path / "checkpoint_step_1.pt").stat().st_size


# --------------------------------------------------------------------------------------- retention


def test_the_last_epochs_stay_and_the_best(tmp_path: Path) -> None:
    with Toy().manager(tmp_path, keep_last=2) as engine:
        for epoch in range(1, 7):
            end_epoch(engine, epoch, step=epoch, metrics={"val_loss": abs(epoch - 2)})
        assert [entry.step for entry in engine.list()] == [6, 5, 2]
    assert {e["step"] for e in events(tmp_path) if e["event"] == "removed"} == {1, 3, 4}


def test_zero_keeps_all(tmp_path: Path) -> None:
    make_run(tmp_path, 6, kind="epoch", keep_last=0)
    assert len(Catalog(tmp_path).scan().entries) == 6


def test_temporaries_roll_and_go_when_something_lasting_is_there(tmp_path: Path) -> None:
    with Toy().manager(tmp_path, save_when=[EverySteps(2)]) as engine:
        for step in range(1, 10):
            engine.after_step(step, epoch=1)
            engine.wait()
        assert sorted(p.name for p in (tmp_path / "temp").iterdir()) == [
            "temp_epoch1_step6.pt", "temp_epoch1_step8.pt"
        ]  # fmt: skip
        end_epoch(engine, 1, step=10)
        assert [entry.step for entry in engine.list()] == [10, 8], "two verified states"
        end_epoch(engine, 2, step=20)
        assert [entry.step for entry in engine.list()] == [20, 10]


def test_nothing_old_goes_before_the_new_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Catalog.delete
    removed = []

    def delete(catalog: Catalog, entry: Any, why: str) -> None:
        newest = catalog.scan().entries[0]
        assert newest.verified
        assert newest.step > entry.step
        removed.append(entry.step)
        real(catalog, entry, why)

    monkeypatch.setattr(Catalog, "delete", delete)
    make_run(tmp_path, 5, keep_last=1)
    assert removed == [1, 2, 3]


def test_clean_up_that_fails_is_no_failure_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_path: Path) -> None:
        raise OSError(errno.EPERM, "immutable")

    make_run(tmp_path, 3, keep_last=1)
    toy = Toy()
    with toy.manager(tmp_path, keep_last=1) as engine:
        engine.resume()
        monkeypatch.setattr(filesystem, "remove", fail)
        toy.step()
        assert engine.save(step=4, strict=True) is not None
        monkeypatch.undo()
        toy.step()
        engine.save(step=5, strict=True)
        assert [entry.step for entry in engine.list()] == [5, 4], "gone after the next one"


# ---------------------------------------------------------------------------------- when to save


def test_policies_decide_after_each_step(tmp_path: Path) -> None:
    with Toy().manager(tmp_path, save_when=[EverySteps(3)]) as engine:
        saved = []
        for step in range(1, 10):
            if engine.after_step(step):
                saved.append(step)
            engine.wait()
        assert saved == [3, 6, 9]
        engine.save(step=12)
        assert engine.after_step(12) is None, "saved already"
        assert engine.saved_step == 12
    with Toy().manager(tmp_path / "b") as engine:
        assert engine.after_step(100) is None, "no policy, no save"
    with Toy().manager(tmp_path / "c", save_when=[EveryMinutes(0)]) as engine:
        assert engine.after_step(1) is not None


# ------------------------------------------------------------------------------------- who may save


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(RunLocked, match="Another process"):
            Toy().manager(tmp_path)

    with Toy().manager(tmp_path):
        assert in_child(second) == 0
    Toy().manager(tmp_path).close()


def test_a_manager_that_could_not_be_made_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(manager, "Place", fail_with(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            Toy().manager(tmp_path)
    with pytest.raises(UnsupportedValue, match=r"bad is a builtins\.object"):
        CheckpointManager(tmp_path, {"bad": object()})
    Toy().manager(tmp_path).close()


def test_a_lock_that_is_held_already_is_used(tmp_path: Path) -> None:
    ours = Catalog(tmp_path)
    with ours.run_lock:
        engine = Toy().manager(tmp_path, catalog=ours)
        assert engine.save(step=1, strict=True) is not None


def test_who_does_not_hold_the_directory_does_not_write(tmp_path: Path) -> None:
    def child() -> None:
        with pytest.raises(SaveFailed, match="does not hold"):
            engine.save(step=2)

    engine = Toy().manager(tmp_path)
    engine.save(step=1, strict=True)
    assert in_child(child) == 0, "a forked child"
    engine.close()
    child()
    engine.close()


def test_temporaries_of_dead_writers_are_swept(tmp_path: Path) -> None:
    (tmp_path / "temp").mkdir()
    for place in (tmp_path, tmp_path / "temp"):
        (place / ".holdfast-99-abc.tmp").write_bytes(b"half a checkpoint")
    with Toy().manager(tmp_path) as engine:
        engine.resume()
    assert not list(filesystem.temporaries(tmp_path))
    assert not list(filesystem.temporaries(tmp_path / "temp"))


def test_a_directory_that_cannot_be_made_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"[Nn]ot a directory"):
        Toy().manager(tmp_path / "file" / "run")


# ----------------------------------------------------------------------------------------- resuming


def test_a_changed_rate_takes_effect_from_run_to_run(tmp_path: Path) -> None:
    rates = [0.1, 0.1, 0.03, 0.03, 0.1]
    for step, rate in enumerate(rates, 1):
        toy = Toy(lr=rate)
        with toy.manager(tmp_path) as engine:
            engine.resume()
            assert toy.optimizer.param_groups[0]["lr"] == rate
            toy.step()
            engine.save(step=step, strict=True)
    toy = Toy(lr=0.1)
    toy.optimizer.param_groups[0]["lr"] = 0.1
    with toy.manager(tmp_path) as engine:
        engine.resume()
    assert toy.now == 5


def test_a_rate_that_the_loop_changed_is_restored(tmp_path: Path) -> None:
    toy = Toy(lr=0.1)
    with toy.manager(tmp_path) as engine:
        toy.optimizer.param_groups[0]["lr"] = 0.01
        engine.save(step=1, strict=True)
    again = Toy(lr=0.1)
    with again.manager(tmp_path) as engine:
        engine.resume()
    assert again.optimizer.param_groups[0]["lr"] == 0.01


def test_a_state_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    toy = Toy()
    toy.state["model"] = torch.nn.Linear(7, 2)
    before, stream = snapshot(toy.state), torch.get_rng_state()
    with toy.manager(tmp_path) as engine:
        with pytest.raises(StateMismatch, match=r"float32\[2, 3\] in the checkpoint and"):
            engine.resume()
        assert_same(snapshot(toy.state), before)
        assert torch.equal(torch.get_rng_state(), stream)
        assert [entry.step for entry in engine.list()] == [2, 1]
        assert events(tmp_path)[-1]["event"] == "verified", "nothing was begun"


def test_an_interrupt_while_resuming_is_all_or_nothing(tmp_path: Path) -> None:
    class Interrupted(Broken):
        def load_state_dict(self, _state: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    def make(seed: int) -> Toy:
        toy = Toy(seed)
        toy.state["last"] = Interrupted()
        return toy

    with make(1).manager(tmp_path) as engine:
        engine.save(step=3, strict=True)
    toy = make(2)
    before, stream = snapshot(toy.state), torch.get_rng_state()
    with toy.manager(tmp_path) as engine, pytest.raises(KeyboardInterrupt):
        engine.resume()
    assert_same(snapshot(toy.state), before)
    assert torch.equal(torch.get_rng_state(), stream)


def test_random_streams_belong_to_the_state(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedValue, match="'rng'"):
        CheckpointManager(tmp_path, {"rng": 1})
    with CheckpointManager(tmp_path, {"rng": 1, "n": 1}, rng=False) as engine:
        engine.save(step=1, strict=True)
    with CheckpointManager(tmp_path, {"n": 2}) as engine, pytest.raises(StateMismatch):
        engine.resume()  # {"rng": 1} is no state of random streams
    with CheckpointManager(tmp_path / "b", {"n": 1}, rng=False) as engine:
        engine.save(step=1, strict=True)
    state = {"n": 2}
    with CheckpointManager(tmp_path / "b", state) as engine:
        with pytest.raises(StateMismatch, match="no random streams"):
            engine.resume()
        assert engine.resume(strict=False) is not None
    assert state == {"n": 1}


def test_the_number_of_threads_is_restored_and_said(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        make_run(tmp_path, 1)
        torch.set_num_threads(1)
        told, tell = listener()
        with Toy().manager(tmp_path, on_event=tell) as engine:
            engine.resume()
        assert torch.get_num_threads() == 2
        assert ("threads", {"saved": 2, "live": 1}) in told
    finally:
        torch.set_num_threads(before)


def test_rolling_back_in_the_middle_of_a_run(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, keep_last=0) as engine:
        for _step in range(4):
            toy.step()
            engine.save(step=toy.now, strict=True)
        resumed = engine.resume("checkpoint_step_2.pt")
        assert resumed is not None
        assert (resumed.step, resumed.generation, toy.now) == (2, 2, 2)
        toy.step()
        engine.save(step=3, strict=True)
        assert [(entry.generation, entry.step) for entry in engine.list()] == [
            (2, 3),
            (1, 2),
            (1, 1),
        ]
    assert_same(snapshot(toy.state), snapshot(after(3).state))


# ------------------------------------------------------------------------------------------ looking


def test_verifying_tells_each_file(tmp_path: Path) -> None:
    toy = make_run(tmp_path, 3)
    with toy.manager(tmp_path) as engine:
        assert engine.verify() == {f"checkpoint_step_{i}.pt": None for i in (1, 2, 3)}
        damage(tmp_path / "checkpoint_step_1.pt")
        cut(tmp_path / "checkpoint_step_2.pt")
        answer = engine.verify()
    assert {name for name, why in answer.items() if why} == {
        "checkpoint_step_1.pt", "checkpoint_step_2.pt"
    }  # fmt: skip


def test_without_links_every_name_is_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_DISABLE", "hardlinks,reflink,fallocate")
    toy = Toy()
    with toy.manager(tmp_path, keep_last=1) as engine:
        for epoch in (1, 2, 3):
            toy.step()
            saved = end_epoch(engine, epoch, step=epoch, metrics={"val_loss": epoch})
        temp = engine.save(step=4, kind="temp", strict=True)
    assert saved is not None
    assert saved.names == {"model_epoch_3.pt": "file", "latest.pt": "copy", "model.pt": "copy"}
    assert temp is not None
    assert temp.names == {"temp/temp_step4.pt": "file", "latest.pt": "copy"}
    assert load(tmp_path / "model.pt", only="global_step") == 3
    assert load(tmp_path / "best_model.pt", only="global_step") == 1
    with Toy().manager(tmp_path) as engine:
        resumed = engine.resume()
    assert resumed is not None
    assert resumed.step == 4


def test_a_damaged_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    make_run(tmp_path, 1)
    damage(tmp_path / "latest.pt")
    with pytest.raises(DamagedCheckpoint):
        load(tmp_path / "latest.pt")
    assert manager.load is load
    assert filesystem.RESERVE > 0


# ------------------------------------------------------------------------------------------- clocks


@pytest.mark.parametrize("jump", [-40 * 365, 40 * 365], ids=["back", "forth"])
def test_a_clock_that_jumps_changes_no_order_and_no_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: int
) -> None:
    """A dead battery sets the clock of a machine to 1970; the step says what is newer."""
    began = datetime.datetime(2030, 1, 1, tzinfo=datetime.timezone.utc)
    days = [0]

    def now() -> str:
        return (began + datetime.timedelta(days=days[0])).isoformat(timespec="milliseconds")

    for module in (catalog, source):
        monkeypatch.setattr(module, "now", now)
    toy = Toy()
    with toy.manager(tmp_path, keep_last=2) as engine:
        for step in range(1, 6):
            days[0] = jump if step > 2 else 0
            toy.step()
            engine.save(step=step, strict=True)
        assert [entry.step for entry in engine.list()] == [5, 4]
    damage(tmp_path / "checkpoint_step_5.pt")
    with Toy(seed=2).manager(tmp_path) as engine:
        resumed = engine.resume()
    assert resumed is not None
    assert (resumed.step, resumed.steps_lost) == (4, 1)
    assert resumed.minutes_lost >= 0


def test_wall_clocks_decide_nothing_about_when_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, jumps = time.time, iter([0.0, 1e9, -1e9, 0.0] * 10)
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    with Toy().manager(tmp_path, save_when=[EveryMinutes(10)], max_unsafe=1) as engine:
        engine.resume()
        for step in range(1, 9):
            assert engine.after_step(step) is None
        saved = engine.save(step=9)
        assert saved is not None
        assert 0 <= saved.seconds < 60


# ------------------------------------------------------------------------------------ before an end


def large() -> dict[str, Any]:
    """A state whose save takes seconds where a megabyte a second is written."""
    return {"weights": torch.ones(2 << 20)}


def test_the_last_save_waits_for_one_of_the_same_step_and_adds_none(tmp_path: Path) -> None:
    with Toy().manager(tmp_path) as manager:
        manager.save_async(step=4)
        manager.save_last(step=4, reason="signal")
        assert manager.saved_step == 4
    assert [event["event"] for event in events(tmp_path)].count("durable") == 1


@pytest.mark.parametrize(("within", "durable"), [(0.3, 4), (60.0, 5)])
def test_where_two_saves_take_too_long_the_one_on_its_way_is_enough(
    tmp_path: Path, within: float, durable: int
) -> None:
    with CheckpointManager(tmp_path, large(), rng=False, io_limit=16e6) as manager:
        manager.save(step=3)  # half a second: what the next ones are judged by
        manager.save_async(step=4)
        manager.save_last(step=5, reason="signal", within=within)
        assert manager.saved_step == durable


def test_an_abandoned_write_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, large(), rng=False, io_limit=1e6)
    manager.save_async(step=1)
    began = time.monotonic()
    manager.abandon()
    manager.close()
    assert time.monotonic() - began < 4
    assert not list(tmp_path.rglob("*.pt"))
    with CheckpointManager(tmp_path, large(), rng=False) as manager:
        assert manager.resume() is None
        assert manager.save(step=1) is not None
