"""Full disks, real ones where this user may mount: retention is tightened down to the floor and no
further, what does not fit is skipped and said, and it is saved again when there is room."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import load, verify
from holdfast.checkpoint import Catalog
from holdfast.checkpoint.manager import CheckpointManager
from holdfast.checkpoint.policy import alarm
from holdfast.checkpoint.rundir import shared_memory, space
from holdfast.checkpoint.system import filesystem
from holdfast.errors import ResourceError
from tests.support import die, events, in_child, listener, said, tree_of

MB = 1 << 20
SIZE = 0.93  # MB that a checkpoint of these tests takes, nearly

Disk = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small disks here are smaller than what stays free of a real one."""
    monkeypatch.setattr(filesystem, "RESERVE", 64 << 10)


def training(directory: Path, **options: Any) -> CheckpointManager:
    state = {"weights": torch.zeros(240_000)}
    return CheckpointManager(directory, state, **{"keep_last": 0, "rng": False, **options})


def steps(directory: Path) -> list[int]:
    return sorted(entry.step for entry in Catalog(directory).scan().entries)


def gone_for_space(directory: Path) -> list[int]:
    return [e["step"] for e in events(directory) if e.get("reason") == "space"]


def fill(disk: Path, leave: int = 0) -> Path:
    """Somebody else takes all of a disk but `leave` bytes."""
    hog = disk / "hog"
    with hog.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, filesystem.free_bytes(disk) - leave)
    return hog


# --------------------------------------------------------------------------------------- tightening


def test_what_policies_keep_goes_oldest_first_and_no_more_than_is_needed(
    small_disk: Disk,
) -> None:
    run = small_disk(4 * MB) / "run"
    told, tell = listener()
    with training(run, on_event=tell) as manager:
        for step in range(1, 8):
            assert manager.save(step=step) is not None
            assert verify(run / "latest.pt") is None
    assert steps(run) == [4, 5, 6, 7], "four fit, however many are wanted"
    assert gone_for_space(run) == [1, 2, 3]
    made = [fields["names"] for event, fields in told if event == "room_made"]
    assert made == [["checkpoint_step_1.pt"], ["checkpoint_step_2.pt"], ["checkpoint_step_3.pt"]]


def test_the_best_and_two_verified_stay_and_the_save_is_skipped(small_disk: Disk) -> None:
    run = small_disk(int(3.6 * SIZE * MB)) / "run"
    told, tell = listener()
    with training(run, on_event=tell, keep_last=1) as manager:
        for step, loss in ((1, 0.5), (2, 0.9), (3, 0.8)):
            assert manager.save(step=step, metrics={"val_loss": loss}) is not None
        before = {name: (run / name).stat().st_ino for name in tree_of(run) if ".pt" in name}
        assert manager.save(step=4, metrics={"val_loss": 0.7}) is None
        assert manager.failing
        assert manager.saved_step == 3
    assert steps(run) == [1, 2, 3]
    assert {name: (run / name).stat().st_ino for name in before} == before, "nothing was touched"
    assert not list(filesystem.temporaries(run))
    assert said(told)[-1] == "failed"
    assert "MB free" in told[-1][1]["reason"]
    assert gone_for_space(run) == []


def test_nothing_goes_where_all_of_it_would_not_be_enough(small_disk: Disk) -> None:
    disk = small_disk(6 * MB)
    with training(disk / "run") as manager:
        for step in range(1, 6):
            manager.save(step=step, strict=True)
        manager.state["weights"] = torch.zeros(1_500_000)
        assert manager.save(step=6) is None
    assert steps(disk / "run") == [1, 2, 3, 4, 5]


def test_what_has_names_elsewhere_frees_nothing_and_stays(small_disk: Disk) -> None:
    disk = small_disk(4 * MB)
    run = disk / "run"
    with training(run) as manager:
        for step in range(1, 5):
            manager.save(step=step, strict=True)
        os.link(run / "checkpoint_step_1.pt", disk / "mine.pt")
        manager.save(step=5, strict=True)
    assert steps(run) == [1, 3, 4, 5]


@pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")
@pytest.mark.parametrize("named", [False, True])
def test_a_snapshot_of_a_killed_training_makes_room_as_a_save_does(
    small_disk: Disk, named: bool
) -> None:
    """But not for one that the user goes back behind: what he has named might have to go."""
    run = small_disk(4 * MB) / "run"

    def killed() -> None:
        with training(run, memory_every=1) as manager:
            manager.resume()
            for step in range(1, 6):
                manager.state["weights"].fill_(step)
                if step < 5:
                    manager.save(step=step, strict=True)
                manager.after_step(step)
            manager.wait()
            die()

    assert in_child(killed) == -signal.SIGKILL
    told, tell = listener()
    with training(run, on_event=tell) as manager:
        if named:
            with pytest.raises(ResourceError, match="Step 5 lies in memory"):
                manager.resume(run / "checkpoint_step_1.pt")
            assert steps(run) == [1, 2, 3, 4]
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 5
    assert steps(run) == [2, 3, 4, 5]
    assert gone_for_space(run) == [1]
    assert "room_made" in said(told)


def test_the_start_counts_what_can_be_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with training(tmp_path) as manager:
        for step in range(1, 5):
            manager.save(step=step)
    monkeypatch.setattr(filesystem, "free_bytes", lambda _directory: filesystem.RESERVE)
    catalog = Catalog(tmp_path)
    space.check_room(catalog, catalog.scan().of(manager.run_id), int(1.5 * SIZE * MB))
    with pytest.raises(ResourceError, match="the next checkpoint needs"):
        space.check_room(catalog, catalog.scan().of(manager.run_id), int(2.5 * SIZE * MB))
    assert steps(tmp_path) == [1, 2, 3, 4], "looking removes nothing"


# ------------------------------------------------------------------------- refused while writing


def test_a_disk_that_somebody_else_fills_while_it_is_written(
    small_disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check has passed and the bytes are refused: what is left over goes, and it is tried."""
    run = small_disk(4 * MB) / "run"
    monkeypatch.setattr(filesystem, "free_bytes", lambda _directory: 1 << 40)
    with training(run) as manager:
        for step in range(1, 7):
            assert manager.save(step=step) is not None
    assert steps(run) == [3, 4, 5, 6]
    assert gone_for_space(run) == [1, 2]
    assert not list(filesystem.temporaries(run))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_quota_counts_like_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real, left = filesystem.allocate, [1]

    def quota(fd: int, size: int) -> None:
        if size > MB // 2 and left.pop():
            left.append(0)
            raise OSError(number, os.strerror(number))
        left.append(0)
        real(fd, size)

    with training(tmp_path) as manager:
        for step in range(1, 5):
            manager.save(step=step, strict=True)
        monkeypatch.setattr(filesystem, "allocate", quota)
        assert manager.save(step=5) is not None
    assert steps(tmp_path) == [2, 3, 4, 5]


def test_without_inodes_one_goes_for_another(small_disk: Disk) -> None:
    disk = small_disk(40 * MB, inodes=48)
    run = disk / "run"
    with training(run) as manager:
        for step in range(1, 5):
            manager.save(step=step, strict=True)
        taken = []
        with pytest.raises(OSError, match="No space"):
            while True:
                taken.append(disk / f"empty{len(taken)}")
                taken[-1].touch()
        # Here a link takes an inode as well: one checkpoint that goes may not be enough.
        saved = [step for step in (5, 6, 7) if manager.save(step=step)]
        assert 7 in saved
        assert 1 not in steps(run)
    assert load(run / "latest.pt", only="global_step") == 7


def test_without_inodes_and_with_nothing_to_spare_training_goes_on(small_disk: Disk) -> None:
    disk = small_disk(40 * MB, inodes=32)
    run, number = disk / "run", 0
    with training(run) as manager:
        manager.save(step=1, strict=True)
        with pytest.raises(OSError, match="No space"):
            while True:
                number += 1
                (disk / f"empty{number}").touch()
        assert manager.save(step=2) is None
        for i in range(1, 9):
            (disk / f"empty{i}").unlink()
        assert manager.save(step=2) is not None


def test_a_limit_of_file_sizes_is_a_failed_save(tmp_path: Path) -> None:
    """EFBIG; Python ignores the signal that comes with it."""

    def child() -> None:
        told, tell = listener()
        with training(tmp_path / "run", on_event=tell) as manager:
            resource.setrlimit(resource.RLIMIT_FSIZE, (MB // 4, resource.RLIM_INFINITY))
            assert manager.save(step=1) is None
            assert "File too large" in told[-1][1]["reason"]
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            assert manager.save(step=2) is not None
            assert not list(filesystem.temporaries(tmp_path / "run"))

    assert in_child(child) == 0


# ----------------------------------------------------------------------------- until it works again


def test_it_is_tried_again_and_said_when_there_is_room(
    small_disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarm, "RETRY", 0.0)
    disk = small_disk(4 * MB)
    told, tell = listener()
    with training(disk / "run", on_event=tell) as manager:
        manager.resume()
        assert manager.save(step=1) is not None
        hog = fill(disk, leave=96 << 10)
        assert manager.save(step=2) is None
        for step in (3, 4, 5):
            manager.after_step(step)
            manager.wait()
        assert said(told).count("failed") == 1, "retries that fail as before are no news"
        hog.unlink()
        manager.after_step(6)
        manager.wait()
        assert manager.saved_step == 6
        assert not manager.failing
    assert ("recovered", 6, 4) in [(e, f.get("step"), f.get("failures")) for e, f in told]
    assert [e["reason"] for e in events(disk / "run") if e["event"] == "durable"][-1] == "retry"


def test_a_disk_full_to_the_last_byte_takes_no_line_and_no_training(small_disk: Disk) -> None:
    disk = small_disk(4 * MB)
    with training(disk / "run") as manager:
        manager.save(step=1, strict=True)
        hog = fill(disk)
        assert manager.save(step=2) is None
        hog.unlink()
        assert manager.save(step=3) is not None
    assert steps(disk / "run") == [1, 3]


def test_a_removal_is_recorded_where_there_was_no_room_for_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with training(tmp_path) as manager:
        for step in range(1, 4):
            manager.save(step=step, strict=True)
    real = filesystem.append_line

    def full_until_removed(path: Path, line: str) -> None:
        if (tmp_path / "checkpoint_step_1.pt").exists():
            raise OSError(errno.ENOSPC, "full")
        real(path, line)

    monkeypatch.setattr(filesystem, "append_line", full_until_removed)
    monkeypatch.setattr(filesystem, "free_bytes", lambda _directory: filesystem.RESERVE)
    gone = space.make_room(Catalog(tmp_path), MB // 2, manager.run_id)
    assert [entry.step for entry in gone] == [1]
    assert gone_for_space(tmp_path) == [1]


def test_unsafe_is_told_by_after_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    told, tell = listener()
    with training(tmp_path, on_event=tell, max_unsafe=10) as manager:
        manager.resume()
        manager.save(step=1, strict=True)
        monkeypatch.setattr(filesystem, "free_bytes", lambda _directory: 0)
        manager.save(step=2)
        for step in range(3, 30):
            clock[0] += 60
            manager.after_step(step)
            manager.wait()
        assert manager.unsafe
        unsafe = [fields for event, fields in told if event == "unsafe"]
        assert len(unsafe) == 1, "again after half an hour, not at every step"
        assert (unsafe[0]["minutes"], unsafe[0]["step"], unsafe[0]["first"]) == (10, 1, True)
        assert "MB free" in unsafe[0]["reason"]
        monkeypatch.undo()
        manager.save(step=30, strict=True)
        assert not manager.unsafe
    assert [e["minutes"] for e in events(tmp_path) if e["event"] == "unsafe"] == [10]


def test_space_is_checked_with_a_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "RESERVE", 64 << 20)
    monkeypatch.setattr(filesystem, "free_bytes", lambda _directory: filesystem.RESERVE + 1000)
    space.check_space(tmp_path, 1000)
    with pytest.raises(ResourceError, match="64 MB free") as error:
        space.check_space(tmp_path, 1001)
    assert str(tmp_path) in str(error.value)
