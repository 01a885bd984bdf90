"""Record what a process does to files: shim.c, compiled on demand and preloaded into it.

Only where there is Linux and a C compiler. No torch here.
"""

from __future__ import annotations

import enum
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")


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
class Call:
    """A line of the shim's log; `data` with RECORD only.

    With RECORD two names stand for no change of a file: "said" (`path` was announced, and had been
    read, before the next call) and "out" (`data` was written to stdout or stderr).
    """

    number: int
    thread: int
    name: str
    inode: int
    offset: int
    path: str
    other: str
    data: bytes = b""


def compile_shim(library: Path) -> bool:
    """Compile the shim to `library`; False where there is no Linux or no C compiler that can."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux") or compiler is None:
        return False
    fresh = library.with_suffix(f".{os.getpid()}.so")
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-O1",
        "-o",
        str(fresh),
        str(SOURCE),
        "-ldl",
        "-pthread",
    ]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    fresh.replace(library)
    return True


def recording(library: Path, root: Path, log: Path) -> dict[str, str]:
    """Return the environment variables with which a process, and those that it begins, record what
    they write below `root`, and what they say, into the file `log`."""
    preloaded = " ".join(filter(None, [str(library), os.environ.get("LD_PRELOAD")]))
    return {
        "LD_PRELOAD": preloaded,
        "HOLDFAST_RECORD": str(root.resolve()),
        "HOLDFAST_RECORD_LOG": str(log),
    }


def read_log(path: Path) -> Iterator[Call]:
    """Yield the calls that the shim has logged at `path`, in the order of their effects."""
    with path.open("rb") as file:
        for line in file:
            fields = line.rstrip(b"\n").decode("utf-8", "surrogateescape").split("\t")
            number, thread, name, inode, offset, length, place, other = fields
            data = file.read(int(length))
            yield Call(int(number), int(thread), name, int(inode), int(offset), place, other, data)
