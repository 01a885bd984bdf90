"""Lock a run directory for one process. The kernel drops the lock when its owner dies.

The lock belongs to the open file: reading, copying or uploading the lock file does not drop it, as
it would a POSIX record lock. But a forked child inherits the open file, and a data-loader worker
would hold the lock of its dead parent: the child closes it at once. On Linux these are OFD locks,
which exclude, and are excluded by, the record locks of earlier versions; elsewhere flock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from holdfast.checkpoint.system import filesystem
from holdfast.errors import RunLocked
from holdfast.i18n import _

if sys.platform != "win32":
    import fcntl

RUN_LOCK, CATALOG_LOCK = LOCKS = (".run.lock", ".catalog.lock")  # in a run directory
_held: dict[int, FileLock] = {}  # by descriptor
_guard = threading.RLock()  # reentrant: a signal handler may fork in the thread that has it


def _in_child() -> None:
    """Close what this forked child has inherited; its parent's locks hold on."""
    for fd, lock in _held.items():
        os.close(fd)
        lock._fd = -1
    _held.clear()
    _guard.release()


if hasattr(os, "register_at_fork"):
    # A fork waits while a thread opens a lock file: the child could not know its descriptor.
    os.register_at_fork(
        before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_in_child
    )


class FileLock:
    """An exclusive lock on `path`; use as a context manager.

    `wait` seconds are spent on trying; then `RunLocked` names the owner.
    """

    def __init__(self, path: Path, *, wait: float = 0.0) -> None:
        self.path, self._wait = path, wait
        self._fd = -1
        self._pid = 0
        self._key: tuple[int, int] = (0, 0)

    @property
    def held(self) -> bool:
        """True while this process holds the lock through this object; False in a forked child."""
        return self._fd >= 0 and self._pid == os.getpid()

    @property
    def in_place(self) -> bool:
        """True if the locked file is still the one at the path. Nothing is opened."""
        return _key_of(self.path) == self._key

    @property
    def in_this_process(self) -> bool:
        """True if any object of this process holds the lock."""
        with _guard:
            return _key_of(self.path) in [lock._key for lock in _held.values()]

    @property
    def taken(self) -> bool:
        """True if the lock is held now.

        It is not taken to find out: that would turn away a training that begins at that moment.
        Only Linux can be asked: elsewhere the locks of other processes are not seen.
        """
        return self.in_this_process or _held_elsewhere(self.path)

    def acquire(self) -> None:
        filesystem.make_directory(self.path.parent)
        deadline = time.monotonic() + self._wait
        while not self._try():
            if time.monotonic() >= deadline:
                raise self._refused()
            time.sleep(0.02)

    def renew(self) -> None:
        """Re-create and lock the lock file if it was deleted.

        The old lock is released only after the new one is held. Raises `RunLocked` where another
        process was faster.
        """
        fd = self._fd
        self.acquire()
        _close(fd)

    def release(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            _close(fd)

    def owner(self) -> str:
        """Return the holder of the lock in words; empty where `taken` is False."""
        return self._owner() if self.taken else ""

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
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        while True:
            with _guard:
                fd = os.open(self.path, flags, 0o644)
                try:
                    taken, found = _lock(fd), os.fstat(fd)
                except BaseException:  # an interrupt, too, leaves nothing open
                    os.close(fd)
                    raise
                key = (found.st_dev, found.st_ino)
                if taken and key == _key_of(self.path):
                    self._fd, self._pid, self._key = fd, os.getpid(), key
                    _held[fd] = self
                    break
                os.close(fd)
            if not taken:
                return False
            # The file was removed between the two calls: lock its successor.
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its owner's name
            os.truncate(fd, 0)
            os.write(fd, json.dumps(owner).encode())
        return True

    def _refused(self) -> RunLocked:
        directory, owner = self.path.parent, self._owner()
        if owner == _("this process"):
            return RunLocked(
                "{directory} is in use by this process already. Close what works there, or "
                "choose another directory.",
                directory=directory,
            )
        return RunLocked(
            "Another process works in {directory} ({owner}). Stop it, or choose another directory.",
            directory=directory,
            owner=owner,
        )

    def _owner(self) -> str:
        """Return the process that wrote the lock file last."""
        if self.in_this_process:
            return _("this process")
        try:
            owner = json.loads(self.path.read_text())
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
            return _(
                "process {pid} on {host}, since {since}",
                pid=owner["pid"],
                host=owner["host"],
                since=since,
            )
        except (OSError, ValueError, KeyError, TypeError):
            return _("unknown process")


def run_lock(directory: str | os.PathLike[str]) -> FileLock:
    """Return the lock of a run directory: training, clean and roll-back hold it."""
    return FileLock(Path(directory) / RUN_LOCK)


def _key_of(path: Path) -> tuple[int, int] | None:
    """Return device and inode of the file at `path`, if there is one."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (found.st_dev, found.st_ino)


def _close(fd: int) -> None:
    with _guard:
        del _held[fd]
        if os.name != "nt":  # or the lock stays until a child that is forked just now has closed it
            _unlock(fd)
        os.close(fd)


def _whole(kind: int) -> bytes:
    """Return 64-bit Linux's struct flock for a whole file: type, whence, start, length, pid."""
    return struct.pack("hhqqi", kind, os.SEEK_SET, 0, 0, 0)


def _held_elsewhere(path: Path) -> bool:
    """Return True if Linux knows of a lock on `path`, of an open file or of a process."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _whole(fcntl.F_WRLCK))
        return found[:2] != _whole(fcntl.F_UNLCK)[:2]
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
    try:
        if not _lock_open_file(fd, fcntl.F_WRLCK):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _unlock(fd: int) -> None:
    with contextlib.suppress(OSError):  # closing it does the same, if later
        if not _lock_open_file(fd, fcntl.F_UNLCK):
            fcntl.flock(fd, fcntl.LOCK_UN)


def _lock_open_file(fd: int, kind: int) -> bool:
    """Lock or unlock with an OFD lock; False where the system has none."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _whole(kind))
    except OSError as error:
        if error.errno == errno.EINVAL:  # before Linux 3.15, or something that acts as Linux
            return False
        raise
    return True
