"""Room for checkpoints, and when there will be none: pure arithmetic, no disk and no clock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.checkpoint.policy import KeepRollingTemps
from holdfast.checkpoint.rundir import Entry
from holdfast.formatting import parse_time

ROLLING = KeepRollingTemps().count  # temporary checkpoints that may lie there at a time


@dataclass(frozen=True, slots=True)
class Disk:
    """Room for checkpoints. `growth` bytes an hour, over what is kept; 0.0 where it is settled.

    `to_come`: bytes by which the run will still grow in all, infinite where there is no end to it.
    `besides`: bytes of what comes and goes, and may lie there at that time: rolling checkpoints,
    and a best one that is older than what is kept.
    """

    free: int
    used: int
    next_size: int  # of the newest checkpoint: what the next one will take
    growth: float
    to_come: float = math.inf
    besides: int = 0

    @property
    def hours_left(self) -> float:
        """Until it is full; infinite where it does not fill."""
        # Old checkpoints go only after the next one is durable: that one needs its room besides.
        fills = self.growth > 0 and self.to_come + self.besides + self.next_size > self.free
        return self.free / self.growth if fills else math.inf

    @property
    def fits(self) -> bool:
        """True if the next checkpoint can be written at all."""
        return self.free >= self.next_size


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a run for its checkpoints; None where it is not known.

    `keep`: how many of each kind retention leaves, 0 for all. `every`: steps between two
    checkpoints of a kind. `pace`: seconds a step. `steps_left`: to the end of the training.
    """

    keep: int
    every: Mapping[str, int]
    pace: float
    steps_left: int | None

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        steps_per_epoch: int | None,
        steps_left: int | None,
        pace: float | None,
    ) -> Plan | None:
        """Make a plan of a run's config.json and what it has said of itself; None where that is too
        little, as of a training loop that is not ours."""
        section = config.get("checkpoint")
        if pace is None or not isinstance(section, Mapping):
            return None
        keep, step_every = section.get("keep_last_n"), section.get("save_every")
        if not isinstance(keep, int) or keep < 0:
            return None
        every = {}
        if section.get("save_every_epoch") and steps_per_epoch:
            every["epoch"] = steps_per_epoch
        if isinstance(step_every, int) and step_every > 0:
            every["step"] = step_every
        return cls(keep, every, pace, steps_left)


def forecast(entries: Sequence[Entry], free: int, plan: Plan | None, *, settled: bool) -> Disk:
    """Return room and growth for checkpoints `entries` (newest first) beside `free` bytes.

    With a `plan` each kind grows until retention keeps as many as it may, or the training ends.
    Without one the past is the measure, unless it is `settled`: something lasting has had to go.
    """
    used = sum({entry.id: entry.size for entry in entries}.values())
    next_size = entries[0].size if entries else 0
    lasting = [entry for entry in entries if entry.kind != "temp"]
    if plan is None:
        growth = 0.0 if settled else _measured(lasting)
        return Disk(free, used, next_size, growth)
    size = lasting[0].size if lasting else next_size
    growth = to_come = 0.0
    for kind, every in plan.every.items():
        have = sum(entry.kind == kind for entry in lasting)
        room = math.inf if plan.keep == 0 else max(0, plan.keep - have)
        left = math.inf if plan.steps_left is None else math.ceil(plan.steps_left / every)
        if min(room, left) > 0:
            growth += size / (every * plan.pace / 3600) if plan.pace > 0 else 0.0
            to_come += size * min(room, left) if size else 0.0
    rolling = max(0, ROLLING - (len(entries) - len(lasting)))
    best = plan.keep > 0 and all(
        sum(entry.kind == kind for entry in lasting) <= plan.keep for kind in plan.every
    )
    return Disk(free, used, next_size, growth, to_come, size * (rolling + best))


def _measured(lasting: Sequence[Entry]) -> float:
    """Return bytes an hour by which what is kept has grown."""
    times = [time.timestamp() for e in lasting if (time := parse_time(e.created)) is not None]
    if len(times) < 2 or times[0] <= times[-1]:
        return 0.0
    return sum(entry.size for entry in lasting[:-1]) / ((times[0] - times[-1]) / 3600)
