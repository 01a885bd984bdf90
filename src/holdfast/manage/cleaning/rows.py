"""Decide what goes from a run directory and what stays, a row each, and why.

Retention decides (checkpoint/policy/keep.py and its floor); the reasons only explain. Nothing is
removed here: clean.py does that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.checkpoint.format import NewerFormat, read_manifest
from holdfast.checkpoint.policy import (
    Candidate,
    KeepBest,
    KeepEvery,
    KeepLast,
    Policy,
    select,
    verified_states,
)
from holdfast.checkpoint.rundir import ARCHIVE, QUARANTINE, ROLES, TEMP
from holdfast.checkpoint.system import filesystem
from holdfast.errors import DamagedCheckpoint, ForeignCheckpoint
from holdfast.i18n import N_, _
from holdfast.manage.rundir import RunDirectory, set_aside

# Why something stays or goes: the words of `--json`, and what they mean.
_REASONS = {
    "pinned": N_("pinned"),
    "best": N_("the best"),
    "newest": N_("the newest"),
    "role": N_("one of the moving names stands for it"),
    "best_verified": N_("the best that is verified"),
    "last": N_("among the last {count}"),
    "among_best": N_("among the best {best}"),
    "every": N_("a multiple of {every}"),
    "all": N_("all are kept (--keep 0)"),
    "not_keep": N_("not asked for (--keep)"),
    "not_temp": N_("not asked for (--temp)"),
    "two_verified": N_("one of the two newest that are verified"),
    "too_few_verified": N_("nothing goes before two checkpoints are verified"),
    "unverified": N_("newer than the newest that is verified"),
    "older": N_("older than the last {count}"),
    "not_kept": N_("no rule keeps it"),
    "temp": N_("temporary"),
    "no_longer_best": N_("no longer the best"),
    "unfinished": N_("unfinished; goes unless a training runs"),
    "damaged": N_("damaged, set aside"),
    "only_damaged": N_("damaged, but nothing here is verified yet"),
    "archived": N_("in the archive"),
    "newer": N_("written by a newer holdfast: this one cannot read it"),
    "only_archived": N_("in the archive, but nothing here is verified yet"),
    "rolled_back_to": N_("a roll-back that was begun needs it"),
    "linked": N_("a symbolic link: what it leads to is left alone"),
    "came": N_("came meanwhile"),
    "training": N_("a training runs here"),
}


@dataclass(frozen=True, slots=True)
class Wish:
    """The user's wish. Where none of `keep`, `keep_best` and `every` is given,
    epoch and step checkpoints are left alone; else what none of them keeps goes."""

    keep: int | None  # how many epoch and how many step checkpoints stay; 0 for all
    temp: bool = False  # temporary checkpoints and what dead writers left
    quarantine: bool = False
    keep_best: int | None = None  # how many with the lowest loss stay
    every: int | None = None  # of epochs and steps, the multiples of this stay
    archive: bool = False

    def why(self, reason: str) -> str:
        """A reason of `Row`, in words."""
        return _(_REASONS[reason]).format(count=self.keep, best=self.keep_best, every=self.every)


@dataclass(frozen=True, slots=True)
class Row:
    """One thing, whether it stays, and why."""

    key: str  # the id of a checkpoint, the path of another file
    names: tuple[str, ...]  # relative to the run directory
    step: int | None
    size: int
    stays: bool
    reason: str  # a key of `_REASONS`

    @property
    def needs_rest(self) -> bool:
        """True if it may go only while no training runs: its writer may live, or a save that is
        under way may still need what it has set aside."""
        name = self.names[0]
        return name.startswith(f"{ARCHIVE}/") or name.rpartition("/")[2].startswith(".holdfast-")


def rows_of(run: RunDirectory, wish: Wish) -> list[Row]:
    """Return a row for everything in `run` that `wish` is about."""
    rows = _checkpoints(run, wish)
    if wish.temp:
        rows += _leftovers(run)
    if wish.quarantine:
        rows += _quarantined(run)
    if wish.archive:
        rows += _archived(run)
    return rows


# ---------------------------------------------------------------------------------- checkpoints


def _checkpoints(run: RunDirectory, wish: Wish) -> list[Row]:
    """A row a checkpoint, newest first."""
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
            reason = _reason_to_go(entry.kind, wish)
        rows.append(Row(entry.id, entry.names, entry.step, entry.size, stays, reason))
    return rows


def _reason_to_go(kind: str, wish: Wish) -> str:
    if kind == "temp":
        return "temp"
    if wish.keep_best is not None or wish.every is not None:
        return "not_kept"
    return "no_longer_best" if kind == "best" else "older"


def _rules(wish: Wish) -> list[tuple[Policy, str]]:
    """Return the rules of the wish, each with its reason."""
    rules: list[tuple[Policy, str]] = []
    if wish.keep == 0:
        rules.append((_Kinds(lambda kind: kind != "temp"), "all"))
    elif wish.keep is None and wish.keep_best is None and wish.every is None:
        rules.append((_Kinds(lambda kind: kind != "temp"), "not_keep"))
    elif wish.keep is not None:
        rules += [(KeepLast(kind, wish.keep), "last") for kind in ("epoch", "step")]
    if wish.keep_best is not None:
        rules.append((KeepBest(wish.keep_best), "among_best"))
    if wish.every is not None:
        rules.append((KeepEvery(wish.every), "every"))
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
    """Return the part of the floor of `select` that holds the i-th of `candidates`."""
    if too_few_verified(candidates):
        return "too_few_verified"
    return "two_verified" if candidates[i].verified else "unverified"


def too_few_verified(candidates: Sequence[Candidate]) -> bool:
    """Return True if nothing may go: a step that was saved twice is one state."""
    return len(verified_states(candidates)) < 2


# ---------------------------------------------------------------------------------- other files


def _leftovers(run: RunDirectory) -> list[Row]:
    """Return what dead writers have left; the run's lock will say that none lives."""
    return [
        _file_row(run, (path,), stays=False, reason="unfinished")
        for place in (run.directory, run.directory / TEMP)
        for path in sorted(filesystem.temporaries(place))
    ]


def _quarantined(run: RunDirectory) -> list[Row]:
    """Damaged files go only where something intact is known: they may be all there is."""
    if (run.directory / QUARANTINE).is_symlink():
        return [_linked(run, QUARANTINE)]
    stays = not any(entry.verified for entry in run.entries)
    reason = "only_damaged" if stays else "damaged"
    return [
        _file_row(run, (path,), stays=stays, reason=reason)
        for path in set_aside(run.directory, QUARANTINE)
    ]


def _archived(run: RunDirectory) -> list[Row]:
    """Return what roll-backs and new starts have set aside, links to one file in one row.

    Pinned ones stay, what a roll-back is about to bring back does, and so does everything while
    nothing here is known to be intact.
    """
    if (run.directory / ARCHIVE).is_symlink():
        return [_linked(run, ARCHIVE)]
    groups: dict[tuple[int, int], list[Path]] = {}
    for path in set_aside(run.directory, ARCHIVE):
        if path.suffix == ".pt" and not path.is_symlink():
            stat = path.stat()
            groups.setdefault((stat.st_dev, stat.st_ino), []).append(path)
    known = run.catalog.history.known
    back = known.pending
    here = {entry.id for entry in run.entries}
    needed = back.source if back is not None and back.id not in here else None
    verified = any(entry.verified for entry in run.entries)
    rows = []
    for paths in groups.values():
        telling = sorted(paths, key=lambda path: (path.name in ROLES, path))
        row = _file_row(run, telling, stays=False, reason="archived")
        try:
            id_, step = _identity(telling[0])
        except NewerFormat:  # it may be pinned, or the one to keep
            rows.append(replace(row, stays=True, reason="newer"))
            continue
        reason = (
            "pinned"
            if id_ in known.pinned
            else "rolled_back_to"
            if needed in row.names
            else "archived"
            if verified
            else "only_archived"
        )
        rows.append(replace(row, step=step, stays=reason != "archived", reason=reason))
    return sorted(rows, key=lambda row: (-(row.step or 0), row.names))


def _linked(run: RunDirectory, place: str) -> Row:
    """A link where a directory should be: a copied run may bring one that leads anywhere."""
    return _file_row(run, (run.directory / place,), stays=True, reason="linked")


def _identity(path: Path) -> tuple[str | None, int | None]:
    """Id and step of a checkpoint that was set aside; nothing where it does not tell. Raises
    `NewerFormat`."""
    try:
        identity = read_manifest(path).get("identity") or {}
        step = identity.get("step")
        return str(identity.get("id")), step if isinstance(step, int) else None
    except (DamagedCheckpoint, ForeignCheckpoint, OSError, AttributeError):
        return None, None


def _file_row(run: RunDirectory, paths: Collection[Path], *, stays: bool, reason: str) -> Row:
    names = tuple(path.relative_to(run.directory).as_posix() for path in paths)
    try:
        size = os.lstat(run.directory / names[0]).st_size
    except FileNotFoundError:
        size = 0
    return Row(names[0], names, None, size, stays, reason)
