"""Memory, shared memory, versions and GPU, each with its bounds."""

from __future__ import annotations

import importlib.metadata
import types
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.save import MEMORY_SLOTS
from holdfast.manage.doctor import machine_checks
from holdfast.manage.doctor.findings import BAD, OK, UNKNOWN, WARN

GIB = 1 << 30


def test_everything_is_looked_at() -> None:
    found = {finding.name: finding for finding in machine_checks.machine_checks(0)}
    assert {"memory", "shared_memory", "python", "extras", "torch", "gpu"} <= set(found)
    assert found["python"].state == found["torch"].state == OK


@pytest.mark.parametrize(
    ("free", "needed", "state"),
    [(GIB - 1, 0, WARN), (GIB, 0, OK), (99, 100, BAD), (100, 100, WARN), (GIB + 100, 100, OK),
     (1 << 62, 0, UNKNOWN)],
)  # fmt: skip
def test_memory(free: int, needed: int, state: str) -> None:
    assert machine_checks.main_memory(free, needed).state == state


@pytest.mark.parametrize(
    ("free", "needed", "state"),
    [(64 << 20, 0, WARN), ((64 << 20) + 1, 0, OK), (3 * GIB, GIB, OK), (3 * GIB - 1, GIB, WARN)],
)
def test_shared_memory_holds_three_snapshots(
    monkeypatch: pytest.MonkeyPatch, free: int, needed: int, state: str
) -> None:
    monkeypatch.setattr(shared_memory, "usable", lambda: True)
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: free)
    monkeypatch.setattr(shared_memory, "PLACE", Path("/"))
    found = machine_checks.snapshots_in_memory(needed)
    assert (found.state, bool(found.advice)) == (state, state == WARN)


def test_the_number_of_snapshots_is_the_engines() -> None:
    assert machine_checks.SNAPSHOTS == MEMORY_SLOTS


def test_shared_memory_that_is_off_or_closed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "usable", lambda: False)
    assert machine_checks.snapshots_in_memory(0).state == WARN
    monkeypatch.setenv("HOLDFAST_DISABLE", "sharedmemory")
    assert "switched off" in machine_checks.snapshots_in_memory(0).found


@pytest.mark.parametrize(
    ("text", "removes"),
    [
        ("", True),
        ("[Login]\n#RemoveIPC=no\n", True),
        ("[Login]\nRemoveIPC=no\n", False),
        ("RemoveIPC = no\nRemoveIPC=yes\n", True),
        ("removeipc=False\n", False),
    ],
)
def test_what_logind_does_at_logout(text: str, removes: bool) -> None:
    assert machine_checks.removes_ipc(text) is removes


@pytest.mark.parametrize(
    ("version", "state"),
    [("2.13.0+cpu", OK), ("2.10.0", OK), ("2.9.1", BAD), ("3.0.0a0", OK), ("1.13.1", BAD)],
)
def test_an_old_torch_is_not_safe(version: str, state: str) -> None:
    assert machine_checks.torch_version(version).state == state


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "transformers":
            return "5.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    extras = machine_checks.extras()
    assert (
        extras.state == WARN and extras.advice == "pip install 'holdfast-train[train,tensorboard]'"
    )
    assert "train: missing tokenizers, psutil" in extras.found


def _torch(cuda: bool, count: int = 1) -> Any:
    space = types.SimpleNamespace
    return space(
        cuda=space(
            is_available=lambda: cuda,
            device_count=lambda: count,
            get_device_properties=lambda _i: space(name="NVIDIA X"),
            mem_get_info=lambda _i: (3 * GIB, 4 * GIB),
        ),
        backends=space(mps=space(is_available=lambda: False)),
        version=space(cuda="12.8", hip=None),
    )


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "nvidia_driver", lambda: "550.54")
    found = machine_checks.gpu(_torch(True, 2), "2.13.0")
    assert (found.state, found.found) == (
        OK, "2 × NVIDIA X, 3.00 GiB free of 4.00 GiB; driver 550.54, CUDA 12.8",
    )  # fmt: skip
    unused = machine_checks.gpu(_torch(False), "2.13.0+cpu")
    assert unused.state == WARN and "2.13.0+cpu cannot use it" in unused.found
    monkeypatch.setattr(machine_checks, "nvidia_driver", lambda: None)
    assert machine_checks.gpu(_torch(False), "2.13.0").state == OK


def test_the_driver_is_read_from_the_kernel(tmp_path: Path) -> None:
    path = tmp_path / "version"
    assert machine_checks.nvidia_driver(path) is None
    path.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
    )
    assert machine_checks.nvidia_driver(path) == "570.86.15"
