"""The curves of a run and what happened beside them, as plain numbers: what every plot draws.

Nothing here knows how it will be shown. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.manage.history import Epoch, history_of
from holdfast.monitor.run_view import BROKE_OFF, RunView

MOST = 2000  # points of one curve: more than any screen shows, less than any browser minds

# Kinds of marks, in the order in which a legend names them.
CHECKPOINT, INTERRUPTED, RESUMED, TROUBLE = "checkpoint", "interrupted", "resumed", "trouble"
KINDS = (CHECKPOINT, INTERRUPTED, RESUMED, TROUBLE)
_KIND_OF = {
    "interrupted": INTERRUPTED,
    BROKE_OFF: INTERRUPTED,
    "resumed": RESUMED,
    "rescued": RESUMED,
    "rolled_back": RESUMED,
    "diverged": TROUBLE,
    "failed": TROUBLE,
    "damaged": TROUBLE,
}


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: `values` at `steps`, finite all of them, in the order of the steps."""

    steps: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True, slots=True)
class Curves:
    """The curves and marks of one run; losses in nats a token."""

    label: str
    loss: Series  # of training
    smoothed: Series  # the same, smoothed by the trainer
    val_loss: Series
    marks: dict[str, list[int]]  # the steps of each of KINDS, each step once

    def __bool__(self) -> bool:
        """Return whether there is a curve at all; marks alone are none."""
        return bool(self.loss or self.val_loss)


def curves_of(view: RunView, label: str) -> Curves:
    """Return the curves of what `view` has read at its last `refresh`.

    A loop that writes no metrics still has the losses of its epochs.
    """
    epochs = history_of(view.run).epochs if view.run is not None else []
    loss = _series((point.step, point.loss) for point in view.points)
    val_loss = _series((each.step, each.val_loss) for each in view.evaluations)
    return Curves(
        label,
        loss or _of_epochs(epochs, "train_loss"),
        _series((point.step, point.smoothed) for point in view.points),
        val_loss or _of_epochs(epochs, "val_loss"),
        _marks(view),
    )


def labels_of(directories: Sequence[Path]) -> list[str]:
    """Return a short name for each directory: as much of the end of its path as tells them
    apart."""
    parts = [directory.absolute().parts for directory in directories]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(directory) for directory in directories]  # one of them is named twice


def thin(
    steps: Sequence[int], values: Sequence[float], most: int = MOST
) -> tuple[list[int], list[float]]:
    """Return at most `most` points of a curve (4 or more): its ends, and of each stretch between
    the lowest and the highest, so that no peak disappears."""
    assert most >= 4, most
    count = len(steps)
    if count <= most:
        return list(steps), list(values)
    kept = {0, count - 1}
    stretches = (most - 2) // 2
    for i in range(stretches):
        start = count * i // stretches
        stretch = values[start : count * (i + 1) // stretches]
        kept |= {start + stretch.index(end(stretch)) for end in (min, max)}
    chosen = sorted(kept)
    return [steps[i] for i in chosen], [values[i] for i in chosen]


def _series(points: Iterable[tuple[object, object]]) -> Series:
    """Return the finite ones of `points`, thinned; the files may hold anything."""
    known = [
        (step, float(value))
        for step, value in points
        if type(step) is int and isinstance(value, int | float) and math.isfinite(value)
    ]
    known.sort(key=lambda point: point[0])
    return Series(*thin([step for step, _value in known], [value for _step, value in known]))


def _of_epochs(epochs: Sequence[Epoch], name: str) -> Series:
    return _series((epoch.step, getattr(epoch, name)) for epoch in epochs)


def _marks(view: RunView) -> dict[str, list[int]]:
    found: dict[str, set[int]] = {kind: set() for kind in KINDS}
    for mark in view.marks:
        kind = _KIND_OF.get(mark.kind)
        if kind is not None and mark.step is not None:
            found[kind].add(mark.step)
    for event in view.events:
        step = event.get("step")
        if event.get("event") == "durable" and event.get("kind") != "temp" and type(step) is int:
            found[CHECKPOINT].add(step)
    return {kind: thin(sorted(steps), sorted(steps))[0] for kind, steps in found.items()}
