"""Which losses are not to be learned from: what is no number, and spikes that stay."""

from __future__ import annotations

import math
import random

import pytest

from holdfast.training.health import SPIKE_STEPS, WARM_UP, LossWatch


def warmed_up(mean: float = 3.0, noise: float = 0.1) -> LossWatch:
    watch, draw = LossWatch(), random.Random(0)
    for step in range(WARM_UP):
        assert not watch.problem(draw.gauss(mean, noise), 1.0, (1, step))
    return watch


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_a_problem_from_the_first_step_on(loss: float) -> None:
    watch = LossWatch()
    assert "the loss is" in watch.problem(loss, 1.0, (1, 0))
    assert watch.suspects == [(1, 0)]


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_so_is_a_gradient_under_a_finite_loss(norm: float) -> None:
    assert "norm of the gradient" in LossWatch().problem(2.0, norm, (1, 0))


def test_a_spike_is_several_high_losses_in_a_row() -> None:
    watch = warmed_up()
    places = [(2, position) for position in range(SPIKE_STEPS)]
    told = [watch.problem(5.0, 1.0, place) for place in places]
    assert [bool(text) for text in told] == [False] * (SPIKE_STEPS - 1) + [True]
    assert watch.suspects == places
    assert "5.0000" in told[-1]


def test_one_that_comes_down_again_is_none() -> None:
    watch = warmed_up()
    for step in range(60):
        loss = 3.0 if step % SPIKE_STEPS == SPIKE_STEPS - 1 else 9.0
        assert not watch.problem(loss, 1.0, (2, step))


def test_high_losses_do_not_become_the_measure_of_themselves() -> None:
    watch = warmed_up()
    for _spike in range(20):
        for step in range(SPIKE_STEPS - 1):
            watch.problem(50.0, 1.0, (2, step))
        watch.problem(3.0, 1.0, (2, 9))
    assert watch.problem(50.0, 1.0, (3, 0)) == ""
    assert watch.suspects == [(3, 0)]


@pytest.mark.parametrize(("mean", "noise"), [(3.0, 0.05), (3.0, 1.0), (0.01, 0.001)])
def test_a_healthy_run_is_never_told_otherwise(mean: float, noise: float) -> None:
    watch, draw = LossWatch(), random.Random(1)
    for step in range(20_000):
        assert not watch.problem(mean + draw.gauss(0, noise), 1.0, (1, step))


def test_a_converged_run_may_jump_by_less_than_the_margin() -> None:
    watch = warmed_up(0.01, 0.0001)
    for step in range(2 * SPIKE_STEPS):
        assert not watch.problem(0.9, 1.0, (2, step))


def test_the_first_steps_after_a_start_are_never_a_spike() -> None:
    watch = LossWatch()
    for step in range(WARM_UP):
        assert not watch.problem(3.0 if step < 90 else 30.0, 1.0, (1, step))


def test_a_falling_loss_is_healthy() -> None:
    watch = LossWatch()
    for step in range(2000):
        assert not watch.problem(3 + 7 * math.exp(-step / 100), 1.0, (1, step))
