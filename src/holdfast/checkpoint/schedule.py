"""WHEN to save: pure policies that look at where training stands; no disk, no clock."""

from __future__ import annotations

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
