"""Which moments and states a power cut is tried at. That ours loses nothing and every control is
caught is a row of the matrix."""

from __future__ import annotations

from holdfast.prove.disk import Disk
from tests.faults import power
from tests.faults.inject import Call


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
