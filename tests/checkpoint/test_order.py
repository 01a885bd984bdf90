"""What was saved last in a generation is its newest, also where a loop counts its steps anew."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import CheckpointManager, EverySteps
from holdfast.checkpoint import Catalog, Resumed
from holdfast.checkpoint.policy.keep import KeepLast
from holdfast.checkpoint.rundir import shared_memory
from tests.support import Told, Toy, after, assert_same, damage, events, in_child, said, snapshot

STEPS = 4  # in an epoch of these loops


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    for remains in shared_memory.remains():
        run = remains.run
        if run is not None and tmp_path in [run, *run.parents]:
            remains.remove()


def epochs(manager: CheckpointManager, toy: Toy, steps: int, **how: str) -> None:
    """Train for `steps` and save each, called by its number in the epoch alone."""
    for _step in range(steps):
        batch = toy.now % STEPS
        toy.step()
        manager.save(step=batch + 1, strict=True, **how)


def resumed(directory: Path, **options: object) -> tuple[Toy, Resumed]:
    toy = Toy(seed=5)
    with toy.manager(directory, **options) as manager:
        result = manager.resume()
    assert result is not None
    return toy, result


@pytest.mark.parametrize("keep_last", [1, 3])
@pytest.mark.parametrize("kind", ["step", "temp"])
@pytest.mark.parametrize("steps", [STEPS + 1, 2 * STEPS, 3 * STEPS - 1])
def test_the_state_that_was_announced_last_is_gone_on_from(
    tmp_path: Path, steps: int, kind: str, keep_last: int
) -> None:
    toy = Toy()
    with toy.manager(tmp_path, keep_last=keep_last) as manager:
        epochs(manager, toy, steps, kind=kind)
        newest = manager.list()[0]
        assert {"latest.pt", "model.pt"} <= set(newest.names)
        assert manager.saved_step == newest.step
    again, result = resumed(tmp_path)
    assert (again.now, result.steps_lost, result.generation) == (steps, 0, 1)
    again.step()
    assert_same(snapshot(again.state), snapshot(after(steps + 1).state))


def test_a_step_that_goes_back_is_told_once_each_time(tmp_path: Path) -> None:
    toy, told = Toy(), Told()
    with toy.manager(tmp_path, on_event=lambda *event: told.append(event)) as manager:
        for _epoch in range(3):
            for batch in range(STEPS):
                toy.step()
                manager.after_step(batch + 1)
    assert said(told).count("step_back") == 2
    (reason, *_more) = [fields["reason"] for event, fields in told if event == "step_back"]
    assert "1" in reason and str(STEPS) in reason


def test_policies_go_on_in_an_epoch_that_counts_anew(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, save_when=[EverySteps(2)], keep_last=0) as manager:
        asked = []
        for epoch in (1, 2, 3):
            for batch in range(1, STEPS + 1):
                toy.step()
                asked += [(epoch, batch)] * bool(manager.after_step(batch, epoch=epoch))
    assert asked == [(epoch, batch) for epoch in (1, 2, 3) for batch in (2, 4)]


@pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")
@pytest.mark.parametrize("on_disk", [0, 3, STEPS, STEPS + 1])
def test_a_snapshot_of_a_later_epoch_is_rescued(tmp_path: Path, on_disk: int) -> None:
    """The disk has a larger step, of the epoch before; the process is killed."""

    def train() -> None:
        toy = Toy()
        manager = toy.manager(tmp_path, memory_every=1)
        manager.resume()
        epochs(manager, toy, on_disk)
        while toy.now < STEPS + 2:
            toy.step()
            manager.after_step((toy.now - 1) % STEPS + 1)
        manager.wait()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(train) == -signal.SIGKILL
    assert resumed(tmp_path)[0].now == STEPS + 2


def test_what_is_lost_of_a_later_epoch_is_told_in_steps(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, keep_last=0) as manager:
        epochs(manager, toy, STEPS + 3)
        for entry in manager.list()[:-2]:  # all but steps 1 and 2 of the first epoch
            damage(manager.catalog.path(entry))
    again, result = resumed(tmp_path)
    assert (again.now, result.steps_lost, result.generation) == (2, STEPS + 1, 2)


def test_the_same_name_of_an_earlier_epoch_is_retentions_to_judge(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, keep_last=0) as manager:
        epochs(manager, toy, 2 * STEPS)
        assert len(manager.list()) == 2 * STEPS, "all of them are kept"
        assert all(len(set(entry.names)) == len(entry.names) for entry in manager.list())
    toy = Toy()
    with toy.manager(tmp_path, keep_last=2) as manager:
        manager.resume()
        toy.step()
        manager.save(step=STEPS + 1, strict=True)
        assert [entry.step for entry in manager.list()] == [STEPS + 1, STEPS]
    assert not (tmp_path / "archive").exists()


def test_the_best_survives_the_same_name_of_a_later_epoch(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, keep_last=1) as manager:
        for loss in (0.5, 0.7, 0.8):
            toy.step()
            manager.save(step=toy.now, metrics={"val_loss": loss}, strict=True)
        best = manager.catalog.scan().best
        assert best is not None
        for step in (1, 2, 3):
            toy.step()
            manager.save(step=step, metrics={"val_loss": 0.9}, strict=True)
        found = manager.catalog.scan().best
        assert found is not None
        assert found.id == best.id
        assert (tmp_path / "best_model.pt").samefile(tmp_path / found.names[0])


def test_training_that_went_wrong_goes_back_to_what_was_saved_before(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, keep_last=0) as manager:
        manager.resume()
        epochs(manager, toy, STEPS + 2)
        toy.step()
        result = manager.go_back(2, "loss")  # step 2 of the second epoch went wrong already
        assert result is not None
        assert toy.now == STEPS + 1
        result = manager.go_back(1, "loss")
        assert result is not None
        assert toy.now == STEPS, "the end of the epoch before"


def test_no_save_has_the_number_of_another(tmp_path: Path) -> None:
    """Across a start, a damaged newest, going back, and a start within one process."""
    for keep_last in (0, 1, 0, 2):
        toy = Toy(seed=5)
        with toy.manager(tmp_path, keep_last=keep_last) as manager:
            if manager.resume() is not None:
                manager.resume(manager.catalog.path(manager.list()[-1]))
            epochs(manager, toy, STEPS)
            manager.resume()
            epochs(manager, toy, 2)
            newest = manager.catalog.path(manager.list()[0])
        damage(newest)
    told = [(e["generation"], e["sequence"]) for e in events(tmp_path) if e["event"] == "durable"]
    assert told == sorted(told)
    numbers = [number for _generation, number in told]
    assert numbers == sorted(set(numbers))


def test_a_directory_of_an_earlier_version_stays_right(tmp_path: Path) -> None:
    """Its history does not say the sequence, which all of its files do."""
    toy = Toy()
    with toy.manager(tmp_path, keep_last=0) as manager:
        epochs(manager, toy, STEPS + 2)
        entries = manager.list()
    lines = [{k: v for k, v in event.items() if k != "sequence"} for event in events(tmp_path)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again, result = resumed(tmp_path)
    assert (again.now, result.steps_lost, result.generation) == (STEPS + 2, 0, 1)
    damage(Catalog(tmp_path).path(entries[0]))
    again, result = resumed(tmp_path)
    assert (again.now, result.generation) == (STEPS + 1, 2)


def test_retention_keeps_the_newest_of_a_loop_that_counts_anew(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, keep_last=0) as manager:
        epochs(manager, toy, STEPS + 1)
        candidates = [entry.candidate() for entry in manager.list()]
    assert KeepLast("step", 2)(candidates) == [True, True] + [False] * (STEPS - 1)
