"""A run as it is at this moment: curves, marks, what is safe, how long it will still take.

Only reads the run directory, never talks to the trainer: it works over SSH, on a copy, and while
training goes on. `RunView.refresh` reads what has come since the last time. No torch here.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.checkpoint.rundir import EVENTS, Catalog, Entry, shared_memory
from holdfast.checkpoint.system import Follower, filesystem, run_lock
from holdfast.errors import HoldfastError
from holdfast.formatting import seconds_of
from holdfast.manage.rundir import RunDirectory, look, names_of, number
from holdfast.manage.story import is_story
from holdfast.monitor.forecast import Disk, Plan, forecast
from holdfast.monitor.measured import Evaluation, Mark, Point, Safety, Sample, integer

METRICS, CONFIG = "metrics.jsonl", "config.json"
SILENCE = 120.0  # seconds without a line after which a training elsewhere is taken to have ended

TRAINING, FINISHED, STOPPED, EMPTY = "training", "finished", "stopped", "empty"

INTERRUPTED = "interrupted"  # a mark of ours: a checkpoint that a signal or an error asked for
BROKE_OFF = "broke_off"  # an event of ours: a killed process writes none
# Events that are worth a mark beside a curve.
_MARKS = {"resumed", "rolled_back", "quarantined", "damaged", "failed", "diverged", "rescued"}
_MARKS |= {"finished", INTERRUPTED, BROKE_OFF}
_ENDS = ("signal", "error")  # reasons for which a checkpoint is an interruption
_STARTS = ("began", "resumed")  # events with which a process begins to train
_RECENT = 20  # logging intervals from which the speed is taken
_NO_RUNS = ("archive", "quarantine", "temp", "tokenizer", "logs")  # folders of a run directory


class RunView:
    """One run directory; call `refresh` before looking at it again. Not for several threads.

    `points`, `evaluations` and `samples` hold what counts: steps that a crash or a roll-back has
    undone are gone from them, as they are from the run. `events` is the whole history, `notices`
    what of it a person wants to know, both oldest first; `config` what the run was asked to do.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._metrics = Follower(directory / METRICS)
        self._catalog = Catalog(directory)
        self._catalog.history.follow(self._take_event, self._forget_events)
        self.run: RunDirectory | None = None
        self.config: dict[str, Any] = {}
        self._seen: tuple[int, int] | None = None  # None: the directory is to be looked at
        self._forget_metrics()
        self._forget_events()

    def _forget_metrics(self) -> None:
        self.points: list[Point] = []
        self.evaluations: list[Evaluation] = []
        self.samples: list[Sample] = []
        self.wild: list[Point] = []  # of `points`, those whose loss is NaN or infinite
        self.started: dict[str, Any] = {}  # the line of the last start: plan, device, model
        self._ends: list[dict[str, Any]] = []  # of earlier processes, as events: see `ends`
        self._ended = self._said = False  # finished; or ended in another way, and said so
        self._last_line = ""

    def _forget_events(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._settled = False  # whether something lasting has had to go
        self._happened = True  # since the last look at the directory

    def refresh(self) -> bool:
        """Read what has come; whether there was anything. Raises HoldfastError where the directory
        is none (any more: the view is empty then), OSError as it comes; call it again later."""
        seen = _changed_at(self.directory)
        lines, again = self._read_metrics()
        self._catalog.history.read()
        if self._happened or again or seen != self._seen:
            self._seen, self._happened = None, False
            try:
                self.run = look(self.directory, self._catalog, cached=True)
            except HoldfastError:
                self.run, self.config = None, {}
                raise
            self.config = _read_config(self.directory / CONFIG)
            self._seen = seen  # of before the look: what has changed meanwhile is looked at again
            return True
        return lines

    def _read_metrics(self) -> tuple[bool, bool]:
        """Take in what has come. Return whether anything has, and whether all of it came again."""
        came = again = False
        while True:
            lines = self._metrics.new()
            if self._metrics.restarted:
                again = True
                self._forget_metrics()
            for line in lines:
                self._take_line(line)
            came = came or bool(lines)
            if not self._metrics.more:
                return came, again

    # ------------------------------------------------------------------------------------ taking in

    def _take_line(self, line: Mapping[str, Any]) -> None:
        kind, step = line.get("event"), line.get("step")
        if not isinstance(step, int):
            return
        time, last, spoken = str(line.get("time") or ""), self._last_line, self._ended or self._said
        self._last_line, self._ended, self._said = time, kind == "finished", kind == "ended"
        if kind == "step":
            self._undo_after(step - 1)
            point = Point(
                step,
                time,
                integer(line.get("epoch")),
                number(line.get("loss")),
                number(line.get("smoothed_loss")),
                number(line.get("learning_rate")),
                number(line.get("tokens_per_second")),
                integer(line.get("durable_step")),
                integer(line.get("memory_step")),
                integer(line.get("gpu_bytes")),
            )
            self.points.append(point)
            if "loss" in line and not _finite(point.loss):  # the trainer writes null for NaN
                self.wild.append(point)
        elif kind == "evaluation":
            _forget_step(step, self.evaluations)
            values = (number(line.get(n)) for n in ("val_loss", "perplexity", "bits_per_byte"))
            self.evaluations.append(Evaluation(step, time, *values))
        elif kind == "sample":
            _forget_step(step, self.samples)
            epoch, text = integer(line.get("epoch")) or 0, str(line.get("text") or "")
            self.samples.append(Sample(step, epoch, text, time))
        elif kind == "started":
            if self.points and self.points[-1].step > step and not spoken:
                broken = {"time": last, "event": BROKE_OFF, "step": self.points[-1].step}
                self._ends.append(broken)
            self._undo_after(step)
            self.started = dict(line)
        elif kind in ("resumed", "diverged"):
            back_to = integer(line.get("back_to"))
            self._undo_after(step if back_to is None else back_to)
        elif kind == "finished":
            self._ends.append(dict(line))

    def _undo_after(self, step: int, until: float = math.inf) -> None:
        """Forget what was measured after `step` and before the time `until`: training goes on from
        `step` and makes those steps again."""
        for measured in (self.points, self.evaluations, self.samples, self.wild):
            while measured and measured[-1].step > step:
                if until < math.inf and seconds_of(measured[-1].time) > until:
                    break
                measured.pop()

    def _take_event(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self._happened = True
        kind, step = event.get("event"), integer(event.get("step"))
        if kind == "rolled_back" and step is not None:
            # Training goes on from there with its next start; what it writes then is younger.
            time = seconds_of(event.get("time"))
            self._undo_after(step, until=time)
            self._ended = self._ended and seconds_of(self._last_line) > time
        if kind == "removed" and event.get("reason") == "retention" and _lasting(event):
            self._settled = True

    # --------------------------------------------------------------------------------------- asking

    @property
    def marks(self) -> list[Mark]:
        """The marks on the way, in the order of time."""
        marks = map(_mark_of, _in_time([*self.events, *self.ends]))
        return [mark for mark in marks if mark.kind in _MARKS]

    @property
    def notices(self) -> list[dict[str, Any]]:
        """The events that a person wants to know of, in the order of time; `manage.story.describe`
        has the words for each."""
        return _in_time([*filter(is_story, self.events), *self.ends])

    @property
    def ends(self) -> list[dict[str, Any]]:
        """Events that the metrics alone tell of: a finish, and a training that broke off."""
        now = self.broke_off
        return self._ends + ([now] if now is not None else [])

    @property
    def broke_off(self) -> dict[str, Any] | None:
        """The end of a training that could write nothing any more, in the form of an event: it was
        killed, or its machine failed. None where the newest step is on the disk, and where it has
        said how it ended; a stranger's loop says neither.
        """
        if self.state != STOPPED or not self.started or self._said:
            return None
        safety = self.safety
        if not safety.disk_steps:
            return None
        return {"time": self._last_time, "event": BROKE_OFF, "step": safety.step}

    @property
    def saving_fails(self) -> str:
        """The reason for which the last save failed; empty where all is well."""
        for event in reversed(self.events):
            if event.get("event") in ("durable", "recovered"):
                return ""
            if event.get("event") in ("failed", "unsafe"):
                return str(event.get("reason") or event.get("event"))
        return ""

    @property
    def entries(self) -> list[Entry]:
        """The checkpoints, newest first."""
        return self.run.entries if self.run is not None else []

    @property
    def owner(self) -> str:
        """The process that trains here now, where this machine knows it; else empty."""
        try:
            return run_lock(self.directory).owner()
        except OSError:
            return ""

    @property
    def state(self) -> str:
        """TRAINING, FINISHED, STOPPED or EMPTY."""
        if self.owner:
            return TRAINING
        if self._ended:
            return FINISHED
        if not (self.points or self.entries or self.events or self.started):
            return EMPTY
        return TRAINING if self._unasked and self.silent < self.patience else STOPPED

    @property
    def _unasked(self) -> bool:
        """True if no lock can tell whether a training goes on: it runs elsewhere, on a shared disk,
        or this system cannot be asked. The silence of the run tells then."""
        return self._elsewhere or not sys.platform.startswith("linux")

    @property
    def _elsewhere(self) -> bool:
        return self.started.get("host") not in (None, socket.gethostname())

    @property
    def patience(self) -> float:
        """Seconds of silence that mean nothing: a slow training writes a line when it can."""
        pair = self.points[-2:]
        between = seconds_of(pair[-1].time) - seconds_of(pair[0].time) if len(pair) == 2 else 0.0
        return max(SILENCE, 5 * between)

    @property
    def silent(self) -> float:
        """Seconds since the last line of metrics or history; infinite where there is none."""
        last = seconds_of(self._last_time)
        return max(0.0, time.time() - last) if last else math.inf

    @property
    def _last_time(self) -> str:
        """The time of the last line of metrics or history."""
        times = [self._last_line, *(str(event.get("time")) for event in self.events[-1:])]
        return max(times, key=seconds_of)

    @property
    def step(self) -> int:
        """The newest step that anything here knows of."""
        last = self.points[-1].step if self.points else 0
        return max([last, *(entry.step for entry in self.entries[:1])])

    @property
    def nan_since(self) -> int | None:
        """The first step of those up to now whose loss was NaN or infinite; None where it is a
        number."""
        since = None
        for point, wild in zip(reversed(self.points), reversed(self.wild), strict=False):
            if point is not wild:
                break
            since = point.step
        return since

    @property
    def total_steps(self) -> int | None:
        """Of the whole plan, where the run has said it."""
        return integer(self.started.get("total_steps"))

    @property
    def pace(self) -> float | None:
        """Seconds a step in the last lines of this start, what a save or an evaluation takes
        included; None where that is not known."""
        began = self._began()
        recent = [point for point in self.points[-_RECENT:] if seconds_of(point.time) >= began]
        if len(recent) < 2 or recent[-1].step <= recent[0].step:
            return None
        spent = seconds_of(recent[-1].time) - seconds_of(recent[0].time)
        return max(0.0, spent) / (recent[-1].step - recent[0].step)

    @property
    def eta(self) -> float | None:
        """Seconds to the end of the plan at that pace; None where that is not known, or nothing
        runs."""
        pace, total = self.pace, self.total_steps
        if total is None or pace is None or self.state != TRAINING:
            return None
        return max(0, total - self.step) * pace

    def _began(self) -> float:
        """Return the time of the last start of the training."""
        times = [str(self.started.get("time") or "")]
        times += [str(e.get("time")) for e in reversed(self.events) if e.get("event") in _STARTS][
            :1
        ]
        return max(map(seconds_of, times))

    @property
    def safety(self) -> Safety:
        """The cost of a failure now."""
        newest = self.entries[0] if self.entries else None
        in_memory = self.memory_step
        step = max(self.step, in_memory or 0)
        # The work of a state ends where it was taken; what a start goes on from may be old.
        since = max(seconds_of(newest.created) if newest is not None else 0.0, self._began())
        training = self.state == TRAINING
        now = time.time() if training else seconds_of(self._last_line)
        spent = max(0.0, now - since) if since and now else None
        # A stranger's loop tells what it saves, and nothing of the steps that it makes meanwhile.
        counted = not training or bool(self.points or self.started)
        if newest is not None and step <= newest.step and counted:
            spent = 0.0
        disk_step = newest.step if newest is not None else None
        return Safety(step, disk_step, spent, in_memory, counted)

    @property
    def memory_step(self) -> int | None:
        """The newest whole snapshot in shared memory of this machine, of the generation that is
        under way; else what the run has said last, as long as it runs elsewhere."""
        run = [e for e in reversed(self.events) if "run_id" in e and "generation" in e][:1]
        steps = []
        with contextlib.suppress(OSError):  # deleted at this moment: the directory, or a slot
            for each in shared_memory.remains():
                left = shared_memory.newest_in(each) if each.belongs_to(self.directory) else None
                if left is not None and all(
                    left.identity[name] == event[name]
                    for event in run
                    for name in ("run_id", "generation")
                ):
                    steps.append(left.step)
        if steps:
            return max(steps)
        return self.points[-1].memory_step if self.points and self._elsewhere else None

    @property
    def disk(self) -> Disk:
        """Room for checkpoints, and when there will be none; nothing grows that does not train.
        Raises OSError where the directory is gone."""
        plan = None
        growing = self.state == TRAINING
        if growing:
            left = None if self.total_steps is None else max(0, self.total_steps - self.step)
            per_epoch = integer(self.started.get("steps_per_epoch"))
            plan = Plan.of(self.config, per_epoch, left, self.pace)
        free = filesystem.free_bytes(self.directory)
        return forecast(self.entries, free, plan, settled=self._settled or not growing)


def _in_time(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(events, key=lambda event: seconds_of(event.get("time")))


def _mark_of(event: dict[str, Any]) -> Mark:
    kind = str(event.get("event"))
    if kind == "durable" and event.get("reason") in _ENDS:
        kind = INTERRUPTED
    return Mark(kind, integer(event.get("step")), str(event.get("time") or ""), event)


def _forget_step(step: int, measured: list[Evaluation] | list[Sample]) -> None:
    """Forget lines from `step` on: after a kill before the save, training writes them again."""
    while measured and measured[-1].step >= step:
        measured.pop()


def find_runs(root: Path, *, depth: int = 3) -> list[Path]:
    """Return the run directories at and below `root`, by name; links are not followed, and what a
    run has set aside is not one."""
    found = []
    is_run = (root / EVENTS).exists() or (root / METRICS).exists()
    if is_run:
        found.append(root)
    if depth:
        try:
            below = sorted(p for p in root.iterdir() if p.is_dir() and not p.is_symlink())
        except OSError:
            return found
        for path in below:
            if not path.name.startswith(".") and not (is_run and path.name in _NO_RUNS):
                found += find_runs(path, depth=depth - 1)
    return found


def _read_config(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        config = json.loads(filesystem.read_small(path))
        if isinstance(config, dict):
            return config
    return {}


def _lasting(event: Mapping[str, Any]) -> bool:
    return not all(str(name).startswith("temp/") for name in names_of(event))


def _changed_at(directory: Path) -> tuple[int, int]:
    """Return times that change when a file comes or goes."""
    stamps = []
    for place in (directory, directory / "temp"):
        try:
            stamps.append(place.stat().st_mtime_ns)
        except OSError:
            stamps.append(0)
    return stamps[0], stamps[1]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
