"""Check that the run directory may be written, and is still the one that this process locked."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.checkpoint.rundir.entries import EVENTS, METADATA, ROLES
from holdfast.checkpoint.rundir.reporter import Reporter
from holdfast.checkpoint.system import LOCKS, FileLock, filesystem
from holdfast.errors import DirectoryLost, ResourceError


class Place:
    """The directory of a run whose `lock` this process holds; `secure` may be called by any thread.

    Once a directory is renamed, its path may name another one: every save asks before it writes.
    The directory is held open, because a file system gives a deleted inode's number to a new file.
    """

    _fd = -1

    def __init__(self, catalog: Catalog, lock: FileLock, reporter: Reporter) -> None:
        self._catalog, self._lock, self._reporter = catalog, lock, reporter
        self._turn = threading.Lock()
        if hasattr(os, "O_DIRECTORY"):
            flags = os.O_RDONLY | os.O_DIRECTORY | getattr(os, "O_CLOEXEC", 0)
            self._fd = os.open(catalog.directory, flags)

    def secure(self) -> None:
        """Return if the directory at the path is the one that this process has locked.

        Lock it again where only the lock file was removed. Raises `DirectoryLost` where it was
        deleted, renamed or replaced, and `RunLocked` where another process was faster.
        """
        with self._turn:
            if not self._lock.held:
                return
            here = self._lock.in_place or self._is_here()
            self._reporter.recording = here  # else a line could go into another run's history
            if not here:
                raise self._lost()
            if not self._lock.in_place:
                self._lock.renew()
                self._reporter.report("lock_renewed", directory=str(self._catalog.directory))

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1  # an interrupt must not have it closed a second time
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def _is_here(self) -> bool:
        if self._fd < 0:
            return True  # this platform removes no directory that has open files
        try:
            return os.path.samestat(self._catalog.directory.stat(), os.fstat(self._fd))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _lost(self) -> DirectoryLost:
        directory = self._catalog.directory
        with contextlib.suppress(OSError):
            moved_to = Path(f"/proc/self/fd/{self._fd}").readlink()
            if os.path.samestat(moved_to.stat(), os.fstat(self._fd)):
                return DirectoryLost(
                    "The run directory {directory} was renamed to {moved_to} while training: "
                    "its checkpoints and its history are there. Rename it back, and the next "
                    "step is saved.",
                    directory=directory,
                    moved_to=moved_to,
                )
        return DirectoryLost(
            "The run directory {directory} was deleted or replaced while training. If it can "
            "be moved back, the next step is saved; a new directory is not written to.",
            directory=directory,
        )


def check_rights(directory: Path) -> None:
    """Raise `ResourceError` if this user could save nothing in a run directory because another one,
    perhaps root, has trained there before. `OSError` where no user can write it now."""
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
    """Yield the files that a save must write or replace and this user cannot."""
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
    if path.stat().st_uid == _user():  # only the permission is missing
        return PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return ResourceError(
        "{path} belongs to {owner}, and {user} may not write it: nothing could be saved there. "
        "Give it to this user (chown -R {user} {directory}), or choose another directory.",
        path=path,
        owner=_name_of(path.stat().st_uid),
        user=_name_of(_user()),
        directory=directory,
    )


def _name_of(user: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(user).pw_name
    except (ImportError, KeyError):
        return str(user)
