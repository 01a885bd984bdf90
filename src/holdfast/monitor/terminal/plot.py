"""Curves as lines of text, drawn by plotext: whole for `history`, the losses for `monitor`.

Words stand beside the drawing, not in it: Chinese is twice as wide, which plotext does not know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from holdfast.i18n import N_, _
from holdfast.monitor.curves import CHECKPOINT, INTERRUPTED, RESUMED, TROUBLE, Curves, Series, thin
from holdfast.table import Screen, printable

WIDTH = 80  # cells, where there is no terminal that says
_HEIGHT = 16  # lines, axes included

# Okabe and Ito's colours, which the colour-blind tell apart, as the nearest of the 256 of a
# terminal; beside the colour each run has a sign of its own.
_COLOURS = (32, 172, 36, 175, 74, 166)
_SIGNS = ("braille", "•", "×", "○", "+", "·")
_SHOWN = {"braille": "⠒⠤"}  # what stands for a sign in the legend
_SIGN_OF = {CHECKPOINT: "▲", INTERRUPTED: "✗", RESUMED: "▶", TROUBLE: "!"}
_RED, _GREY = 166, 245
_WORDS = {
    CHECKPOINT: N_("checkpoint"),
    INTERRUPTED: N_("interrupted"),
    RESUMED: N_("went on"),
    TROUBLE: N_("trouble"),
}
# The curves of the monitor: grey, sky blue, orange; each has a sign of its own as well.
TRAINING, SMOOTHED, VALIDATION = 245, 75, 214
SYMBOLS = {TRAINING: "·", SMOOTHED: "─", VALIDATION: "o"}


def lines(runs: Sequence[Curves], screen: Screen, height: int | None = None) -> list[str]:
    """Return the losses of `runs` in one drawing, for a terminal of `height` lines (None: no end).

    Raises ModuleNotFoundError where plotext is missing.
    """
    runs = [run for run in runs if run]
    if not runs:
        return [_("There is nothing to plot yet.")]
    width = screen.width or WIDTH
    return _large(runs, width, screen, min(_HEIGHT, max(10, (height or 99) - 8)))


def losses(run: Curves, width: int, height: int) -> list[Text]:
    """Return the losses of `run` in `height` lines; nothing where there is nothing, or no room.

    The smoothed and the validation losses span the axis: one bad batch does not press the rest
    into one line. Raises ModuleNotFoundError where plotext is missing.
    """
    if width < 20 or height < 4 or not (run.loss or run.val_loss):
        return []
    few = [_fewer(series, 4 * width) for series in (run.loss, run.smoothed, run.val_loss)]
    raw, smoothed, validation = few
    panel = _Panel([smoothed or raw, validation], width, height, Screen(width, colour=True))
    panel.points(raw, "braille", TRAINING)
    panel.curve(smoothed, "braille", SMOOTHED)
    panel.points(validation, SYMBOLS[VALIDATION], VALIDATION)
    return [Text.from_ansi(line) for line in panel.lines()]


def _fewer(series: Series, most: int) -> Series:
    return Series(*thin(series.steps, series.values, most))


def _large(runs: Sequence[Curves], width: int, screen: Screen, height: int) -> list[str]:
    series = [one for run in runs for one in (run.loss, run.val_loss)]
    marks = runs[0].marks.values() if len(runs) == 1 else []
    last = max((step for steps in marks for step in steps), default=0)
    panel = _Panel(series, width, height, screen, last=last)
    for i, run in enumerate(runs):
        panel.curve(run.loss, _SIGNS[i % len(_SIGNS)], _COLOURS[i % len(_COLOURS)])
    for i, run in enumerate(runs):  # over the curves, or they could not be found in the noise
        panel.points(run.val_loss, _letter(i, runs), _COLOURS[i % len(_COLOURS)])
    if len(runs) == 1:
        panel.marks(runs[0])
    title = _("loss in nats a token, by step")
    return ["", screen.bold(title), *panel.lines(), *_legend(runs, width, screen)]


def _letter(number: int, runs: Sequence[Curves]) -> str:
    """Return the sign of a run's validation losses: a letter where there are several runs."""
    return "●" if len(runs) == 1 else chr(ord("A") + number % 26)


def _legend(runs: Sequence[Curves], width: int, screen: Screen) -> list[str]:
    """Return the legend in as few lines as fit the width."""
    entries = []
    for i, run in enumerate(runs):
        name = f"{printable(run.label)}: " if len(runs) > 1 else ""
        sign = _SIGNS[i % len(_SIGNS)]
        colour = _COLOURS[i % len(_COLOURS)]
        parts = []
        if run.loss:
            parts.append((_SHOWN.get(sign, sign), _("training loss")))
        if run.val_loss:
            parts.append((_letter(i, runs), _("validation loss")))
        for j, (shown, text) in enumerate(parts):
            entries.append((shown, (name if j == 0 else "") + text, colour))
    if len(runs) == 1:
        for kind, steps in runs[0].marks.items():
            if steps:
                colour = _GREY if kind == CHECKPOINT else _RED
                entries.append((_SIGN_OF[kind], _(_WORDS[kind]), colour))
    found, room = [""], width - 1
    used = 0
    for shown, text, colour in entries:
        taken = cell_len(shown) + 1 + cell_len(text) + 3
        if used and used + taken > room:
            found.append("")
            used = 0
        found[-1] += (" " * 3 if used else " ") + _coloured(shown, colour, screen) + " " + text
        used += taken
    return found


def _coloured(text: str, colour: int, screen: Screen) -> str:
    return f"\x1b[38;5;{colour}m{text}\x1b[0m" if screen.colour else text


class _Panel:
    """One drawing with its axes. plotext keeps one figure a process: it is cleared first."""

    def __init__(
        self,
        series: Sequence[Series],
        width: int,
        height: int,
        screen: Screen,
        *,
        last: int = 0,
    ) -> None:
        """Make axes for all of `series`, up to the step `last` at least."""
        import plotext

        self._plotext: Any = plotext
        self._screen = screen
        plotext.terminal.limit(False, False)
        self._figure: Any = plotext.figure
        self._figure.clear()
        self._figure.theme("colorless")
        self._figure.plot_size(width, height)
        steps = [step for one in series for step in one.steps]
        values = [value for one in series for value in one.values]
        self._low, self._high = _span(values)
        self._last = max([1, last, *steps])
        self._rows = height - 3
        xs = ticks(0, self._last, max(2, width // 12))
        ys = ticks(self._low, self._high, height // 2)
        self._figure.ruler("x").lim(0, self._last)
        self._figure.ruler("x").ticks(xs, [f"{x:g}" for x in xs])
        self._figure.ruler("y").lim(self._low, self._high)
        self._figure.ruler("y").ticks(ys, [f"{y:.4g}" for y in ys])

    def curve(self, series: Series, sign: str, colour: int) -> None:
        if series:
            self._draw(series.steps, series.values, sign, colour, lines=len(series.steps) > 1)

    def points(self, series: Series, sign: str, colour: int) -> None:
        if series:
            self._draw(series.steps, series.values, sign, colour)

    def marks(self, run: Curves) -> None:
        """Draw checkpoints along the foot, and trouble from the top, each kind in its row."""
        row = (self._high - self._low) / self._rows
        places = {
            CHECKPOINT: self._low,
            INTERRUPTED: self._high,
            RESUMED: self._high - row,
            TROUBLE: self._high - 2 * row,
        }
        for kind, at in places.items():
            steps = [step for step in run.marks[kind] if step <= self._last]
            if steps:
                colour = _GREY if kind == CHECKPOINT else _RED
                self._draw(steps, [at] * len(steps), _SIGN_OF[kind], colour)

    def _draw(
        self, xs: list[int], ys: list[float], sign: str, colour: int, *, lines: bool = False
    ) -> None:
        marker = self._plotext.marker(sign, colour)
        within = [min(max(y, self._low), self._high) for y in ys]
        signal = self._figure.signal(list(xs), within, marker=marker)
        self._figure.draw(signal.lines() if lines else signal)

    def lines(self) -> list[str]:
        """Return the lines, all equally wide."""
        text: str = self._figure.build().string(colorless=not self._screen.colour)
        return text.rstrip("\n").split("\n")


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Return the values that an axis shows: a little more than there are."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return low - room if low - room > 0 or low < 0 else 0.0, high + room


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers between `low` and `high`, at most `most` and at least one."""
    rough = (high - low) / max(1, most)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = int((high - first * step) / step + 1e-9)
    # As decimals are written: 0.30000000000000004 is 0.3.
    return [float(f"{(first + i) * step:.12g}") for i in range(count + 1)] or [low]
