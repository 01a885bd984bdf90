"""One moment of a run, ready to be shown: what the terminal monitor draws, and `--once` prints.

Plain values and `to_json`, the documented form. The words are in words.py.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint.rundir import Entry
from holdfast.formatting import parse_time
from holdfast.manage.rundir import number
from holdfast.manage.story import describe
from holdfast.monitor.forecast import Disk
from holdfast.monitor.machine import Machine, Probe
from holdfast.monitor.measured import Evaluation, Point, Safety
from holdfast.monitor.run_view import BROKE_OFF, FINISHED, TRAINING, RunView

NOTICES = 100  # of the last ones that are kept to be shown
WARNINGS = (
    *("failed", "unsafe", "quarantined", "damaged", "diverged"),
    *("lock_renewed", "interrupted", BROKE_OFF),
)
_ENDS = ("signal", "error")

# Exit statuses of `holdfast monitor --once`; errors have those of holdfast.errors.
UNFINISHED, CANNOT_SAVE = 9, 10


@dataclass(frozen=True, slots=True)
class Row:
    """A checkpoint as the monitor lists it."""

    entry: Entry
    best: bool
    latest: bool
    damaged: bool

    @property
    def age(self) -> float:
        """Seconds since its state was taken; NaN where it does not say."""
        created = parse_time(self.entry.created)
        return math.nan if created is None else time.time() - created.timestamp()

    def to_json(self) -> dict[str, Any]:
        entry = self.entry
        return {
            "file": entry.names[0],
            "kind": entry.kind,
            "step": entry.step,
            "epoch": entry.epoch,
            "bytes": entry.size,
            "created": entry.created,
            "age_seconds": _rounded(self.age),
            "val_loss": number(entry.metrics.get("val_loss")),
            "verified": entry.verified,
            "damaged": self.damaged,
            "best": self.best,
            "latest": self.latest,
            "pinned": entry.pinned,
        }


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one moment; None where something is not known."""

    directory: Path
    state: str  # as RunView.state
    owner: str
    silent: float  # seconds without a line
    overdue: bool  # whether a training has been silent for longer than it should
    started: Mapping[str, Any]
    elsewhere: bool
    step: int
    total_steps: int | None
    eta: float | None
    last: Point | None
    nan_since: int | None  # the first of the newest steps, where their loss is no number
    validation: Evaluation | None
    best_validation: Evaluation | None
    safety: Safety
    saving_fails: str
    disk: Disk | None
    rows: list[Row]  # newest first
    notices: list[dict[str, Any]]  # oldest first
    machine: Machine

    @property
    def progress(self) -> float | None:
        """The share of the plan that is done, 0 to 1."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else None

    @property
    def epoch(self) -> int | None:
        return self.last.epoch if self.last is not None else None

    @property
    def epochs(self) -> int | None:
        value = self.started.get("epochs")
        return value if isinstance(value, int) else None

    @property
    def exit_status(self) -> int:
        """For scripts: 0 while it trains and when it is finished."""
        if self.state == TRAINING:
            return CANNOT_SAVE if self.saving_fails else 0
        return 0 if self.state == FINISHED else UNFINISHED

    def to_json(self) -> dict[str, Any]:
        """Return the documented form; times ISO 8601, sizes bytes, durations seconds, losses
        nats."""
        last, validation, best = self.last, self.validation, self.best_validation
        return {
            "directory": str(self.directory),
            "state": self.state,
            "owner": self.owner or None,
            "silent_seconds": _rounded(self.silent),
            "model": self.started.get("model"),
            "parameters": self.started.get("parameters"),
            "device": self.started.get("device"),
            "host": self.started.get("host"),
            "epoch": self.epoch,
            "epochs": self.epochs,
            "step": self.step,
            "total_steps": self.total_steps,
            "progress": self.progress,
            "eta_seconds": _rounded(self.eta),
            "time": last.time if last else None,
            "loss": last.loss if last else None,
            "nan_since_step": self.nan_since,
            "smoothed_loss": last.smoothed if last else None,
            "learning_rate": last.learning_rate if last else None,
            "tokens_per_second": last.tokens_per_second if last else None,
            "val_loss": validation.val_loss if validation else None,
            "val_step": validation.step if validation else None,
            "best_val_loss": best.val_loss if best else None,
            "best_val_step": best.step if best else None,
            "safety": self._safety_json(),
            "saving_fails": self.saving_fails or None,
            "disk": self._disk_json(),
            "machine": asdict(self.machine),
            "checkpoints": [row.to_json() for row in self.rows],
            "events": [
                {"warning": is_warning(event), "text": describe(event), **event}
                for event in self.notices
            ],
        }

    def _safety_json(self) -> dict[str, Any]:
        safety = self.safety
        return {
            "disk_step": safety.disk_step,
            "memory_step": safety.memory_step,
            "power_cut": {
                "steps_lost": None if safety.disk_unknown else safety.disk_steps,
                "seconds_lost": _rounded(safety.disk_seconds),
            },
            "kill": {"steps_lost": None if safety.memory_unknown else safety.memory_steps},
            "remote": None,  # no remote tier is configured
        }

    def _disk_json(self) -> dict[str, Any] | None:
        disk = self.disk
        if disk is None:
            return None
        return {
            "free_bytes": disk.free,
            "used_bytes": disk.used,
            "next_bytes": disk.next_size,
            "next_fits": disk.fits,
            "growth_bytes_per_hour": round(disk.growth),
            "full_in_seconds": _rounded(3600 * disk.hours_left),
        }


def take(view: RunView, probe: Probe) -> Snapshot:
    """Take the moment of `view`, which has been refreshed, and of this machine."""
    state = view.state
    here = view.started.get("host") in (None, socket.gethostname())
    pid, began = view.started.get("pid"), parse_time(view.started.get("time"))
    measured = state == TRAINING and here and isinstance(pid, int) and began is not None
    machine = probe.sample(pid, began.timestamp()) if measured and began else probe.sample()
    finite = [
        (e.val_loss, e)
        for e in view.evaluations
        if e.val_loss is not None and math.isfinite(e.val_loss)
    ]
    disk = None
    with contextlib.suppress(OSError):  # deleted at this moment; the next look says so
        disk = view.disk
    return Snapshot(
        view.directory,
        state,
        view.owner,
        view.silent,
        state == TRAINING and view.silent > view.patience,
        dict(view.started),
        not here,
        view.step,
        view.total_steps,
        view.eta,
        view.points[-1] if view.points else None,
        view.nan_since,
        finite[-1][1] if finite else None,
        min(finite, key=lambda pair: pair[0])[1] if finite else None,
        view.safety,
        view.saving_fails,
        disk,
        _rows(view),
        view.notices[-NOTICES:],
        machine,
    )


def _rows(view: RunView) -> list[Row]:
    if view.run is None:
        return []
    best, newest = view.run.contents.best, view.run.contents.newest
    return [
        Row(
            entry,
            best is not None and entry.id == best.id,
            newest is not None and entry.id == newest.id,
            entry.id in view.run.distrusted,
        )
        for entry in view.entries
    ]


def is_warning(event: Mapping[str, Any]) -> bool:
    """Return whether a person should worry about an event."""
    return event.get("event") in WARNINGS or event.get("reason") in _ENDS


def _rounded(seconds: float | None) -> float | None:
    return round(seconds, 3) if seconds is not None and math.isfinite(seconds) else None
