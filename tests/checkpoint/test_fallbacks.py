"""Every fast path can be missing: what is saved and found again is the same without it."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import CheckpointManager, load, verify
from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.system import direct, filesystem
from tests.support import in_child

PATHS = ("direct", "hardlinks", "reflink", "fallocate", "sharedmemory")


def make_state(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(700, 900)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 700)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize("missing", [*((path,) for path in PATHS), ("hardlinks", "reflink"), PATHS])
def test_without_a_fast_path_everything_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HOLDFAST_DISABLE", ",".join(missing))
    state = make_state(1)
    with CheckpointManager(tmp_path, state, memory_every=1, overlap=True) as manager:
        manager.resume()
        for step in (1, 2, 3):
            manager.after_step(step)
            manager.save_async(step=step, epoch=step, kind="epoch")
            manager.wait()
    other = make_state(2)
    with CheckpointManager(tmp_path, other) as manager:
        resumed = manager.resume()
    assert resumed is not None
    assert resumed.step == 3
    for mine, theirs in zip(state["model"].parameters(), other["model"].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for name in ("latest.pt", "model.pt", "model_epoch_3.pt"):
        assert verify(tmp_path / name) is None
        assert torch.load(tmp_path / name, weights_only=True)["global_step"] == 3
    linked = (tmp_path / "latest.pt").samefile(tmp_path / "model_epoch_3.pt")
    assert linked is ("hardlinks" not in missing)


def test_a_file_system_that_takes_the_flag_and_refuses_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems: the open succeeds, the aligned write is EINVAL."""
    import fcntl

    real, refused = os.pwrite, []

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    state = {"w": torch.arange(9_000_000)}
    with CheckpointManager(tmp_path, state) as manager:
        manager.save(step=1, strict=True)
    assert refused
    assert torch.equal(load(tmp_path / "latest.pt", only="w"), state["w"])


def test_a_short_direct_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut at a place that no direct write may begin at: the rest goes through the page cache."""
    real = os.pwrite

    def pwrite(fd: int, data: Any, offset: int) -> int:
        return real(fd, data[:5001], offset) if len(data) > 5001 and not offset else real(
            fd, data, offset)  # fmt: skip

    monkeypatch.setattr(os, "pwrite", pwrite)
    state = {"w": torch.arange(9_000_000)}
    with CheckpointManager(tmp_path, state) as manager:
        manager.save(step=1, strict=True)
    assert verify(tmp_path / "latest.pt") is None


def test_on_macos_the_cache_is_switched_off_by_fcntl(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("fcntl.fcntl", lambda *arguments: calls.append(arguments))
    assert direct.switch_on(7)
    assert calls == [(7, 48, 1)], "F_NOCACHE"
    monkeypatch.setattr("fcntl.fcntl", _refuse)
    assert not direct.switch_on(7)


def test_where_there_is_no_direct_io_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows: no flag; and no shared memory that outlives a process."""
    monkeypatch.delattr(os, "O_DIRECT")
    assert not direct.switch_on(7)
    direct.switch_off(7)
    monkeypatch.setattr(sys, "platform", "win32")
    assert not shared_memory.usable()
    assert shared_memory.remains() == []


def _refuse(*_arguments: int) -> None:
    raise OSError(errno.ENOTSUP, "Operation not supported")


def test_what_is_missing_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOLDFAST_DISABLE", "direct")
    monkeypatch.setattr(filesystem, "said", set())
    caplog.set_level("INFO", logger="holdfast")
    with CheckpointManager(tmp_path, {"w": torch.zeros(10_000)}) as manager:
        for step in (1, 2, 3):
            manager.save(step=step, strict=True)
    lines = [record.message for record in caplog.records if "page cache" in record.message]
    assert len(lines) == 1


def test_a_forked_child_neither_saves_nor_takes_anything_away(tmp_path: Path) -> None:
    """A data-loader worker inherits the manager: its end must not remove the parent's memory."""
    state = {"w": torch.zeros(1000)}
    with CheckpointManager(
        tmp_path, state, memory_every=1 if shared_memory.usable() else 0
    ) as manager:
        manager.resume()
        manager.after_step(1)
        manager.wait()
        before = manager.memory_step
        assert in_child(manager.close) == 0
        manager.after_step(2)
        manager.wait()
        assert manager.memory_step >= before
        assert manager.save(step=3, strict=True) is not None


def test_on_macos_the_drive_is_told_to_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync(2) there leaves the bytes in the drive's cache; some network file systems lack more."""
    import fcntl

    calls: list[str] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda _fd, command: calls.append(f"fcntl {command}"))
    monkeypatch.setattr(os, "fsync", lambda _fd: calls.append("fsync"))
    filesystem.sync_file(7)
    assert calls == ["fcntl 51"]
    monkeypatch.setattr(fcntl, "fcntl", _refuse)
    filesystem.sync_file(7)
    assert calls == ["fcntl 51", "fsync"]


def test_without_positional_reads_and_writes_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has neither; two threads write one file by turns."""
    monkeypatch.setenv("HOLDFAST_DISABLE", "direct,sharedmemory")
    for name in ("pwrite", "preadv", "posix_fallocate", "posix_fadvise"):
        monkeypatch.delattr(os, name)
    state = make_state(1)
    state["large"] = torch.arange(6_000_000)
    with CheckpointManager(tmp_path, state) as manager:
        manager.save_async(step=1)
        manager.save(step=2, strict=True)
    assert verify(tmp_path / "latest.pt") is None
    found = load(tmp_path / "latest.pt")
    assert torch.equal(found["large"], state["large"])
    assert torch.equal(found["model"]["weight"], state["model"].weight)


def test_windows_has_no_directory_to_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem.os, "name", "nt")
    monkeypatch.setattr(os, "open", _refuse)
    filesystem.sync_directory(tmp_path)
