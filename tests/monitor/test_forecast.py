"""When the disk will be full: by the plan and by retention, else by what has been."""

from __future__ import annotations

import math
from typing import Any

import pytest

from holdfast.checkpoint.rundir.entries import Entry
from holdfast.monitor.forecast import Disk, Plan, forecast

SIZE = 1000
HOUR_OF_EPOCHS = 36  # at 1 s a step and 100 steps an epoch


def entries(*kinds: str) -> list[Entry]:
    """Checkpoints of these kinds, the newest first, ten minutes between two."""
    count = len(kinds)
    return [
        Entry(
            id=f"id{i}", run_id="r", generation=1, step=100 * (count - i), sequence=count - i,
            parent=None, kind=kind, reason="", epoch=None,
            created=f"2026-03-01T{12 + (count - i) // 6:02}:{(count - i) % 6}0:00+00:00",
            metrics={}, size=SIZE, loss=None, names=(f"{i}.pt",),
        )
        for i, kind in enumerate(kinds)
    ]  # fmt: skip


def plan(keep: int, steps_left: int | None = None, **every: int) -> Plan:
    return Plan(keep, every or {"epoch": 100}, 1.0, steps_left)


def of(found: list[Entry], plan: Plan | None, free: int = 10**6, *, settled: bool = False) -> Disk:
    return forecast(found, free, plan, settled=settled)


@pytest.mark.parametrize(("have", "coming"), [(0, 3), (1, 2), (2, 1), (3, 0), (4, 0)])
def test_a_kind_grows_until_as_many_lie_there_as_are_kept(have: int, coming: int) -> None:
    """Four of three: the best is kept besides the last three."""
    found = of(entries(*["epoch"] * have, "temp"), plan(keep=3))
    assert found.growth == (HOUR_OF_EPOCHS * SIZE if coming else 0.0)
    assert found.to_come == coming * SIZE


def test_each_kind_is_kept_for_itself() -> None:
    found = of(entries("step", "epoch", "epoch"), plan(keep=2, epoch=100, step=50))
    assert found.growth == 2 * HOUR_OF_EPOCHS * SIZE, "steps only: twice as many"
    assert found.to_come == SIZE


def test_what_keeps_all_grows_as_long_as_it_trains() -> None:
    assert of(entries("epoch"), plan(keep=0)).to_come == math.inf
    assert of(entries("epoch"), plan(keep=0, steps_left=250)).to_come == 3 * SIZE
    assert of(entries("epoch"), plan(keep=0, steps_left=0)).growth == 0.0


@pytest.mark.parametrize(
    ("free", "hours"),
    [
        (100 * SIZE, math.inf),
        (6 * SIZE, math.inf),
        # Two to come, two that roll, a best of before, and the one that is written before one goes.
        (5 * SIZE, 5 / HOUR_OF_EPOCHS),
        (0, 0.0),
    ],
)
def test_the_disk_is_full_only_where_what_is_to_come_does_not_fit(free: int, hours: float) -> None:
    assert of(entries("epoch"), plan(keep=3), free).hours_left == pytest.approx(hours)


def test_a_settled_run_never_fills_the_disk_but_its_next_checkpoint_may_not_fit() -> None:
    found = of(entries("epoch", "epoch", "epoch"), plan(keep=3), SIZE - 1)
    assert (found.hours_left, found.fits) == (math.inf, False)
    assert of(entries("epoch"), plan(keep=3), SIZE).fits


def test_without_a_plan_the_past_is_the_measure() -> None:
    found = of(entries("step", "step", "temp", "step", "step"), None, 60 * SIZE)
    # The four lasting ones are 40 minutes apart in all: three came in that time.
    assert found.growth == pytest.approx(4.5 * SIZE)
    assert found.hours_left == pytest.approx(60 / 4.5)
    assert of(entries("step", "step"), None, settled=True).growth == 0.0
    assert of(entries("step"), None).growth == 0.0
    assert of([], None) == Disk(10**6, 0, 0, 0.0)


def test_links_count_once() -> None:
    found = entries("epoch")
    assert of(found * 3, None).used == SIZE


@pytest.mark.parametrize(
    ("config", "pace", "expected"),
    [
        ({"keep_last_n": 3, "save_every_epoch": True, "save_every": 50}, 1.0,
         Plan(3, {"epoch": 100, "step": 50}, 1.0, 7)),
        ({"keep_last_n": 0, "save_every_epoch": False, "save_every": None}, 2.0,
         Plan(0, {}, 2.0, 7)),
        ({"keep_last_n": 3, "save_every_epoch": True}, None, None),
        ({"keep_last_n": "3"}, 1.0, None),
        ({}, 1.0, None),
    ],
)  # fmt: skip
def test_a_plan_is_read_from_the_configuration(
    config: dict[str, Any], pace: float | None, expected: Plan | None
) -> None:
    assert Plan.of({"checkpoint": config}, 100, 7, pace) == expected


def test_no_configuration_is_no_plan() -> None:
    assert Plan.of({}, 100, 7, 1.0) is None
    assert Plan.of({"checkpoint": None}, 100, 7, 1.0) is None


def test_what_comes_and_goes_needs_its_room_too() -> None:
    """Three to be kept, a second rolling one, a best of before these, and the one being written."""
    found = of(entries("temp"), plan(keep=3), free=5 * SIZE)
    assert (found.to_come, found.besides) == (3 * SIZE, 2 * SIZE)
    assert found.hours_left < math.inf
    assert of(entries("temp"), plan(keep=3), free=6 * SIZE).hours_left == math.inf
