"""WHEN to save: pure policies that look at where training stands; no disk, no clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Moment:
    """Where training stands after a step. Times are seconds of one monotonic clock."""

    step: int
    now: float
    last_saved_step: int
    last_saved_at: float  # or when a save was last tried in vain


class SavePolicy(Protocol):
    def __call__(self, moment: Moment) -> bool: ...


@dataclass(frozen=True, slots=True)
class EverySteps:
    """At every step that is a multiple of `steps`."""

    steps: int

    def __call__(self, moment: Moment) -> bool:
        return moment.step > moment.last_saved_step and moment.step % self.steps == 0


@dataclass(frozen=True, slots=True)
class EveryMinutes:
    """When `minutes` have passed since anything was saved, or a save has failed."""

    minutes: float

    def __call__(self, moment: Moment) -> bool:
        return (
            moment.step > moment.last_saved_step
            and moment.now - moment.last_saved_at >= 60 * self.minutes
        )


@dataclass(frozen=True, slots=True)
class AnyOf:
    """When any of `policies` says so; never where there are none."""

    policies: Sequence[SavePolicy]

    def __call__(self, moment: Moment) -> bool:
        return any(policy(moment) for policy in self.policies)


class MemoryPace:
    """How many steps from one snapshot in memory to the next: `every`, or as many as it costs at
    most `share` of the training's time.

    Costs and steps are told in seconds as they are measured; until then every step has one.
    """

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
        if self._step is None or self._cost is None:
            return 1
        return max(1, math.ceil(self._cost / (self._share * max(self._step, 1e-6))))
