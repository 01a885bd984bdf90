"""How often to save: what is learned, the interval that follows, and which bound has decided."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint import AnyOf, EverySteps, RiskAware
from holdfast.checkpoint.policy import risk
from holdfast.checkpoint.policy.when import Choice, Cost, Measured, Moment
from tests.support import Toy, listener

HOUR, MB, GB = 3600.0, 1e6, 1e9


def taught(cost: Cost, *, slower: float = 0.0, **options: Any) -> RiskAware:
    """A policy that has seen quiet steps of a second and one save that slowed one step down."""
    policy = RiskAware(**options)
    for _step in range(20):
        policy.learn(Measured(1.0, saving=False))
    policy.learn(Measured(1.0 + slower, saving=True, saves=[cost]))
    policy.learn(Measured(1.0, saving=False))
    return policy


def test_the_interval_is_youngs() -> None:
    policy = taught(Cost(2.0, 3.0, 0), fails_every=4 * HOUR)
    assert policy.choice.interval == pytest.approx(math.sqrt(2 * 2.0 * 4 * HOUR))
    assert policy.choice.bound == risk.BALANCE


def test_no_other_interval_loses_less() -> None:
    """The expected loss a second, cost / T + T / 2M, computed here and not by the policy."""
    best = taught(Cost(1.5, 2.0, 0), fails_every=HOUR, time_share=1.0).choice.interval

    def loss(interval: float) -> float:
        return 1.5 / interval + interval / 2 / HOUR

    assert all(loss(best) <= loss(best * factor) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0))


@pytest.mark.parametrize(
    ("cost", "bound", "interval"),
    [
        (Cost(6.0, 6.0, 0), risk.TIME_BUDGET, 600.0),
        (Cost(0.5, 1.0, int(1.5 * GB)), risk.WRITES, 648.0),
        (Cost(0.0, 0.1, int(10 * MB)), risk.MOST_OFTEN, 60.0),
        (Cost(0.5, 1.0, int(50 * GB)), risk.RAREST, 1800.0),
        (Cost(60.0, 60.0, 0), risk.RAREST, 1800.0),
        (Cost(0.1, 400.0, 0), risk.WRITE_TIME, 400.0),
        (Cost(0.1, 2400.0, 0), risk.WRITE_TIME, 2400.0),
    ],
)
def test_each_bound_decides_where_it_is_the_tightest(
    cost: Cost, bound: str, interval: float
) -> None:
    choice = taught(cost).choice
    assert (choice.bound, choice.interval) == (bound, pytest.approx(interval))
    assert choice.expected_loss == pytest.approx(interval / 2 + cost.seconds)
    assert choice.bytes_per_day == pytest.approx(cost.size * 86400 / interval)


def test_no_write_budget_is_no_bound() -> None:
    cost = Cost(0.5, 1.0, int(50 * GB))
    assert taught(cost, write_budget=0).choice.bound == risk.BALANCE


def test_slower_steps_while_a_save_is_written_are_its_cost() -> None:
    assert taught(Cost(0.1, 3.0, 0), slower=2.0).choice.cost == pytest.approx(2.0)


def test_what_else_falls_into_a_write_is_not_its_cost() -> None:
    """An evaluation of ten minutes: at most the write itself can have been in the way."""
    assert taught(Cost(0.1, 3.0, 0), slower=600.0).choice.cost == pytest.approx(3.1)


def test_saves_without_a_pause_between_them_teach_as_well() -> None:
    policy = RiskAware()
    policy.learn(Measured(1.0, saving=False))
    for _save in range(risk._MOST_SAVES):
        policy.learn(Measured(1.5, saving=True, saves=[Cost(0.0, 2.0, 0)]))
    assert policy.choice.cost == pytest.approx(0.5)


def test_a_save_that_failed_does_not_burden_the_next() -> None:
    policy = RiskAware()
    policy.learn(Measured(1.0, saving=False))
    policy.learn(Measured(9.0, saving=True))
    policy.learn(Measured(1.0, saving=False))
    policy.learn(Measured(1.0, saving=True, saves=[Cost(0.2, 20.0, 0)]))
    policy.learn(Measured(1.0, saving=False))
    assert policy.choice.cost == pytest.approx(0.2)


def test_it_saves_early_to_learn_and_then_as_chosen_counted_from_any_save() -> None:
    policy = RiskAware()
    assert not policy(Moment(5, 59.0, 0, 0.0))
    assert policy(Moment(5, 60.0, 0, 0.0))
    policy = taught(Cost(0.5, 1.0, int(1.5 * GB)))
    assert not policy(Moment(900, 1000 + 647.0, 800, 1000.0))
    assert policy(Moment(900, 1000 + 649.0, 800, 1000.0))
    assert not policy(Moment(900, 1e9, 900, 0.0))  # nothing new to save


def test_a_choice_is_news_once_and_again_when_it_has_changed_by_much() -> None:
    policy, told = RiskAware(), []

    def save(size: float) -> None:
        for saving in (True, False):
            saves = [Cost(0.0, 1.0, int(size))] if saving else []
            choice = policy.learn(Measured(1.0, saving=saving, saves=saves))
            if choice is not None:
                told.append(round(choice.interval))

    policy.learn(Measured(1.0, saving=False))
    for size in (1 * GB, 1.1 * GB, 1.9 * GB, 3 * GB):
        save(size)
    assert told == [432, 1296]


def test_any_of_passes_on_what_is_learned() -> None:
    either = AnyOf([EverySteps(10), RiskAware()])
    either.learn(Measured(1.0, saving=False))
    choice = either.learn(Measured(1.0, saving=False, saves=[Cost(0.0, 1.0, int(GB))]))
    assert isinstance(choice, Choice)
    assert either(Moment(10, 1.0, 0, 0.0))
    assert not either(Moment(11, 431.0, 0, 0.0))
    assert either(Moment(11, 433.0, 0, 0.0))


def test_a_manager_teaches_its_policies_and_tells_the_choice(tmp_path: Path) -> None:
    told, on_event = listener()
    policy = RiskAware()
    toy = Toy()
    with toy.manager(tmp_path, save_when=[policy], on_event=on_event) as manager:
        for _step in range(3):
            toy.step()
            manager.after_step(toy.now)
        saved = manager.save(step=toy.now)
        for _step in range(2):
            toy.step()
            manager.after_step(toy.now)
    assert saved is not None
    (choice,) = [fields["choice"] for event, fields in told if event == "interval"]
    assert choice.bytes_per_day == pytest.approx(saved.entry.size * 86400 / choice.interval)
    assert choice.bound == risk.MOST_OFTEN
    assert choice.cost <= saved.seconds + saved.stall
