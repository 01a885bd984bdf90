"""What every test starts from: English and signals that arrive, whatever the machine or the test
before it has set; and what every test leaves behind: no process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

# Two workers of pytest share two cores: threads of torch that spin for each other would make every
# test ten times as slow. Those that tokenizers keeps would forbid forks (processes.py).
# Inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from holdfast.i18n import set_language

# `nohup make test &` and `trap '' INT` have signals ignored, and every process that a test starts
# would inherit that: Ctrl-C would never end it. A handler is not inherited.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for _name in ("SIGTERM", "SIGHUP", "SIGUSR1"):
    if getattr(signal, _name, None) and signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), lambda _number, _frame: None)

if sys.platform.startswith("linux"):  # the children of a child that has ended become ours
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
_STAY = ("resource_tracker", "forkserver", "compile_worker")  # Python and torch keep these
_END_WITHIN = 3.0  # seconds for a process that is ending already


def _processes() -> dict[tuple[int, float], psutil.Process]:
    """All processes below this one, but those that have ended and wait for their parent."""
    with contextlib.suppress(AttributeError):
        try:  # looking through every process of the machine takes milliseconds
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return {}
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid, process.create_time()] = process
    return found


def _left(before: dict[tuple[int, float], psutil.Process]) -> list[psutil.Process]:
    """Processes that came after `before`, and belong to none of those (a server of a module may
    start a worker at any time)."""
    old, ours, result = {pid for pid, _born in before}, os.getpid(), []
    for key, process in _processes().items():
        with contextlib.suppress(psutil.Error):
            above = [parent.pid for parent in process.parents()]
            above = above[: above.index(ours)] if ours in above else above
            if key in before or old.intersection(above):
                continue
            if not any(word in " ".join(process.cmdline()) for word in _STAY):
                result.append(process)
    return result


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """A process that a test has begun ends with it. Set up first, this is torn down last."""
    before = _processes()
    yield
    deadline = time.monotonic() + _END_WITHIN
    while (left := _left(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    told = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            told.append(f"{process.pid}: {' '.join(process.cmdline())}")
            process.kill()
    for process in left:
        with contextlib.suppress(psutil.Error, ChildProcessError):
            process.wait(5)
    if told:
        pytest.fail("left running: " + "; ".join(told), pytrace=False)


@pytest.fixture(autouse=True)
def signals_go_back() -> Iterator[None]:
    """Handlers that a library sets (a transformers Trainer with jit checkpoints) end with the test:
    a test of signals on the same worker would be answered by them."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def the_repository_is_left_as_it_was() -> Iterator[None]:
    """Tests write into directories of their own: a file beside the Makefile is an error here."""
    place = Path(__file__).parents[1]
    before = set(place.iterdir())
    yield
    new = sorted(each.name for each in set(place.iterdir()) - before if each.name[0] != ".")
    assert not new, f"tests have left {new} in {place}"


@pytest.fixture(autouse=True)
def english() -> Iterator[None]:
    before = os.environ.get("LANGUAGE")
    set_language("en")
    yield
    set_language("en")
    if before is None:
        os.environ.pop("LANGUAGE", None)
    else:
        os.environ["LANGUAGE"] = before


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where there is one: for sweeps that sync thousands of files."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes file systems of a few megabytes, with the errors of real full ones. Needs root."""
    mounted: list[Path] = []

    def make(size: int, *, inodes: int = 0) -> Path:
        """An empty file system of `size` bytes and so many `inodes` (0: enough)."""
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        options = f"size={size},nr_inodes={inodes}"
        call = ["mount", "-t", "tmpfs", "-o", options, "holdfast-test", str(place)]
        try:
            done = subprocess.run(call, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"there is no mount here: {error}")
        if done.returncode:
            pytest.skip(f"this user mounts nothing: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
