"""All rows of the matrix: which fault, against whom, how many points, and what the row must show.

"ours": nothing may be lost, wrong, or need a human. "caught": a control or a mutant that must fail,
or the harness proves nothing. "beside": a peer, told as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from tests.faults import (
    evaluations,
    hostile,
    inject,
    moves,
    obstacles,
    peers,
    power,
    random_kills,
    reads,
    real_cut,
    restarts,
    rot,
    savers,
)
from tests.faults import syscalls as calls
from tests.faults.savers import Saver
from tests.faults.tally import Tally

Role = Literal["ours", "caught", "beside"]


@dataclass(frozen=True, slots=True)
class Row:
    """One row to be made; `make(full, seed)` does it."""

    fault: str
    saver: str
    role: Role
    make: Callable[[bool, int], Tally]
    missing: str = ""  # why it cannot be made here
    full_only: bool = False  # not in the short form

    @property
    def name(self) -> str:
        return f"{self.fault}: {self.saver}"

    def run(self, *, full: bool, seed: int) -> Tally:
        if self.missing:
            return Tally(self.fault, self.saver, skipped=self.missing)
        return self.make(full, seed)


def problem(row: Row, tally: Tally) -> str:
    """What is wrong with a row that has been made; "" where it shows what it must."""
    if tally.skipped:
        return ""
    if tally.points == 0:
        return f"{row.name}: no fault has fired {''.join(tally.examples)}".rstrip()
    if row.role == "ours" and tally.failed:
        return f"{row.name}: {tally.failed} of {tally.points}: {'; '.join(tally.examples)}"
    if row.role == "caught" and not tally.failed:
        return f"{row.name}: it survived, so this harness proves nothing"
    return ""


def rows() -> list[Row]:
    """The whole matrix, in the order of the table."""
    found = [_calls(savers.Ours, kind, "ours", quick=quick) for kind, quick in _QUICK.items()]
    found += [
        _calls(savers.TorchSaveLatest, "killed at a call", "caught", quick=1),
        _calls(savers.TorchSaveLatest, "a call fails once", "caught", quick=1),
        _calls(savers.TorchSaveLatest, "a lying write", "caught", quick=1),
        _calls(savers.Believes, "a lying write", "caught", quick=2),
        _calls(savers.Remembering, calls.UNREAD, "ours", quick=8),
        _calls(savers.BelievesTheDisk, calls.UNREAD, "caught", quick=1),
        *(
            _counted(reads.BACK, saver, role, reads.read_back, quick=quick)
            for saver, role, quick in (
                (savers.Ours, "ours", 16),
                (savers.Condemns, "caught", 16),
                (savers.PrunesUnread, "caught", 24),
            )
        ),
        *(
            _counted(reads.START, saver, role, reads.at_a_start, quick=quick)
            for saver, role, quick in ((savers.Ours, "ours", 16), (savers.Condemns, "caught", 12))
        ),
    ]
    found += [_calls(peer, "killed at a call", "beside", quick=0) for peer in _BESIDE]
    found += [
        Row(start.name, savers.Ours.name, "ours", _restarting(start)) for start in restarts.STARTS
    ]
    found += [
        _moved(moves.OURS, "ours", quick=16),
        _moved(moves.MUTANT, "caught", quick=16),
    ]
    found += [_power(saver, "ours", quick=24) for saver in _SCENES]
    found += [_power(saver, "caught", quick=12) for saver in _TRUSTING_NAMES]
    found += [_power(peer, "beside", quick=0) for peer in peers.PEERS]
    found += [_real_cut(savers.Ours, "ours", quick=5)]
    found += [_real_cut(saver, "caught", quick=3) for saver in savers.BY_HAND]
    found += [_real_cut(peer, "beside", quick=0) for peer in peers.PEERS]
    found += [
        _rot(savers.Ours, "ours", quick=30),
        _rot(savers.TrustsBytes, "caught", quick=20),
        _rot(savers.TorchSaveLatest, "caught", quick=20),
        *(_rot(peer, "beside", quick=0) for peer in peers.PEERS),
        *(_counted(rot.CACHE, saver, role, rot.cache_rot, quick=20)
          for saver, role in ((savers.Ours, "ours"), (savers.BelievesTheCache, "caught"))),
        *(_counted(rot.SLOTS, saver, role, rot.slot_rot, quick=quick, full=200)
          for saver, role, quick in ((savers.Ours, "ours", 16), (savers.TrustsBytes, "caught", 8))),
        Row("disk full, read-only, no inodes, limits", savers.Ours.name, "ours",
            lambda _full, _seed: obstacles.obstructed(savers.Ours)),
        Row("hostile files", savers.Ours.name, "ours",
            lambda full, _seed: hostile.hostile(full=full)),
        Row("a training killed at a random moment", savers.Ours.name, "ours",
            lambda full, seed: random_kills.random_kills(
                200 if full else 4, seed=seed, small=not full)),
        _struck(evaluations.OURS, "ours", quick=3),
        _struck(evaluations.MUTANT, "caught", quick=1),
    ]  # fmt: skip
    return found


_QUICK = {
    "killed at a call": 7,
    "a call fails once": 29,
    "calls fail from there on": 21,
    "a short write": 3,
    "a lying write": 5,
}
_SCENES = [savers.Ours, savers.OneName, savers.GoesBack, savers.SetsAside, savers.StartsAgain]
_TRUSTING_NAMES = [*savers.BY_HAND, savers.NoDirectorySync, savers.TempElsewhere]
_BESIDE: list[type[Saver]] = [savers.RenameNoSync, savers.RenameNoDirectorySync, *peers.PEERS]


def chosen(words: Iterable[str], *, full: bool) -> list[Row]:
    """The rows of a form whose names contain one of `words`; all where there are none."""
    wanted = list(words)
    return [
        row
        for row in rows()
        if (full or not row.full_only) and (not wanted or any(word in row.name for word in wanted))
    ]


def _brief(full: bool, role: Role) -> bool:
    """True for what must fail in the short form: there its first failure is enough."""
    return not full and role == "caught"


def _missing(saver: type[Saver]) -> str:
    absent = saver.missing()
    if not absent and saver.needs_shim and inject.shim() is None:
        absent = "its calls cannot be seen without a C compiler"
    return absent


def _calls(saver: type[Saver], kind: str, role: Role, *, quick: int) -> Row:
    """`quick`: each so-manieth point in the short form; 0: not there."""

    def make(full: bool, _seed: int) -> Tally:
        if full:
            return calls.sweep(saver, kind)
        if role == "caught":
            return calls.sweep(saver, kind, every=quick, reach=1, until_failed=True)
        return calls.sweep(saver, kind, every=quick, reach=0)

    return Row(kind, saver.name, role, make, _missing(saver), full_only=not quick)


def _power(saver: type[Saver], role: Role, *, quick: int) -> Row:
    """`quick`: states in the short form."""

    def make(full: bool, seed: int) -> Tally:
        try:
            return power.power_loss(
                saver, budget=None if full else quick, seed=seed, until_failed=_brief(full, role)
            )
        except power.Unexplained as error:
            if role != "beside":
                raise
            return Tally(power.NAME, saver.name, skipped=str(error).removeprefix(f"{saver.name}: "))

    missing = _missing(saver)
    if not missing and inject.shim() is None:
        missing = "calls are recorded through a C compiler only"
    return Row(power.NAME, saver.name, role, make, missing, full_only=not quick)


def _real_cut(saver: type[Saver], role: Role, *, quick: int) -> Row:
    def make(full: bool, seed: int) -> Tally:
        return real_cut.real_cut(saver, cuts=50 if full else quick, seed=seed)

    missing = saver.missing()
    return Row(real_cut.NAME, saver.name, role, make, missing, full_only=not quick)


def _rot(saver: type[Saver], role: Role, *, quick: int) -> Row:
    def make(full: bool, seed: int) -> Tally:
        points = 400 if full else quick
        return rot.rot(saver, points=points, seed=seed, until_failed=_brief(full, role))

    return Row(rot.ROT, saver.name, role, make, _missing(saver), full_only=not quick)


def _counted(
    fault: str,
    saver: type[savers.Ours],
    role: Role,
    row: Callable[..., Tally],
    *,
    quick: int,
    full: int | None = None,
) -> Row:
    """`quick`: points of the short form; `full`: of the full one, None: all there are."""

    def make(whole: bool, seed: int) -> Tally:
        points = full if whole else quick
        return row(saver, points=points, seed=seed, until_failed=_brief(whole, role))

    return Row(fault, saver.name, role, make)


def _moved(saver: str, role: Role, *, quick: int) -> Row:
    def make(full: bool, _seed: int) -> Tally:
        return moves.sweep(saver, every=1 if full else quick, until_failed=_brief(full, role))

    missing = "" if inject.shim() is not None else "its calls cannot be seen without a C compiler"
    return Row(moves.NAME, saver, role, make, missing)


def _struck(saver: str, role: Role, *, quick: int) -> Row:
    def make(full: bool, seed: int) -> Tally:
        return evaluations.strike_duties(saver, points=90 if full else quick, seed=seed)

    return Row(evaluations.NAME, saver, role, make)


def _restarting(start: type[restarts.Start]) -> Callable[[bool, int], Tally]:
    return lambda full, _seed: restarts.sweep(start, every=1 if full else 13)
