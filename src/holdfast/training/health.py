"""Judge whether to learn from a step: a loss that is no number, or has left its range.

Pure: numbers in, a judgement out. What follows from it is decided in ending.py.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from holdfast.i18n import _

WARM_UP = 100  # healthy steps before anything counts as a spike
SPIKE_STEPS = 5  # high losses in a row that are one; fewer come and go by themselves
DEVIATIONS = 8.0  # mean absolute deviations above the mean: never reached by a healthy run's noise
MARGIN = 1.0  # nats a token above the mean at least: a run that has converged deviates by little
_MEMORY = 0.98  # of the running mean and deviation: about 50 steps

Place = tuple[int, int]  # epoch, and step within the epoch: whose data it was


@dataclass(slots=True)
class Setbacks:
    """Roll-backs since the start of this process."""

    to: Counter[int] = field(default_factory=Counter)  # roll-backs, by the step they led to
    places: list[list[int]] = field(default_factory=list)  # whose data must not come again


class LossWatch:
    """Judges one step after another.

    A loss or a gradient's norm that is not finite is unusable at once. A loss is high when it
    exceeds the running mean by `DEVIATIONS` running mean absolute deviations, and by `MARGIN`;
    `SPIKE_STEPS` high ones in a row are a spike. High losses do not move mean and deviation. The
    first `WARM_UP` steps after a start are never high.
    """

    def __init__(self) -> None:
        self._mean = self._deviation = 0.0
        self._seen = 0
        self.suspects: list[Place] = []  # the steps in a row that were high, or worse

    def problem(self, loss: float, norm: float, place: Place) -> str:
        """Return what is wrong with a step, in words; empty if its gradient may be used."""
        if not math.isfinite(loss):
            self.suspects.append(place)
            return _("the loss is {loss}", loss=loss)
        if not math.isfinite(norm):
            self.suspects.append(place)
            return _("the norm of the gradient is {norm}", norm=norm)
        if self._high(loss):
            self.suspects.append(place)
            if len(self.suspects) < SPIKE_STEPS:
                return ""
            return _(
                "the loss has been far above its mean of {mean} for {count} steps and is {loss}",
                mean=f"{self._mean:.4f}",
                count=SPIKE_STEPS,
                loss=f"{loss:.4f}",
            )
        self.suspects.clear()
        self._take(loss)
        return ""

    def _high(self, loss: float) -> bool:
        above = max(DEVIATIONS * self._deviation, MARGIN)
        return self._seen >= WARM_UP and loss > self._mean + above

    def _take(self, loss: float) -> None:
        # The first steps count in full: a mean of n values, until n is what is remembered.
        weight = max(1 - _MEMORY, 1 / (self._seen + 1))
        self._deviation += weight * (abs(loss - self._mean) - self._deviation) * (self._seen > 0)
        self._mean += weight * (loss - self._mean)
        self._seen += 1
