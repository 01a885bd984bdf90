"""The loss curve of the terminal monitor: a long run in few points, drawn with plotext."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from holdfast.monitor.measured import Evaluation, Point

LIMIT = 1024  # points that are kept of a curve; more are merged in pairs

# Okabe and Ito's palette, which everybody can tell apart, as numbers of the 256 terminal colours.
TRAINING, SMOOTHED, VALIDATION = 245, 75, 214
# Each curve has a character of its own besides: colour alone tells nothing in black and white.
SYMBOLS = {TRAINING: "·", SMOOTHED: "─", VALIDATION: "o"}


@dataclass(frozen=True, slots=True)
class Series:
    """What is drawn: steps, and the losses in nats a token at them."""

    raw: tuple[tuple[float, float], ...] = ()
    smoothed: tuple[tuple[float, float], ...] = ()
    validation: tuple[tuple[float, float], ...] = ()


class Curve:
    """Takes the points of a `RunView` as they come; costs what is new, not what is there."""

    def __init__(self) -> None:
        self.series = Series()
        self._forget()

    def _forget(self) -> None:
        self._taken = 0
        self._last: Point | None = None
        self._evaluations = 0
        self._stride = 1  # points in one bucket
        self._raw = _Buckets()
        self._smoothed = _Buckets()

    def update(self, points: Sequence[Point], evaluations: Sequence[Evaluation]) -> bool:
        """Whether the curve is another one now."""
        before = self._taken, self._last, self._evaluations
        if self._taken > len(points) or (self._taken and points[self._taken - 1] is not self._last):
            self._forget()  # steps were undone
        for point in points[self._taken :]:
            self._raw.add(point.step, point.loss)
            self._smoothed.add(point.step, point.smoothed)
        self._taken, self._last = len(points), points[-1] if points else None
        self._evaluations = len(evaluations)
        if before == (self._taken, self._last, self._evaluations):
            return False
        measured = [
            (float(e.step), e.val_loss)
            for e in evaluations
            if e.val_loss is not None and math.isfinite(e.val_loss)
        ]
        stride = math.ceil(len(measured) / LIMIT) or 1
        self.series = Series(
            self._raw.means(), self._smoothed.means(), tuple(measured[::-stride][::-1])
        )
        return True


class _Buckets:
    """Means of so many neighbours that there are never more than LIMIT of them."""

    def __init__(self) -> None:
        self._size = 1
        self._sums: list[tuple[float, float, int]] = []  # of steps, of losses, how many

    def add(self, step: int, loss: float | None) -> None:
        if loss is None or not math.isfinite(loss):
            return
        if self._sums and self._sums[-1][2] < self._size:
            steps, losses, count = self._sums[-1]
            self._sums[-1] = steps + step, losses + loss, count + 1
            return
        if len(self._sums) >= LIMIT:
            self._size *= 2
            pairs = zip(self._sums[::2], self._sums[1::2], strict=True)
            self._sums = [(a + d, b + e, c + f) for (a, b, c), (d, e, f) in pairs]
        self._sums.append((step, loss, 1))

    def means(self) -> tuple[tuple[float, float], ...]:
        return tuple((steps / count, losses / count) for steps, losses, count in self._sums)


def draw(series: Series, width: int, height: int) -> Text:
    """The curves in `width` cells and `height` lines; empty where there is nothing, or no room."""
    shown = series.smoothed + series.validation or series.raw
    if not shown or width < 20 or height < 4:
        return Text()
    from plotext import figure, marker, terminal

    losses = sorted(loss for _step, loss in shown)
    # A first loss, or a single bad batch, must not press the rest into one line.
    raw = sorted(loss for _step, loss in series.raw)
    cut = len(raw) // 50
    low = min([losses[0], *raw[cut : cut + 1]])
    high = max([losses[-1], *raw[len(raw) - 1 - cut :][:1]])
    pad = 0.05 * (high - low) or 0.5
    low, high = low - pad, high + pad
    steps = [step for step, _loss in series.raw + shown]
    first, last = min(steps), max(*steps, min(steps) + 1)

    terminal.limit(width=False, height=False)  # a panel has a size of its own
    figure.clear()
    figure.theme("colorless")
    figure.canvas("default")
    figure.plot_size(width, height)
    figure.axes(False)
    figure.axes(True, axis=0, side=0)
    figure.axes(True, axis=1, side=0)
    for values, colour, symbol in (
        (series.raw, TRAINING, "braille"),
        (series.smoothed, SMOOTHED, "braille"),
        (series.validation, VALIDATION, SYMBOLS[VALIDATION]),
    ):
        if values:
            few = _fewer(values, 2 * width if symbol == "braille" else width // 4)
            clamped = [min(max(loss, low), high) for _step, loss in few]
            signal = figure.signal(
                [step for step, _loss in few], clamped, marker=marker(symbol, colour)
            )
            figure.draw(signal.lines(colour == SMOOTHED))
    gaps = max(1, min(4, (height - 2) // 3))
    ticks = [low + (high - low) * part / gaps for part in range(gaps + 1)]
    figure.ruler("y", "left").lim(low, high).ticks(ticks, [f"{tick:.2f}" for tick in ticks])
    marks = [first + (last - first) * part / 4 for part in range(5)]
    figure.ruler("x", "lower").lim(first, last).ticks(marks, [str(round(mark)) for mark in marks])
    return Text.from_ansi(figure.build().string().rstrip("\n"))


def _fewer(values: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """Means of neighbours, at most `count` of them."""
    size = math.ceil(len(values) / count)
    groups = (values[i : i + size] for i in range(0, len(values), size))
    return [
        (sum(s for s, _loss in g) / len(g), sum(loss for _step, loss in g) / len(g)) for g in groups
    ]
