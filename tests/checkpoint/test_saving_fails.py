"""Saving never kills training: full disks, failing calls, lying disks, and errors of the user's own
objects are reported, nothing old is lost, and the next save tries again."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import load, verify
from holdfast.checkpoint import Catalog
from holdfast.checkpoint.format import reading
from holdfast.checkpoint.manager import CheckpointManager
from holdfast.checkpoint.system import filesystem
from holdfast.errors import ResourceError, SaveFailed
from tests.support import (
    Broken,
    Toy,
    after,
    archived,
    assert_same,
    cut,
    damage,
    end_epoch,
    events,
    fail_with,
    lie,
    listener,
    make_run,
    said,
    snapshot,
    tree_of,
)

# ---------------------------------------------------------------------- saving never kills training


@pytest.mark.parametrize("seam", ["allocate", "write_all", "sync_file", "rename", "link"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_failed_save_leaves_training_and_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seam: str, number: int
) -> None:
    toy = make_run(tmp_path, 2)
    before = (tmp_path / "latest.pt").read_bytes()
    told, tell = listener()
    with toy.manager(tmp_path, on_event=tell) as engine:
        engine.resume()
        with monkeypatch.context() as patch:
            patch.setattr(filesystem, seam, fail_with(number))
            toy.step()
            assert engine.save(step=3) is None
            with pytest.raises(SaveFailed, match="Step 3 could not be saved"):
                engine.save(step=3, strict=True)
        assert (tmp_path / "latest.pt").read_bytes() == before
        assert not list(filesystem.temporaries(tmp_path))
        failed = [fields for event, fields in told if event == "failed"]
        assert len(failed) == 2
        assert os.strerror(number) in failed[0]["reason"]
        assert failed[0]["attempts"] == (2 if number == errno.EIO else 1)
        assert engine.saved_step == 2
        assert engine.save(step=3, strict=True) is not None, "tried again, it works"
    assert load(tmp_path / "latest.pt", only="global_step") == 3


def test_a_failure_is_written_into_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Toy().manager(tmp_path) as engine:
        monkeypatch.setattr(filesystem, "write_file", fail_with(errno.ENOSPC))
        engine.save(step=7)
    assert events(tmp_path)[-1]["event"] == "failed"
    assert events(tmp_path)[-1]["step"] == 7


def test_a_passing_error_is_overcome_with_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed fsync the kernel may call the same file clean: never fsync it again."""
    written: list[str] = []
    name, sync = filesystem.temporary_name, filesystem.sync_file

    def temporary(target: Path, *prefix: str) -> Path:
        written.append(name(target, *prefix).name)
        return target.with_name(written[-1])

    def once(fd: int) -> None:
        if len(written) == 1:
            raise OSError(errno.EIO, "once")
        sync(fd)

    with Toy().manager(tmp_path) as engine:
        monkeypatch.setattr(filesystem, "temporary_name", temporary)
        monkeypatch.setattr(filesystem, "sync_file", once)
        saved = engine.save(step=1)
    assert saved is not None
    assert verify(saved.path) is None
    assert len(set(written)) == len(written) > 1


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("CUDA out of memory"),
                                   MemoryError(), ZeroDivisionError()], ids=repr)  # fmt: skip
def test_an_error_of_the_users_own_object_does_not_kill_training(
    tmp_path: Path, error: BaseException
) -> None:
    told, tell = listener()
    broken = Broken()
    with CheckpointManager(tmp_path, {"x": broken}, on_event=tell) as engine:
        broken.error = error
        assert engine.save(step=1) is None
        assert type(error).__name__ in told[-1][1]["reason"]
        broken.error = None
        assert engine.save(step=1) is not None


def test_a_value_that_became_unsavable_is_reported_with_its_path(tmp_path: Path) -> None:
    told, tell = listener()
    state: dict[str, Any] = {"a": {"b": 1}}
    with CheckpointManager(tmp_path, state, on_event=tell) as engine:
        state["a"]["b"] = lambda: 0
        assert engine.save(step=1) is None
    assert "a/b is a builtins.function" in told[-1][1]["reason"]


def test_a_full_disk_is_known_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, tell = listener()
    with Toy().manager(tmp_path, on_event=tell) as engine:
        monkeypatch.setattr(filesystem, "free_bytes", lambda _directory: 1 << 20)
        assert engine.save(step=1) is None
        with pytest.raises(SaveFailed) as failure:
            engine.save(step=1, strict=True)
    assert "1 MB free" in told[0][1]["reason"]
    assert isinstance(failure.value.__cause__, ResourceError)
    assert not (tmp_path / "checkpoint_step_1.pt").exists()


def test_a_listener_that_fails_does_not_kill_training(tmp_path: Path) -> None:
    def broken(_event: str, _fields: dict[str, Any]) -> None:
        raise BrokenPipeError(errno.EPIPE, "the terminal is gone")

    make_run(tmp_path, 1)
    toy = Toy()
    with toy.manager(tmp_path, on_event=broken) as engine:
        assert engine.resume() is not None
        toy.step()
        assert engine.save(step=2, strict=True) is not None


def test_a_history_that_cannot_be_written_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Toy().manager(tmp_path) as engine:
        monkeypatch.setattr(filesystem, "append_line", fail_with(errno.ENOSPC))
        monkeypatch.setattr(filesystem, "write_json", fail_with(errno.ENOSPC))
        assert engine.save(step=1, strict=True) is not None
        assert engine.save(step=2, strict=True) is not None
    assert [entry.step for entry in Catalog(tmp_path).scan().entries] == [2, 1]


def test_loading_works_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, 2)
    (tmp_path / "latest.pt").unlink()
    toy = Toy(seed=9)
    with toy.manager(tmp_path) as engine:
        for seam in ("append_line", "write_json", "write_file", "publish"):
            monkeypatch.setattr(filesystem, seam, fail_with(errno.ENOSPC))
        resumed = engine.resume()
    assert resumed is not None
    assert resumed.step == 2
    assert_same(snapshot(toy.state), snapshot(after(2).state))


def test_an_interrupt_during_a_save_takes_effect_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = filesystem.sync_file
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def sync(fd: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(fd)

    monkeypatch.setattr(filesystem, "sync_file", sync)
    try:
        with Toy().manager(tmp_path) as engine, pytest.raises(KeyboardInterrupt):
            engine.save(step=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert load(tmp_path / "latest.pt", only="global_step") == 1
    assert Catalog(tmp_path).scan().entries[0].verified


# -------------------------------------------------------------------------------------- lying disks


def lose(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(bytes(path.stat().st_size))


def garble(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(b"?" * 5000)


HARM = {"a flipped bit": damage, "zeros": lose, "truncated": cut, "garbage": garble}


@pytest.mark.parametrize("name", HARM)
def test_a_disk_that_lies_once_is_noticed_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    told, tell = listener()
    toy = make_run(tmp_path, 2, kind="epoch", keep_last=1)
    with toy.manager(tmp_path, keep_last=1, on_event=tell) as engine:
        engine.resume()
        lie(monkeypatch, 1, HARM[name])
        saved = end_epoch(engine, 3, step=3, metrics={"val_loss": 1.0})
    assert saved is not None
    assert verify(saved.path) is None
    assert said(told)[1:] == ["durable", "quarantined", "durable", "verified"]
    assert (tmp_path / "quarantine" / "model_epoch_3.pt").exists()
    found = Catalog(tmp_path).scan()
    assert (found.entries[0].step, found.damaged) == (3, [])
    assert set(found.entries[0].names) == set(saved.names)


@pytest.mark.parametrize("name", ["a flipped bit", "garbage"])
def test_a_disk_that_always_lies_costs_nothing_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    toy = make_run(tmp_path, 3, kind="epoch", keep_last=1)
    kept = [entry.step for entry in Catalog(tmp_path).scan().entries]
    with toy.manager(tmp_path, keep_last=1) as engine:
        engine.resume()
        lie(monkeypatch, 99, HARM[name])
        for step in (4, 5):
            assert end_epoch(engine, step, step=step) is None
        assert engine.saved_step == 3, "nothing newer is safe"
        with pytest.raises(SaveFailed):
            engine.save(step=6, strict=True)
        assert [entry.step for entry in engine.list()] == kept
    assert load(tmp_path / "latest.pt", only="global_step") == 3
    assert filesystem.same_data(tmp_path / "latest.pt", tmp_path / "model_epoch_3.pt")


def test_a_disk_that_gives_an_older_file_back_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = make_run(tmp_path, 2)
    older = (tmp_path / "checkpoint_step_1.pt").read_bytes()

    def stale(path: Path) -> None:
        path.chmod(0o644)
        path.write_bytes(older)

    with toy.manager(tmp_path) as engine:
        engine.resume()
        lie(monkeypatch, 99, stale)
        assert engine.save(step=3) is None
    assert "holds another checkpoint" in events(tmp_path)[-1]["reason"]


def test_reading_back_goes_past_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, bool]] = []
    real = reading.run

    def run(file: reading.File, parts: Any, *, threads: int, fresh: bool) -> None:
        parts = list(parts)
        read.append((sum(part.stop - part.start for part in parts), fresh))
        real(file, parts, threads=threads, fresh=fresh)

    monkeypatch.setattr(reading, "run", run)
    with Toy().manager(tmp_path) as engine:
        saved = engine.save(step=1, strict=True)
    assert saved is not None
    assert read == [(saved.entry.size, True)], "every byte once, from the device"


# -------------------------------------------------------------------- nothing is overwritten unseen


def test_the_same_step_saved_again_replaces_itself(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path) as engine:
        end_epoch(engine, 1, step=1)
        for _again in range(3):
            toy.step()
            end_epoch(engine, 2, step=2)
        assert [entry.step for entry in engine.list()] == [2, 1]
    assert load(tmp_path / "latest.pt")["losses"] == toy.losses
    assert tree_of(tmp_path / "archive") == set()


def test_another_state_of_the_same_name_keeps_a_name_of_its_own(tmp_path: Path) -> None:
    """Retention judges it as any other; an archive would grow with every epoch."""
    with Toy().manager(tmp_path, keep_last=2) as engine:
        for step in (1, 2, 3):
            end_epoch(engine, 1, step=step)
        kept = {entry.step: entry.names for entry in engine.list()}
    assert "model_epoch_1.pt" in kept[3]
    assert kept.keys() == {2, 3}
    assert load(tmp_path / kept[2][0], only="global_step") == 2
    assert tree_of(tmp_path / "archive") == set()


def test_a_failed_overwrite_leaves_the_old_one_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Toy().manager(tmp_path) as engine:
        end_epoch(engine, 1, step=1)
        before = (tmp_path / "model_epoch_1.pt").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(filesystem, "write_all", fail_with(errno.ENOSPC))
            assert end_epoch(engine, 1, step=2) is None
        assert (tmp_path / "model_epoch_1.pt").read_bytes() == before
        assert tree_of(tmp_path / "archive") == set()
        lie(monkeypatch, 99, damage)
        assert end_epoch(engine, 1, step=2) is None
        assert (tmp_path / "model_epoch_1.pt").read_bytes() == before
        assert filesystem.same_data(tmp_path / "latest.pt", tmp_path / "model_epoch_1.pt")


def test_a_run_that_was_not_resumed_is_archived_by_the_first_save(tmp_path: Path) -> None:
    """Who forgets resume() must not lose the old run, nor see it win over the new one."""
    make_run(tmp_path, 5, kind="epoch")
    told, tell = listener()
    toy = Toy(seed=3)
    with toy.manager(tmp_path, keep_last=1, on_event=tell) as engine:
        for epoch in (1, 2, 3):
            toy.step()
            end_epoch(engine, epoch, step=epoch)
        assert [(entry.generation, entry.step) for entry in engine.list()] == [(2, 3), (2, 2)]
    assert [fields for event, fields in told if event == "archived"] == [
        {"count": 5, "to": str(archived(tmp_path))}
    ]
    assert {f"model_epoch_{i}.pt" for i in range(2, 6)} < tree_of(archived(tmp_path))


def test_somebody_elses_files_are_kept(tmp_path: Path) -> None:
    for name in ("latest.pt", "model.pt", "best_model.pt", "model_epoch_1.pt"):
        torch.save({"theirs": name}, tmp_path / name)
    with Toy().manager(tmp_path) as engine:
        assert engine.resume() is None
        end_epoch(engine, 1, step=1, metrics={"val_loss": 1.0})
        end_epoch(engine, 2, step=2, metrics={"val_loss": 0.5})
    kept = [torch.load(tmp_path / "archive" / name) for name in tree_of(tmp_path / "archive")]
    assert sorted(state["theirs"] for state in kept) == [
        "best_model.pt", "latest.pt", "model.pt", "model_epoch_1.pt"
    ]  # fmt: skip
    assert len(Catalog(tmp_path).scan().entries) == 2


def test_a_disk_that_stays_full_is_not_tried_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By minutes: a failed save is tried again when they have passed, not after the next step."""
    from holdfast.checkpoint.policy.when import EveryMinutes

    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    tried: list[int] = []
    state = {"weights": torch.zeros(4)}
    with CheckpointManager(tmp_path / "run", state, save_when=[EveryMinutes(1)]) as manager:
        manager.resume()

        def full(target: Path, *_rest: object, **_more: object) -> None:
            tried.append(int(re.sub(r".*\D", "", target.stem)))
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(filesystem, "write_file", full)
        for step in range(1, 200):
            clock[0] += 1.0
            manager.after_step(step)
            manager.wait()
    assert tried == [60, 120, 180, 199], "and once more at the end"
