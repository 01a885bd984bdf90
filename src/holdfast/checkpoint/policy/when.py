"""WHEN to save: pure policies that look at where training stands; no disk, no clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Protocol

from holdfast.checkpoint.calls import check_number, check_policies, check_positive

TIME_SHARE = 0.01  # of training that saving may cost
WRITE_BUDGET = 200e9  # bytes a day: wears out a consumer SSD rated for 300 TB in 4 years
LONGEST = 30 * 60.0  # seconds: never rarer, whatever it costs
SHORTEST = 60.0  # seconds: half a minute of work is not worth a new file
_DAY = 24 * 3600.0

# The consideration that decided an interval (`Choice.bound`).
TIME_BUDGET = "time"
WRITES = "writes"
WRITE_TIME = "write_time"  # a write takes that long
MOST_OFTEN, RAREST = "shortest", "longest"


@dataclass(frozen=True, slots=True)
class Cost:
    """The price of one save, in seconds and bytes."""

    training: float  # seconds that training lost: standing still, and processors taken from it
    seconds: float  # from the request until it was durable
    size: int  # written


@dataclass(frozen=True, slots=True)
class Moment:
    """The place of training after a step. Times are seconds of one monotonic clock."""

    step: int
    now: float
    last_saved_step: int
    last_saved_at: float  # when one last became durable or, if that is later, was asked for
    epoch: int | None = None
    last_saved_epoch: int | None = None  # of the last save, or the first one that was seen
    improved: bool = False  # True if this step's metrics are the best so far
    cost: Cost | None = None  # of a save of this run; None before the first


@dataclass(frozen=True, slots=True)
class Choice:
    """An interval between saves that a policy has chosen, and why."""

    interval: float  # seconds
    bound: str  # the consideration that decided: one of the words above
    cost: float  # seconds of training that a save costs
    expected_loss: float  # seconds of work that a failure destroys on average
    bytes_per_day: float  # written at this interval


class SavePolicy(Protocol):
    """Say after each step whether to save."""

    def __call__(self, moment: Moment) -> bool: ...


@dataclass(frozen=True, slots=True)
class EverySteps:
    """Save at every step that is a multiple of `steps`."""

    steps: int

    def __post_init__(self) -> None:
        check_number("steps", self.steps, 1, whole=True)

    def __call__(self, moment: Moment) -> bool:
        return moment.step > moment.last_saved_step and moment.step % self.steps == 0


@dataclass(frozen=True, slots=True)
class EveryMinutes:
    """Save when `minutes` have passed since anything was saved, or asked to be."""

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
    """Save once an epoch: after its first step, where nothing has been saved in it yet. The first
    epoch that is seen does not count: what it began from is there already."""

    def __call__(self, moment: Moment) -> bool:
        if moment.epoch is None or moment.last_saved_epoch is None:
            return False
        return moment.epoch > moment.last_saved_epoch


@dataclass(frozen=True, slots=True)
class OnBest:
    """Save when the metrics of a step are better than all before them."""

    def __call__(self, moment: Moment) -> bool:
        return moment.improved


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Save when any of `policies` says so; never where there are none."""

    policies: Sequence[SavePolicy]

    def __post_init__(self) -> None:
        check_policies(self.policies)

    def __call__(self, moment: Moment) -> bool:
        return any(policy(moment) for policy in self.policies)


@dataclass(frozen=True, slots=True)
class RiskAware:
    """Save when `max(60 s, cost / time_share)` has passed since the last save of whatever kind.

    The cost is what the last saves took from training, as measured. The interval is also

    - so long that `write_budget` bytes a day (0: any number) are not exceeded;
    - never over 30 minutes: this wins over the budgets;
    - never shorter than a write takes.

    Until the first save has a cost, the interval is the shortest. Where the machine fails
    every four hours, Young's interval (CACM 1974), the best for a known cost, loses the same time
    with the default write budget, and without one at most 0.3 percentage points less.
    """

    time_share: float = TIME_SHARE
    write_budget: float = WRITE_BUDGET

    def __post_init__(self) -> None:
        check_positive("time_share", self.time_share)
        check_number("write_budget", self.write_budget, 0)

    def __call__(self, moment: Moment) -> bool:
        since = moment.now - moment.last_saved_at
        return moment.step > moment.last_saved_step and since >= self.choose(moment.cost).interval

    def choose(self, cost: Cost | None) -> Choice:
        """Return the interval for saves of this cost, and the numbers behind it."""
        cost = cost or Cost(0.0, 0.0, 0)
        bounds = [(SHORTEST, MOST_OFTEN), (cost.training / self.time_share, TIME_BUDGET)]
        if self.write_budget:
            bounds.append((cost.size * _DAY / self.write_budget, WRITES))
        interval, bound = max(bounds, key=itemgetter(0))
        if interval > LONGEST:
            interval, bound = LONGEST, RAREST
        if interval < cost.seconds:
            interval, bound = cost.seconds, WRITE_TIME
        # A power cut also destroys the save that is on its way to the disk.
        loss = interval / 2 + cost.seconds
        return Choice(interval, bound, cost.training, loss, cost.size * _DAY / interval)


class MemoryPace:
    """The number of steps from one snapshot in memory to the next: `every`, or as many as it costs
    at most `share` of the training's time.

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

    def step(self, seconds: float) -> None:
        """Note that a step took so long."""
        self._step = seconds if self._step is None else self._step + 0.2 * (seconds - self._step)

    def cost(self, seconds: float) -> None:
        """Note that a snapshot has cost training so much. The first one, which has touched every
        page of its memory for the first time, says nothing about the others."""
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
