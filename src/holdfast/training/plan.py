"""Compute the length of a run, its position, and the learning rate there. Pure; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.training.options.config import Config
    from holdfast.training.text.batches import Batches


@dataclass(slots=True)
class Progress:
    """Position of the loop; part of every checkpoint."""

    epoch: int = 1  # counted from 1
    position: int = 0  # steps done in this epoch
    step: int = 0  # steps done in all
    tokens: int = 0  # tokens trained on in all
    loss_sum: float = 0.0  # of this epoch's steps
    smoothed: float = math.nan
    stale: int = 0  # evaluations since the best one
    stopped_early: bool = False
    left_out: list[list[int]] = field(default_factory=list)  # [epoch, position] that lie ahead
    owed: bool = False  # the last step's evaluation, saves and epoch's end are still to be done
    lines: list[dict[str, Any]] = field(default_factory=list)  # what the last step has come to

    def count_step(self) -> None:
        """One more step is done, and nothing yet of what is due after it."""
        self.step += 1
        self.position += 1
        self.owed = True
        self.lines = []

    def begin_epoch(self) -> None:
        """Go to the first step of the next epoch."""
        self.epoch += 1
        self.position = 0
        self.loss_sum = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restored = type(self)(**state)  # an older checkpoint lacks what came later
        for each in fields(self):
            setattr(self, each.name, getattr(restored, each.name))


@dataclass(frozen=True, slots=True)
class Plan:
    """Numbers of steps of an epoch and of the run, from configuration and data alone."""

    accumulation: int
    steps_per_epoch: int
    epochs: int | None  # None: the run is counted in steps
    total_steps: int

    @classmethod
    def of(cls, config: Config, batches: Batches, *, done: Progress | None = None) -> Plan:
        """The plan of a new run, or of one that goes on from `done` (whose past may differ)."""
        training = config.training
        micro = batches.micro_batches_per_epoch
        accumulation = min(training.gradient_accumulation, micro)
        per_epoch = micro // accumulation
        if training.num_steps is not None:
            return cls(accumulation, per_epoch, None, training.num_steps)
        assert training.epochs is not None
        if done is None:
            return cls(accumulation, per_epoch, training.epochs, training.epochs * per_epoch)
        left = (training.epochs - done.epoch + 1) * per_epoch - done.position
        return cls(accumulation, per_epoch, training.epochs, done.step + max(0, left))


def learning_rate_factor(schedule: str, warmup: int, total: int) -> Callable[[int], float]:
    """Factor of the highest learning rate at a step: linear warm-up, then down to a tenth.

    `schedule` is "cosine", "linear" or "constant" (no fall); `warmup` and `total` count steps.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if schedule == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        fall = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
        return 0.1 + 0.9 * fall

    return factor
