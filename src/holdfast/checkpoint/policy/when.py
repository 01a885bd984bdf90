"""WHEN to save: pure policies that look at where training stands; no disk, no clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from holdfast.checkpoint.calls import check_number


@dataclass(frozen=True, slots=True)
class Moment:
    """Where training stands after a step. Times are seconds of one monotonic clock."""

    step: int
    now: float
    last_saved_step: int
    last_saved_at: float  # or when a save was last tried in vain
    epoch: int | None = None
    last_saved_epoch: int | None = None  # in which was last saved, or the first one that was seen
    improved: bool = False  # whether this step's metrics are the best there have been


@dataclass(frozen=True, slots=True)
class Cost:
    """What one save has taken, in seconds and bytes."""

    stall: float  # that training has stood still for it
    seconds: float  # from the wish until it was durable
    size: int  # written


@dataclass(frozen=True, slots=True)
class Measured:
    """What one step has taken, and what has become durable meanwhile."""

    step: float  # seconds from the step before, standing still for a save included
    saving: bool  # whether a save was on its way to the disk meanwhile
    saves: Sequence[Cost] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """An interval between saves that a policy has chosen, and why."""

    interval: float  # seconds
    bound: str  # which consideration has decided: one of the words in risk.py
    cost: float  # seconds of training that a save is taken to cost
    expected_loss: float  # seconds of work that a failure destroys on average
    bytes_per_day: float  # written at this interval


class SavePolicy(Protocol):
    """Says after each step whether to save.

    A policy with a method `learn` as well (`Learner`) is told there what steps and saves have
    taken: policies look at no clock and no disk of their own.
    """

    def __call__(self, moment: Moment) -> bool: ...


@runtime_checkable
class Learner(Protocol):
    """A policy that decides by what saving costs."""

    def learn(self, measured: Measured) -> Choice | None:
        """Take in what a step has taken; called before the policy is asked about that step.
        Returns what it has chosen where that is news for the user."""


@dataclass(frozen=True, slots=True)
class EverySteps:
    """At every step that is a multiple of `steps`."""

    steps: int

    def __post_init__(self) -> None:
        check_number("steps", self.steps, 1, whole=True)

    def __call__(self, moment: Moment) -> bool:
        return moment.step > moment.last_saved_step and moment.step % self.steps == 0


@dataclass(frozen=True, slots=True)
class EveryMinutes:
    """When `minutes` have passed since anything was saved, or a save has failed."""

    minutes: float

    def __post_init__(self) -> None:
        check_number("minutes", self.minutes, 0)

    def __call__(self, moment: Moment) -> bool:
        return (
            moment.step > moment.last_saved_step
            and moment.now - moment.last_saved_at >= 60 * self.minutes
        )


@dataclass(frozen=True, slots=True)
class EveryEpoch:
    """Once an epoch: after its first step, where nothing has been saved in it yet. The first epoch
    that is seen does not count: what it began from is there already."""

    def __call__(self, moment: Moment) -> bool:
        if moment.epoch is None or moment.last_saved_epoch is None:
            return False
        return moment.epoch > moment.last_saved_epoch


@dataclass(frozen=True, slots=True)
class OnBest:
    """When the metrics of a step are better than all before them."""

    def __call__(self, moment: Moment) -> bool:
        return moment.improved


@dataclass(frozen=True, slots=True)
class AnyOf:
    """When any of `policies` says so; never where there are none."""

    policies: Sequence[SavePolicy]

    def __call__(self, moment: Moment) -> bool:
        return any(policy(moment) for policy in self.policies)

    def learn(self, measured: Measured) -> Choice | None:
        """Tell those that want to know; the first news there is."""
        learners = [policy for policy in self.policies if isinstance(policy, Learner)]
        choices = [learner.learn(measured) for learner in learners]
        return next((choice for choice in choices if choice is not None), None)


class MemoryPace:
    """How many steps from one snapshot in memory to the next: `every`, or as many as it costs at
    most `share` of the training's time.

    Costs and steps are told in seconds as they are measured. The first `AT_FIRST` steps after a
    start have one each, whatever it costs: most of what kills a training kills it there, and a
    measurement needs a few.
    """

    AT_FIRST = 16

    def __init__(self, every: int | None = None, *, share: float = 0.01) -> None:
        self._every, self._share = every, share
        self._step: float | None = None
        self._cost: float | None = None
        self._told = 0

    @property
    def promised(self) -> bool:
        """Whether a number of steps was asked for: then training waits rather than skip one."""
        return self._every is not None

    def step(self, seconds: float) -> None:
        """A step took so long."""
        self._step = seconds if self._step is None else self._step + 0.2 * (seconds - self._step)

    def cost(self, seconds: float) -> None:
        """A snapshot has cost training so much. The first one, which has touched every page of its
        memory for the first time, says nothing about the others."""
        self._told += 1
        if self._told > 1:
            self._cost = (
                seconds if self._cost is None else self._cost + 0.5 * (seconds - self._cost)
            )

    @property
    def interval(self) -> int:
        """Steps between two snapshots, at least 1."""
        if self._every is not None:
            return self._every
        if self._told < self.AT_FIRST or self._step is None or self._cost is None:
            return 1
        return max(1, math.ceil(self._cost / (self._share * max(self._step, 1e-6))))
