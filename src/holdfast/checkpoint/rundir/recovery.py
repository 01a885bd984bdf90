"""Find the checkpoint to go on from: the newest intact one, or the one that was asked for.

`choose` decides from manifests alone, and `find` reads. Damaged files are set aside on the way,
with their reason. Nothing live is touched here.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.checkpoint.format import container
from holdfast.checkpoint.policy import Order
from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.checkpoint.rundir.entries import QUARANTINE, ROLES, Contents, Entry, summary
from holdfast.checkpoint.rundir.history import Known
from holdfast.checkpoint.system import filesystem
from holdfast.errors import CheckpointError, DamagedCheckpoint, ForeignCheckpoint
from holdfast.formatting import seconds_of

Tell = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Choice:
    """Checkpoints that training may go on from, the best first: where one turns out to be damaged,
    the next takes its place."""

    contents: Contents
    paths: Sequence[Path]
    entries: Sequence[Entry] = ()  # those at `paths`; none where `paths` lie elsewhere
    named: bool = False  # asked for; else the newest here

    @property
    def unread(self) -> bool:
        """True if something here that cannot be read now may be newer than what was named."""
        return self.named and bool(self.contents.unreadable)


@dataclass(slots=True)
class Found:
    """A checkpoint that was read whole and verified, and is not restored yet."""

    entry: Entry
    path: Path
    manifest: Mapping[str, Any]
    payload: Mapping[str, Any]
    choice: Choice
    contents: Contents  # of the run directory now
    here: bool = False  # whether it belongs to this run directory
    newer: list[Entry] = field(default_factory=list)  # intact ones here that it goes back behind
    skipped: list[tuple[str, str]] = field(default_factory=list)  # damaged and set aside, and why


def choose(
    directory: Path, contents: Contents, source: str | os.PathLike[str] | None = None
) -> Choice:
    """Decide what to go on from: `source` (a file, a glob or a directory), else the newest here.

    Raises `CheckpointError` where there is nothing at `source`, or what is wanted cannot be read
    now: it may be intact, so nothing older takes its place.
    """
    wanted: Sequence[Entry] = contents.entries
    if source is None:
        refuse_older(directory, contents, contents.newest)
    else:
        files = _files(directory, source)
        wanted = [entry for entry in wanted if _is_one_of(directory, entry, files)]
        if not wanted:
            return Choice(contents, files, named=True)
    paths = [directory / entry.names[0] for entry in wanted]
    return Choice(contents, paths, wanted, named=source is not None)


def find(catalog: Catalog, choice: Choice, tell: Tell) -> Found | None:
    """Read the first of `choice` that is intact; None where this directory holds nothing and
    nothing was named. Damaged files are moved to `quarantine/`.

    Raises `DamagedCheckpoint` where the named checkpoint is damaged, or where all are: no run is
    started over in silence. A file that cannot be read now stays where it is.
    """
    contents = choice.contents
    if choice.named and not choice.entries:
        return _first_intact(choice)
    with catalog.lock():
        if not choice.named:
            for name, reason in contents.unreadable:
                tell("unread", name=name, reason=reason)
        aside = _Aside(catalog, tell)
        for name, reason in contents.damaged:
            aside.put(name, reason)
        for entry in choice.entries:
            if aside.skipped and not choice.named:  # what was chosen first is damaged
                refuse_older(catalog.directory, contents, entry)
            found = _read_entry(catalog, choice, entry, aside)
            if found is not None:
                found.contents = contents.without(aside.names)
                found.newer = [e for e in found.contents.entries if e.order > entry.order]
                return found
    if choice.named:
        name, why = aside.skipped[-1]
        path = catalog.directory / name
        raise DamagedCheckpoint("{path} is damaged: {why}.", path=path, why=why)
    refuse_older(catalog.directory, contents, None)
    refuse_to_start_over(catalog, aside.names)
    return None


def cannot_read(path: Path, reason: object) -> CheckpointError:
    """Return the error to raise for a checkpoint that the system cannot read now."""
    return CheckpointError(
        "{path} cannot be read now ({reason}). It may be intact, so nothing older is taken in "
        "its place: try again, or name another checkpoint to go on from.",
        path=path,
        reason=reason,
    )


def refuse_older(directory: Path, contents: Contents, wanted: Entry | None) -> None:
    """Raise if a file that cannot be read now may be newer than `wanted`, the newest that is left.

    The history may say of a file that it is older: that one is no reason.
    """
    perhaps = contents.unreadable
    announced = contents.known.announced.values() if wanted is not None and perhaps else ()
    last = {name: event for event in announced for name in event["names"]}
    older = [
        directory / name
        for name, _reason in perhaps
        if wanted is not None
        and name in last
        and name not in ROLES
        and not wanted.precedes(last[name])
    ]
    for name, reason in perhaps:
        if not any(filesystem.same_data(directory / name, path) for path in older):
            raise cannot_read(directory / name, reason)


def lost(known: Known, entry: Entry) -> tuple[int, float]:
    """Return steps and minutes between `entry` and the newest announced checkpoint that is gone.

    Checkpoints that a roll-back left behind do not count as lost. In a loop that counts its steps
    anew, the steps of each count are added up.
    """
    back = known.back
    gone: list[dict[str, Any]] = []
    for event in known.announced.values():
        if event.get("id") == entry.id:
            gone.clear()  # the history is in the order of the saves
        elif (
            event["run_id"] == entry.run_id
            and not (back is not None and back.abandons(event))
            and entry.precedes(event)
        ):
            gone.append(event)
    steps, at = 0, entry.step
    for event in gone:
        steps += event["step"] - (at if event["step"] >= at else 0)
        at = event["step"]
    if not steps:
        return 0, 0.0
    minutes = (seconds_of(gone[-1]["time"]) - seconds_of(entry.created)) / 60
    return steps, max(0.0, minutes)


def refuse_to_start_over(catalog: Catalog, damaged: Collection[str]) -> None:
    """Raise if all checkpoints of a run are damaged, now or at an earlier start: a job that is
    started again and again must not end with an empty run in place of the lost one."""
    place = catalog.directory / QUARANTINE
    names = sorted(damaged) or sorted(path.name for path in place.rglob("*.pt"))
    if names:
        raise DamagedCheckpoint(
            "Every checkpoint in {directory} is damaged ({names}); they lie in quarantine/. "
            "Training does not start over by itself: to begin anew, move quarantine/ away or "
            "choose another directory.",
            directory=catalog.directory,
            names=", ".join(names),
        )


@dataclass(slots=True)
class _Aside:
    """Damaged files that were moved to quarantine while looking."""

    catalog: Catalog
    tell: Tell
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def names(self) -> set[str]:
        return {name for name, _reason in self.skipped}

    def put(self, name: str, reason: str, step: int | None = None) -> None:
        names = self.catalog.quarantine([name], reason)
        self.skipped.extend((each, reason) for each in names)
        if names:  # else another name of its inode has taken it along
            self.tell("quarantined", names=names, reason=reason, step=step)


def _read(path: Path, choice: Choice) -> Found:
    from holdfast.checkpoint.state import codec  # needs torch: listing does without

    with container.Reader(path) as reader:
        payload = codec.read(reader, arrays=True)
        entry = summary(reader.manifest, reader.size)
        if not isinstance(payload, Mapping):
            raise ForeignCheckpoint("{path} holds no state of a training.", path=path)
        return Found(entry, path, reader.manifest, payload, choice, choice.contents)


def _read_entry(catalog: Catalog, choice: Choice, entry: Entry, aside: _Aside) -> Found | None:
    """Read an entry by the first of its names that is intact: without links they are copies.

    Raises `CheckpointError` where none is, and one of them cannot be read now.
    """
    unread: CheckpointError | None = None
    seen: set[tuple[int, int]] = set()
    for name in entry.names:
        path = catalog.directory / name
        try:
            stat = path.stat()
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            found = _read(path, choice)
        except FileNotFoundError:  # quarantined with another name of its inode
            continue
        except (DamagedCheckpoint, ForeignCheckpoint) as error:
            aside.put(name, error.why, entry.step)
        except OSError as error:  # says nothing about the file
            unread = unread or cannot_read(path, error)
        else:
            found.entry = replace(found.entry, names=entry.names, verified=entry.verified)
            found.here, found.skipped = True, aside.skipped
            return found
    if unread is not None:
        raise unread
    return None


# ------------------------------------------------------------------------------ what was asked for


def _files(directory: Path, source: str | os.PathLike[str]) -> list[Path]:
    """Return the files that `source` (file, glob, directory) means, the newest first.

    Looked for from the working directory, then in the run directory. Raises `CheckpointError` where
    one of several cannot be read now or by this version, since it may be the newest.
    """
    text = os.fspath(source)
    files: list[Path] = []
    for base in (Path(), directory):
        exists = (base / text).exists()
        for each in [base / text] if exists else _matches(text, base):
            if each.is_dir():
                contents = Catalog(each).scan()
                for name, reason in contents.unreadable:
                    raise cannot_read(each / name, reason)
                files += [each / entry.names[0] for entry in contents.entries]
            else:
                files.append(each)
        if files:
            return sorted(files, key=_order, reverse=True) if len(files) > 1 else files
    raise CheckpointError("There is no checkpoint at {source}.", source=text)


def _matches(pattern: str, base: Path) -> list[Path]:
    return [base / name for name in sorted(glob.glob(pattern, root_dir=base))]  # noqa: PTH207


def _order(path: Path) -> Order:
    try:
        return summary(container.read_manifest(path), 0).order
    except (DamagedCheckpoint, ForeignCheckpoint):
        return (-1, -1)
    except OSError as error:
        raise cannot_read(path, error) from error


def _is_one_of(directory: Path, entry: Entry, files: Sequence[Path]) -> bool:
    return any(
        filesystem.same_data(directory / name, file) for name in entry.names for file in files
    )


def _first_intact(choice: Choice) -> Found:
    """Read the first of the files elsewhere that is intact. Raises the error of the last one."""
    for path in choice.paths:
        try:
            return _read(path, choice)
        except (DamagedCheckpoint, ForeignCheckpoint):
            if path is choice.paths[-1]:
                raise
        except OSError as error:
            raise cannot_read(path, error) from error
    raise AssertionError("the last one returns or raises")
