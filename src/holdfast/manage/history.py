"""`holdfast history`: the epochs of a run in a table, and what happened to it on the way.

Losses come from the newest intact checkpoint, which carries the history of its branch; from
training_history.json; and from the metrics of the checkpoints that are still there. No torch here.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint.format import plain_state, read_manifest
from holdfast.checkpoint.system import filesystem
from holdfast.errors import CheckpointError
from holdfast.formatting import NOTHING, format_loss, format_time, seconds_of
from holdfast.i18n import _
from holdfast.manage.output import write_output
from holdfast.manage.rundir import RunDirectory, names_of, number
from holdfast.manage.story import story
from holdfast.table import Column, Screen, printable, render

HISTORY = "training_history.json"
_ENDS = ("epoch", "end")  # the reasons for which a checkpoint closes an epoch
_FATES = ("removed", "archived", "quarantined")  # the events that end a checkpoint's stay


@dataclass(slots=True)
class Epoch:
    """One epoch; None where nothing that is left knows it. Losses in nats a token."""

    epoch: int
    step: int | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    time: str | None = None  # when its checkpoint became durable, ISO 8601
    checkpoint: str | None = None  # the file that is still there
    fate: str | None = None  # "kept", "removed", "archived", "quarantined"

    @property
    def perplexity(self) -> float | None:
        """exp of the validation loss."""
        if self.val_loss is None:
            return None
        return math.inf if self.val_loss >= 700 else math.exp(self.val_loss)  # NaN stays NaN


@dataclass(frozen=True, slots=True)
class History:
    """The epochs of a run in their order, and its events, oldest first.

    `state` and `ends` are of those who have read the metrics (monitor/run_view.py): "training",
    "finished", "stopped" or "empty"; and in the form of events, when it was finished, or broke off.
    """

    run: RunDirectory
    epochs: list[Epoch]
    events: list[dict[str, Any]]
    state: str | None = None
    ends: Sequence[dict[str, Any]] = ()

    @property
    def best(self) -> Epoch | None:
        """The epoch with the lowest validation loss; the earlier one where two are equal."""
        known = [e for e in self.epochs if e.val_loss is not None and math.isfinite(e.val_loss)]
        return min(known, key=lambda epoch: epoch.val_loss or 0.0, default=None)

    def to_json(self) -> dict[str, Any]:
        """The documented form."""
        return {
            "directory": str(self.run.directory),
            "state": self.state,
            "ends": list(self.ends),
            "epochs": self.records(),
            "events": self.events,
        }

    def records(self) -> list[dict[str, Any]]:
        """The epochs as JSON and CSV have them."""
        return [
            {**asdict(epoch), "perplexity": epoch.perplexity, "best": epoch is self.best}
            for epoch in self.epochs
        ]

    def lines(self, screen: Screen, *, everything: bool = False) -> list[str]:
        """Write the table, then the story, or every event."""
        told = story(_in_time(self.events, self.ends), everything=everything, screen=screen)
        if not self.epochs and not told:
            nothing = _(
                "There is no history of a training in {directory}.", directory=self.run.directory
            )
            return [printable(nothing)]
        lines = [_("No epoch has been finished yet.")]
        if self.epochs:
            lines = render(_columns(), [self._row(epoch) for epoch in self.epochs], screen)
        if told:
            title = _("All events") if everything else _("What happened")
            lines += ["", screen.bold(title), *told]
        return lines

    def _row(self, epoch: Epoch) -> list[str]:
        fates = {
            "kept": epoch.checkpoint or "",
            "removed": _("removed"),
            "archived": _("archived"),
            "quarantined": _("quarantined"),
        }
        return [
            str(epoch.epoch),
            NOTHING if epoch.step is None else str(epoch.step),
            format_loss(epoch.train_loss),
            format_loss(epoch.val_loss),
            format_loss(epoch.perplexity),
            "⭐" if epoch is self.best else "",
            format_time(epoch.time),
            fates.get(epoch.fate or "", NOTHING),
        ]


def history_of(run: RunDirectory) -> History:
    """Put the epochs of `run` together from everything that knows of them."""
    epochs: dict[int, Epoch] = {}
    for source in (_read_file(run.directory / HISTORY), _from_newest(run)):
        for number_, train_loss, val_loss in _losses(source):
            epoch = epochs.setdefault(number_, Epoch(number_))
            epoch.train_loss, epoch.val_loss = train_loss, val_loss
    events = run.events
    _add_events(events, epochs)
    _add_checkpoints(run, epochs)
    return History(run, [epochs[key] for key in sorted(epochs)], events)


def _in_time(
    events: Sequence[dict[str, Any]], more: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """`more` behind what had happened by then; the events themselves keep the order in which they
    were written, whatever a clock said."""
    merged = list(events)
    for event in more:
        at = seconds_of(event.get("time"))
        before = [i for i, one in enumerate(merged) if seconds_of(one.get("time")) <= at]
        merged.insert(before[-1] + 1 if before else 0, event)
    return merged


def write_csv(histories: Sequence[History], path: Path) -> None:
    """Write the table to `path`. Raises OSError as it comes.

    A line an epoch under a header, empty where a value is not known; of several runs each line
    begins with its directory.
    """
    names = [
        "epoch",
        "step",
        "train_loss",
        "val_loss",
        "perplexity",
        "time",
        "checkpoint",
        "fate",
        "best",
    ]
    several = len(histories) > 1
    text = io.StringIO()
    writer = csv.DictWriter(text, ["directory", *names] if several else names, lineterminator="\n")
    writer.writeheader()
    for history in histories:
        where = {"directory": str(history.run.directory)} if several else {}
        writer.writerows({**where, **record} for record in history.records())
    data = text.getvalue().encode("utf-8", "backslashreplace")
    write_output(path, data)


def _read_file(path: Path) -> object:
    try:
        return json.loads(filesystem.read_small(path))
    except (OSError, ValueError, RecursionError):
        return None  # the checkpoints know as well


def _from_newest(run: RunDirectory) -> object:
    """The payload `history` of the newest checkpoint that can be read."""
    for entry in run.entries:
        # Between the look and now a running training may have removed it, or a disk spoilt it.
        with contextlib.suppress(FileNotFoundError, CheckpointError):
            path = run.catalog.path(entry)
            return plain_state(read_manifest(path), path).get("history")
    return None


def _losses(history: object) -> Iterator[tuple[int, float | None, float | None]]:
    """(epoch, training loss, validation loss) of `{"epochs": [...], "train_loss": [...], ...}`."""
    if not isinstance(history, Mapping):
        return
    columns = [history.get(name) for name in ("epochs", "train_loss", "val_loss")]
    epochs, train, val = (column if isinstance(column, list) else [] for column in columns)
    for i, epoch in enumerate(epochs):
        if isinstance(epoch, int):
            yield (
                epoch,
                number(train[i]) if i < len(train) else None,
                number(val[i]) if i < len(val) else None,
            )


def _add_events(events: Sequence[dict[str, Any]], epochs: dict[int, Epoch]) -> None:
    """Add when each epoch's checkpoint became durable, and its fate."""
    by_id: dict[str, Epoch] = {}
    by_name: dict[str, Epoch] = {}
    for event in events:
        kind, number_, names = event.get("event"), event.get("epoch"), names_of(event)
        if kind == "durable" and event.get("reason") in _ENDS and isinstance(number_, int):
            epoch = epochs.setdefault(number_, Epoch(number_))
            epoch.step, epoch.time, epoch.fate = event.get("step"), event.get("time"), None
            by_id[str(event.get("id"))] = epoch
            if names:
                by_name[names[0]] = epoch
        elif kind in _FATES:
            gone = by_id.get(str(event.get("id")))
            for epoch in [gone] if gone else [by_name[n] for n in names if n in by_name]:
                epoch.fate = str(kind)


def _add_checkpoints(run: RunDirectory, epochs: dict[int, Epoch]) -> None:
    """Add what the checkpoints say of themselves: the newest of an epoch counts."""
    for entry in reversed(run.entries):
        if entry.epoch is None or entry.reason not in _ENDS:
            continue
        epoch = epochs.setdefault(entry.epoch, Epoch(entry.epoch))
        epoch.step, epoch.time = entry.step, entry.created
        epoch.checkpoint, epoch.fate = entry.names[0], "kept"
        for name in ("train_loss", "val_loss"):
            if name in entry.metrics:
                setattr(epoch, name, number(entry.metrics[name]))


def _columns() -> list[Column]:
    return [
        Column(_("epoch"), right=True),
        Column(_("step"), right=True, hide=3),
        Column(_("train loss"), right=True),
        Column(_("val loss"), right=True),
        Column(_("perplexity"), right=True, hide=2),
        Column(_("best")),
        Column(_("when"), hide=4),
        Column(_("checkpoint"), hide=1),
    ]
