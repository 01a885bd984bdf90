"""`holdfast` in processes of its own, without the seconds that Python takes to import torch."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from holdfast.cli.main import main
from tests.training.runs import ROOT, config_for, train, write_corpus


def start(
    *words: str | Path,
    environment: Mapping[str, str] | None = None,
    first: Callable[[], Any] = lambda: None,
    **popen: Any,
) -> subprocess.Popen[str]:
    """Start a command in a fork of this process, which has imported everything. Pid, signals, pipes
    and exit status are those of any other process. `first` is done in it before the command."""
    argv = ["holdfast", *map(str, words)]
    given = dict(os.environ if environment is None else environment)

    def work() -> None:
        os.closerange(3, 65536)  # as an exec would; Popen returns once its own pipe is closed
        first()
        os.environ.clear()
        os.environ.update(given)
        become(argv)

    popen = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "cwd": ROOT,
        **popen,
    }
    if torch.cuda.is_available() or _has_threads_of_libraries():  # which no fork survives
        call = [sys.executable, "-m", *argv]
        return subprocess.Popen(call, env=given, preexec_fn=first, **popen)  # noqa: PLW1509
    _import_everything()
    return subprocess.Popen(argv, preexec_fn=work, **popen)  # noqa: PLW1509 - it never returns


def run(*words: str | Path, timeout: float = 200, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command as `start` does, to its end."""
    process = start(*words, **more)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def become(argv: list[str]) -> None:
    """Be the command from here on; never returns. For a process that was just forked."""
    status = 1
    try:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as every Python at its start
        sys.argv = argv
        sys.stdin, sys.stdout, sys.stderr = (open(fd, mode) for fd, mode in enumerate("rww"))  # noqa: PTH123, SIM115
        status = main(argv[1:])
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:  # noqa: BLE001 - as Python itself: shown, and status 1
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                status = status or 120
        os._exit(status)


def _has_threads_of_libraries() -> bool:
    """Return True if a library runs threads here, as OpenMP does once a test has computed with two:
    a fork would wait for them for ever."""
    tasks = Path("/proc/self/task")
    return tasks.is_dir() and len(list(tasks.iterdir())) > len(sys._current_frames())


@functools.cache
def _import_everything() -> None:
    """Train one step, which imports what trainings import: once here and not in every process."""
    with tempfile.TemporaryDirectory() as name:
        corpus = write_corpus(Path(name), passages=2)
        train(config_for(Path(name) / "run", corpus, epochs="none", num_steps=1, sample_tokens=0))
