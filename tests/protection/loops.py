"""Somebody's script in a process of its own, which is forked from this one: torch is there."""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

import numpy as np
import torch

from tests.training.runs import ROOT

EXAMPLES = ROOT / "examples"
_fork = multiprocessing.get_context("fork")  # its processes end as Python does: exit hooks are run


@dataclass
class Script:
    """A running script: its output as lines, and its end."""

    process: BaseProcess
    out: IO[str]
    errors: Path
    lines: list[str] = field(default_factory=list)

    def until(self, wanted: Callable[[str], bool]) -> bool:
        """Read lines up to the one that is `wanted`; False if the script ends before it."""
        for line in self.out:
            self.lines.append(line.rstrip("\n"))
            if wanted(self.lines[-1]):
                return True
        return False

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> int:
        """Read what is left; return the exit status, negative for the signal that ended it."""
        self.until(lambda _line: False)
        self.process.join(60)
        status = self.process.exitcode
        self.process.kill()
        self.out.close()
        assert status is not None, "it has not ended"
        return status

    @property
    def stderr(self) -> str:
        return self.errors.read_text("utf-8")


def changed(script: Path, path: Path, *changes: tuple[str, str]) -> Path:
    """Write `script` to `path` with `changes`, each of which must apply once."""
    text = script.read_text("utf-8")
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    path.write_text(text, "utf-8")
    return path


def start(path: Path, *arguments: str | Path) -> Script:
    """Start the script at `path` as `python path arguments`."""
    reading, writing = os.pipe()
    errors = path.with_suffix(".stderr") if ROOT not in path.parents else Path(arguments[0])
    errors = Path(f"{errors}.stderr")
    process = _fork.Process(target=_become, args=(path, arguments, writing, reading, errors))
    process.start()
    os.close(writing)
    return Script(process, os.fdopen(reading, encoding="utf-8"), errors)


def _become(
    path: Path, arguments: Sequence[str | Path], writing: int, reading: int, errors: Path
) -> None:
    os.close(reading)
    os.dup2(writing, 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed(1)  # streams that a script does not seed are compared all the same
    np.random.seed(1)
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    sys.argv = [str(path), *map(str, arguments)]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
