"""Power cuts for real: ext4 on a loop mount is shut down in the middle of saving, its journal not
flushed, and mounted again.

Needs root, loop mounts and a kernel whose ext4 knows the shutdown ioctl (it is there for the tests
of the file system itself, xfstests); elsewhere the row says why there is nothing in it.

What ext4 does beyond its promise is seen here, too: each fsync of any file commits the journal with
all names before it. So a saver that syncs no directory but goes on to write a log survives here,
and is caught in `power.py` only.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast.checkpoint.system import filesystem
from tests.faults import cycle, inject
from tests.faults.inject import Fault, Outcome
from tests.faults.savers import Saver, Training
from tests.faults.tally import Tally

NAME = "real power cut (ext4 shutdown)"
STEPS = 100_000  # more than a training comes to before its cut
MOUNT_NAME = "cut-off"
_STRIDE = 200  # steps; the undisturbed training is known in multiples of it
_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
_NO_FLUSH = (2).to_bytes(4, sys.byteorder)  # EXT4_GOING_FLAGS_NOLOGFLUSH
_SIZE = 512 << 20  # bytes of the file system, in a file with holes: nobody is ever out of space
_SHORTEST, _LONGEST = 0.02, 0.5  # seconds of saving before the cut


def real_cut(saver: type[Saver], *, cuts: int, seed: int) -> Tally:
    """Cut the power of `saver` so many times, at random moments of its saving."""
    tally, began = Tally(NAME, saver.name), time.monotonic()
    tally.skipped = missing()
    rng = random.Random(seed)
    for number in range(0 if tally.skipped else cuts):
        with cycle.scratch() as place:
            disk = LoopDisk(place)
            disk.make()
            with disk.mounted() as mounted:
                outcome = save_until_cut(saver, mounted, rng.uniform(_SHORTEST, _LONGEST))
                if not is_down(mounted):
                    raise RuntimeError(f"{saver.name}: ended before the cut: {outcome.error}")
            newest = cycle.announced(outcome)
            known = cycle.digests((newest // _STRIDE + 1) * _STRIDE + 1 + cycle.FURTHER)
            with disk.mounted() as mounted:
                tally.note(mounted / "run")
                verdict = cycle.recover(saver, mounted / "run", newest, newest + 1, known)
            tally.judge(verdict, f"cut {number + 1} of seed {seed}")
    tally.seconds = time.monotonic() - began
    return tally


def save_until_cut(saver: type[Saver], mounted: Path, seconds: float) -> Outcome:
    """Train and save until the power fails, `seconds` after the first step. The process is killed
    then, if the first error of its disk has not ended it."""

    def body(_arm: object, say: Callable[[str], None]) -> None:
        directory = mounted / "run"
        directory.mkdir()
        filesystem.sync_directory(mounted)

        def cut() -> None:
            shut_down(mounted)
            os.kill(os.getpid(), signal.SIGKILL)

        timer = threading.Timer(seconds, cut)
        training = Training()
        it = saver(directory, training)
        it.start()
        for step in range(1, STEPS + 1):
            training.step()
            it.save(step, lambda done: say(f"durable {done}"))
            if step == 1:
                timer.start()

    return inject.run(body, mounted, Fault())


def shut_down(mounted: Path) -> None:
    """Cut the power of a file system: nothing more reaches its disk. Raises OSError."""
    handle = os.open(mounted, os.O_RDONLY)
    try:
        fcntl.ioctl(handle, _SHUTDOWN, _NO_FLUSH)
    finally:
        os.close(handle)


def is_down(mounted: Path) -> bool:
    """Whether nothing can be written there any more."""
    try:
        (mounted / "probe").touch()
    except OSError:
        return True
    return False


class LoopDisk:
    """ext4 in a file below `place`."""

    def __init__(self, place: Path) -> None:
        self._image, self._target = place / "image", place / MOUNT_NAME

    def make(self) -> None:
        self._target.mkdir()
        with self._image.open("wb") as file:
            file.truncate(_SIZE)
        _run("mkfs.ext4", "-q", self._image)

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        """Mount it, which replays its journal; whatever happens, it does not stay mounted."""
        _run("mount", "-t", "ext4", "-o", "loop", self._image, self._target)
        try:
            yield self._target
        finally:
            for _attempt in range(50):
                if not _unmounted(self._target):
                    time.sleep(0.1)
                    continue
                break
            else:
                _run("umount", "-l", self._target)


def missing() -> str:
    """Why no power can be cut here; "" where it can. Tried, not guessed."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux"
    if shutil.which("mkfs.ext4") is None or shutil.which("mount") is None:
        return "needs mkfs.ext4 and mount"
    with cycle.scratch() as place:
        disk = LoopDisk(place)
        try:
            disk.make()
            with disk.mounted() as mounted:
                shut_down(mounted)
        except subprocess.CalledProcessError as error:
            return f"no loop mount here: {error.stderr.decode(errors='replace').strip()[:80]}"
        except OSError as error:
            return f"no shutdown of ext4 here: {error.strerror}"
    return ""


def _unmounted(target: Path) -> bool:
    return subprocess.run(["umount", target], capture_output=True, check=False).returncode == 0


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)
