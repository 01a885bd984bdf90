"""How often to save by cost: the interval, and which bound has decided."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.checkpoint import RiskAware
from holdfast.checkpoint.policy import (
    MOST_OFTEN,
    RAREST,
    TIME_BUDGET,
    WRITE_TIME,
    WRITES,
    Cost,
    Moment,
)
from tests.support import Toy, listener

MB, GB = 1e6, 1e9


@pytest.mark.parametrize(
    ("cost", "bound", "interval"),
    [
        (Cost(6.0, 6.0, 0), TIME_BUDGET, 600.0),
        (Cost(0.5, 1.0, int(1.5 * GB)), WRITES, 648.0),
        (Cost(0.0, 0.1, int(10 * MB)), MOST_OFTEN, 60.0),
        (Cost(0.5, 1.0, int(50 * GB)), RAREST, 1800.0),
        (Cost(60.0, 60.0, 0), RAREST, 1800.0),
        (Cost(0.1, 400.0, 0), WRITE_TIME, 400.0),
        (Cost(0.1, 2400.0, 0), WRITE_TIME, 2400.0),
    ],
)
def test_each_bound_decides_where_it_is_the_tightest(
    cost: Cost, bound: str, interval: float
) -> None:
    choice = RiskAware().choose(cost)
    assert (choice.bound, choice.interval) == (bound, pytest.approx(interval))
    assert choice.expected_loss == pytest.approx(interval / 2 + cost.seconds)
    assert choice.bytes_per_day == pytest.approx(cost.size * 86400 / interval)


def test_no_write_budget_is_no_bound() -> None:
    choice = RiskAware(write_budget=0).choose(Cost(0.9, 1.0, int(50 * GB)))
    assert (choice.bound, choice.interval) == (TIME_BUDGET, pytest.approx(90.0))


def test_it_saves_early_before_a_cost_is_known_and_then_as_chosen_counted_from_any_save() -> None:
    policy, cost = RiskAware(), Cost(0.5, 1.0, int(1.5 * GB))
    assert not policy(Moment(5, 59.0, 0, 0.0))
    assert policy(Moment(5, 60.0, 0, 0.0))
    assert not policy(Moment(900, 1000 + 647.0, 800, 1000.0, cost=cost))
    assert policy(Moment(900, 1000 + 649.0, 800, 1000.0, cost=cost))
    assert not policy(Moment(900, 1e9, 900, 0.0, cost=cost))  # nothing new to save


def test_a_manager_measures_the_cost_and_tells_the_choice_once(tmp_path: Path) -> None:
    told, on_event = listener()
    toy = Toy()
    with toy.manager(tmp_path, save_when=[RiskAware()], on_event=on_event) as manager:
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
    assert choice.bound == MOST_OFTEN
    assert choice.cost < 0.6
