"""Power cuts, on paper and for real, in short forms: ours loses nothing, every control is caught."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import inject, power, real_cut
from tests.faults.disk import Disk
from tests.faults.inject import Call

pytestmark = pytest.mark.skipif(inject.compiled() is None, reason="needs a C compiler on Linux")

OURS = ["Ours", "OneName", "GoesBack", "SetsAside"]
BY_HAND = ["RenameNoSync", "RenameNoDirectorySync", "TorchSaveLatest"]
MUTANTS = ["NoDirectorySync", "TempElsewhere"]


def rows(savers: list[str], *args: str) -> list[dict[str, Any]]:
    """What `python -m tests.faults.power` counts."""
    wanted = [f"--saver={name}" for name in savers]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.power", "--json", *wanted, *args],
        capture_output=True, text=True, timeout=200, check=False,
        env=inject.environment(), cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.mark.parametrize("savers", [OURS[:2], OURS[2:]])
def test_no_state_that_a_power_cut_may_leave_takes_back_an_announcement(savers: list[str]) -> None:
    for row in rows(savers, "--quick"):
        assert (row["lost"], row["wrong"], row["human"]) == (0, 0, 0), row["examples"]
        assert row["recovered"] == row["points"] > row["states"] == power.QUICK
        assert row["repeated"] <= 1


def test_every_control_is_caught() -> None:
    for row in rows([*BY_HAND, *MUTANTS], "--budget", "20"):
        assert row["lost"] + row["wrong"] + row["human"] > 0, row


def test_real_power_cuts() -> None:
    reason = real_cut.missing()
    if reason:
        pytest.skip(reason)
    [ours, *controls] = rows(["Ours", *BY_HAND], "--real", "5")
    assert (ours["points"], ours["recovered"]) == (5, 5), ours["examples"]
    for row in controls:
        assert row["recovered"] < row["points"], row
    assert real_cut.MOUNT_NAME not in Path("/proc/mounts").read_text()


def said(step: int) -> Call:
    return Call(0, 1, "said", 0, 0, f"durable {step}", "")


def trace(*calls: Call, announced: int = 0) -> power.Trace:
    return power.Trace("/r", Disk(), announced, calls)


def test_an_announcement_binds_from_the_next_moment_on() -> None:
    calls = [Call(1, 1, "open", 7, 0, "/r/a", ""), said(3), Call(2, 1, "fsync", 7, 0, "/r/a", "")]
    moments = [(cut.calls, cut.announced) for cut, _disk in power.cuts(trace(*calls, announced=2))]
    assert moments == [(0, 2), (1, 2), (1, 3), (2, 3)]


def test_a_state_of_several_cuts_is_built_once_and_counts_for_each() -> None:
    calls = [
        Call(1, 1, "open", 7, 0, "/r/a", ""),
        Call(2, 1, "fsync", 8, 0, "/r", ""),
        said(1),
        Call(3, 1, "fsync", 7, 0, "/r/a", ""),
    ]
    lefts = power.choose(trace(*calls), None, 1)
    counted = {len(left.state.files): sorted(cut.calls for cut in left.cuts) for left in lefts}
    assert counted == {0: [0, 1], 1: [1, 2, 2, 3]}


def test_a_budget_is_kept_and_the_same_seed_chooses_the_same() -> None:
    calls = [
        call
        for number in range(8)
        for call in (
            Call(1, 1, "open", number, 0, f"/r/{number}", ""),
            Call(2, 1, "write", number, 0, f"/r/{number}", "", b"x" * 5000),
        )
    ]
    once, again = (power.choose(trace(*calls), 30, 7) for _ in range(2))
    assert len(once) == 30
    assert [left.state.digest for left in once] == [left.state.digest for left in again]
