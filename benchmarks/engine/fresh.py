"""Measurements that need a new process: its first save, and the memory that one save takes.

`python -m benchmarks.engine.fresh first|memory NAME SIZE DIR` prints one JSON object.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil

from benchmarks.engine.watch import ROOT

_SHM = Path("/dev/shm")
_SAMPLE = 0.02  # s


def in_process(mode: str, name: str, size: str, directory: Path) -> dict[str, float]:
    """Run `mode` ("first" or "memory") for the peer `name` in a new process. Raises OSError."""
    arguments = [mode, name, size, str(directory.absolute())]
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.engine.fresh", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, problems = child.communicate()
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        shutil.rmtree(directory, ignore_errors=True)
    if child.returncode != 0:
        why = problems.strip().splitlines()[-1:] or [str(child.returncode)]
        raise OSError(f"the new process failed: {why[0]}")
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def first_save(name: str, size: str, directory: Path) -> dict[str, float]:
    """Measure the first save of a process, after one step of training."""
    from benchmarks.engine.frameworks import PEERS
    from benchmarks.engine.workload import Workload

    work = Workload(size)
    peer = PEERS[name](work, directory)
    work.step()  # precedes a save in every training; a saver may prepare in the background here
    peer.prepare()
    timing = peer.save(1)
    peer.settle()
    peer.close()
    return {"first_stall": timing.stall, "first_durable": timing.durable}


def memory(name: str, size: str, directory: Path) -> dict[str, float]:
    """Measure the peak memory of one save beyond the training, in bytes, without the page cache.

    Holdfast is counted from before the manager is made; a framework only after its set-up, so that
    its modules are not counted.
    """
    from benchmarks.engine.frameworks import PEERS
    from benchmarks.engine.peers import Ours
    from benchmarks.engine.workload import Workload

    work = Workload(size)
    work.step()
    with contextlib.ExitStack() as stack:
        if issubclass(PEERS[name], Ours):
            peak = stack.enter_context(_Peak())
            peer = PEERS[name](work, directory)
        else:
            peer = PEERS[name](work, directory)
            peer.prepare()
            peak = stack.enter_context(_Peak())
        peer.begin(peer.target(1))()
        peer.settle()
    peer.close()
    return {"peak": float(peak.extra), "state": float(work.nbytes)}


class _Peak:
    """Record the peak memory of this process and its children, less their memory at the start."""

    def __enter__(self) -> _Peak:
        _trim()
        self._before, self._shm, self.extra = _held(), _shared(), 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            over = self._over.is_set()
            private, shared = _held()
            # Shared memory that is allocated and not mapped yet is seen only in the file system.
            shared = max(shared - self._before[1], _shared() - self._shm)
            self.extra = max(self.extra, private - self._before[0] + shared)
            if over:
                return
            self._over.wait(_SAMPLE)


def _trim() -> None:
    """Return freed memory to the system, so that a save cannot reuse it unseen."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _held() -> tuple[int, int]:
    """Return the bytes of private and of shared memory of this process and its children.

    A page that several processes share is divided among them.
    """
    private = shared = 0
    here = psutil.Process()
    for process in (here, *here.children(recursive=True)):
        try:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:  # it has ended since
            continue
        kib = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
        private += int(kib["Pss_Anon"]) * 1024
        shared += int(kib["Pss_Shmem"]) * 1024
    return private, shared


def _shared() -> int:
    return shutil.disk_usage(_SHM).used


if __name__ == "__main__":
    _mode, _name, _size, _directory = sys.argv[1:]
    _work = {"first": first_save, "memory": memory}[_mode]
    print(json.dumps(_work(_name, _size, Path(_directory))), flush=True)
    os._exit(0)  # a framework may hang at exit
