"""The memory tier: after a kill the next start finds a newer snapshot than the disk has, verifies
it and makes it durable; and nothing is left behind, or found by the wrong run."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import CheckpointManager, load
from holdfast.checkpoint import Catalog, EverySteps, verify
from holdfast.checkpoint.format import image
from holdfast.checkpoint.format.container import Reader, read_manifest
from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.rundir.reporter import Reporter
from holdfast.checkpoint.save import MEMORY_SLOTS
from holdfast.checkpoint.save.rescue import rescue
from holdfast.checkpoint.system import filesystem
from holdfast.checkpoint.system.lock import FileLock
from holdfast.errors import CheckpointError, RunLocked, SaveFailed
from holdfast.manage.cleaning import leftovers
from tests.support import (
    Toy,
    after,
    assert_same,
    damage,
    die,
    events,
    flip,
    in_child,
    lie,
    snapshot,
)

pytestmark = pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Whatever a test leaves in shared memory goes with it."""
    yield
    for remains in shared_memory.remains():
        run = remains.run  # read once: tests of others come and go there
        if run is not None and tmp_path in [run, *run.parents]:
            remains.remove()


def left(directory: Path) -> list[shared_memory.Remains]:
    return [remains for remains in shared_memory.remains() if remains.run == directory]


def killed(directory: Path, steps: int, *, then: Callable[[], Any] = die, **options: Any) -> None:
    """A training that is killed after `steps`, with a snapshot in memory at each."""

    def run() -> None:
        toy = Toy()
        manager = toy.manager(directory, **{"memory_every": 1, **options})
        manager.resume()
        for _step in range(steps):
            toy.step()
            manager.after_step(toy.now)
        manager.wait()
        then()

    in_child(run)


# ---------------------------------------------------------------------------------------- rescued


def test_a_killed_run_goes_on_from_memory(tmp_path: Path) -> None:
    """Nothing is on the disk but the history: the whole run lies in shared memory."""
    killed(tmp_path, 7)
    assert not list(tmp_path.rglob("*.pt"))
    assert len(left(tmp_path)) == 1
    toy = Toy(seed=9)
    with toy.manager(tmp_path) as manager:
        resumed = manager.resume()
        assert resumed is not None
        assert (resumed.step, resumed.steps_lost) == (7, 0)
        assert toy.now == 7
        toy.step()
    assert_same(snapshot(toy.state), snapshot(after(8).state))
    told = [event["event"] for event in events(tmp_path)]
    assert told == ["began", "durable", "verified", "rescued", "resumed"]
    assert not left(tmp_path), "what is durable is not kept in memory"
    assert verify(tmp_path / "latest.pt") is None


def test_what_is_newer_on_the_disk_wins(tmp_path: Path) -> None:
    def run() -> None:
        toy = Toy()
        manager = toy.manager(tmp_path, memory_every=1)
        manager.resume()
        for _step in range(3):
            toy.step()
            manager.after_step(toy.now)
        toy.step()
        manager.save(step=4, strict=True)
        die()

    in_child(run)
    with Toy(seed=9).manager(tmp_path) as manager:
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 4
    assert "rescued" not in [event["event"] for event in events(tmp_path)]
    assert not left(tmp_path)


def test_a_rescue_that_is_killed_is_repeated(tmp_path: Path) -> None:
    killed(tmp_path, 5)

    def rescue_and_die() -> None:
        filesystem.rename = die  # type: ignore[assignment]
        Toy().manager(tmp_path).resume()

    assert in_child(rescue_and_die) == -signal.SIGKILL
    with Toy(seed=9).manager(tmp_path) as manager:
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 5


def test_a_full_disk_keeps_the_snapshot_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tmp_path, 5)

    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Toy(seed=9).manager(tmp_path) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(filesystem, "allocate", full)
            with pytest.raises(SaveFailed, match="Step 5 lies in memory"):
                manager.resume()
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 5


def newest_two(directory: Path) -> tuple[Path, Path]:
    """The slots of the newest snapshot and of the one before it."""
    steps: dict[int, Path] = {}
    for path in left(directory)[0].directory.glob("*.pt"):
        with contextlib.suppress(CheckpointError):  # not filled yet
            steps[read_manifest(path)["identity"]["step"]] = path
    return steps[max(steps)], steps[max(steps) - 1]


def head(slot: Path) -> Path:
    return slot.with_suffix(".head")


def overwritten(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def half_of_the_step_before(newest: Path, before: Path) -> None:
    overwritten(newest, 0, before.read_bytes()[: before.stat().st_size // 2])


ROT: dict[str, Callable[[Path, Path], Any]] = {
    "a bit of a tensor": lambda newest, _before: flip(newest, 100),
    "a bit of the values": lambda newest, _before: flip(newest, newest.stat().st_size - 5000),
    "bits of slot and head": lambda newest, _before: [flip(newest, 100), flip(head(newest), 20)],
    "a page of zeros": lambda newest, _before: overwritten(newest, 0, bytes(4096)),
    "half of the step before": half_of_the_step_before,
    "all of the step before": lambda newest, before: overwritten(newest, 0, before.read_bytes()),
    "an empty slot": lambda newest, _before: os.truncate(newest, 0),
    "half a slot": lambda newest, _before: os.truncate(newest, newest.stat().st_size // 2),
    "no slot": lambda newest, _before: newest.unlink(),
}


@pytest.mark.parametrize("rot", ROT)
def test_a_damaged_snapshot_is_told_and_passed_over_for_the_one_before(
    tmp_path: Path, rot: str
) -> None:
    """A snapshot is verified to the last bit; its predecessor lies in another slot."""
    killed(tmp_path, 6)
    ROT[rot](*newest_two(tmp_path))
    toy = Toy(seed=9)
    with toy.manager(tmp_path) as manager:
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 5
    assert_same(snapshot(toy.state), snapshot(after(5).state))
    failed = [event["step"] for event in events(tmp_path) if event["event"] == "failed"]
    assert failed == [6]
    assert not left(tmp_path)


@pytest.mark.parametrize("offset", [0, 20, 100])
def test_a_damaged_head_hides_no_snapshot(tmp_path: Path, offset: int) -> None:
    """The slot says itself what it is, and proves it by its checksums."""
    killed(tmp_path, 6)
    flip(head(newest_two(tmp_path)[0]), offset)
    toy = Toy(seed=9)
    with toy.manager(tmp_path) as manager:
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 6
    assert_same(snapshot(toy.state), snapshot(after(6).state))


def test_a_head_and_a_manifest_that_are_damaged_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed(tmp_path, 6)
    newest, _before = newest_two(tmp_path)
    flip(head(newest), 20)
    flip(newest, newest.stat().st_size - 5)
    with Toy(seed=9).manager(tmp_path) as manager:
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 5
    assert f"{head(newest)}: " in caplog.text


def test_a_snapshot_without_checksums_is_not_believed(tmp_path: Path) -> None:
    """Killed between the copy and the checksums: nothing could tell its bytes from rot."""

    def run() -> None:
        toy = Toy()
        manager = toy.manager(tmp_path, memory_every=1)
        manager.resume()
        real = image.Sealer.advance

        def advance(sealer: image.Sealer, end: int) -> None:
            if toy.now == 6:
                die()
            real(sealer, end)

        image.Sealer.advance = advance  # type: ignore[method-assign]
        for _step in range(6):
            toy.step()
            manager.after_step(toy.now)
        manager.wait()

    assert in_child(run) == -signal.SIGKILL
    toy = Toy(seed=9)
    with toy.manager(tmp_path) as manager:
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 5
    assert_same(snapshot(toy.state), snapshot(after(5).state))


def test_nothing_is_announced_before_its_snapshot_in_memory_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, append = os.pwrite, filesystem.append_line
    announced: list[tuple[int, int]] = []

    def slow_memory(fd: int, data: bytes, offset: int) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink().is_relative_to(shared_memory.PLACE):
            time.sleep(0.2)  # the head, without which a snapshot is not found
        return write(fd, data, offset)

    def listen(path: Path, line: str) -> None:
        event = json.loads(line)
        if event["event"] == "durable":
            announced.append((event["step"], manager.memory_step))
        append(path, line)

    monkeypatch.setattr(os, "pwrite", slow_memory)
    monkeypatch.setattr(filesystem, "append_line", listen)
    toy = Toy()
    with toy.manager(tmp_path, memory_every=1, save_when=[EverySteps(1)]) as manager:
        for _step in range(3):
            toy.step()
            manager.after_step(toy.now)
            manager.wait()
    assert announced == [(1, 1), (2, 2), (3, 3)]


def test_no_step_of_an_optimizer_begins_before_the_snapshot_can_be_verified(tmp_path: Path) -> None:
    """Else a kill in that step would cost two."""
    toy = Toy()
    with toy.manager(tmp_path, memory_every=1, overlap="always") as manager:
        manager.resume()
        for step in range(1, 6):
            toy.step()  # its hook waits
            if step > 1:
                (remains,) = left(tmp_path)
                newest = shared_memory.newest_in(remains)
                assert newest is not None
                assert newest.step == step - 1
                assert verify(newest.path) is None
            manager.after_step(step)


# ------------------------------------------------------------------ memory goes last, and on proof


@pytest.mark.parametrize("verified", [False, True])
def test_memory_is_not_given_back_for_a_damaged_file(tmp_path: Path, verified: bool) -> None:
    """The disk has the same step, says its manifest, and what it says of its bytes is wrong."""

    def run() -> None:
        toy = Toy()
        manager = toy.manager(tmp_path, memory_every=1)
        manager.resume()
        for step in (1, 2, 3):
            toy.step()
            manager.after_step(step)
        toy.step()
        if not verified:
            Reader.verify = die  # type: ignore[assignment]
        manager.save(step=4, metrics={"val_loss": 1.0}, strict=True)
        die()

    assert in_child(run) == -signal.SIGKILL
    damage(tmp_path / "latest.pt")
    toy = Toy(seed=9)
    with toy.manager(tmp_path) as manager:
        resumed = manager.resume()
        assert resumed is not None
        assert (resumed.step, resumed.steps_lost) == (4, 0)
    assert_same(snapshot(toy.state), snapshot(after(4).state))
    told = [event["event"] for event in events(tmp_path)]
    assert told[-4:] == ["durable", "verified", "rescued", "resumed"]
    assert "quarantined" in told
    for name in ("latest.pt", "model.pt", "best_model.pt"):
        assert verify(tmp_path / name) is None
    assert not left(tmp_path)


def test_an_intact_file_is_read_before_the_memory_is_given_back(tmp_path: Path) -> None:
    def run() -> None:
        toy = Toy()
        manager = toy.manager(tmp_path, memory_every=1)
        manager.resume()
        toy.step()
        Reader.verify = die  # type: ignore[assignment]
        manager.save(step=1, strict=True)

    assert in_child(run) == -signal.SIGKILL
    with Toy(seed=9).manager(tmp_path) as manager:
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 1
    assert [e["event"] for e in events(tmp_path)] == ["began", "durable", "verified", "resumed"]
    assert not left(tmp_path)


def test_a_disk_that_damages_what_it_is_given_does_not_get_the_memory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tmp_path, 5)
    with Toy(seed=9).manager(tmp_path) as manager:
        with monkeypatch.context() as patch:
            lie(patch, 2, damage)
            with pytest.raises(SaveFailed, match=r"Step 5 lies in memory.* is damaged"):
                manager.resume()
        assert left(tmp_path)
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("where", ["write", "fsync", "rename"])
def test_a_rescue_that_fails_says_why_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    """In the middle of the bytes, while threads hold views of the mapped memory."""
    killed(tmp_path, 5)

    def fail(*_args: Any) -> None:
        raise OSError(number, os.strerror(number))

    name = {"write": "pwrite", "fsync": "sync_file", "rename": "rename"}[where]
    with Toy(seed=9).manager(tmp_path) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(filesystem, name, fail)
            with pytest.raises(SaveFailed) as raised:
                manager.resume()
        words = str(raised.value)
        assert words.startswith("Step 5 lies in memory")
        assert os.strerror(number) in words
        assert "\n" not in words
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 5


def test_each_slot_is_a_checkpoint_that_torch_opens(tmp_path: Path) -> None:
    killed(tmp_path, 4)
    (remains,) = left(tmp_path)
    newest = shared_memory.newest_in(remains)
    assert newest is not None
    assert torch.load(newest.path, weights_only=True)["global_step"] == 4
    assert (newest.path.stat().st_mode & 0o777, remains.directory.stat().st_mode & 0o777) == (
        0o600, 0o700
    )  # fmt: skip


# ----------------------------------------------------------------------------- at any moment at all

LARGE = 400_000  # numbers: a save takes some milliseconds


class Counting:
    """A training whose state at each step is known without training: every number is the step."""

    def __init__(self) -> None:
        self.weights = torch.nn.Parameter(torch.zeros(LARGE))
        self.optimizer = torch.optim.SGD([self.weights], lr=1.0)
        self.state: dict[str, Any] = {"weights": self.weights, "optimizer": self.optimizer}

    def step(self) -> None:
        self.weights.grad = torch.full_like(self.weights, -1.0)
        self.optimizer.step()


def run_until_killed(directory: Path, progress: mmap.mmap, *, overlap: Any) -> None:
    counting = Counting()
    manager = CheckpointManager(
        directory, counting.state, memory_every=1, overlap=overlap, save_when=[EverySteps(3)],
        io_limit=50e6,  # a write is in flight nearly always
    )  # fmt: skip
    resumed = manager.resume()
    step = resumed.step if resumed else 0
    while True:
        counting.step()
        step += 1
        progress[:8] = struct.pack("q", step)  # done: the weights are those of this step
        manager.after_step(step)


@pytest.mark.parametrize("overlap", [False, "always"])
def test_killed_at_twenty_random_moments_it_loses_at_most_one_step(
    tmp_path: Path, overlap: Any
) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    done, lost = 0, []
    for _kill in range(10 if overlap else 20):
        progress = mmap.mmap(-1, 8)
        progress[:8] = struct.pack("q", done)
        pid = os.fork()
        if pid == 0:
            try:
                run_until_killed(tmp_path, progress, overlap=overlap)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 60
        while struct.unpack("q", progress[:8])[0] <= done:  # it has resumed and trains
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.25))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        reached = struct.unpack("q", progress[:8])[0]
        counting = Counting()
        with CheckpointManager(tmp_path, counting.state) as manager:
            resumed = manager.resume()
        done = resumed.step if resumed is not None else 0  # killed in the first step's snapshot
        lost.append(reached - done)
        assert torch.equal(counting.weights, torch.full((LARGE,), float(done)))
    print("steps lost", lost, "of", done)
    assert max(lost) <= 1


# ------------------------------------------------------------------------------- whose and how long


def test_a_clean_end_leaves_nothing_in_memory(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, memory_every=1) as manager:
        manager.resume()
        toy.step()
        manager.after_step(1)
        manager.wait()
        assert manager.memory_step == 1
        assert left(tmp_path)
        manager.save(step=1, strict=True)
    assert not left(tmp_path)


def test_a_closed_manager_keeps_no_memory_mapped(tmp_path: Path) -> None:
    """Its views of the newest slot would, until the garbage is collected."""
    toy = Toy()
    gc.disable()
    try:
        with toy.manager(tmp_path, memory_every=1) as manager:
            manager.resume()
            toy.step()
            manager.after_step(1)
            manager.save(step=1, strict=True)
            (remains,) = left(tmp_path)
        assert str(remains.directory) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


def test_slots_that_somebody_has_removed_keep_no_step(tmp_path: Path) -> None:
    """systemd does that at a logout; what is mapped still would be gone with the process."""
    toy = Toy()
    with toy.manager(tmp_path, memory_every=1) as manager:
        manager.resume()
        for step in (1, 2):
            toy.step()
            manager.after_step(step)
        manager.wait()
        assert manager.memory_step == 2
        shutil.rmtree(left(tmp_path)[0].directory)
        toy.step()
        manager.after_step(3)
        manager.wait()
        assert manager.memory_step == 0
        assert manager.save(step=3, strict=True) is not None
    with Toy(seed=9).manager(tmp_path) as manager:
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 3


def test_memory_for_one_slot_only_saves_without_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one slot has what a crash falls back to: nothing that is under way would free it."""
    toy, real = Toy(), shared_memory.MemoryTier.slot

    def slot(tier: shared_memory.MemoryTier, capacity: int) -> Any:
        if list(tier.directory.glob("slot-*")):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(tier, capacity)

    monkeypatch.setattr(shared_memory.MemoryTier, "slot", slot)
    with toy.manager(tmp_path, memory_every=1) as manager:
        manager.resume()
        toy.step()
        manager.after_step(1)
        manager.wait()
        for step in (2, 3):
            toy.step()
            saved = manager.save_async(step=step).durable.result(20)
            assert saved is not None
            assert saved.entry.step == step


def test_a_state_that_grows_leaves_no_old_slots_behind(tmp_path: Path) -> None:
    """An optimizer makes its state in its first step: what was made before that is too small."""
    toy = Toy()
    with toy.manager(tmp_path, memory_every=1) as manager:
        manager.resume()
        toy.state["extra"] = torch.ones(10)
        manager.prepare()
        for step in range(1, 5):
            toy.state["extra"] = torch.full((10 ** (step + 2),), float(step))
            manager.after_step(step)
            manager.wait()
            (remains,) = left(tmp_path)
            newest = shared_memory.newest_in(remains)
            assert newest is not None
            assert newest.step == step
        assert len(list(remains.directory.glob("slot-*.pt"))) <= MEMORY_SLOTS


def test_what_was_not_found_right_on_the_disk_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Announced, then read back wrong, twice: the memory has the only good one."""
    toy = Toy()
    with toy.manager(tmp_path, memory_every=1) as manager:
        manager.resume()
        toy.step()
        with monkeypatch.context() as patch:
            lie(patch, 2, damage)
            assert manager.save(step=1) is None
        manager.close(save=False)
    with Toy(seed=9).manager(tmp_path) as manager:
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 1
    assert "rescued" in [event["event"] for event in events(tmp_path)]


def test_killed_before_its_first_snapshot_leaves_nothing_for_ever(tmp_path: Path) -> None:
    """A job that is killed and started again and again must not fill the memory."""

    def run() -> None:
        toy = Toy()
        manager = toy.manager(tmp_path, memory_every=1)
        manager.resume()
        shared_memory.SharedSlot.complete = die  # type: ignore[assignment, method-assign]
        manager.after_step(1)
        manager.wait()

    for _start in range(3):
        assert in_child(run) == -signal.SIGKILL
        assert len(left(tmp_path)) == 1
    with Toy().manager(tmp_path) as manager:
        assert manager.resume() is None
    assert not left(tmp_path)


def test_an_end_without_a_last_save_leaves_the_snapshot(tmp_path: Path) -> None:
    """Closed by an exception, say: what only the memory has stays there for the next start."""
    toy = Toy()
    with toy.manager(tmp_path, memory_every=1) as manager:
        manager.resume()
        toy.step()
        manager.after_step(1)
    with Toy(seed=9).manager(tmp_path) as manager:
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 1


def test_a_copy_of_the_run_does_not_meet_the_snapshots_of_the_original(tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    killed(original, 3)
    shutil.copytree(original, copy)
    with Toy(seed=9).manager(copy) as manager:
        assert manager.resume() is None
    with Toy(seed=9).manager(original) as manager:
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 3


def test_a_moved_run_finds_its_snapshots(tmp_path: Path) -> None:
    killed(tmp_path / "a", 3)
    (tmp_path / "a").rename(tmp_path / "b c")
    with Toy(seed=9).manager(tmp_path / "b c") as manager:
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 3
    for remains in shared_memory.remains():
        assert remains.run != tmp_path / "a"


def test_another_run_in_the_same_directory_does_not_take_them(tmp_path: Path) -> None:
    """Not resumed but begun anew: what an abandoned run has in memory is not of the new one."""
    killed(tmp_path, 3)
    catalog = Catalog(tmp_path)
    catalog.record("began", run_id="f" * 32, generation=1)
    before = catalog.scan().entries
    assert rescue(catalog, Reporter(catalog)).entries == before


def test_what_a_lock_is_taken_of_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    """An earlier version asks by taking the lock: the snapshot must not be passed over for that."""
    killed(tmp_path, 5)
    lock = left(tmp_path)[0].directory / "owner.lock"
    with asking(lock) as asker:
        threading.Timer(0.3, asker.kill).start()
        with Toy(seed=9).manager(tmp_path) as manager:
            resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 5


def test_what_another_process_keeps_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    """Training from the disk meanwhile, it would meet the older snapshot at a later start."""
    killed(tmp_path, 5)
    lock = left(tmp_path)[0].directory / "owner.lock"
    with Toy(seed=9).manager(tmp_path) as manager:
        with asking(lock), pytest.raises(RunLocked, match="are in use by another process"):
            manager.resume()
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 5


@contextlib.contextmanager
def asking(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has taken `lock` as an earlier version does to ask about it."""
    script = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'r+'); "
        "fcntl.lockf(file, fcntl.LOCK_EX); print('taken', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "taken\n"
            yield process
        finally:
            process.kill()


def test_looking_at_what_is_left_takes_no_lock(tmp_path: Path) -> None:
    """Whoever looks all the time must not be in the way of a start, nor of one that ends."""
    killed(tmp_path, 3)
    (remains,) = left(tmp_path)
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(tell, b"x")
        while True:
            leftovers.plan()
            shared_memory.left_by(tmp_path, "x", 1)
    try:
        os.read(ready, 1)
        lock = FileLock(remains.directory / "owner.lock")
        for _time in range(300):
            with lock:
                pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_runs_begin_and_end_beside_each_other(tmp_path: Path) -> None:
    """What belongs to others in shared memory may come and go at any moment."""

    def run(name: str) -> Callable[[], None]:
        def work() -> None:
            for number in range(25):
                toy = Toy()
                with toy.manager(tmp_path / name / str(number), memory_every=1) as manager:
                    manager.resume()
                    toy.step()
                    manager.after_step(1)
                    manager.save(step=1, strict=True)

        return work

    def look() -> None:
        while (tmp_path / "go").exists():
            ours = list(tmp_path.glob("*/*"))
            rows = leftovers.plan().rows
            rows = [row for row in rows if any(row.remains.belongs_to(run) for run in ours)]
            leftovers.execute(leftovers.Plan(rows))

    (tmp_path / "go").touch()
    lookers, runs = [begun(look), begun(look)], [begun(run("a")), begun(run("b"))]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in runs]
    (tmp_path / "go").unlink()
    codes += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in lookers]
    assert codes == [0, 0, 0, 0]


def begun(work: Callable[[], None]) -> int:
    """The pid of a forked process that does `work`; it ends with 1 where that fails."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - told, and its end is the forked process's
        traceback.print_exc()
    finally:
        os._exit(code)


def test_an_end_is_not_disturbed_by_a_lock_file_that_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = Toy()
    manager = toy.manager(tmp_path, memory_every=1)
    manager.resume()
    toy.step()
    manager.after_step(1)
    manager.save(step=1, strict=True)
    (remains,) = left(tmp_path)
    real, times = filesystem.remove, [3]

    def remove(path: Path) -> None:
        real(path)
        if path.name == "owner.lock" and times[0]:
            times[0] -= 1
            path.touch()

    monkeypatch.setattr(filesystem, "remove", remove)
    manager.close()
    assert not remains.directory.exists()


def test_a_snapshot_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, memory_every=1) as manager:
        manager.resume()
        toy.step()
        manager.after_step(1)
        manager.wait()
        catalog = Catalog(tmp_path)
        before = catalog.scan().entries
        assert rescue(catalog, Reporter(catalog)).entries == before
        (remains,) = left(tmp_path)
        assert not remains.remove()
        assert left(tmp_path)


@pytest.mark.parametrize("why", ["docker", "no shared memory", "little memory"])
def test_too_little_room_turns_it_off_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "docker":
        monkeypatch.setattr(shared_memory, "free_bytes", lambda: 1 << 20)
    elif why == "little memory":
        monkeypatch.setattr("holdfast.checkpoint.save.slots.available_memory", lambda: 1 << 20)
    else:
        monkeypatch.setenv("HOLDFAST_DISABLE", "sharedmemory")
    told: list[str] = []
    toy = Toy()
    with toy.manager(
        tmp_path, memory_every=1, on_event=lambda event, _fields: told.append(event)
    ) as manager:
        manager.resume()
        for step in range(1, 4):
            toy.step()
            manager.after_step(step)
        saved = manager.save_async(step=4).durable.result()
        assert saved is not None
        assert manager.memory_step == 0
    assert told.count("memory_off") == 1
    assert not left(tmp_path)
    assert load(saved.path, only="global_step") == 4


# ----------------------------------------------------------------- made durable while it is known


def test_the_newest_snapshot_is_made_durable_on_request(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, memory_every=1) as manager:
        manager.resume()
        for _step in range(7):
            toy.step()
            manager.after_step(toy.now)
        expected = snapshot(toy.state)
        toy.model.weight.data.fill_(float("nan"))  # what the live state is worth by now
        saved = manager.save_snapshot()
        assert saved is not None
        assert saved.entry.step == manager.saved_step == 7
        assert manager.save_snapshot() is None  # nothing to gain
    assert left(tmp_path) == []
    assert verify(saved.path) is None
    again = Toy(seed=9)
    with again.manager(tmp_path) as manager:
        manager.resume()
    assert_same(snapshot(again.state), expected)


def test_a_snapshot_that_cannot_be_made_durable_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = Toy()
    with toy.manager(tmp_path, memory_every=1) as manager:
        manager.resume()
        toy.step()
        manager.after_step(toy.now)
        with monkeypatch.context() as patch:
            patch.setattr(filesystem, "write_file", _full)
            assert manager.save_snapshot() is None
        manager.close(save=False)
    assert len(left(tmp_path)) == 1
    with Toy(seed=9).manager(tmp_path) as manager:
        resumed = manager.resume()
    assert resumed is not None
    assert resumed.step == 1


def _full(*_arguments: Any, **_keywords: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# ------------------------------------------------------------------------------------- going back


def test_going_back_begins_a_generation_and_gives_up_what_is_in_memory(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, memory_every=1) as manager:
        manager.resume()
        for step in range(1, 8):
            toy.step()
            if step in (3, 5):
                manager.save(step=step)
            manager.after_step(step)
        resumed = manager.go_back(7, "the loss is nan")
        assert resumed is not None
        assert (resumed.step, manager.generation) == (5, 2)
        assert left(tmp_path) == []
        toy.step()
        manager.after_step(toy.now)
        manager.wait()
        assert manager.memory_step == 6
    assert_same(toy.losses, after(6).losses)
    (event,) = [event for event in events(tmp_path) if event["event"] == "diverged"]
    assert (event["step"], event["back_to"], event["reason"]) == (7, 5, "the loss is nan")
    with Toy(seed=9).manager(tmp_path) as manager:  # and the abandoned step 7 never comes back
        resumed = manager.resume()
        assert resumed is not None
        assert (resumed.step, manager.generation) == (6, 2)


def test_going_back_passes_over_what_is_damaged_or_too_new(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, keep_last=0) as manager:
        manager.resume()
        for step in range(1, 7):
            toy.step()
            manager.save(step=step)
        damage(manager.catalog.path(manager.list()[2]))  # step 4
        resumed = manager.go_back(5, "x")
        assert resumed is not None
        assert resumed.step == 3
        assert [entry.step for entry in manager.list()] == [3, 2, 1]
        assert manager.go_back(1, "x") is None
        assert (manager.generation, toy.now) == (2, 3)


def test_a_state_whose_tensors_grow_and_shrink_fits_its_slots(tmp_path: Path) -> None:
    """Values between two optimizer steps, such as gradients in progress, come and go."""

    def run() -> None:
        state: dict[str, Any] = {"w": torch.zeros(4), "more": []}
        manager = CheckpointManager(tmp_path, state, memory_every=1)
        manager.resume()
        for step in range(1, 25):
            large = step // MEMORY_SLOTS % 2 or step == 1
            state["more"] = [torch.ones(1 << 17)] if large else []
            manager.after_step(step)
        manager.close()

    assert in_child(run) == 0
