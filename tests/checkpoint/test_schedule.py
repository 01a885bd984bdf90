"""WHEN to save: pure functions of where training stands."""

from __future__ import annotations

import pytest

from holdfast.checkpoint import AnyOf, EveryMinutes, EverySteps
from holdfast.checkpoint.schedule import Moment


def moment(step: int = 0, now: float = 0.0, *, saved: int = 0, at: float = 0.0) -> Moment:
    return Moment(step, now, saved, at)


def test_every_steps_means_multiples() -> None:
    policy = EverySteps(50)
    due = [step for step in range(1, 201) if policy(moment(step, saved=step - 1))]
    assert due == [50, 100, 150, 200]


def test_a_step_is_saved_once() -> None:
    assert not EverySteps(50)(moment(100, saved=100))
    assert not EveryMinutes(1)(moment(100, 1e9, saved=100))


def test_after_a_resume_the_multiples_stay_where_they_were() -> None:
    assert not EverySteps(50)(moment(130, saved=130))
    assert EverySteps(50)(moment(150, saved=130))


@pytest.mark.parametrize(("seconds", "due"), [(0, False), (89.9, False), (90, True), (1e9, True)])
def test_every_minutes_counts_from_the_last_save(seconds: float, due: bool) -> None:
    assert EveryMinutes(1.5)(moment(7, 1000 + seconds, saved=3, at=1000)) is due


def test_any_of_joins_and_no_policy_means_never() -> None:
    both = AnyOf([EverySteps(10), EveryMinutes(1)])
    assert both(moment(10))
    assert both(moment(3, 60))
    assert not both(moment(3, 59))
    assert not AnyOf([])(moment(10, 1e9))
