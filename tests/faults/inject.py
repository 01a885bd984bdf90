"""Faults at single system calls of a forked process, through the shim of holdfast.prove.

A process that has imported everything once is forked for each point: tens of milliseconds instead
of seconds. The shim must be in the process from its start, so `preloaded()` begins it anew with
LD_PRELOAD. Where there is no C compiler the same sweep runs through `seam.py`, Python's own calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import functools
import hashlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.prove.recorder import SOURCE, Call, How, compile_shim, read_log

_SECONDS = 90  # after which a forked process is hung, and that is a failure of the run
HUNG = "hung"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: what happens at the `nth` write-side call (from 1) after the process has armed; at
    the `nth` read-side call where `how` says so."""

    how: How = How.OFF
    nth: int = 0
    error: int = 0  # errno

    def __str__(self) -> str:
        name = errno.errorcode.get(self.error, "") if self.error else ""
        return f"{self.how.name.lower()} {name} at call {self.nth}".replace("  ", " ")


@dataclass(slots=True)
class Outcome:
    """How a forked process ended."""

    status: int  # exit status, or minus the signal's number
    said: list[str] = field(default_factory=list)  # lines that were read before it ended
    log: list[Call] = field(default_factory=list)
    error: str = ""  # its traceback, if it had one

    @property
    def fired(self) -> bool:
        return any(call.other == "fired" for call in self.log)


@dataclass(frozen=True, slots=True)
class Strike:
    """What the parent does to a forked process from outside: `act(pid)`, so many seconds after it
    has said its first line."""

    seconds: float
    act: Callable[[int], None]


@functools.cache
def compiled() -> Path | None:
    """The shim as a library; None where there is no compiler or no Linux, or where
    HOLDFAST_FAULTS=seam says to do without."""
    if os.environ.get("HOLDFAST_FAULTS") == "seam":
        return None
    key = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"holdfast-faults-{os.getuid()}-{key}.so"
    return library if library.exists() or compile_shim(library) else None


def environment() -> dict[str, str]:
    """What a process needs to have the shim in it, and one thread for its sums."""
    library = compiled()
    preload = {"LD_PRELOAD": str(library)} if library else {}
    return {**os.environ, "OMP_NUM_THREADS": "1", **preload}


@functools.cache
def shim() -> Any:
    """The shim of this process. None where it was begun without."""
    with contextlib.suppress(AttributeError):
        library = ctypes.CDLL(None)
        library.fault_arm.argtypes = [
            ctypes.c_int, ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int,
        ]  # fmt: skip
        library.fault_arm.restype = None
        library.fault_fired.restype = ctypes.c_long
        library.fault_mark.argtypes = [ctypes.c_char_p]
        library.fault_mark.restype = None
        return library
    return None


def fired() -> bool:
    """Whether the fault that this process has armed has happened."""
    from tests.faults import seam

    return bool(shim().fault_fired() if shim() is not None else seam.fired())


def run(
    body: Callable[[Callable[[], None], Callable[[str], None]], Any],
    directory: Path,
    fault: Fault,
    log: Path | None = None,
    strike: Strike | None = None,
) -> Outcome:
    """Fork, run `body(arm, say)` in the child, and tell how it ended.

    The child calls `arm()` where faults below `directory` begin to count, and `say(line)` to
    announce something: that returns when this process has read the line. What the child answers
    is its last line, "= " and JSON. `strike` is done to it from here.
    """
    there, here = os.pipe(), os.pipe()
    with tempfile.TemporaryFile() as errors, _log_file(log) as (log_fd, log_path):
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os.close(there[0])
            os.close(here[1])
            _child(body, directory, fault, (there[1], here[0]), (log_fd, errors.fileno()))
        os.close(there[1])
        os.close(here[0])
        said = _listen(pid, there[0], here[1], strike)
        _pid, status = os.waitpid(pid, 0)
        os.close(there[0])
        os.close(here[1])
        errors.seek(0)
        text = errors.read().decode("utf-8", "replace")
        calls = list(read_log(log_path))
    if said[-1:] == [HUNG]:
        raise TimeoutError(f"a process under test hangs; it has said {said[:-1]}\n{text}")
    return Outcome(os.waitstatus_to_exitcode(status), said, calls, text)


def answer(outcome: Outcome) -> Any:
    """What the body of `run` returned. Raises RuntimeError, with its traceback, if it did not."""
    last = outcome.said[-1] if outcome.said else ""
    if not last.startswith("= "):
        raise RuntimeError(f"no answer (status {outcome.status}): {outcome.error}")
    return json.loads(last[2:])


@contextlib.contextmanager
def _log_file(wanted: Path | None) -> Iterator[tuple[int, Path]]:
    path = wanted
    if path is None:
        fd, name = tempfile.mkstemp(prefix="holdfast-faults-")
        path = Path(name)
    else:
        fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    try:
        yield fd, path
    finally:
        os.close(fd)
        if wanted is None:
            path.unlink()


def _child(
    body: Callable[..., Any], directory: Path, fault: Fault, pipes: tuple[int, int],
    logs: tuple[int, int],
) -> None:  # fmt: skip
    """The forked process: never returns."""
    from tests.faults import seam

    status, (there, here), (log_fd, errors) = 1, pipes, logs
    try:
        os.dup2(errors, 2)
        os.dup2(errors, 1)
        faulthandler.dump_traceback_later(_SECONDS - 5, file=errors)  # where every thread stands

        def say(line: str) -> None:
            os.write(there, f"{line}\n".encode())
            os.read(here, 1)  # it has been read
            if fault.how is How.RECORD:
                shim().fault_mark(line.encode())

        def arm() -> None:
            if fault.how is How.OFF:
                return
            library = shim()
            if library is not None:
                root = os.fsencode(directory.resolve())
                library.fault_arm(int(fault.how), root, fault.nth, fault.error, log_fd)
            else:
                seam.arm(fault, directory.resolve(), log_fd)

        result = body(arm, say)
        if shim() is not None:
            shim().fault_disarm()
        say("= " + json.dumps(result))
        status = 0
    except BaseException:  # noqa: BLE001 - the parent is told
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _listen(pid: int, there: int, here: int, strike: Strike | None) -> list[str]:
    said: list[str] = []
    rest, deadline = b"", time.monotonic() + _SECONDS
    due = float("inf")  # when to strike
    while True:
        left = min(deadline, due) - time.monotonic()
        readable, _w, _x = select.select([there], [], [], max(0.0, left))
        if not readable and due < deadline:
            assert strike is not None
            due = float("inf")
            strike.act(pid)
            continue
        if not readable:
            os.kill(pid, signal.SIGKILL)
            said.append(HUNG)
            return said
        piece = os.read(there, 65536)
        if not piece:
            return said
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if strike is not None and not said:
                due = time.monotonic() + strike.seconds
            said.append(line.decode())
            with contextlib.suppress(BrokenPipeError):
                os.write(here, b"+")
