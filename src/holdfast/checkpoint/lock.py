"""Who works in a run directory: one process, by a lock that the kernel drops when its owner dies.

POSIX record locks, not flock: a forked data-loader worker does not inherit them. They belong to the
process and fall when it closes *any* descriptor of the file, so the lock file is opened here only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from holdfast.checkpoint import filesystem
from holdfast.errors import RunLocked
from holdfast.i18n import _

_held: set[tuple[int, int]] = set()  # record locks do not exclude threads of one process: this does
_held_guard = threading.Lock()


def _forget() -> None:
    """In a forked child: it inherits no record lock, and perhaps a guard that nobody will open."""
    global _held_guard
    _held_guard = threading.Lock()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class FileLock:
    """An exclusive lock on `path`; use as a context manager.

    `wait` seconds are spent on trying; then `RunLocked` names the owner.
    """

    def __init__(self, path: Path, *, wait: float = 0.0) -> None:
        self._path, self._wait = path, wait
        self._fd = -1
        self._pid = 0
        self._key: tuple[int, int] = (0, 0)

    @property
    def held(self) -> bool:
        """Whether this process holds the lock through this object; a forked child does not."""
        return self._fd >= 0 and self._pid == os.getpid()

    @property
    def in_place(self) -> bool:
        """Whether the file that is locked is still the one at the path; looked at, not opened."""
        try:
            found = self._path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return (found.st_dev, found.st_ino) == self._key

    def acquire(self) -> None:
        deadline = time.monotonic() + self._wait
        while not self._try():
            if time.monotonic() >= deadline:
                raise RunLocked(
                    _("Another process works in {directory} ({owner}). Stop it, or choose another "
                      "--checkpoint-dir.", directory=self._path.parent, owner=self._owner())
                )  # fmt: skip
            time.sleep(0.02)

    def renew(self) -> None:
        """Take the lock at its path anew, where the file of before is gone from there; the old one
        falls only then. Raises `RunLocked` where somebody else was faster."""
        fd, key = self._fd, self._key
        self.acquire()
        with _held_guard:
            _held.discard(key)
            os.close(fd)

    def release(self) -> None:
        if self._fd < 0:
            return
        with _held_guard:
            _held.discard(self._key)
            os.close(self._fd)
            self._fd = -1

    def owner(self) -> str:
        """Who holds the lock now, without trying to take it; empty where nobody does, or where
        this system cannot be asked (only Linux can)."""
        with _held_guard:
            # One step with the question: to close the file would drop a lock taken in between.
            held = self._in_this_process() or _held_elsewhere(self._path)
        return self._owner() if held else ""

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _try(self) -> bool:
        filesystem.make_directory(self._path.parent)
        with _held_guard:
            with contextlib.suppress(FileNotFoundError):
                found = self._path.stat()
                if (found.st_dev, found.st_ino) in _held:
                    return False  # and do not open it: closing it again would drop the lock
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
            try:
                if not _lock(fd):
                    os.close(fd)
                    return False
            except OSError:
                os.close(fd)
                raise
            found = os.fstat(fd)
            self._fd, self._pid, self._key = fd, os.getpid(), (found.st_dev, found.st_ino)
            _held.add(self._key)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its owner's name
            os.truncate(fd, 0)
            os.write(fd, json.dumps(owner).encode())
        return True

    def _owner(self) -> str:
        """Who wrote the lock file last. Read by name: `_try` has made sure that it is not ours."""
        with _held_guard:
            if self._in_this_process():
                return _("this process")
            try:
                owner = json.loads(self._path.read_text())
                since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
                return _("process {pid} on {host}, since {since}", pid=owner["pid"],
                         host=owner["host"], since=since)  # fmt: skip
            except (OSError, ValueError, KeyError, TypeError):
                return _("unknown process")

    def _in_this_process(self) -> bool:
        try:
            found = self._path.stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) in _held


_FLOCK = "hhqqi"  # struct flock of 64-bit Linux: type, whence, start, length, pid


def _held_elsewhere(path: Path) -> bool:
    """Whether another process has locked `path`: asked by F_GETLK, since taking the lock for a
    moment would turn away a training that begins in that moment."""
    if not sys.platform.startswith("linux"):
        return False
    import fcntl

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        found = fcntl.fcntl(fd, fcntl.F_GETLK, wanted)
        return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)
    except OSError:
        return False
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    if os.name == "nt":
        import msvcrt

        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
