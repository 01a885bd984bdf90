"""WHEN to save: pure functions of where training stands."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from holdfast.checkpoint import AnyOf, EveryEpoch, EveryMinutes, EverySteps, OnBest
from holdfast.checkpoint.policy.when import MemoryPace, Moment
from tests.support import Toy


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


def test_every_epoch_saves_once_in_each_but_the_first() -> None:
    def asked(epoch: int | None, last: int | None) -> bool:
        return EveryEpoch()(Moment(9, 0.0, 0, 0.0, epoch, last))

    assert not asked(None, None)
    assert not asked(1, 1)
    assert asked(2, 1)
    assert not asked(2, 2)
    assert asked(4, 2), "an epoch may have been too short to save in"


def test_on_best_saves_what_is_better_than_all_before(tmp_path: Path) -> None:
    toy, saved = Toy(), []
    with toy.manager(tmp_path, save_when=[OnBest()], keep_last=1) as manager:
        for step, loss in enumerate([3.0, 4.0, math.nan, 2.5, 2.5, 2.0], 1):
            toy.step()
            if manager.after_step(step, metrics={"val_loss": loss}) is not None:
                saved.append(step)
            manager.wait()
    assert saved == [1, 4, 6]
    with Toy(seed=1).manager(tmp_path, save_when=[OnBest()]) as manager:
        resumed = manager.resume(tmp_path / "best_model.pt")
        assert resumed is not None
        assert resumed.step == 6
        assert manager.after_step(7, metrics={"val_loss": 2.1}) is None, "the best is remembered"
        assert manager.after_step(8, metrics={"val_loss": 1.9}) is not None


def test_a_loop_that_tells_its_epochs_is_saved_in_each(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, save_when=[EveryEpoch()]) as manager:
        for step in range(1, 10):
            toy.step()
            manager.after_step(step, epoch=1 + (step - 1) // 3)
            manager.wait()
        assert [(e.step, e.epoch) for e in manager.list()] == [(7, 3), (4, 2)]


def test_a_start_has_a_snapshot_at_each_of_its_first_steps_and_then_as_many_as_they_cost() -> None:
    pace = MemoryPace()
    taken, last = [], 0
    for step in range(1, 400):
        pace.step(0.05)
        if step - last >= pace.interval:
            last = step
            taken.append(step)
            pace.cost(0.03)  # 60 % of a step: a hundredth of the time is one in 60
    first = list(range(1, MemoryPace.AT_FIRST + 1))
    assert taken[: len(first)] == first
    assert {b - a for a, b in zip(taken[len(first) - 1 :], taken[len(first) :])} == {60}  # noqa: B905
    assert MemoryPace(7).interval == 7, "what was asked for is kept from the start"
