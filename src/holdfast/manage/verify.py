"""`holdfast verify`: every byte of every checkpoint against its checksums, and nothing is moved.

What was checked goes into the history, so that retention knows which states it may count on. The
catalogue is locked for the moment of writing that line only: training goes on. Memory is
bounded. No torch here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.checkpoint.format import NewerFormat, Reader
from holdfast.checkpoint.rundir import ARCHIVE, EVENTS, QUARANTINE, ROLES, TEMP, Catalog
from holdfast.errors import CheckpointError, DamagedCheckpoint, HoldfastError, RunLocked
from holdfast.i18n import _
from holdfast.manage.progress import Meter, Show
from holdfast.manage.rundir import DAMAGED, checkpoint_files, look, set_aside

INTACT, FOREIGN, UNREADABLE = "intact", "foreign", "unreadable"  # and DAMAGED

RUN = "run"  # the place of what recovery looks at; the others are `archive` and `quarantine`


@dataclass(frozen=True, slots=True)
class Target:
    """The names of one file, the telling one first, and the run directory it belongs to."""

    paths: tuple[Path, ...]
    directory: Path | None  # None: of no run directory, so nothing is recorded
    known: tuple[str, str] | None = None  # state and reason where the first look has told
    place: str = RUN

    @property
    def quarantined(self) -> bool:
        """True if it was set aside as damaged before."""
        return self.place == QUARANTINE


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of one check."""

    target: Target
    state: str  # "intact", "damaged", "unreadable" (perhaps intact), "foreign" (not ours)
    reason: str | None = None
    size: int = 0
    step: int | None = None
    recorded: bool = False  # whether the history knows
    note: str | None = None  # why it does not

    @property
    def failed(self) -> bool:
        """True if it should be a checkpoint and cannot be relied on.

        A foreign file in a run directory is excused; one that was named is no checkpoint.
        """
        beside = self.target.known is not None or self.target.place != RUN
        excused = self.target.quarantined or (self.state == FOREIGN and beside)
        return self.state != INTACT and not excused

    def to_json(self) -> dict[str, Any]:
        """The documented form."""
        return {
            "path": str(self.target.paths[0]),
            "names": [str(path) for path in self.target.paths],
            "place": self.target.place,
            "state": self.state,
            "reason": self.reason,
            "step": self.step,
            "size": self.size,
            "recorded": self.recorded,
        }


@dataclass(slots=True)
class _Check:
    """One reading of a file: identity from the very bytes that were checked."""

    state: str = INTACT
    reason: str | None = None
    size: int = 0
    identity: dict[str, Any] = field(default_factory=dict)


def targets_of(
    sources: Sequence[str | os.PathLike[str]], *, everything: bool = False
) -> list[Target]:
    """Return what there is to check; links to one file are one target.

    `everything`: also what lies in `archive/` and `quarantine/`. Raises HoldfastError where a
    source is missing: before anything long begins.
    """
    found: list[Target] = []
    for source in map(Path, sources):
        if source.is_dir():
            found += _targets_in(source)
            found += _targets_aside(source, found) if everything else []
        elif source.is_file():
            found.append(Target((source,), _run_directory_of(source)))
        else:
            raise HoldfastError("There is no checkpoint at {path}.", path=source)
    return found


def verify(targets: Iterable[Target], show: Show | None = None) -> Iterator[Verdict]:
    """Check the targets one after the other; leave out a file that a running training has removed.

    `show` is called from any of the threads that read. What it raises ends the reading.
    """
    every = list(targets)
    sizes = {target: 0 if target.known else _size(target.paths[0]) for target in every}
    damaged: set[str] = set()  # ids: a copy that is intact does not make up for one that is not
    meter = Meter(len(every), sum(sizes.values()), show)
    for target in every:
        meter.file(target.paths[0])
        if target.known is not None:
            yield Verdict(target, *target.known, _size(target.paths[0]))
            continue
        before = meter.done
        check = _read(target.paths[0], meter.count)
        meter.count(before + sizes[target] - meter.done)  # headers, and what lies behind damage
        if check is None:
            continue
        id_, step = str(check.identity.get("id")), check.identity.get("step")
        verdict = Verdict(target, check.state, check.reason, check.size, step)
        if check.state == DAMAGED:
            damaged.add(id_)
        trusted = check.state == DAMAGED or (check.state == INTACT and id_ not in damaged)
        yield _record(verdict, check) if trusted else verdict


def _targets_in(directory: Path) -> list[Target]:
    contents = look(directory).contents
    known = {name: (FOREIGN, _("not written by holdfast")) for name in contents.foreign}
    known |= {name: (DAMAGED, reason) for name, reason in contents.damaged}
    known |= {name: (UNREADABLE, reason) for name, reason in contents.unreadable}
    order = {name: (i, k) for i, e in enumerate(contents.entries) for k, name in enumerate(e.names)}

    def rank(name: str) -> tuple[int, int]:
        return order.get(name, (len(contents.entries), 0))

    by_inode: dict[tuple[int, int], list[str]] = {}
    for path in checkpoint_files(directory):
        try:
            stat = path.lstat()
        except FileNotFoundError:
            continue
        name = path.relative_to(directory).as_posix()
        by_inode.setdefault((stat.st_dev, stat.st_ino), []).append(name)
    groups = sorted(
        (sorted(names, key=rank) for names in by_inode.values()), key=lambda names: rank(names[0])
    )
    return [
        Target(tuple(directory / name for name in names), directory, known.get(names[0]))
        for names in groups
    ]


def _targets_aside(directory: Path, others: Sequence[Target]) -> list[Target]:
    """Return what was set aside, unless it is a link to one of `others`. Nothing is recorded: what
    is wrong with a copy in quarantine says nothing of the checkpoint that is still there."""
    seen = {_inode(target.paths[0]) for target in others}
    found: list[Target] = []
    for place in (ARCHIVE, QUARANTINE):
        groups: dict[tuple[int, int], list[Path]] = {}
        for path in set_aside(directory, place):
            if path.suffix == ".pt" and _inode(path) not in seen:
                groups.setdefault(_inode(path), []).append(path)
        for paths in groups.values():
            telling = sorted(paths, key=lambda path: (path.name in ROLES, path))
            found.append(Target(tuple(telling), None, place=place))
    return found


def _inode(path: Path) -> tuple[int, int]:
    try:
        stat = path.lstat()
    except FileNotFoundError:
        return (-1, -1)
    return stat.st_dev, stat.st_ino


def _run_directory_of(path: Path) -> Path | None:
    """The run directory that a single file lies in: the one that keeps a history."""
    place = path.absolute().parent
    place = place.parent if place.name == TEMP else place
    return place if (place / EVENTS).is_file() else None


def _read(path: Path, count: Callable[[int], None]) -> _Check | None:
    """Check every byte, from the device and not from the page cache; None where it has gone."""
    check = _Check()
    try:
        with Reader(path) as reader:
            check.size, check.identity = reader.size, reader.manifest.get("identity") or {}
            reader.forget_cached()
            reader.verify(threads=4, progress=count)
    except FileNotFoundError:
        return None
    except DamagedCheckpoint as error:
        check.state, check.reason = DAMAGED, error.why
    except CheckpointError as error:
        check.state = UNREADABLE if isinstance(error, NewerFormat) else FOREIGN
        check.reason = error.why
    except OSError as error:  # says nothing about the file
        check.state, check.reason = UNREADABLE, str(error)
    check.size = check.size or _size(path)
    return check


def _record(verdict: Verdict, check: _Check) -> Verdict:
    """Write the verdict into the history, unless the file belongs to none or has no id."""
    directory = verdict.target.directory
    if directory is None or "id" not in check.identity:
        return verdict
    catalog = Catalog(directory)
    fields: dict[str, Any] = {key: check.identity.get(key) for key in ("id", "step")}
    try:
        with catalog.lock():
            if check.state == INTACT:
                catalog.record("verified", **fields)
            else:
                names = [path.name for path in verdict.target.paths]
                catalog.record(DAMAGED, **fields, names=names, reason=check.reason)
    except (OSError, RunLocked) as error:
        note = _(
            "The history could not be written ({error}): retention does not know of this check.",
            error=error,
        )
        return replace(verdict, note=note)
    return replace(verdict, recorded=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
