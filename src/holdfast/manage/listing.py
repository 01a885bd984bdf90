"""`holdfast list`: which checkpoints a run directory holds, one row each, and what they cost.

The form of `--json` is `Listing.to_json`. No torch in this room, and no lock.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint.rundir import ARCHIVE, QUARANTINE, Entry
from holdfast.formatting import NOTHING, format_age, format_bytes, format_loss, parse_time
from holdfast.i18n import _
from holdfast.manage.rundir import (
    RunDirectory,
    checkpoint_files,
    disk_use,
    kind_in_words,
    number,
    set_aside,
)
from holdfast.table import Column, Screen, printable, render, wrapped

_Key = Callable[[Entry], Any]
_EPOCH = datetime.datetime.fromtimestamp(0, datetime.timezone.utc)

# By what `--sort` can order; each puts first what a person looks for: the newest, best, largest.
SORTS: dict[str, _Key] = {
    "step": lambda entry: (-entry.step, *(-part for part in entry.order)),
    "loss": lambda entry: _loss_order(entry.loss),
    "size": lambda entry: -entry.size,
    "age": lambda entry: -(parse_time(entry.created) or _EPOCH).timestamp(),
}


def _loss_order(loss: float | None) -> float:
    return math.inf if loss is None or math.isnan(loss) else loss


@dataclass(frozen=True, slots=True)
class Listing:
    """The checkpoints of one run directory in the order that was asked for."""

    run: RunDirectory
    entries: list[Entry]
    best: str | None  # its id
    latest: str | None
    disk_bytes: int  # of the checkpoints that recovery looks at, links counted once
    quarantine: tuple[int, int]  # files and bytes
    archive: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """The documented form: a record a checkpoint, then what concerns the directory."""
        return {
            "directory": str(self.run.directory),
            "checkpoints": [self._record(entry) for entry in self.entries],
            "disk_bytes": self.disk_bytes,
            "damaged": [{"name": n, "reason": why} for n, why in self.run.contents.damaged],
            "unreadable": [{"name": n, "reason": why} for n, why in self.run.contents.unreadable],
            "foreign": list(self.run.contents.foreign),
            "quarantine": dict(zip(("files", "bytes"), self.quarantine, strict=True)),
            "archive": dict(zip(("files", "bytes"), self.archive, strict=True)),
        }

    def _record(self, entry: Entry) -> dict[str, Any]:
        return record_of(
            entry,
            damaged=entry.id in self.run.distrusted,
            best=entry.id == self.best,
            latest=entry.id == self.latest,
        )

    def lines(self, screen: Screen, now: datetime.datetime | None = None) -> list[str]:
        """Write the table for a person; `now` is for the ages."""
        if not self.entries and not self.run.contents.damaged:
            empty = _("There are no checkpoints in {directory}.", directory=self.run.directory)
            return [printable(empty), *self._remarks(screen)]
        now = now or datetime.datetime.now().astimezone()
        rows = [self._row(entry, screen, now) for entry in self.entries]
        table = render(_columns(), rows, screen) if rows else []
        return [*table, *([""] if table else []), *self._footer(screen), *self._remarks(screen)]

    def _row(self, entry: Entry, screen: Screen, now: datetime.datetime) -> list[str]:
        created = parse_time(entry.created)
        verified = _("yes") if entry.verified else _("no")
        marks = [(self.best, _best(screen)), (self.latest, _latest(screen))]
        marks += [(entry.id, _pinned(screen))] if entry.pinned else []
        return [
            entry.names[0],
            kind_in_words(entry.kind),
            NOTHING if entry.epoch is None else str(entry.epoch),
            str(entry.step),
            format_loss(number(entry.metrics.get("train_loss"))),
            format_loss(number(entry.metrics.get("val_loss"))),
            format_bytes(entry.size),
            NOTHING if created is None else format_age((now - created).total_seconds()),
            _("damaged") if entry.id in self.run.distrusted else verified,
            " ".join(mark for id_, mark in marks if entry.id == id_),
            _other_metrics(entry),
            ", ".join(entry.names[1:]),
        ]

    def _footer(self, screen: Screen) -> list[str]:
        names = sum(len(entry.names) for entry in self.entries)
        lines = [
            _(
                "checkpoints: {count} under {names} names, {size} on disk (links counted once)",
                count=len(self.entries),
                names=names,
                size=format_bytes(self.disk_bytes),
            )
        ]
        if screen.terminal and self.entries:
            marks = {"best": _best(screen), "latest": _latest(screen)}
            if self.latest in self.run.distrusted:  # recovery passes it over
                lines.append(_("{best} best · {latest} newest, but damaged", **marks))
            else:
                lines.append(_("{best} best · {latest} newest, training goes on from it", **marks))
            if any(entry.pinned for entry in self.entries):
                lines[-1] += _(" · {pinned} pinned: no clean-up takes it", pinned=_pinned(screen))
        return lines

    def _remarks(self, screen: Screen) -> list[str]:
        """Name what lies here besides the checkpoints."""
        contents, lines = self.run.contents, []
        for place, (count, size) in ((QUARANTINE, self.quarantine), (ARCHIVE, self.archive)):
            if count:
                lines.append(
                    _(
                        "{place}/: checkpoint files: {count}, {size} in all",
                        place=place,
                        count=count,
                        size=format_bytes(size),
                    )
                )
        lines += [
            _("damaged: {name}: {reason}", name=name, reason=reason)
            for name, reason in contents.damaged
        ]
        lines += [
            _("cannot be read: {name}: {reason}", name=name, reason=reason)
            for name, reason in contents.unreadable
        ]
        if contents.foreign:
            lines.append(_("not written by holdfast: {names}", names=", ".join(contents.foreign)))
        return [part for line in lines for part in wrapped(printable(line), screen)]


def record_of(entry: Entry, *, damaged: bool, best: bool, latest: bool) -> dict[str, Any]:
    """A checkpoint in the documented form, the same in every command."""
    return {
        **asdict(entry),
        "names": list(entry.names),
        "train_loss": entry.metrics.get("train_loss"),
        "val_loss": entry.metrics.get("val_loss"),
        "damaged": damaged,
        "best": best,
        "latest": latest,
    }


def listing_of(run: RunDirectory, sort: str | None = None) -> Listing:
    """The listing of what was seen in `run`, ordered by one of `SORTS`, else newest first."""
    entries = sorted(run.entries, key=SORTS[sort]) if sort else run.entries
    best, newest = run.contents.best, run.contents.newest
    return Listing(
        run,
        entries,
        best.id if best is not None else None,
        newest.id if newest is not None else None,
        disk_use(checkpoint_files(run.directory)),
        _tally(set_aside(run.directory, QUARANTINE)),
        _tally(set_aside(run.directory, ARCHIVE)),
    )


def _tally(files: list[Path]) -> tuple[int, int]:
    return len([file for file in files if file.suffix == ".pt"]), disk_use(files)


def _columns() -> list[Column]:
    return [
        Column(_("file")),
        Column(_("kind"), hide=7),
        Column(_("epoch"), right=True, hide=4),
        Column(_("step"), right=True),
        Column(_("train loss"), right=True, hide=5),
        Column(_("val loss"), right=True, hide=1),
        Column(_("size"), right=True, hide=2),
        Column(_("age"), right=True, hide=3),
        Column(_("verified"), hide=1),
        Column(_("mark")),
        Column(_("other metrics"), hide=6),
        Column(_("other names"), hide=8),
    ]


def _other_metrics(entry: Entry) -> str:
    """For a run whose quality is not a validation loss; else the table has said it."""
    if "val_loss" in entry.metrics:
        return ""
    others = {name: value for name, value in entry.metrics.items() if name != "train_loss"}
    return " ".join(f"{name}={format_loss(number(value))}" for name, value in others.items())


def _best(screen: Screen) -> str:
    return "⭐" if screen.terminal else _("⭐ best")


def _latest(screen: Screen) -> str:
    return "📌" if screen.terminal else _("📌 latest")


def _pinned(screen: Screen) -> str:
    return "🔒" if screen.terminal else _("🔒 pinned")
