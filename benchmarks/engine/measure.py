"""Interleaved rounds and what they show: medians, ratios pair by pair, intervals.

Each round measures every contender once, in random order, so that whatever else the machine does
meanwhile affects all of them alike. A ratio is formed within rounds.
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

import psutil

from holdfast.formatting import format_seconds

T = TypeVar("T")

log = logging.getLogger(__name__)

Measure = Callable[[int], dict[str, float]]  # the number of the round → metrics
PAUSE = 0.3  # s between two measurements, after sync(2)


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratio of two medians.

    `low` and `high` enclose the median of the pairwise ratios with at least 95 % confidence. They
    are None if there are too few pairs.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(slots=True)
class Series:
    """Measurements in rounds: for each round contender → metric → value."""

    rounds: list[dict[str, dict[str, float]]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # contender → why it is not measured

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rounds for name in row))

    def values(self, name: str, metric: str) -> list[float]:
        return [row[name][metric] for row in self.rounds if metric in row.get(name, {})]

    def median(self, name: str, metric: str) -> float | None:
        values = self.values(name, metric)
        return statistics.median(values) if values else None

    def ratio(self, over: tuple[str, str], under: tuple[str, str]) -> Ratio | None:
        """Divide `over` (contender, metric) by `under`, using the rounds that have both."""
        pairs = [
            (row[over[0]][over[1]], row[under[0]][under[1]])
            for row in self.rounds
            if over[1] in row.get(over[0], {}) and under[1] in row.get(under[0], {})
        ]
        if not pairs:
            return None
        if over == under:
            return Ratio(1.0, None, None)
        low, high = interval([a / b for a, b in pairs])
        above, below = zip(*pairs, strict=True)
        return Ratio(statistics.median(above) / statistics.median(below), low, high)


def interval(values: list[float]) -> tuple[float | None, float | None]:
    """Return a distribution-free interval that covers the median with at least 95 %.

    The k-th smallest and k-th largest value, with the largest k for which the two tails of the
    binomial distribution (n, 1/2) hold at most 5 % (Conover, Practical Nonparametric Statistics,
    3rd ed., section 3.2). Fewer than six values give no interval.
    """
    n, k, tails = len(values), 0, 0.0
    while (tails := tails + 2 * math.comb(n, k) / 2**n) <= 0.05:
        k += 1
    if k == 0:
        return None, None
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]


class Progress:
    """One line on stderr, if that is a terminal: the current measurement and the time left."""

    def __init__(self) -> None:
        self._active = sys.stderr.isatty()
        self._part, self._total, self._done, self._began = "", 0, 0, 0.0

    def start(self, part: str, total: int) -> None:
        self._part, self._total, self._done, self._began = part, total, 0, time.monotonic()

    def next(self, what: str) -> None:
        left = ""
        if self._done:
            each = (time.monotonic() - self._began) / self._done
            left = f", about {format_seconds(each * (self._total - self._done))} left in this part"
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
    """Measure every contender once in each of `rounds`, into `series`.

    A contender that fails is not measured again; `series.failed` gets its reason.
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
    """Return the result of `act`. If it fails, note why for the table and return None."""
    try:
        return act()
    except Exception as error:  # a peer may raise anything; the others must still be measured
        log.debug("%s", name, exc_info=True)
        text = (str(error) or type(error).__name__).splitlines()[0]
        series.failed[name] = f"failed: {text}"
        return None


def settle() -> None:
    """Write the dirty pages and collect the garbage of the contender that was measured before."""
    gc.collect()
    os.sync()
    time.sleep(PAUSE)


def cpu_seconds(without: Collection[int] = ()) -> float:
    """Return the CPU seconds of this process and its children so far, less those of `without`."""
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        if child.pid not in without:
            try:
                times = child.cpu_times()
            except psutil.Error:  # it has ended since
                continue
            total += times.user + times.system
    return total
