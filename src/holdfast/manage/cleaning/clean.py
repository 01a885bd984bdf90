"""`holdfast clean`: what may go from a run directory, why, and letting it go.

rows.py decides what stays. Removal goes through the catalogue under its lock, so that a running
training and this command never work against each other. A plan is made without the
lock and shown; what is removed is what was shown *and* may still go then. No torch in this room.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.checkpoint.rundir import ARCHIVE, QUARANTINE, Catalog
from holdfast.checkpoint.system import filesystem, run_lock, signals
from holdfast.errors import RunLocked
from holdfast.formatting import format_bytes
from holdfast.i18n import _
from holdfast.manage.cleaning.plan_table import plan_lines
from holdfast.manage.cleaning.rows import Row, Wish, rows_of, too_few_verified
from holdfast.manage.locking import catalogue_lock
from holdfast.manage.rundir import look, reclaimable
from holdfast.table import Screen, printable

__all__ = ["Plan", "Row", "Wish", "execute", "plan"]

# A thousand removals take minutes on a slow disk, and a training that saves waits half a minute for
# the catalogue: so they are done in turns of so many seconds, with a pause for others between.
TURN, _PAUSE = 1.0, 0.1


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan for one run directory."""

    directory: Path
    wish: Wish
    rows: list[Row]
    freed: int  # bytes that come back
    unverified: bool  # too little is verified for a checkpoint to go

    @property
    def going(self) -> list[Row]:
        return [row for row in self.rows if not row.stays]

    def why(self, row: Row) -> str:
        """The reason of a row, in words."""
        return self.wish.why(row.reason)

    def to_json(self, *, done: bool) -> dict[str, Any]:
        """The documented form; `done` says whether `removed` has happened."""

        def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
            return [
                {
                    "id": None if row.key in row.names else row.key,  # null: not a checkpoint
                    "names": list(row.names),
                    "step": row.step,
                    "size": row.size,
                    "reason": row.reason,
                }
                for row in rows
            ]

        return {
            "directory": str(self.directory),
            "done": done,
            "removed": records(self.going),
            "kept": records([row for row in self.rows if row.stays]),
            "bytes_freed": self.freed,
            "enough_verified": not self.unverified,
        }

    def lines(self, screen: Screen) -> list[str]:
        """Write what goes, what stays, why, and how many bytes come back."""
        if not self.rows:
            nothing = _("There is nothing to clean in {directory}.", directory=self.directory)
            return [printable(nothing)]
        lines = [(row.stays, row.names[0], row.step, row.size, self.why(row)) for row in self.rows]
        return plan_lines(_("file"), lines, self.freed, screen)


def plan(directory: str | os.PathLike[str], wish: Wish) -> Plan:
    """Apply `wish` to `directory` as it is now. Raises HoldfastError where there is none."""
    run = look(directory)
    rows = rows_of(run, wish)
    candidates = [entry.candidate() for entry in run.entries]
    unverified = bool(candidates) and too_few_verified(candidates)
    going = [run.directory / name for row in rows if not row.stays for name in row.names]
    return Plan(run.directory, wish, rows, reclaimable(going), unverified)


def execute(shown: Plan) -> Plan:
    """Remove what `shown` said and what may still go; returns what was removed and what stays.

    Ctrl-C takes effect within about a second, between two removals, and says what has gone until
    then. Raises RunLocked where the catalogue is not given free, ResourceError where the directory
    cannot be written, OSError where something cannot be removed.
    """
    agreed = {row.key for row in shown.going}
    gone: list[Row] = []
    freed = 0
    catalog = Catalog(shown.directory)
    while True:
        try:
            with (
                catalogue_lock(catalog),
                signals.deferred_interrupt(),
                _writers_dead(shown) as dead,
            ):
                now = plan(shown.directory, shown.wish)
                rows = [_agreed(row, agreed, dead) for row in now.rows]
                going = [row for row in rows if not row.stays]
                for row, size in _remove(catalog, going):
                    gone.append(row)
                    freed += size
            if not {row.key for row in going} - {row.key for row in gone}:
                stays = [row for row in rows if row.stays]
                return replace(now, rows=[*gone, *stays], freed=freed)
            time.sleep(_PAUSE)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                _(
                    "Stopped: {count} of {all} removed, {size} came back; the others are as they "
                    "were.",
                    count=len(gone),
                    all=len(agreed),
                    size=format_bytes(freed),
                )
            ) from None


def _agreed(row: Row, agreed: Collection[str], dead: bool) -> Row:
    """`row`, which stays where it was not shown as going, or where a training may need it."""
    if row.stays:
        return row
    if row.key not in agreed:
        return replace(row, stays=True, reason="came")
    if row.needs_rest and not dead:
        return replace(row, stays=True, reason="training")
    return row


def _remove(catalog: Catalog, going: Sequence[Row]) -> Iterator[tuple[Row, int]]:
    """Remove as many of `going` as one turn has time for; yields each with the bytes it gave back.
    The caller holds the lock."""
    began = time.monotonic()
    entries = {entry.id: entry for entry in catalog.scan().entries}
    files = [row for row in going if row.key not in entries]
    if files:
        names = [name for row in files for name in row.names]
        catalog.record("removed", names=names, reason="clean")
    for row in [*files, *(row for row in going if row.key in entries)]:
        paths = [catalog.directory / name for name in row.names]
        size = reclaimable(paths)
        if row.key in entries:
            catalog.delete(entries[row.key], "clean")
        else:
            for path in paths:
                filesystem.remove(path)
        yield row, size
        if row.key in entries and time.monotonic() - began > TURN:
            break
    # Only where something went: a save that is under way may have made an empty archive just now.
    for place in {row.names[0].partition("/")[0] for row in files} & {ARCHIVE, QUARANTINE}:
        _remove_empty(catalog.directory / place)
    if entries:
        catalog.write_cache()


def _remove_empty(place: Path) -> None:
    """Remove `place` and what is in it, as far as these are empty directories."""
    folders = [Path(folder) for folder, _folders, _names in os.walk(place, topdown=False)]
    for folder in folders:
        with contextlib.suppress(OSError):  # something is left in it
            folder.rmdir()


@contextlib.contextmanager
def _writers_dead(shown: Plan) -> Iterator[bool]:
    """Yield True if no training runs here; none can begin in the block then."""
    if not any(row.needs_rest for row in shown.going):
        yield False
        return
    try:
        with run_lock(shown.directory):
            yield True
    except RunLocked:
        yield False
