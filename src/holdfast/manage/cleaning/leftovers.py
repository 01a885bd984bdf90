"""`holdfast clean --memory`: what killed trainings have left in shared memory, and giving it back.

A snapshot that is newer than everything on the disk of its run stays: the next start of that
training makes it durable and goes on from it. No torch in this room.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint.rundir import Catalog, rollback, shared_memory
from holdfast.formatting import NOTHING
from holdfast.i18n import N_, _
from holdfast.manage.cleaning.plan_table import plan_lines
from holdfast.table import Screen, printable

_REASONS = {
    "in_use": N_("a training uses it"),
    "unsaved": N_("newer than what is on the disk: start the training again to go on from it"),
    "saved": N_("on the disk already"),
    "incomplete": N_("no complete snapshot in it"),
    "gone": N_("its run directory is gone or was moved"),
}
_STAYS = ("in_use", "unsaved")


@dataclass(frozen=True, slots=True)
class Row:
    """The shared memory of one training that runs or was killed."""

    remains: shared_memory.Remains
    run: Path | None
    step: int | None  # of the newest complete snapshot
    reason: str  # a key of `_REASONS`

    @property
    def stays(self) -> bool:
        return self.reason in _STAYS

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.remains.directory),
            "run": None if self.run is None else str(self.run),
            "step": self.step,
            "size": self.remains.size,
            "stays": self.stays,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan for shared memory."""

    rows: list[Row]

    @property
    def going(self) -> list[Row]:
        return [row for row in self.rows if not row.stays]

    @property
    def freed(self) -> int:
        """Bytes of memory that come back."""
        return sum(row.remains.size for row in self.going)

    def to_json(self, *, done: bool) -> dict[str, Any]:
        rows = [row.to_json() for row in self.rows]
        return {"memory": rows, "done": done, "bytes_freed": self.freed}

    def lines(self, screen: Screen) -> list[str]:
        """Write what lies there, of which run, how large, and what becomes of it."""
        if not self.rows:
            return [_("There is nothing of holdfast in shared memory.")]
        lines = [
            (
                row.stays,
                NOTHING if row.run is None else printable(str(row.run)),
                row.step,
                row.remains.size,
                _(_REASONS[row.reason]),
            )
            for row in self.rows
        ]
        return plan_lines(_("run directory"), lines, self.freed, screen)


def plan() -> Plan:
    """Look at everything of this user in shared memory."""
    return Plan([_row(remains) for remains in shared_memory.remains()])


def execute(shown: Plan) -> Plan:
    """Remove what `shown` says goes and still may; returns what has gone. What is on the disk
    already is read there first, every byte: the memory may have the only intact one."""
    gone = []
    for row in shown.going:
        now = _row(row.remains)
        if now.stays or (now.reason == "saved" and not _is_intact(now)):
            continue
        if row.remains.remove():
            gone.append(row)
    return Plan(gone)


def _is_intact(row: Row) -> bool:
    """Return True if a state as new as the one in memory can be read from the disk."""
    newest = shared_memory.newest_in(row.remains)
    if newest is None or row.run is None:
        return False
    catalog = Catalog(row.run)
    entries = [entry for entry in catalog.scan().entries if entry.order >= newest.order]
    try:
        return any(rollback.damage_of_all(catalog, entry) is None for entry in entries)
    except OSError:
        return False


def _row(remains: shared_memory.Remains) -> Row:
    newest = shared_memory.newest_in(remains)
    step = None if newest is None else newest.step
    run = remains.run
    here = run is not None and remains.belongs_to(run)
    if remains.lock.taken:
        reason = "in_use"
    elif newest is None:
        reason = "incomplete"
    elif run is None or not here:
        reason = "gone"
    else:
        saved = Catalog(run).scan().newest
        reason = "saved" if saved is not None and saved.order >= newest.order else "unsaved"
    return Row(remains, run, step, reason)
