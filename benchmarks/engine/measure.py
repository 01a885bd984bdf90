"""Interleaved rounds and what may be said from them: medians, ratios pair by pair, intervals.

Within a round everybody is measured once, in random order, so that whatever this machine does
meanwhile hits all alike; a ratio is formed within rounds.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from holdfast.formatting import format_seconds
from holdfast.i18n import _

T = TypeVar("T")

log = logging.getLogger("holdfast")

Measure = Callable[[int], dict[str, float]]  # the number of the round → metrics
_PAUSE = 0.3  # s between two measurements, after sync(2)


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratio of two medians; `low` and `high` enclose the median of the pairwise ratios with
    at least 95 % confidence, and are None where there are too few pairs for that."""

    value: float
    low: float | None
    high: float | None
    pairs: int


@dataclass(slots=True)
class Series:
    """What was measured in rounds: for each round contender → metric → value."""

    rounds: list[dict[str, dict[str, float]]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # contender → why it is not measured

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rounds for name in row))

    def values(self, name: str, metric: str) -> list[float]:
        return [row[name][metric] for row in self.rounds if metric in row.get(name, {})]

    def median(self, name: str, metric: str) -> float | None:
        values = self.values(name, metric)
        return statistics.median(values) if values else None

    def interval(self, name: str, metric: str) -> tuple[float | None, float | None]:
        return interval(self.values(name, metric))

    def ratio(self, over: tuple[str, str], under: tuple[str, str]) -> Ratio | None:
        """`over` (contender, metric) by `under`, from the rounds that have both."""
        pairs = [
            (row[over[0]][over[1]], row[under[0]][under[1]])
            for row in self.rounds
            if over[1] in row.get(over[0], {}) and under[1] in row.get(under[0], {})
        ]
        if not pairs:
            return None
        if over == under:
            return Ratio(1.0, None, None, len(pairs))
        low, high = interval([a / b for a, b in pairs])
        above, below = zip(*pairs, strict=True)
        return Ratio(statistics.median(above) / statistics.median(below), low, high, len(pairs))


def interval(values: list[float]) -> tuple[float | None, float | None]:
    """A distribution-free interval that covers the median with at least 95 %.

    The k-th smallest and k-th largest value, with the largest k for which the two tails of the
    binomial distribution (n, 1/2) hold at most 5 % (Conover, Practical Nonparametric Statistics,
    3rd ed., section 3.2). Six values are the fewest that can say anything.
    """
    n, k, tails = len(values), 0, 0.0
    while (tails := tails + 2 * math.comb(n, k) / 2**n) <= 0.05:
        k += 1
    if k == 0:
        return None, None
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]


class Progress:
    """One line on stderr where that is a terminal: what is measured, and how long it may take."""

    def __init__(self) -> None:
        self._active = sys.stderr.isatty()
        self._part, self._total, self._done, self._began = "", 0, 0, 0.0

    def start(self, part: str, total: int) -> None:
        self._part, self._total, self._done, self._began = part, total, 0, time.monotonic()

    def next(self, what: str) -> None:
        left = ""
        if self._done:
            each = (time.monotonic() - self._began) / self._done
            time_left = format_seconds(each * (self._total - self._done))
            left = _(", about {time} left in this part", time=time_left)
        self._done += 1
        self._write(f"\r\x1b[K{self._part} {self._done}/{self._total}: {what}{left}")

    def clear(self) -> None:
        self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        if self._active:
            sys.stderr.write(text)
            sys.stderr.flush()


def interleave(
    contenders: Mapping[str, Measure],
    rounds: range,
    rng: random.Random,
    series: Series,
    progress: Progress,
) -> None:
    """Measure everybody once in each of `rounds`, whose numbers they are told, into `series`.

    Who fails is not measured any more, and why is in `series.failed`.
    """
    for number in rounds:
        row: dict[str, dict[str, float]] = {}
        series.rounds.append(row)
        order = list(contenders)
        rng.shuffle(order)
        for name in order:
            progress.next(name)
            if name not in series.failed:
                settle()
                found = attempt(name, series, partial(contenders[name], number))
                if found is not None:
                    row[name] = found


def attempt(name: str, series: Series, act: Callable[[], T]) -> T | None:
    """What `act` gives; None where it fails, which becomes a row of the table."""
    try:
        return act()
    except Exception as error:  # whatever somebody's library raises: the others are still measured
        log.debug("%s", name, exc_info=True)
        text = (str(error) or type(error).__name__).splitlines()[0]
        series.failed[name] = _("failed: {error}", error=text)
        return None


def settle() -> None:
    """Let nobody pay for the dirty pages and the garbage of who was measured before."""
    gc.collect()
    if hasattr(os, "sync"):
        os.sync()
    time.sleep(_PAUSE)


def cpu_seconds(without: Collection[int] = ()) -> float:
    """Processor seconds of this process and its children so far, where psutil is installed; else
    of this process alone. `without`: process ids of ours that are no part of what is measured."""
    total = time.process_time()
    try:
        import psutil
    except ModuleNotFoundError:
        return total
    for child in psutil.Process().children(recursive=True):
        if child.pid not in without:
            try:
                times = child.cpu_times()
            except psutil.Error:  # it has ended since
                continue
            total += times.user + times.system
    return total
