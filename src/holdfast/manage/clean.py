"""`holdfast clean`: what may go from a run directory, why, and letting it go.

What stays is decided by checkpoint/retention.py with its floor, and removed through the catalogue
under its lock, so that a running training and this command never work against each other. A plan
is made without the lock and shown; what is removed is what was shown *and* may still go then.
No torch in this room.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.checkpoint import filesystem, guard
from holdfast.checkpoint.catalog import QUARANTINE, ROLES, TEMP, Catalog
from holdfast.checkpoint.lock import FileLock
from holdfast.checkpoint.retention import Candidate, KeepBest, KeepLast, Policy, select
from holdfast.errors import RunLocked
from holdfast.formatting import NOTHING, format_bytes
from holdfast.i18n import N_, _
from holdfast.manage.rundir import RunDirectory, look, reclaimable, set_aside
from holdfast.manage.table import Column, Screen, printable, render

# Why something stays or goes: the words of `--json`, and what they mean.
_REASONS = {
    "pinned": N_("pinned"),
    "best": N_("the best"),
    "newest": N_("the newest"),
    "role": N_("one of the moving names stands for it"),
    "best_verified": N_("the best that is verified"),
    "last": N_("among the last {count}"),
    "all": N_("all are kept (--keep 0)"),
    "not_keep": N_("not asked for (--keep)"),
    "not_temp": N_("not asked for (--temp)"),
    "two_verified": N_("one of the two newest that are verified"),
    "too_few_verified": N_("nothing goes before two checkpoints are verified"),
    "unverified": N_("newer than the newest that is verified"),
    "older": N_("older than the last {count}"),
    "temp": N_("temporary"),
    "no_longer_best": N_("no longer the best"),
    "unfinished": N_("unfinished; goes unless a training runs"),
    "damaged": N_("damaged, set aside"),
    "only_damaged": N_("damaged, but nothing here is verified yet"),
    "came": N_("came meanwhile"),
    "training": N_("a training runs here"),
}


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked to be cleaned; `keep` None leaves epoch and step checkpoints alone."""

    keep: int | None  # how many epoch and how many step checkpoints stay; 0 for all
    temp: bool = False  # temporary checkpoints and what dead writers left
    quarantine: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One thing, whether it stays, and why."""

    key: str  # the id of a checkpoint, the path of another file
    names: tuple[str, ...]  # relative to the run directory
    step: int | None
    size: int
    stays: bool
    reason: str  # a key of `_REASONS`


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes and what stays in one run directory."""

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
        return _(_REASONS[row.reason]).format(count=self.wish.keep)

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
        """What goes, what stays, why, and how many bytes come back."""
        if not self.rows:
            nothing = _("There is nothing to clean in {directory}.", directory=self.directory)
            return [printable(nothing)]
        table = [
            [
                _("stays") if row.stays else _("goes"),
                row.names[0],
                NOTHING if row.step is None else str(row.step),
                format_bytes(row.size),
                self.why(row),
            ]
            for row in sorted(self.rows, key=lambda row: row.stays)
        ]
        columns = [
            Column(""), Column(_("file")), Column(_("step"), right=True, hide=2),
            Column(_("size"), right=True, hide=1), Column(_("why")),
        ]  # fmt: skip
        going = len(self.going)
        footer = _("goes: {going} of {all}, {size} come back", going=going, all=len(self.rows),
                   size=format_bytes(self.freed))  # fmt: skip
        return [*render(columns, table, screen), "", footer if going else _("Nothing goes.")]


def plan(directory: str | os.PathLike[str], wish: Wish) -> Plan:
    """What `wish` means in `directory` as it is now. Raises HoldfastError where there is none."""
    run = look(directory)
    rows = _checkpoints(run, wish)
    candidates = [entry.candidate() for entry in run.entries]
    unverified = bool(candidates) and _too_few_verified(candidates)
    if wish.temp:
        rows += _leftovers(run)
    if wish.quarantine:
        rows += _quarantined(run)
    going = [run.directory / name for row in rows if not row.stays for name in row.names]
    return Plan(run.directory, wish, rows, reclaimable(going), unverified)


def execute(shown: Plan) -> Plan:
    """Remove what `shown` said and what may still go; returns what was removed and what stays.

    Ctrl-C takes effect when the removal is complete. Raises RunLocked where the catalogue is not
    given free, OSError where something cannot be removed.
    """
    agreed = {row.key for row in shown.going}
    catalog = Catalog(shown.directory)
    with catalog.lock(), guard.deferred_interrupt(), _writers_dead(shown) as dead:
        now = plan(shown.directory, shown.wish)
        rows = [_agreed(row, agreed, dead) for row in now.rows]
        going = [shown.directory / name for row in rows if not row.stays for name in row.names]
        now = replace(now, rows=rows, freed=reclaimable(going))
        _remove(catalog, now)
    return now


def _agreed(row: Row, agreed: Collection[str], dead: bool) -> Row:
    """`row`, which stays where it was not shown as going, or where a writer may be at work."""
    if row.stays:
        return row
    if row.key not in agreed:
        return replace(row, stays=True, reason="came")
    if _is_leftover(row) and not dead:
        return replace(row, stays=True, reason="training")
    return row


def _remove(catalog: Catalog, now: Plan) -> None:
    entries = {entry.id: entry for entry in catalog.scan().entries}
    files = []
    for row in now.going:
        if row.key in entries:
            catalog.delete(entries[row.key], "clean")
        else:
            files += list(row.names)
    if files:
        catalog.record("removed", names=files, reason="clean")
    for name in files:
        filesystem.remove(catalog.directory / name)
    if now.wish.quarantine:
        for folder in (f"{QUARANTINE}/{TEMP}", QUARANTINE):
            with contextlib.suppress(OSError):  # not there, or something is left in it
                (catalog.directory / folder).rmdir()
    if entries:
        catalog.write_cache()


# ---------------------------------------------------------------------------------- checkpoints


def _checkpoints(run: RunDirectory, wish: Wish) -> list[Row]:
    """A row a checkpoint, newest first; retention decides, the reasons only explain."""
    candidates = [entry.candidate() for entry in run.entries]
    pins = _pins(run, candidates)
    candidates = [replace(c, pinned=c.id in pins) for c in candidates]
    rules = _rules(wish)
    mask = select(candidates, [rule for rule, _why in rules])
    kept = [(rule(candidates), why) for rule, why in rules]
    rows = []
    for i, (entry, stays) in enumerate(zip(run.entries, mask, strict=True)):
        if stays:
            by_rule = next((why for kept_by, why in kept if kept_by[i]), None)
            reason = pins.get(entry.id) or by_rule or _floor_reason(candidates, i)
        else:
            reason = {"temp": "temp", "best": "no_longer_best"}.get(entry.kind, "older")
        rows.append(Row(entry.id, entry.names, entry.step, entry.size, stays, reason))
    return rows


def _rules(wish: Wish) -> list[tuple[Policy, str]]:
    """What the wish keeps, each with its reason."""
    rules: list[tuple[Policy, str]] = []
    if not wish.keep:
        why = "not_keep" if wish.keep is None else "all"
        rules.append((_Kinds(lambda kind: kind != "temp"), why))
    else:
        rules += [(KeepLast(kind, wish.keep), "last") for kind in ("epoch", "step")]
    if not wish.temp:
        rules.append((_Kinds(lambda kind: kind == "temp"), "not_temp"))
    return rules


@dataclass(frozen=True, slots=True)
class _Kinds:
    """Keeps every checkpoint of some kinds."""

    chosen: Callable[[str], bool]

    def __call__(self, candidates: Sequence[Candidate]) -> list[bool]:
        return [self.chosen(candidate.kind) for candidate in candidates]


def _pins(run: RunDirectory, candidates: Sequence[Candidate]) -> dict[str, str]:
    """Ids that stay whatever retention says, each with its reason.

    While a training is between writing a file and verifying it, that file may already be the best
    or the newest: what was that before it must not go on its word alone.
    """
    pins: dict[str, str] = {}
    for entry in run.entries:
        if any(role in entry.names for role in ROLES):
            pins[entry.id] = "role"
    verified = [c for c in candidates if c.verified]
    for candidate, chosen in zip(verified, KeepBest(1)(verified), strict=True):
        if chosen:
            pins.setdefault(candidate.id, "best_verified")
    if run.contents.best is not None:
        pins[run.contents.best.id] = "best"
    if run.contents.newest is not None:
        pins[run.contents.newest.id] = "newest"
    pins |= {entry.id: "pinned" for entry in run.entries if entry.pinned}
    return pins


def _floor_reason(candidates: Sequence[Candidate], i: int) -> str:
    """Which part of the floor of `retention.select` holds the i-th of `candidates`."""
    if _too_few_verified(candidates):
        return "too_few_verified"
    return "two_verified" if candidates[i].verified else "unverified"


def _too_few_verified(candidates: Sequence[Candidate]) -> bool:
    """Whether nothing may go at all: a step that was saved twice is one state."""
    return len({candidate.order[:2] for candidate in candidates if candidate.verified}) < 2


# ---------------------------------------------------------------------------------- other files


def _leftovers(run: RunDirectory) -> list[Row]:
    """What writers that died have left; that no writer lives, the lock of the run will say."""
    return [
        _file_row(run, path, stays=False, reason="unfinished")
        for place in (run.directory, run.directory / TEMP)
        for path in sorted(filesystem.temporaries(place))
    ]


def _quarantined(run: RunDirectory) -> list[Row]:
    """Damaged files go only where something intact is known: they may be all there is."""
    stays = not any(entry.verified for entry in run.entries)
    reason = "only_damaged" if stays else "damaged"
    return [
        _file_row(run, path, stays=stays, reason=reason)
        for path in set_aside(run.directory, QUARANTINE)
    ]


def _file_row(run: RunDirectory, path: Path, *, stays: bool, reason: str) -> Row:
    name = path.relative_to(run.directory).as_posix()
    try:
        size = path.lstat().st_size
    except FileNotFoundError:
        size = 0
    return Row(name, (name,), None, size, stays, reason)


def _is_leftover(row: Row) -> bool:
    return row.names[0].rpartition("/")[2].startswith(".holdfast-")


@contextlib.contextmanager
def _writers_dead(shown: Plan) -> Iterator[bool]:
    """Whether no training runs here, and none can begin in the block: the trainer's own lock."""
    if not any(_is_leftover(row) for row in shown.going):
        yield False
        return
    try:
        with FileLock(shown.directory / ".run.lock"):
            yield True
    except RunLocked:
        yield False
