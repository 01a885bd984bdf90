"""Looks at the runs under a directory again and again, in a thread of its own.

A disk that hangs must not take the keyboard with it: the screen only gets what was seen. RunView
reads.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast.checkpoint.rundir import EVENTS
from holdfast.checkpoint.system import run_lock
from holdfast.errors import HoldfastError
from holdfast.i18n import _
from holdfast.monitor.curves import Curves, curves_of
from holdfast.monitor.machine import Probe
from holdfast.monitor.run_view import METRICS, RunView, find_runs
from holdfast.monitor.terminal.snapshot import Snapshot, take

SEARCH_EVERY = 5.0  # seconds between two searches for runs that have begun
SHARE = 100  # searching takes at most this part of the time, and so does thinning the curves


def runs_in(root: Path) -> list[Path]:
    """Return the runs at and below `root`; a directory that holds nothing but checkpoints is one
    too."""
    return find_runs(root) or ([root] if any(root.glob("*.pt")) else [])


@dataclass(frozen=True, slots=True)
class Look:
    """One look: the chosen run and its place among `runs`.

    `snapshot` is None where there is nothing to show; `problem` says why, or what is wrong with
    what is shown.
    """

    root: Path
    runs: tuple[Path, ...] = ()
    index: int = 0
    snapshot: Snapshot | None = None
    curves: Curves | None = None
    problem: str = ""


def _most_wanted(runs: Sequence[Path]) -> Path:
    """Return the run to show where none of several was named: one that trains, else the one that
    was written last."""

    def order(run: Path) -> tuple[bool, float]:
        owner, written = "", 0.0
        with contextlib.suppress(OSError):
            owner = run_lock(run).owner()
        for name in (METRICS, EVENTS):
            with contextlib.suppress(OSError):
                written = max(written, (run / name).stat().st_mtime)
        return bool(owner), written

    return max(runs, key=order)


class Watcher(threading.Thread):
    """Hands a `Look` to `deliver` every `interval` seconds, from its own thread."""

    def __init__(self, root: Path, interval: float, deliver: Callable[[Look], object]) -> None:
        super().__init__(daemon=True, name="watcher")  # a look that hangs does not hold the end up
        self._root, self._interval, self._deliver = root, interval, deliver
        self._wake = threading.Event()
        self._stopped = False
        self._lock = threading.Lock()
        self._chosen: Path | None = None
        self._runs: list[Path] = []
        self._search_at = 0.0
        self._views: dict[Path, RunView] = {}
        self._curves: dict[Path, Curves] = {}
        self._stale: set[Path] = set()  # runs of which more has been read than is in `_curves`
        self._thin_at = 0.0
        self._probe = Probe()

    def choose(self, run: Path) -> None:
        """Show this one from now on."""
        with self._lock:
            self._chosen = run
        self._wake.set()

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()

    def run(self) -> None:
        while not self._stopped:
            look = self.look()
            if not self._stopped:
                self._deliver(look)
            self._wake.wait(self._interval)
            self._wake.clear()

    def look(self) -> Look:
        """Look once; whatever goes wrong is the `problem` of what is returned."""
        try:
            self._search()
            with self._lock:
                if self._chosen is None and self._runs:
                    self._chosen = _most_wanted(self._runs)
                chosen = self._chosen
        except OSError as error:
            return Look(self._root, problem=str(error))
        if chosen is None:
            return Look(
                self._root, problem=_("Waiting for a training in {directory}", directory=self._root)
            )
        if chosen not in self._runs:
            self._runs = sorted([*self._runs, chosen])
        return self._look_at(chosen, tuple(self._runs), self._runs.index(chosen))

    def _search(self) -> None:
        began = time.monotonic()
        if began >= self._search_at:
            self._runs = runs_in(self._root)
            now = time.monotonic()  # a large tree is searched rarely, whatever is found there
            usual = SEARCH_EVERY if self._runs else 0.0
            self._search_at = now + max(usual, SHARE * (now - began))

    def _thin_curves(self, chosen: Path, view: RunView) -> None:
        began = time.monotonic()
        if chosen in self._stale and (began >= self._thin_at or chosen not in self._curves):
            self._curves[chosen] = curves_of(view, "")
            self._stale.discard(chosen)
            now = time.monotonic()
            self._thin_at = now + SHARE * (now - began)

    def _look_at(self, chosen: Path, runs: tuple[Path, ...], index: int) -> Look:
        view = self._views.setdefault(chosen, RunView(chosen))
        problem = ""
        try:
            if view.refresh() or chosen not in self._curves:
                self._stale.add(chosen)
            self._thin_curves(chosen, view)
        except HoldfastError:
            self._curves.pop(chosen, None)
            gone = _(
                "The directory is gone; waiting for a training in {directory}", directory=chosen
            )
            return Look(self._root, runs, index, problem=gone)
        except OSError as error:  # another look may fare better
            problem = str(error)
        snapshot = take(view, self._probe)
        return Look(self._root, runs, index, snapshot, self._curves.get(chosen), problem)
