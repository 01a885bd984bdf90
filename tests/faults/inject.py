"""Faults at single system calls of a forked process, through shim.c, which is compiled on demand.

A process that has imported everything once is forked for each point: tens of milliseconds instead
of seconds. The shim must be in the process from its start, so `preloaded()` begins it anew with
LD_PRELOAD. Where there is no C compiler the same sweep runs through `seam.py`, Python's own calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import faulthandler
import functools
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("shim.c")
_SECONDS = 90  # after which a forked process is hung, and that is a failure of the run
HUNG = "hung"


class How(enum.IntEnum):
    """What is done at a call; the numbers are those of shim.c."""

    OFF = 0
    COUNT = 1  # every call is logged, nothing else
    KILL = 2  # the process is gone before the call
    KILL_HALF = 3  # ... in the middle of a write
    FAIL = 4  # the call fails, this once
    FAIL_FROM = 5  # it and all after it fail
    SHORT = 6  # a write writes half of what it was given, and says so
    LIE = 7  # a write changes a bit and says that all is well
    DROP = 8  # a write keeps nothing and says that all is well
    RECORD = 9  # every call is logged with its data
    COUNT_READ = 10  # as COUNT, of the calls that open, read and list
    FAIL_READ = 11  # such a call fails, this once
    FAIL_READ_FROM = 12  # ... and whatever its error lasts for: this file, or the whole process


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


@dataclass(frozen=True, slots=True)
class Call:
    """A line of the shim's log; `data` with RECORD only, and so the calls named "said": `path` was
    announced, and had been read, before the next."""

    number: int
    thread: int
    name: str
    inode: int
    offset: int
    path: str
    other: str
    data: bytes = b""


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
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux") or compiler is None:
        return None
    key = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"holdfast-faults-{os.getuid()}-{key}.so"
    if not library.exists():
        fresh = library.with_suffix(f".{os.getpid()}.so")
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", fresh, SOURCE, "-ldl", "-pthread"]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        fresh.replace(library)
    return library


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


def read_log(path: Path) -> Iterator[Call]:
    """The calls that the shim has logged at `path`, in the order of their effects."""
    with path.open("rb") as file:
        for line in file:
            fields = line.rstrip(b"\n").decode("utf-8", "surrogateescape").split("\t")
            number, thread, name, inode, offset, length, place, other = fields
            data = file.read(int(length))
            yield Call(int(number), int(thread), name, int(inode), int(offset), place, other, data)


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
