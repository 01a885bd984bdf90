"""`holdfast verify`: every byte of every checkpoint against its checksums, and nothing is moved.

What was checked goes into the history, so that retention knows which states it may count on. The
catalogue is locked for the moment of writing that line only: training goes on. No torch here.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.checkpoint.catalog import EVENTS, TEMP, Catalog
from holdfast.checkpoint.container import NewerFormat, Reader
from holdfast.errors import CheckpointError, DamagedCheckpoint, HoldfastError, RunLocked
from holdfast.i18n import _
from holdfast.manage.rundir import DAMAGED, checkpoint_files, look

INTACT, FOREIGN, UNREADABLE = "intact", "foreign", "unreadable"  # and DAMAGED

Progress = Callable[[int, int, Path], None]  # which one, of how many, its path


@dataclass(frozen=True, slots=True)
class Target:
    """The names of one file, the telling one first, and the run directory it belongs to."""

    paths: tuple[Path, ...]
    directory: Path | None  # None: of no run directory, so nothing is recorded
    known: tuple[str, str] | None = None  # state and reason where the first look has told


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found about a file."""

    target: Target
    state: str  # "intact", "damaged", "unreadable" (perhaps intact), "foreign" (not ours)
    reason: str | None = None
    size: int = 0
    step: int | None = None
    recorded: bool = False  # whether the history knows
    note: str | None = None  # why it does not

    @property
    def failed(self) -> bool:
        """Whether what should be a checkpoint is none that can be relied on.

        A foreign file in a run directory is nobody's fault; one that was named is no checkpoint.
        """
        return self.state != INTACT and not (self.state == FOREIGN and self.target.known)

    def to_json(self) -> dict[str, Any]:
        """The documented form."""
        return {
            "path": str(self.target.paths[0]),
            "names": [str(path) for path in self.target.paths],
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


def targets_of(sources: Sequence[str | os.PathLike[str]]) -> list[Target]:
    """What there is to check in files and run directories; links to one file are one target.

    Raises HoldfastError where one of them is missing: before anything long begins.
    """
    found: list[Target] = []
    for source in map(Path, sources):
        if source.is_dir():
            found += _targets_in(source)
        elif source.is_file():
            found.append(Target((source,), _run_directory_of(source)))
        else:
            raise HoldfastError(_("There is no checkpoint at {path}.", path=source))
    return found


def verify(targets: Iterable[Target], progress: Progress | None = None) -> Iterator[Verdict]:
    """Check one target after the other; a file that a running training has removed is left out."""
    every = list(targets)
    damaged: set[str] = set()  # ids: a copy that is intact does not make up for one that is not
    for i, target in enumerate(every, 1):
        if progress is not None:
            progress(i, len(every), target.paths[0])
        if target.known is not None:
            state, reason = target.known
            yield Verdict(target, state, reason, _size(target.paths[0]))
            continue
        check = _read(target.paths[0])
        if check is None:
            continue
        id_ = str(check.identity.get("id"))
        if check.state == DAMAGED:
            damaged.add(id_)
        verdict = Verdict(target, check.state, check.reason, check.size, check.identity.get("step"))
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
    groups = sorted((sorted(names, key=rank) for names in by_inode.values()),
                    key=lambda names: rank(names[0]))  # fmt: skip
    return [
        Target(tuple(directory / name for name in names), directory, known.get(names[0]))
        for names in groups
    ]


def _run_directory_of(path: Path) -> Path | None:
    """The run directory that a single file lies in: the one that keeps a history."""
    place = path.absolute().parent
    place = place.parent if place.name == TEMP else place
    return place if (place / EVENTS).is_file() else None


def _read(path: Path) -> _Check | None:
    """Check every byte, from the device and not from the page cache; None where it has gone."""
    check = _Check()
    try:
        with Reader(path) as reader:
            check.size, check.identity = reader.size, reader.manifest.get("identity") or {}
            reader.forget_cached()
            reader.verify()
    except FileNotFoundError:
        return None
    except DamagedCheckpoint as error:
        check.state, check.reason = DAMAGED, str(error)
    except CheckpointError as error:
        check.state = UNREADABLE if isinstance(error, NewerFormat) else FOREIGN
        check.reason = str(error)
    except OSError as error:  # only a medium that fails says something about the file
        check.state = DAMAGED if error.errno == errno.EIO else UNREADABLE
        check.reason = str(error)
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
        note = _("The history could not be written ({error}): retention does not know of this "
                 "check.", error=error)  # fmt: skip
        return replace(verdict, note=note)
    return replace(verdict, recorded=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
