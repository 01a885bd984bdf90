"""What saving and resuming take beside the live state: counted, as the documentation says it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import CheckpointManager
from holdfast.checkpoint.format import reading
from holdfast.checkpoint.rundir import shared_memory
from tests.support import in_child

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

SIZE = 256 << 20  # bytes of state: a few MB of everything else are 2 % of it
SCRATCH = 2 * reading.CHUNK  # of the two threads that read back, whatever the size of the state


def resident(peak: bool = False) -> int:
    """Bytes of memory that this process holds, or has held at most since `forget_peak`."""
    wanted = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(wanted))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def make_state() -> dict[str, Any]:
    return {f"w{i}": torch.full((SIZE >> 4,), float(i)) for i in range(4)}


def measured(work: Callable[[], None]) -> None:
    """Run `work` in a process that has nothing else in its memory than the tests' imports."""
    assert in_child(work) == 0


def test_a_save_takes_one_copy_of_the_state(tmp_path: Path) -> None:
    def work() -> None:
        state = make_state()
        with CheckpointManager(tmp_path, state) as manager:
            before = resident()
            forget_peak()
            saved = manager.save(step=1, strict=True)
            assert saved is not None
            taken = saved.entry.size + SCRATCH
            assert resident(peak=True) - before == pytest.approx(taken, rel=0.02)
            for step in (2, 3, 4):
                manager.save(step=step, strict=True)
            assert resident(peak=True) - before == pytest.approx(taken, rel=0.02)

    measured(work)


def test_without_room_for_a_copy_a_save_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.checkpoint.save.slots.available_memory", lambda: 0)

    def work() -> None:
        state = make_state()
        with CheckpointManager(tmp_path, state) as manager:
            before = resident()
            forget_peak()
            manager.save(step=1, strict=True)
            assert resident(peak=True) - before < 0.1 * SIZE

    measured(work)


@pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")
def test_the_memory_tier_takes_three_copies_in_shared_memory(tmp_path: Path) -> None:
    def work() -> None:
        state = {"w": torch.zeros(SIZE >> 4)}
        with CheckpointManager(tmp_path, state, memory_every=1) as manager:
            manager.resume()
            for step in range(1, 6):
                manager.after_step(step)
                manager.wait()
            saved = manager.save(step=6, strict=True)
            assert saved is not None
            (remains,) = [each for each in shared_memory.remains() if each.run == tmp_path]
            assert remains.size == pytest.approx(3 * saved.entry.size, rel=0.02)

    measured(work)


def test_resuming_takes_one_tenth_more_than_the_state_at_most(tmp_path: Path) -> None:
    state = make_state()
    with CheckpointManager(tmp_path, state) as manager:
        manager.save(step=1, strict=True)
    del state

    def work() -> None:
        live = make_state()
        with CheckpointManager(tmp_path, live) as manager:
            before = resident()
            forget_peak()
            assert manager.resume() is not None
            assert resident(peak=True) - before < 1.1 * SIZE

    measured(work)
