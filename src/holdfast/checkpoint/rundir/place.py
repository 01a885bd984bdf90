"""The run directory as this process found it: whether it may be written, and is still there.

A directory that is deleted or renamed under a training is noticed by its inode: its path may name
another one by then. It is made anew, locked anew and said loudly; nothing goes on in silence.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from holdfast.checkpoint.rundir.catalog import EVENTS, METADATA, ROLES, Catalog
from holdfast.checkpoint.rundir.reporter import Reporter
from holdfast.checkpoint.system import FileLock, filesystem
from holdfast.errors import ResourceError
from holdfast.i18n import _

LOCKS = (".run.lock", ".catalog.lock")


class Place:
    """The directory of a run whose `lock` this process holds. `secure` may be called by any thread.

    `losses` counts how often it had to be made anew.
    """

    _fd = -1

    def __init__(self, catalog: Catalog, lock: FileLock, reporter: Reporter) -> None:
        self._catalog, self._lock, self._reporter = catalog, lock, reporter
        self._turn = threading.Lock()
        self.losses = 0
        self._remember()

    def secure(self) -> None:
        """Return with a directory at the path that is this process's alone.

        Raises `RunLocked` where another process works in what has taken its place, `OSError` where
        it cannot be made.
        """
        with self._turn:
            if not self._lock.held:
                return
            if self._lock.in_place:
                self._reporter.recording = True  # it may have been gone for a while
                return
            gone = not self._is_here()
            where = _path_of(self._fd) if gone else None
            self._reporter.recording = False
            filesystem.make_directory(self._catalog.directory)
            self._lock.renew()
            self._reporter.recording = True
            if not gone:  # only the lock file was removed
                self._reporter.report("lock_renewed", directory=str(self._catalog.directory))
                return
            self._remember()
            self._reporter.report(
                "directory_lost",
                directory=str(self._catalog.directory),
                moved_to=None if where is None else str(where),
            )
            self.losses += 1

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1  # an interrupt must not have it closed a second time
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def _remember(self) -> None:
        """Hold the directory open: its inode's number is given to nobody else meanwhile."""
        self.close()
        if hasattr(os, "O_DIRECTORY"):
            flags = os.O_RDONLY | os.O_DIRECTORY | getattr(os, "O_CLOEXEC", 0)
            self._fd = os.open(self._catalog.directory, flags)

    def _is_here(self) -> bool:
        try:
            found = self._catalog.directory.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        if self._fd < 0:
            return True  # this platform removes no directory that has open files
        held = os.fstat(self._fd)
        return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def _path_of(fd: int) -> Path | None:
    """Where the directory behind `fd` lies now; None where it is deleted or nobody can tell."""
    with contextlib.suppress(OSError):
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if os.path.samestat(path.stat(), os.fstat(fd)):
            return path
    return None


def check_rights(directory: Path) -> None:
    """Raise `ResourceError` where a run directory is there and this user could save nothing in it:
    another one, perhaps root, has trained there before. `OSError` where nobody can write it now."""
    if not directory.is_dir():
        filesystem.check_links(directory)
        return
    try:
        filesystem.try_writing(directory)
    except PermissionError:
        raise _not_yours(directory, directory) from None
    except OSError as error:
        # How much room there is, or can be made, is looked at before the first step.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, str(directory)) from None
    for path in _in_the_way(directory):
        raise _not_yours(path, directory)


def _in_the_way(directory: Path) -> Iterator[Path]:
    """What a save must write or replace and this user cannot."""
    for name in (*LOCKS, EVENTS):
        path = directory / name
        if path.exists() and not os.access(path, os.W_OK):
            yield path
    found = directory.stat()
    if not found.st_mode & stat.S_ISVTX or _user() in (0, found.st_uid):
        return
    for name in (*ROLES, METADATA):  # in a sticky directory only their owner may replace them
        with contextlib.suppress(FileNotFoundError):
            if (directory / name).lstat().st_uid != _user():
                yield directory / name


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _not_yours(path: Path, directory: Path) -> Exception:
    if path.stat().st_uid == _user():  # it has only to allow it
        return PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return ResourceError(
        _("{path} belongs to {owner}, and {user} may not write it: nothing could be saved there. "
          "Give it to this user (chown -R {user} {directory}), or choose another directory.",
          path=path, owner=_name_of(path.stat().st_uid),
          user=_name_of(_user()), directory=directory)
    )  # fmt: skip


def _name_of(user: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(user).pw_name
    except (ImportError, KeyError):
        return str(user)
