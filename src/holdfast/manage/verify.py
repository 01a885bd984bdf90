"""`holdfast verify`: every byte of every checkpoint against its checksums, and nothing is moved.

What was checked goes into the history, so that retention knows which states it may count on. The
catalogue is locked for the moment of writing that line only: training goes on. Several files are
read at once, each in bounded memory. No torch here.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.checkpoint.format import NewerFormat, Reader
from holdfast.checkpoint.rundir import ARCHIVE, EVENTS, QUARANTINE, ROLES, TEMP, Catalog
from holdfast.errors import CheckpointError, DamagedCheckpoint, HoldfastError, RunLocked
from holdfast.i18n import _
from holdfast.manage.rundir import DAMAGED, checkpoint_files, look, set_aside

INTACT, FOREIGN, UNREADABLE = "intact", "foreign", "unreadable"  # and DAMAGED

# Files at once, two threads each: measured, small files were twice as fast as one by one; large
# ones, which wait for the disk alone, as fast; and more at once were no gain for either.
JOBS = 2
RUN = "run"  # the place of what recovery looks at; the others are `archive` and `quarantine`
_TICK = 0.1  # seconds between two looks at how far it has come


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long reading of files has come."""

    number: int  # of the file that is waited for, from 1
    of: int
    path: Path
    done: int  # bytes, of all files
    total: int
    seconds: float

    @property
    def speed(self) -> float:
        """Bytes a second until now."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def left(self) -> float | None:
        """Seconds that it will still take; None where nobody can tell yet."""
        return (self.total - self.done) / self.speed if self.speed else None


Show = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Target:
    """The names of one file, the telling one first, and the run directory it belongs to."""

    paths: tuple[Path, ...]
    directory: Path | None  # None: of no run directory, so nothing is recorded
    known: tuple[str, str] | None = None  # state and reason where the first look has told
    place: str = RUN

    @property
    def quarantined(self) -> bool:
        """Whether it was set aside as damaged: then it is no news that it is."""
        return self.place == QUARANTINE


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
    """What there is to check in files and run directories; links to one file are one target.

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
            raise HoldfastError(_("There is no checkpoint at {path}.", path=source))
    return found


def verify(
    targets: Iterable[Target], show: Show | None = None, *, jobs: int = JOBS
) -> Generator[Verdict, None, None]:
    """Check `jobs` targets at once and tell of them in their order; a file that a running training
    has removed is left out.

    `show` is called here every tenth of a second. Closing the iterator, or an interrupt, ends the
    reading at once.
    """
    every = list(targets)
    damaged: set[str] = set()  # ids: a copy that is intact does not make up for one that is not
    crew = _Crew(every, jobs)
    try:
        for i, target in enumerate(every):
            check = crew.result(i, show)
            if check is None:
                continue
            id_ = str(check.identity.get("id"))
            step = check.identity.get("step")
            verdict = Verdict(target, check.state, check.reason, check.size, step)
            if target.known is not None:
                yield verdict
                continue
            if check.state == DAMAGED:
                damaged.add(id_)
            trusted = check.state == DAMAGED or (check.state == INTACT and id_ not in damaged)
            yield _record(verdict, check) if trusted else verdict
    finally:
        crew.stop()


class _Stopped(Exception):
    """Nobody wants to know any more."""


class _Crew:
    """Threads that check files in order, few ahead of the one that is waited for."""

    def __init__(self, targets: Sequence[Target], jobs: int) -> None:
        self._targets, self._jobs = targets, max(1, jobs)
        self._sizes = [0 if target.known else _size(target.paths[0]) for target in targets]
        self._began = time.monotonic()
        self._turn = threading.Condition()
        self._next = self._taken = 0  # the next file to check; how many were asked for
        self._found: dict[int, _Check | BaseException | None] = {}
        self._done = 0  # bytes
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._work, name="holdfast-verify", daemon=True)
            for _thread in range(min(self._jobs, len(targets)))
        ]
        for thread in self._threads:
            thread.start()

    def result(self, index: int, show: Show | None) -> _Check | None:
        """What was found about the file `index`; None where it has gone. Call it in order."""
        with self._turn:
            self._taken = index
            self._turn.notify_all()
        while True:
            if show is not None:
                show(self._progress(index))
            with self._turn:
                if self._turn.wait_for(lambda: index in self._found, _TICK):
                    found = self._found.pop(index)
                    break
        if isinstance(found, BaseException):
            raise found
        return found

    def stop(self) -> None:
        """Return when nobody reads any more."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()
        for thread in self._threads:
            thread.join()

    def _progress(self, index: int) -> Progress:
        seconds = time.monotonic() - self._began
        path = self._targets[index].paths[0]
        return Progress(index + 1, len(self._targets), path, self._done, sum(self._sizes), seconds)

    def _work(self) -> None:
        while True:
            with self._turn:
                # Not further ahead: what is removed before its turn comes is not to be judged.
                self._turn.wait_for(lambda: self._stopped or self._next < self._taken + self._jobs)
                if self._stopped or self._next >= len(self._targets):
                    return
                index = self._next
                self._next += 1
            try:
                found = self._check(index)
            except _Stopped:
                return
            except BaseException as error:  # noqa: BLE001 - raised again by `result`
                found = error
            with self._turn:
                self._found[index] = found
                self._turn.notify_all()

    def _check(self, index: int) -> _Check | BaseException | None:
        target, counted = self._targets[index], 0
        if target.known is not None:
            state, reason = target.known
            return _Check(state, reason, _size(target.paths[0]))

        def count(more: int) -> None:
            nonlocal counted
            if self._stopped:
                raise _Stopped
            with self._turn:
                counted += more
                self._done += more

        check = _read(target.paths[0], count)
        with self._turn:  # headers, and what was left unread behind damage
            self._done += self._sizes[index] - counted
        return check


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


def _targets_aside(directory: Path, others: Sequence[Target]) -> list[Target]:
    """What was set aside, unless it is a link to one of `others`. Nothing is recorded of it: what
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
            reader.verify(progress=count)
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
        note = _("The history could not be written ({error}): retention does not know of this "
                 "check.", error=error)  # fmt: skip
        return replace(verdict, note=note)
    return replace(verdict, recorded=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
