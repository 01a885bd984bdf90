"""A disk that refuses for a while, for real: full, without inodes, read-only, over a limit.

Mounting needs root; what cannot be mounted here is a row that says so.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch

from holdfast.checkpoint.system import filesystem
from tests.faults import cycle, inject
from tests.faults.inject import Fault, Outcome
from tests.faults.savers import Saver, Training
from tests.faults.tally import Tally, Verdict

_SIZE = 24 << 20
_INODES = 64


class Disk(ABC):
    """A small file system of its own."""

    name: ClassVar[str]

    @contextmanager
    def mounted(self, place: Path) -> Iterator[Path]:
        """Mount it below `place`; whatever happens, nothing stays mounted."""
        target = place / "disk"
        target.mkdir()
        self.mount(place, target)
        try:
            yield target
        finally:
            for _attempt in range(50):
                if subprocess.run(["umount", target], capture_output=True, check=False).returncode:
                    time.sleep(0.1)
                else:
                    break

    @abstractmethod
    def mount(self, place: Path, target: Path) -> None:
        """Make it and mount it."""


class Tmpfs(Disk):
    name = "tmpfs"

    def mount(self, place: Path, target: Path) -> None:
        options = f"size={_SIZE},nr_inodes={_INODES}"
        _run("mount", "-t", "tmpfs", "-o", options, "tmpfs", target)


class Ext4(Disk):
    name = "ext4"

    def mount(self, place: Path, target: Path) -> None:
        image = place / "image"
        with image.open("wb") as file:
            file.truncate(_SIZE)
        _run("mkfs.ext4", "-q", "-N", str(_INODES), image)
        _run("mount", "-o", "loop", image, target)

    def again(self, place: Path, target: Path) -> None:
        """Mount it anew, as after a reboot."""
        _run("umount", target)
        _run("mount", "-o", "loop", place / "image", target)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


def unavailable() -> str:
    """Why nothing can be mounted here; "" where it can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    if shutil.which("mkfs.ext4") is None:
        return "mkfs.ext4 is not installed"
    return ""


# ------------------------------------------------------------------------------------- obstacles


@contextmanager
def full(disk: Path, left: int) -> Iterator[None]:
    """All but `left` bytes are taken by somebody else."""
    filler = disk / "filler"
    with filler.open("wb") as file, contextlib.suppress(OSError):
        while shutil.disk_usage(disk).free > left:
            file.write(bytes(min(1 << 16, shutil.disk_usage(disk).free - left)))
            file.flush()
            os.fsync(file.fileno())
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def no_inodes(disk: Path) -> Iterator[None]:
    """No file can be made."""
    place = disk / "many"
    place.mkdir()
    with contextlib.suppress(OSError):
        for number in range(_INODES):
            (place / str(number)).touch()
    try:
        yield
    finally:
        shutil.rmtree(place)


@contextmanager
def aborted(disk: Path) -> Iterator[None]:
    """Read-only by the kernel's own decision, as after a write error of the journal: only a new
    mount ends that. (A remount that a person asks for is refused while files are open.)"""
    _run("mount", "-o", "remount,abort", disk)
    yield


@contextmanager
def small_files(_disk: Path) -> Iterator[None]:
    """No file may be longer than 8 KiB (ulimit -f)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python has it from its start
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


Obstacle = Callable[[Path], contextlib.AbstractContextManager[None]]
OBSTACLES: dict[str, Obstacle] = {
    "full to the last byte": lambda disk: full(disk, 0),
    "room for the history only": lambda disk: full(disk, 4096),
    "room for half a checkpoint": lambda disk: full(disk, 30 << 10),
    "room for one checkpoint": lambda disk: full(disk, 120 << 10),
    "no inodes": no_inodes,
    "file size limit": small_files,
}


FOR_GOOD: dict[str, Obstacle] = {"read-only": aborted}  # ext4 only; until it is mounted again


def obstructed(saver: type[Saver]) -> Tally:
    """Each obstacle on each disk: training goes on, keeps what was announced, and saves again when
    the obstacle is gone; what is there can be read while it lasts."""
    tally, began = Tally("disk full, read-only, no inodes, limits", saver.name), time.monotonic()
    tally.skipped = unavailable()
    if tally.skipped:
        return tally
    filesystem.RESERVE = 0  # in this process and its children: the write itself is to find out
    for disk in (Tmpfs(), Ext4()):
        for what, obstacle in OBSTACLES.items():
            with cycle.scratch() as place, disk.mounted(place) as mounted:
                outcome = _under(saver, mounted, obstacle)
                _judge(
                    saver,
                    mounted,
                    outcome,
                    tally,
                    expected=cycle.STEPS,
                    what=f"{what} on {disk.name}",
                )
    for what, obstacle in FOR_GOOD.items():
        ext4 = Ext4()
        with cycle.scratch() as place, ext4.mounted(place) as mounted:
            outcome = _under(saver, mounted, obstacle)
            ext4.again(place, mounted)
            _judge(
                saver,
                mounted,
                outcome,
                tally,
                expected=cycle.ARMED - 1,
                what=f"{what} on {ext4.name}",
            )
    tally.seconds = time.monotonic() - began
    return tally


def _under(saver: type[Saver], disk: Path, obstacle: Obstacle) -> Outcome:
    """A cycle of saves with the obstacle in the middle of it."""
    directory = disk / "run"
    directory.mkdir()

    def body(_arm: object, say: Callable[[str], None]) -> None:
        training = Training()
        it = saver(directory, training)
        it.start()

        def save() -> None:
            training.step()
            it.save(training.now, lambda done: say(f"durable {done}"))

        for _step in range(1, cycle.ARMED):
            save()
        with obstacle(disk):
            for _step in range(cycle.ARMED, cycle.STEPS):
                save()
            with torch.random.fork_rng():
                say(f"read {type(it)(directory, Training()).read()}")
        save()
        it.finish()

    return inject.run(body, directory, Fault())


def _judge(
    saver: type[Saver], disk: Path, outcome: Outcome, tally: Tally, *, expected: int, what: str
) -> None:
    """`expected` is the step that must have been announced in the end."""
    read = [int(line.split()[1]) for line in outcome.said if line.startswith("read ")]
    newest = cycle.announced(outcome)
    tally.note(disk / "run")
    verdict = cycle.recover(saver, disk / "run", newest)
    if max(read, default=-1) < cycle.ARMED - 1 or newest != expected:
        error = f"read {read} meanwhile, announced {newest} at the end; {outcome.error[-300:]}"
        verdict = Verdict(newest, cycle.STEPS, error=error)
    tally.judge(verdict, what)
