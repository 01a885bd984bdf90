"""The same faults without a compiler: Python's own calls in `os`, wrapped.

Everything that `holdfast` changes on a disk goes through these, so for us the sweep is the same;
what a library writes from C++ (torch.save, safetensors) is not seen, and such a saver is skipped
with that reason.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.faults.inject import Fault

_ON_PATH = {"mkdir": 0, "unlink": 0, "rmdir": 0, "chmod": 0, "rename": 1, "replace": 1, "link": 1}
_ON_FD = ("write", "pwrite", "fsync", "fdatasync", "ftruncate", "fchmod", "posix_fallocate")
_WRITES = ("write", "pwrite")
_SHORTAGES = (errno.EMFILE, errno.ENOMEM, errno.EINTR)  # of the process, whatever the file
_armed: list[_Seam] = []  # the one of this process


def arm(fault: Fault, directory: Path, log_fd: int) -> None:
    """Wrap the calls of this process from now on; `fault` and log as in `inject`."""
    from tests.faults.inject import How

    if fault.how is How.RECORD:
        raise NotImplementedError("recording a cycle needs a C compiler")
    seam = _Seam(fault, str(directory), log_fd)
    _armed[:] = [seam]
    if fault.how >= How.COUNT_READ:
        seam.wrap("open", lambda path, *_rest: _absolute(path), counts=_only_reads)
        seam.wrap("preadv", _of_fd)
        seam.wrap("listdir", _absolute)
        return
    for name in _ON_FD:
        if hasattr(os, name):
            seam.wrap(name, _of_fd)
    for name, position in _ON_PATH.items():
        seam.wrap(name, lambda *args, at=position: _absolute(args[at]))
    seam.wrap("open", lambda path, *_rest: _absolute(path), counts=_creates)


def fired() -> bool:
    """Whether the fault of this process has happened."""
    return any(seam.has_fired for seam in _armed)


class _Seam:
    """Counts the calls below a directory, over all threads, and does to one what the fault says."""

    def __init__(self, fault: Fault, root: str, log_fd: int) -> None:
        self._fault, self._root, self._log_fd = fault, root, log_fd
        self._turn, self._plain_write = threading.Lock(), os.write
        self._seen = self._fired = 0
        self._broken = ""  # the file that the first failed call was about

    @property
    def has_fired(self) -> bool:
        return self._fired > 0

    def wrap(
        self,
        name: str,
        where: Callable[..., str],
        counts: Callable[..., bool] = lambda *_args: True,
    ) -> None:
        """Put ourselves before `os.name`, whose arguments say `where` it acts."""
        real = getattr(os, name)

        def call(*args: Any, **keywords: Any) -> Any:
            path = where(*args)
            below = path == self._root or path.startswith(self._root + "/")
            if not (below and counts(*args) and self._struck(name, path)):
                return real(*args, **keywords)
            return self._strike(real, path, *args)

        setattr(os, name, call)

    def _struck(self, name: str, path: str) -> bool:
        """Count a call; whether this is the one. A process to be killed is gone here."""
        from tests.faults.inject import How

        how = self._fault.how
        with self._turn:
            self._seen += 1
            if how in (How.COUNT, How.COUNT_READ):
                self._note(name, path, "")
                return False
            behind = how is How.FAIL_FROM and self._seen > self._fault.nth
            if how is How.FAIL_READ_FROM and self._fired:
                behind = self._fault.error in _SHORTAGES or _same_file(path, self._broken)
            fails = (How.FAIL, How.FAIL_FROM, How.FAIL_READ, How.FAIL_READ_FROM)
            fits = name in _WRITES or how is How.KILL or how in fails
            if not fits or not (behind or self._seen == self._fault.nth):
                return False
            if not self._fired:
                self._note(name, path, "fired")
                self._broken = path
            self._fired += 1
            if how is How.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            return True

    def _strike(self, real: Callable[..., Any], path: str, *args: Any) -> Any:
        """The call as the fault has it."""
        from tests.faults.inject import How

        how = self._fault.how
        if how in (How.FAIL, How.FAIL_FROM, How.FAIL_READ, How.FAIL_READ_FROM):
            raise OSError(self._fault.error, os.strerror(self._fault.error), path)
        fd, data, *rest = args
        changed = bytearray(data)
        if how is How.DROP:
            if not rest:
                os.lseek(fd, len(changed), os.SEEK_CUR)
            return len(changed)
        if how is How.LIE:
            changed[len(changed) // 2] ^= 1
            return real(fd, changed, *rest)
        done = real(fd, changed[: len(changed) // 2], *rest)
        if how is How.KILL_HALF:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    def _note(self, name: str, path: str, other: str) -> None:
        line = f"{self._seen}\t{threading.get_native_id()}\t{name}\t0\t0\t0\t{path}\t{other}\n"
        self._plain_write(self._log_fd, line.encode())


def _of_fd(fd: Any, *_rest: Any) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink()) if isinstance(fd, int) else str(fd)


def _absolute(path: Any) -> str:
    return str(Path(os.fsdecode(path)).absolute())


def _creates(_path: Any, flags: int, *_rest: Any) -> bool:
    return bool(flags & (os.O_CREAT | os.O_TRUNC))


def _only_reads(_path: Any, flags: int, *_rest: Any) -> bool:
    return not flags & (os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | os.O_DIRECTORY)


def _same_file(path: str, other: str) -> bool:
    try:
        return Path(path).samefile(other)
    except OSError:
        return False
