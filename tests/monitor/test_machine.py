"""What the machine and the training process take; None where there is nothing to ask."""

from __future__ import annotations

import os
import stat
import sys
import time
from pathlib import Path

import psutil
import pytest

from holdfast.monitor import machine
from holdfast.monitor.machine import Gpu, Machine, Probe, gpu_of

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing in it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def install(path: Path, script: str) -> Path:
    """A program nvidia-smi that counts in `calls` how often it is called."""
    program = path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho x >> {path}/calls\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return path / "calls"


def test_a_machine_without_a_gpu(path: Path) -> None:
    found = Probe().sample()
    assert found.gpus == ()
    assert found.cores == os.cpu_count()
    assert found.memory_total == psutil.virtual_memory().total
    assert found.memory_used is not None
    assert 0 < found.memory_used < found.memory_total
    assert found.cpu is not None
    assert 0 <= found.cpu <= 100
    assert (found.process_cpu, found.process_memory) == (None, None)
    assert path.exists()


@pytest.mark.usefixtures("path")
def test_the_process_that_trains(  # this one stands for it
) -> None:
    probe = Probe()
    probe.sample(os.getpid(), time.time())
    end = time.process_time() + 0.15
    while time.process_time() < end:
        pass
    found = probe.sample(os.getpid(), time.time())
    assert found.process_memory == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert found.process_cpu is not None
    assert found.process_cpu > 5


@pytest.mark.usefixtures("path")
def test_a_process_that_is_gone_or_has_only_inherited_the_number_is_not_shown() -> None:
    probe = Probe()
    free = max(psutil.pids()) + 1000
    assert probe.sample(free, time.time()).process_cpu is None
    long_ago = psutil.Process().create_time() - 3600
    assert probe.sample(os.getpid(), long_ago).process_memory is None


@pytest.mark.usefixtures("path")
def test_without_psutil_there_are_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert Probe().sample(os.getpid(), time.time()) == Machine(os.cpu_count())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("NVIDIA H200, 87, 12345, 143771, 54",
         Gpu("NVIDIA H200", 87.0, 12345 * MIB, 143771 * MIB, 54.0)),
        ("A GPU, with a comma, 0, 1, 2, 3", Gpu("A GPU, with a comma", 0.0, MIB, 2 * MIB, 3.0)),
        ("NVIDIA GB10, 5, [N/A], [N/A], [N/A]", Gpu("NVIDIA GB10", 5.0, None, None, None)),
        ("No devices were found", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_line_of_nvidia_smi(line: str, expected: Gpu | None) -> None:
    assert gpu_of(line) == expected


def test_gpus_are_asked_for_now_and_then(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(path, "echo 'A, 1, 2, 3, 4'; echo 'B, 5, 6, 7, 8'")
    probe = Probe()
    for _look in range(5):
        assert [gpu.name for gpu in probe.sample().gpus] == ["A", "B"]
    assert calls.read_text().count("x") == 1
    monkeypatch.setattr(machine, "GPU_EVERY", 0.0)
    probe = Probe()
    probe.sample()
    probe.sample()
    assert calls.read_text().count("x") == 3


def test_a_driver_that_fails_or_hangs_is_left_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install(path, "echo NVIDIA-SMI has failed >&2; exit 9")
    probe = Probe()
    assert (probe.sample().gpus, probe.sample().gpus) == ((), ())
    assert calls.read_text().count("x") == 1
    monkeypatch.setattr(machine, "GPU_TIMEOUT", 0.2)
    calls = install(path, "exec /bin/sleep 30")
    began = time.monotonic()
    probe = Probe()
    assert (probe.sample().gpus, probe.sample().gpus) == ((), ())
    assert time.monotonic() - began < 10
