"""Steps of an epoch and of a run, and the learning rate they mean."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest

from holdfast.training.options.presets import resolve
from holdfast.training.plan import Plan, Progress, learning_rate_factor


@dataclass
class FakeBatches:
    micro_batches_per_epoch: int


def plan(micro: int, done: Progress | None = None, **flags: str) -> Plan:
    return Plan.of(resolve(flags=flags), FakeBatches(micro), done=done)  # type: ignore[arg-type]


def test_an_epoch_has_whole_steps_only() -> None:
    assert plan(10, epochs="2", gradient_accumulation="3") == Plan(3, 3, 2, 6)


def test_more_accumulation_than_data_is_one_step() -> None:
    assert plan(2, epochs="2", gradient_accumulation="8") == Plan(2, 1, 2, 2)


def test_a_run_of_steps_has_no_epochs() -> None:
    assert plan(10, num_steps="7") == Plan(1, 10, None, 7)


def test_going_on_counts_what_was_done_and_what_is_left() -> None:
    done = Progress(epoch=2, position=4, step=14)
    assert plan(10, done, epochs="3").total_steps == 14 + 6 + 10
    assert plan(5, done, epochs="2").total_steps == 14 + 1  # a larger batch since then


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_then_never_rises_again(schedule: str) -> None:
    factor = learning_rate_factor(schedule, 10, 100)
    rates = [factor(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[100] == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_no_warm_up_starts_at_the_top() -> None:
    assert learning_rate_factor("cosine", 0, 10)(0) == 1.0


def test_progress_goes_through_its_state() -> None:
    progress = Progress(epoch=3, position=2, step=9, loss_sum=1.5)
    other = Progress()
    other.load_state_dict(progress.state_dict())
    assert other == progress or other.smoothed != other.smoothed
