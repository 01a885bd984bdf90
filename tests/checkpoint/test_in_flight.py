"""A kept save that is on its way to the disk, or could not be written: what becomes of it after a
kill, an interrupt or a full disk."""

from __future__ import annotations

import errno
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint import Catalog, verify
from holdfast.checkpoint.policy import alarm
from holdfast.checkpoint.policy.when import OnBest
from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.system import filesystem
from tests.support import Toy, die, events, fail_with, in_child, killed_at, listener, said

ROOMS = pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, fast_path: Path) -> Iterator[None]:
    """Whatever a test leaves in shared memory goes with it."""
    yield
    for remains in shared_memory.remains():
        run = remains.run
        if run is not None and {tmp_path, fast_path} & {run, *run.parents}:
            remains.remove()


def train(run: Path, epochs: int = 4) -> Toy:
    """Two steps an epoch, each with a snapshot, and each epoch better than the one before."""
    toy = Toy()
    with toy.manager(run, memory_every=1, keep_last=0) as manager:
        manager.resume()
        for epoch in range(1, epochs + 1):
            toy.step()
            manager.after_step(toy.now, epoch=epoch)
            toy.step()
            manager.end_epoch(epoch, step=toy.now, metrics={"val_loss": 1 / epoch})
    return toy


def epochs_here(run: Path) -> list[int]:
    """The epochs whose checkpoints lie here under their own names, verified."""
    entries = [e for e in Catalog(run).scan().entries if e.kind == "epoch"]
    assert all(e.verified and verify(run / f"model_epoch_{e.epoch}.pt") is None for e in entries)
    return sorted(e.epoch or 0 for e in entries)


def lost_after(moment: int, run: Path) -> tuple[bool, list[int]]:
    """Whether training was killed at `moment`, and which epochs behind the resumed step are not on
    the disk then."""
    died = killed_at(moment, lambda: train(run) and None, hangs=0.1)
    with Toy(seed=5).manager(run, keep_last=0) as manager:
        resumed = manager.resume()
    done = list(range(1, (resumed.step if resumed else 0) // 2 + 1))
    here = epochs_here(run)
    if done and here:
        best = next(e for e in Catalog(run).scan().entries if "best_model.pt" in e.names)
        assert best.epoch == here[-1]
        newest = Catalog(run).scan().newest
        assert newest is not None
        assert {"latest.pt", "model.pt"} <= set(newest.names), "they mean the newest"
    assert not [r for r in shared_memory.remains() if r.run == run]
    return died, [epoch for epoch in done if epoch not in here]


@ROOMS
def test_no_epoch_behind_the_resumed_step_is_missing_after_a_kill(fast_path: Path) -> None:
    """The disk hangs, training goes on as far as the slots let it, and then all of it is killed."""
    seed = random.randrange(1 << 16)
    print("seed", seed)
    for moment in sorted(random.Random(seed).sample(range(5, 75), 5)):
        died, lost = lost_after(moment, fast_path / str(moment))
        assert died
        assert not lost, moment


@ROOMS
@pytest.mark.slow
def test_no_epoch_is_missing_after_a_kill_at_any_call_to_the_disk(fast_path: Path) -> None:
    for moment in range(1, 200):
        died, lost = lost_after(moment, fast_path / "run")
        assert not lost, moment
        shutil.rmtree(fast_path / "run")
        if not died:
            break
    assert moment > 60


@ROOMS
def test_a_rescue_that_is_killed_still_owes_the_rest(fast_path: Path) -> None:
    """Two epochs wait in memory; the start that makes up for them dies at each call to the disk."""
    template = fast_path / "template"
    killed_at(6, lambda: train(template) and None, hangs=0.3)
    assert epochs_here(template) == []
    with Toy(seed=5).manager(template, keep_last=0) as manager:
        resumed = manager.resume()
    assert resumed is not None
    assert epochs_here(template) == list(range(1, resumed.step // 2 + 1))
    assert len(epochs_here(template)) >= 2
    for moment in range(1, 60, 9):
        run = fast_path / str(moment)
        killed_at(6, lambda run=run: train(run) and None, hangs=0.3)  # type: ignore[misc]

        def go_on(run: Path = run) -> None:
            with Toy(seed=5).manager(run, keep_last=0) as manager:
                manager.resume()

        died = killed_at(moment, go_on)
        go_on()
        assert len(epochs_here(run)) >= 2, moment
        if not died:
            break


@ROOMS
def test_what_was_removed_does_not_come_back_from_memory(tmp_path: Path) -> None:
    def run() -> None:
        toy = Toy()
        manager = toy.manager(tmp_path, memory_every=1)
        manager.resume()
        toy.step()
        manager.end_epoch(1, step=1)
        manager.wait()
        toy.step()
        manager.save(step=2)
        (tmp_path / "model_epoch_1.pt").unlink()
        toy.step()
        manager.after_step(3)
        manager.wait()
        die()

    in_child(run)
    with Toy(seed=5).manager(tmp_path) as manager:
        resumed = manager.resume()
    assert resumed is not None
    assert resumed.step == 3
    assert not (tmp_path / "model_epoch_1.pt").exists()


@ROOMS
def test_what_is_given_up_for_an_end_at_once_is_made_up_for(tmp_path: Path) -> None:
    """A second Ctrl-C waits for no disk: the epochs under way are the next start's to write."""

    def run() -> None:
        real = filesystem.sync_file
        filesystem.sync_file = lambda fd: (time.sleep(0.4), real(fd))[1]  # type: ignore[assignment]
        toy = Toy()
        manager = toy.manager(tmp_path, memory_every=1)
        manager.resume()
        for epoch in (1, 2):
            toy.step()
            manager.end_epoch(epoch, step=toy.now)
        toy.step()
        manager.after_step(3)
        manager.abandon()
        manager.close(save=False)

    assert in_child(run) == 0
    with Toy(seed=5).manager(tmp_path) as manager:
        resumed = manager.resume()
    assert resumed is not None
    assert resumed.step == 3
    assert epochs_here(tmp_path) == [1, 2]


# ---------------------------------------------------------------------------- it could not be saved


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A disk that takes nothing until it is told to."""
    monkeypatch.setattr(alarm, "RETRY", 0.0)
    real = filesystem.write_file

    def switch(on: bool) -> None:
        broken = fail_with(errno.ENOSPC)

        def write(target: Path, *args: Any, **kwargs: Any) -> None:
            (broken if target.suffix == ".pt" else real)(target, *args, **kwargs)

        monkeypatch.setattr(filesystem, "write_file", write if on else real)

    return switch


def test_a_best_that_no_file_has_does_not_hide_the_next_best(tmp_path: Path, full: Any) -> None:
    told, tell = listener()
    toy = Toy()
    with toy.manager(tmp_path, save_when=[OnBest()], on_event=tell) as manager:
        manager.resume()
        for step, loss in ((1, 5.0), (2, 2.0), (3, 3.0), (4, 4.0)):
            full(step == 2)
            toy.step()
            manager.after_step(step, metrics={"val_loss": loss})
            manager.wait()
        entries = {entry.step: entry for entry in manager.list()}
    assert said(told).count("failed") == 1
    assert sorted(entries) == [1, 3]
    assert entries[3].kind == "best"
    assert "best_model.pt" in entries[3].names
    assert entries[3].loss == 3.0


def test_a_failed_epoch_is_saved_as_that_epoch_at_the_end(tmp_path: Path, full: Any) -> None:
    toy = Toy()
    with toy.manager(tmp_path) as manager:
        manager.resume()
        full(True)
        toy.step()
        manager.end_epoch(1, step=1, metrics={"val_loss": 1.5})
        manager.wait()
        assert not list(tmp_path.rglob("*.pt"))
        full(False)
    (entry,) = Catalog(tmp_path).scan().entries
    assert (entry.epoch, entry.loss) == (1, 1.5)
    assert {"model_epoch_1.pt", "best_model.pt"} <= set(entry.names)


def test_a_later_step_is_kept_in_place_of_an_epoch_that_failed(tmp_path: Path, full: Any) -> None:
    """It is not that epoch's end, and has not its loss: it bears neither."""
    toy = Toy()
    with toy.manager(tmp_path) as manager:
        manager.resume()
        full(True)
        toy.step()
        manager.end_epoch(1, step=1, metrics={"val_loss": 1.5})
        manager.wait()
        full(False)
        toy.step()
        manager.after_step(2, epoch=2)
        manager.wait()
        (entry,) = manager.list()
    assert (entry.names[0], entry.kind, entry.loss) == ("checkpoint_step_2.pt", "step", None)
    assert [e["reason"] for e in events(tmp_path) if e["event"] == "durable"] == ["retry"]
