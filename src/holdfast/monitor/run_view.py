"""A run as it is at this moment, for whoever shows it: curves, marks, what is safe, how long still.

Only reads the run directory, never talks to the trainer: it works over SSH, on a copy, and while
training goes on. `RunView.refresh` reads what has come since the last time. No torch here.
"""

from __future__ import annotations

import datetime
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint import filesystem, memory
from holdfast.checkpoint.catalog import EVENTS, Entry
from holdfast.checkpoint.lock import FileLock
from holdfast.formatting import parse_time
from holdfast.manage.rundir import RunDirectory, look, number
from holdfast.monitor.follow import Follower

METRICS = "metrics.jsonl"
SILENCE = 120.0  # seconds without a line after which a training elsewhere is taken to have ended

TRAINING, FINISHED, STOPPED, EMPTY = "training", "finished", "stopped", "empty"

# Events of the history, and lines of the metrics, that are worth a mark beside a curve.
_MARKS = ("resumed", "rolled_back", "quarantined", "damaged", "failed", "diverged", "rescued",
          "finished")  # fmt: skip
_ENDS = ("signal", "error")  # reasons for which a checkpoint is an interruption


@dataclass(frozen=True, slots=True)
class Point:
    """One logging interval. Losses in nats a token; `time` ISO 8601 with the zone."""

    step: int
    time: str
    epoch: int | None
    loss: float | None
    smoothed: float | None
    learning_rate: float | None
    tokens_per_second: float | None
    durable_step: int | None
    memory_step: int | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A measured validation loss."""

    step: int
    time: str
    val_loss: float | None
    perplexity: float | None
    bits_per_byte: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """A text of the model at the end of an epoch."""

    step: int
    epoch: int
    text: str


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened on the way; `kind` is the name of its event, or "interrupted"."""

    kind: str
    step: int | None
    time: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Safety:
    """What a failure would cost now; None where nothing is safe, or where it is not known.

    `disk_*` after a power cut, `memory_*` after a kill of the process.
    """

    step: int  # the newest that is known
    disk_step: int | None
    disk_seconds: float | None  # of work since that state was durable
    memory_step: int | None

    @property
    def disk_steps(self) -> int:
        """Steps that a power cut would cost."""
        return self.step - (self.disk_step or 0)

    @property
    def memory_steps(self) -> int:
        """Steps that a kill of the process would cost."""
        return self.step - max(self.memory_step or 0, self.disk_step or 0)


@dataclass(frozen=True, slots=True)
class Disk:
    """Room for checkpoints. `growth` bytes an hour, over what is kept; 0.0 where it is settled."""

    free: int
    used: int
    next_size: int  # of the newest checkpoint: what the next one will take
    growth: float

    @property
    def hours_left(self) -> float:
        """Until it is full; infinite where it does not fill."""
        return self.free / self.growth if self.growth > 0 else math.inf


class RunView:
    """One run directory; call `refresh` before looking at it again. Not for several threads.

    `points`, `evaluations` and `samples` hold what counts: steps that a crash or a roll-back has
    undone are gone from them, as they are from the run.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._metrics = Follower(directory / METRICS)
        self._events = Follower(directory / EVENTS)
        self.run: RunDirectory | None = None
        self._seen: tuple[int, int] = (0, 0)
        self._forget_metrics()
        self._forget_events()

    def _forget_metrics(self) -> None:
        self.points: list[Point] = []
        self.evaluations: list[Evaluation] = []
        self.samples: list[Sample] = []
        self.started: dict[str, Any] = {}  # the line of the last start: plan, device, model
        self._own_marks: list[Mark] = []
        self._ended = False
        self._last_line = ""

    def _forget_events(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._event_marks: list[Mark] = []

    def refresh(self) -> bool:
        """Read what has come; whether there was anything. Raises HoldfastError where the directory
        is none, OSError as it comes."""
        events, lines = self._events.new(), self._metrics.new()
        restarted = self._events.restarted or self._metrics.restarted
        if self._metrics.restarted:
            self._forget_metrics()
        if self._events.restarted:
            self._forget_events()
        for line in lines:
            self._take_line(line)
        for event in events:
            self._take_event(event)
        seen = _changed_at(self.directory)
        if events or restarted or self.run is None or seen != self._seen:
            self.run, self._seen = look(self.directory), seen
            return True
        return bool(lines)

    # ------------------------------------------------------------------------------------ taking in

    def _take_line(self, line: Mapping[str, Any]) -> None:
        kind, step = line.get("event"), line.get("step")
        if not isinstance(step, int):
            return
        time = str(line.get("time") or "")
        self._last_line, self._ended = time, kind == "finished"
        if kind == "step":
            self._undo_after(step - 1)
            self.points.append(
                Point(
                    step, time, _integer(line.get("epoch")), number(line.get("loss")),
                    number(line.get("smoothed_loss")), number(line.get("learning_rate")),
                    number(line.get("tokens_per_second")), _integer(line.get("durable_step")),
                    _integer(line.get("memory_step")),
                )
            )  # fmt: skip
        elif kind == "evaluation":
            values = (number(line.get(n)) for n in ("val_loss", "perplexity", "bits_per_byte"))
            self.evaluations.append(Evaluation(step, time, *values))
        elif kind == "sample":
            self.samples.append(Sample(step, line.get("epoch") or 0, str(line.get("text") or "")))
        elif kind == "started":
            self._undo_after(step)
            self.started = dict(line)
        elif kind in ("resumed", "diverged"):
            self._undo_after(line.get("back_to", step))
        if kind in ("diverged", "finished"):
            self._own_marks.append(Mark(kind, step, time, dict(line)))

    def _undo_after(self, step: int) -> None:
        """Training goes on from `step`: what was measured after it is of steps made again."""
        for measured in (self.points, self.evaluations, self.samples):
            while measured and measured[-1].step > step:
                measured.pop()

    def _take_event(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        kind, step = str(event.get("event")), _integer(event.get("step"))
        if kind == "durable" and event.get("reason") in _ENDS:
            kind = "interrupted"
        if kind in _MARKS or kind == "interrupted":
            self._event_marks.append(Mark(kind, step, str(event.get("time") or ""), event))

    # --------------------------------------------------------------------------------------- asking

    @property
    def marks(self) -> list[Mark]:
        """What happened on the way, in the order of time."""
        return sorted(self._event_marks + self._own_marks, key=lambda mark: _seconds(mark.time))

    @property
    def entries(self) -> list[Entry]:
        """The checkpoints, newest first."""
        return self.run.entries if self.run is not None else []

    @property
    def owner(self) -> str:
        """Who trains here at this moment, where this machine knows it; else empty."""
        try:
            return FileLock(self.directory / ".run.lock").owner()
        except OSError:
            return ""

    @property
    def state(self) -> str:
        """TRAINING, FINISHED, STOPPED or EMPTY."""
        if self.owner:
            return TRAINING
        if self._ended:
            return FINISHED
        if not self.points and not self.entries:
            return EMPTY
        # Somewhere else, on a shared disk: there no lock can be asked.
        return TRAINING if self._elsewhere and self.silent < SILENCE else STOPPED

    @property
    def _elsewhere(self) -> bool:
        return self.started.get("host") not in (None, socket.gethostname())

    @property
    def silent(self) -> float:
        """Seconds since the last line of the metrics; infinite where there is none."""
        return _now() - _seconds(self._last_line) if self._last_line else math.inf

    @property
    def step(self) -> int:
        """The newest step that anything here knows of."""
        last = self.points[-1].step if self.points else 0
        return max([last, *(entry.step for entry in self.entries[:1])])

    @property
    def total_steps(self) -> int | None:
        """Of the whole plan, where the run has said it."""
        return _integer(self.started.get("total_steps"))

    @property
    def eta(self) -> float | None:
        """Seconds to the end of the plan at the speed of the last lines, what a save or an
        evaluation takes included; None where that is not known, or nothing runs."""
        recent = self.points[-20:]
        if self.total_steps is None or len(recent) < 2 or self.state != TRAINING:
            return None
        began = _seconds(str(self.started.get("time") or ""))
        recent = [point for point in recent if _seconds(point.time) >= began]
        if len(recent) < 2 or recent[-1].step <= recent[0].step:
            return None
        spent = _seconds(recent[-1].time) - _seconds(recent[0].time)
        left = max(0, self.total_steps - self.step)
        return left * spent / (recent[-1].step - recent[0].step)

    @property
    def safety(self) -> Safety:
        """What a failure would cost now."""
        disk = next((e for e in reversed(self.events) if e.get("event") == "durable"), None)
        newest = self.entries[0] if self.entries else None
        durable_at = _seconds(str(disk["time"])) if disk is not None and "time" in disk else None
        now = _now() if self.state == TRAINING else _seconds(self._last_line)
        known = durable_at is not None and newest is not None
        return Safety(
            self.step,
            newest.step if newest is not None else None,
            max(0.0, now - durable_at) if known and durable_at is not None else None,
            self._memory_step(),
        )

    def _memory_step(self) -> int | None:
        """The newest whole snapshot in shared memory of this machine, else what the run has said
        last, as long as it runs."""
        found = [each for each in memory.remains() if each.belongs_to(self.directory)]
        steps = [left.order[1] for left in map(memory.newest_in, found) if left]
        if steps:
            return max(steps)
        return self.points[-1].memory_step if self.points and self._elsewhere else None

    @property
    def disk(self) -> Disk:
        """Room for checkpoints, and when there will be none."""
        sizes: dict[str, int] = {entry.id: entry.size for entry in self.entries}
        lasting = [entry for entry in self.entries if entry.kind != "temp"]
        growth = 0.0
        removed = any(
            e.get("event") == "removed" and e.get("reason") == "retention" and _lasting(e)
            for e in self.events
        )
        if len(lasting) > 1 and not removed:  # nothing lasting has had to go: it still grows
            hours = (_seconds(lasting[0].created) - _seconds(lasting[-1].created)) / 3600
            growth = sum(entry.size for entry in lasting[:-1]) / hours if hours > 0 else 0.0
        newest = self.entries[0].size if self.entries else 0
        return Disk(filesystem.free_bytes(self.directory), sum(sizes.values()), newest, growth)


def find_runs(root: Path, *, depth: int = 3) -> list[Path]:
    """The run directories at and below `root`, by name; links are not followed."""
    found = []
    if (root / EVENTS).exists() or (root / METRICS).exists():
        found.append(root)
    if depth:
        try:
            below = sorted(p for p in root.iterdir() if p.is_dir() and not p.is_symlink())
        except OSError:
            return found
        for path in below:
            if not path.name.startswith("."):
                found += find_runs(path, depth=depth - 1)
    return found


def _lasting(event: Mapping[str, Any]) -> bool:
    return not all(str(name).startswith("temp/") for name in event.get("names") or [])


def _changed_at(directory: Path) -> tuple[int, int]:
    """Something that is another where a file has come or gone."""
    stamps = []
    for place in (directory, directory / "temp"):
        try:
            stamps.append(place.stat().st_mtime_ns)
        except OSError:
            stamps.append(0)
    return stamps[0], stamps[1]


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _seconds(time: str) -> float:
    parsed = parse_time(time)
    return 0.0 if parsed is None else parsed.timestamp()


def _now() -> float:
    return datetime.datetime.now().timestamp()
