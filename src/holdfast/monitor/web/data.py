"""Give a page the data of a run: plain JSON from a RunView, curves thinned to fit a screen.

Everything here is data; words are made in the page, in the reader's language. No torch here.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from holdfast.checkpoint.rundir import ARCHIVE, QUARANTINE
from holdfast.checkpoint.system import filesystem
from holdfast.errors import HoldfastError
from holdfast.formatting import parse_time
from holdfast.manage.compare.manifests import compare
from holdfast.manage.output import json_ready
from holdfast.manage.rundir import number, set_aside
from holdfast.monitor.measured import Mark, Point, Safety
from holdfast.monitor.run_view import TRAINING, RunView
from holdfast.monitor.web.checkpoints import checkpoint_rows, milliseconds
from holdfast.monitor.web.commands import commands

CURVE_POINTS = 2000  # of a curve that is sent whole: more than a screen has columns
LOG_BYTES = 64 * 1024  # of the end of the log
_SAMPLES, _SAMPLE_LENGTH, _MARKS = 100, 4000, 300

# The columns of "curves", and where each comes from.
_COLUMNS: dict[str, Callable[[Point], float | None]] = {
    "loss": lambda point: point.loss,
    "smoothed": lambda point: point.smoothed,
    "learning_rate": lambda point: point.learning_rate,
    "tokens_per_second": lambda point: point.tokens_per_second,
}
_KEPT = ("loss", "tokens_per_second", "learning_rate")  # whose extremes thinning keeps


def run_id(directory: Path) -> str:
    """Return the id of a run: a page never names a path."""
    return hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]


# ---------------------------------------------------------------------------------------- curves


def thin(points: Sequence[Point], limit: int = CURVE_POINTS) -> list[Point]:
    """Return at most `limit` of `points`, in their order: the first, the last, and of every stretch
    between them the lowest and the highest of each quantity. A spike of one step stays visible."""
    if len(points) <= limit:
        return list(points)
    stretches = max(1, (limit - 2) // (2 * len(_KEPT)))
    chosen = {0, len(points) - 1}
    for i in range(stretches):
        begin = 1 + i * (len(points) - 2) // stretches
        end = 1 + (i + 1) * (len(points) - 2) // stretches
        for name in _KEPT:
            of = _COLUMNS[name]
            known = [(value, j) for j in range(begin, end) if _finite(value := of(points[j]))]
            if known:
                chosen |= {min(known)[1], max(known)[1]}
    return [points[j] for j in sorted(chosen)]


def curves(points: Iterable[Point]) -> dict[str, list[Any]]:
    """Return points as columns: "step", "time" (milliseconds since 1970), "epoch" and the
    quantities; null stands for a number that is missing or not finite."""
    every = list(points)
    columns: dict[str, list[Any]] = {
        "step": [point.step for point in every],
        "time": [milliseconds(point.time) for point in every],
        "epoch": [point.epoch for point in every],
    }
    for name, of in _COLUMNS.items():
        columns[name] = [_short(of(point)) for point in every]
    return columns


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _short(value: float | None) -> float | None:
    """Round to seven significant digits, which a 32-bit loss has; None where it is not finite."""
    return float(f"{value:.7g}") if value is not None and math.isfinite(value) else None


# -------------------------------------------------------------------------------------- one run


def summary(view: RunView, identity: str, name: str) -> dict[str, Any]:
    """Return the row of a run in a list of runs."""
    points, safety = view.points, view.safety
    last = points[-1] if points else None
    epochs = view.started.get("epochs")
    return {
        "id": identity,
        "name": name,
        "state": view.state,
        "step": view.step,
        "total_steps": view.total_steps,
        "epoch": last.epoch if last else None,
        "epochs": epochs if isinstance(epochs, int) else None,
        "nan_since": view.nan_since,
        "loss": _short(last.smoothed if last and last.smoothed is not None else None),
        "best": _best(view),
        "tokens_per_second": _short(last.tokens_per_second) if last else None,
        "eta": _short(view.eta),
        "risk": _risk(view, safety),
        "updated": milliseconds(last.time) if last else None,
        "checkpoint_count": len(view.entries),
        "damaged": len(view.run.contents.damaged) if view.run is not None else 0,
    }


def detail(view: RunView, identity: str, name: str) -> dict[str, Any]:
    """Return everything about a run but its curves."""
    disk = view.disk
    started = {
        key: view.started[key]
        for key in (
            "model",
            "parameters",
            "context_length",
            "device",
            "precision",
            "tokens",
            "steps_per_epoch",
            "time",
        )
        if isinstance(view.started.get(key), str | int)
    }
    rows, left_out = checkpoint_rows(view)
    found: dict[str, Any] = {
        **summary(view, identity, name),
        "path": str(view.directory),
        "started": started,
        "evaluations": [
            {**asdict(each), "time": milliseconds(each.time)}
            for each in view.evaluations[-CURVE_POINTS:]
        ],
        "samples": [
            {"step": each.step, "epoch": each.epoch, "text": each.text[:_SAMPLE_LENGTH]}
            for each in view.samples[-_SAMPLES:]
        ],
        "nan": [point.step for point in (view.wild[0], view.wild[-1])] if view.wild else None,
        "marks": [_mark(mark, view.directory) for mark in view.marks[-_MARKS:]],
        "checkpoints": rows,
        "checkpoints_left_out": left_out,
        "disk": {
            "free": disk.free,
            "used": disk.used,
            "next_size": disk.next_size,
            "growth": _short(disk.growth),
            "hours_left": _short(disk.hours_left) if math.isfinite(disk.hours_left) else None,
            QUARANTINE: len(_checkpoints_in(view.directory, QUARANTINE)),
            ARCHIVE: len(_checkpoints_in(view.directory, ARCHIVE)),
        },
        "commands": commands(view),
    }
    ready = json_ready(found)
    assert isinstance(ready, dict)
    return ready


def _best(view: RunView) -> dict[str, Any] | None:
    """Return the lowest validation loss that was measured, else what the best checkpoint says."""
    measured = [e for e in view.evaluations if e.val_loss is not None and _finite(e.val_loss)]
    if measured:
        best = min(measured, key=lambda e: e.val_loss or 0.0)
        return {"step": best.step, "val_loss": best.val_loss, "perplexity": best.perplexity}
    entry = view.run.contents.best if view.run is not None else None
    loss = number(entry.metrics.get("val_loss")) if entry is not None else None
    if entry is None or loss is None or not math.isfinite(loss):
        return None
    return {"step": entry.step, "val_loss": loss, "perplexity": None}


def _risk(view: RunView, safety: Safety) -> dict[str, Any]:
    """Return what would be lost now: `seconds` of work after a power cut, which grow while
    `ticking`."""
    training = view.state == TRAINING
    seconds = safety.disk_seconds
    if not training and safety.disk_steps <= 0:
        seconds = 0.0
    elif seconds is None and training:
        began = parse_time(view.started.get("time"))
        last = parse_time(view.points[-1].time) if view.points else None
        if began is not None:  # nothing is durable yet: all of it
            seconds = max(0.0, (last or began).timestamp() - began.timestamp())
    verified = next((entry.step for entry in view.entries if entry.verified), None)
    return {
        "seconds": None if seconds is None else round(seconds, 1),
        "ticking": training,
        "as_of": round(time.time() * 1000) if training else None,
        "disk_step": safety.disk_step,
        "disk_steps": None if safety.disk_unknown else safety.disk_steps,
        "memory_step": safety.memory_step,
        "memory_steps": None if safety.memory_unknown else safety.memory_steps,
        "verified_step": verified,
    }


def _mark(mark: Mark, directory: Path) -> dict[str, Any]:
    """Return a mark for the page. Reasons name files below the run: the way there is private."""
    wanted = (
        "reason",
        "names",
        "generation",
        "back_to",
        "steps_lost",
        "minutes_lost",
        "failures",
        "minutes",
    )
    fields = {name: mark.fields[name] for name in wanted if name in mark.fields}
    if isinstance(fields.get("reason"), str):
        for way in (directory.resolve(), directory):
            fields["reason"] = fields["reason"].replace(f"{way}{os.sep}", "")
    return {
        "kind": mark.kind,
        "step": mark.step,
        "time": milliseconds(mark.time),
        "fields": fields,
    }


def _checkpoints_in(directory: Path, place: str) -> list[Path]:
    return [path for path in set_aside(directory, place) if path.suffix == ".pt"]


# ------------------------------------------------------------------------------- beside the runs


def log_tail(directory: Path, limit: int = LOG_BYTES) -> dict[str, Any]:
    """Return the end of the newest log: {"name", "text", "cut"}; all empty where there is none.

    Links are not followed: a log is a file of the run, never a way out of it.
    """
    folder = directory / "logs"
    nothing = {"name": None, "text": "", "cut": False}
    try:
        if folder.is_symlink():
            return nothing
        logs = [(p.lstat(), p) for p in folder.iterdir() if p.suffix == ".log"]
        own = [(s.st_mtime_ns, p.name, p) for s, p in logs if stat.S_ISREG(s.st_mode)]
        if not own:
            return nothing
        *_when, path = max(own)
        with os.fdopen(filesystem.open_regular(path), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit))
            data = file.read(limit)
    except OSError:
        return nothing
    cut = size > len(data)
    if cut:  # not in the middle of a line, nor of a character
        data = data.split(b"\n", 1)[-1]
    return {"name": path.name, "text": data.decode("utf-8", "replace"), "cut": cut}


def comparison(runs: Sequence[tuple[str, str, Path]]) -> dict[str, Any]:
    """Return the best checkpoints of runs (id, name, directory) beside each other, as `holdfast
    compare` has them; "runs" says which label is whose, "problems" what could not be compared."""
    usable, problems = [], []
    for identity, name, directory in runs:
        try:
            compare([str(directory)])
            usable.append((identity, name, directory))
        except (HoldfastError, OSError) as error:
            problems.append({"id": identity, "name": name, "problem": str(error)})
    found: dict[str, Any] = {"metrics": {}, "config": {}, "environment": {}, "checkpoints": []}
    if usable:
        found = compare([str(directory) for _id, _name, directory in usable]).to_json()
    found["runs"] = [
        {"id": identity, "name": name, "label": checkpoint["label"], "step": checkpoint["step"]}
        for (identity, name, _directory), checkpoint in zip(
            usable, found["checkpoints"], strict=True
        )
    ]
    found["problems"] = problems
    ready = json_ready(found)
    assert isinstance(ready, dict)
    return ready
