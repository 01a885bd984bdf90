"""The same faults without a compiler: Python's own calls in `os`, wrapped.

Everything that `holdfast` changes on a disk goes through these, so for us the sweep is the same;
what a library writes from C++ (torch.save, safetensors) is not seen, and such a saver is skipped
with that reason.
"""

from __future__ import annotations

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


def arm(fault: Fault, directory: Path, log_fd: int) -> None:
    """Wrap the calls of this process from now on; `fault` and log as in `inject`."""
    from tests.faults.inject import How

    turn, root, plain = threading.Lock(), str(directory), os.write
    state = {"seen": 0, "fired": 0}
    supported = {How.COUNT, How.KILL, How.KILL_HALF, How.FAIL, How.FAIL_FROM, How.SHORT, How.LIE}
    if fault.how not in supported:
        raise NotImplementedError(f"{fault.how.name} needs a C compiler")

    def note(name: str, path: str, other: str) -> None:
        line = f"{state['seen']}\t{threading.get_native_id()}\t{name}\t0\t0\t0\t{path}\t{other}\n"
        plain(log_fd, line.encode())

    def enter(name: str, path: str) -> bool:
        """Count; whether something is to be done at this call."""
        with turn:
            state["seen"] += 1
            now = state["seen"] == fault.nth
            now = now or (fault.how is How.FAIL_FROM and state["seen"] >= fault.nth)
            writing = name in _WRITES
            if fault.how is How.COUNT:
                note(name, path, "")
            if not now or not (writing or fault.how in (How.KILL, How.FAIL, How.FAIL_FROM)):
                return False
            if not state["fired"]:
                note(name, path, "fired")
            state["fired"] += 1
            if fault.how is How.KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            return fault.how is not How.COUNT

    def wrap(name: str, where: Callable[..., str]) -> None:
        real = getattr(os, name)

        def call(*args: Any, **keywords: Any) -> Any:
            path = where(*args)
            if not (path == root or path.startswith(root + "/")) or not enter(name, path):
                return real(*args, **keywords)
            if fault.how in (How.FAIL, How.FAIL_FROM):
                raise OSError(fault.error, os.strerror(fault.error), path)
            fd, data, *rest = args
            changed = bytearray(data)
            if fault.how is How.LIE:
                changed[len(changed) // 2] ^= 1
                return real(fd, changed, *rest)
            done = real(fd, changed[: len(changed) // 2], *rest)
            if fault.how is How.KILL_HALF:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        setattr(os, name, call)

    def of_fd(fd: Any, *_rest: Any) -> str:
        return str(Path(f"/proc/self/fd/{fd}").readlink()) if isinstance(fd, int) else str(fd)

    for name in _ON_FD:
        if hasattr(os, name):
            wrap(name, of_fd)
    for name, position in _ON_PATH.items():
        wrap(name, lambda *args, at=position: str(Path(os.fsdecode(args[at])).absolute()))
    _wrap_open(fault, root, enter)


def _wrap_open(fault: Fault, root: str, enter: Callable[[str, str], bool]) -> None:
    real = os.open

    def opened(path: Any, flags: int, *args: Any, **keywords: Any) -> int:
        full = str(Path(os.fsdecode(path)).absolute())
        creates = flags & (os.O_CREAT | os.O_TRUNC)
        if creates and full.startswith(root + "/") and enter("open", full):
            raise OSError(fault.error, os.strerror(fault.error), full)
        return real(path, flags, *args, **keywords)

    os.open = opened  # type: ignore[assignment]
