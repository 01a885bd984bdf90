"""CPU, memory and GPUs of this machine, and what of them a training process takes.

Everything is None where there is nothing to ask: no psutil, no GPU, a training elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from dataclasses import dataclass
from typing import Any

GPU_EVERY = 5.0  # seconds: nvidia-smi takes far longer than everything else here
GPU_TIMEOUT = 5.0
_CPU_EVERY = 0.1  # seconds: over a shorter time its load is chance
_GPU_RETRY = 60.0  # after a failure: a driver that hangs is left alone for a while
_QUERY = "name,utilization.gpu,memory.used,memory.total,temperature.gpu"
_START_SLACK = 5.0  # seconds by which a process may seem younger than the run that it trains


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; `used` and `total` bytes of its memory, `percent` of its time, `celsius`."""

    name: str
    percent: float | None
    used: int | None
    total: int | None
    celsius: float | None


@dataclass(frozen=True, slots=True)
class Machine:
    """A moment of this machine.

    `cpu` is percent of all `cores`; `process_cpu` percent of one core, so that 400 are four busy
    ones; memory in bytes.
    """

    cores: int | None = None
    cpu: float | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    process_cpu: float | None = None
    process_memory: int | None = None
    gpus: tuple[Gpu, ...] = ()


class Probe:
    """Asks the machine; figures of the CPU are of the time since the last question."""

    def __init__(self) -> None:
        self._psutil = _psutil()
        self._processes: dict[int, Any] = {}
        self._cpu: tuple[float, float | None] = (0.0, None)  # when it was asked, and the answer
        self._gpus: tuple[Gpu, ...] = ()
        self._gpus_next = 0.0  # when to ask again, time.monotonic()
        if self._psutil is not None:
            self._psutil.cpu_percent()

    def sample(self, pid: int | None = None, started: float = 0.0) -> Machine:
        """Return the machine now, and its process `pid`, which has run since `started` (seconds of
        the epoch) or longer; a younger one has only inherited its number."""
        gpus = self._ask_gpus()
        if self._psutil is None:
            return Machine(os.cpu_count(), gpus=gpus)
        memory = self._psutil.virtual_memory()
        asked, percent = self._cpu
        if time.monotonic() - asked >= _CPU_EVERY:
            percent = self._psutil.cpu_percent()
            self._cpu = time.monotonic(), percent
        cpu, used = self._of_process(pid, started)
        return Machine(
            os.cpu_count(),
            percent,
            memory.total - memory.available,
            memory.total,
            cpu,
            used,
            gpus,
        )

    def _of_process(self, pid: int | None, started: float) -> tuple[float | None, int | None]:
        if pid is None:
            return None, None
        try:
            process = self._processes.get(pid)
            if process is None:
                process = self._processes[pid] = self._psutil.Process(pid)
                process.cpu_percent()  # of now on
            if process.create_time() > started + _START_SLACK:
                return None, None
            return process.cpu_percent(), process.memory_info().rss
        except (self._psutil.Error, OSError):
            self._processes.pop(pid, None)
            return None, None

    def _ask_gpus(self) -> tuple[Gpu, ...]:
        now = time.monotonic()
        if now >= self._gpus_next:
            try:
                self._gpus, self._gpus_next = _nvidia_smi(), now + GPU_EVERY
            except FileNotFoundError:
                self._gpus_next = float("inf")
            except (OSError, subprocess.SubprocessError):
                self._gpus, self._gpus_next = (), now + _GPU_RETRY
        return self._gpus


def _psutil() -> Any:
    try:
        import psutil
    except ImportError:  # comes with the extras; the rest is worth showing without it
        return None
    return psutil


def _nvidia_smi() -> tuple[Gpu, ...]:
    """Ask nvidia-smi. Raises OSError or SubprocessError where it cannot answer."""
    call = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    done = subprocess.run(
        call,
        capture_output=True,
        text=True,
        timeout=GPU_TIMEOUT,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return tuple(gpu for line in done.stdout.splitlines() if (gpu := gpu_of(line)) is not None)


def gpu_of(line: str) -> Gpu | None:
    """Parse a line of nvidia-smi's CSV: memory is in MiB, and "[N/A]" stands for unknown."""
    parts = [part.strip() for part in line.rsplit(",", 4)]
    if len(parts) != 5:
        return None
    numbers: list[float | None] = []
    for part in parts[1:]:
        value = None
        with contextlib.suppress(ValueError):
            value = float(part)
        numbers.append(value)
    percent, used, total, celsius = numbers
    mib = 1 << 20
    return Gpu(
        parts[0],
        percent,
        None if used is None else int(used * mib),
        None if total is None else int(total * mib),
        celsius,
    )
