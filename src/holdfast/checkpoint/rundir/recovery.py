"""Which checkpoint to go on from: the newest intact one, or the one that was asked for.

Damaged files are set aside on the way, with their reason. Nothing live is touched here.
"""

from __future__ import annotations

import datetime
import glob
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.checkpoint.format import container
from holdfast.checkpoint.policy import Order
from holdfast.checkpoint.rundir.catalog import QUARANTINE, ROLES, Catalog, Contents, Entry, summary
from holdfast.checkpoint.system import filesystem
from holdfast.errors import CheckpointError, DamagedCheckpoint, ForeignCheckpoint
from holdfast.i18n import _

Tell = Callable[..., None]


@dataclass(slots=True)
class Found:
    """A checkpoint that has been read whole and verified, not yet restored."""

    entry: Entry
    path: Path
    manifest: Mapping[str, Any]
    payload: Mapping[str, Any]
    here: bool  # whether it belongs to this run directory
    newer: list[Entry] = field(default_factory=list)  # intact ones here that it goes back behind
    skipped: list[tuple[str, str]] = field(default_factory=list)  # damaged and set aside, and why
    unread: bool = False  # whether something here that cannot be read now may be newer


def find(catalog: Catalog, source: str | os.PathLike[str] | None, tell: Tell) -> Found | None:
    """Read what to go on from; None where this directory holds nothing and nothing was named.

    The caller holds the catalogue's lock. Raises `DamagedCheckpoint` where `source` is damaged or
    where everything is: nothing is ever started over in silence. `CheckpointError` where what is
    wanted cannot be read now: it may be intact, so nothing older takes its place. Where `source` is
    another one, what cannot be read stays where it is, behind the generation that begins.
    """
    contents = catalog.scan()
    wanted: Sequence[Entry] = contents.entries
    if source is not None:
        files = _files(catalog, source)
        wanted = [entry for entry in contents.entries if _is_one_of(catalog, entry, files)]
        if not wanted:
            found = _first_intact(files)
            found.unread = bool(contents.unreadable)
            return found
    else:
        for name, reason in _perhaps_newest(catalog, contents):
            raise cannot_read(catalog.directory / name, reason)
        for name, reason in contents.unreadable:
            tell("unread", name=name, reason=reason)
    aside = _Aside(catalog, tell)
    for name, reason in contents.damaged:
        aside.put(name, reason)
    for entry in wanted:
        here = _read_entry(catalog, entry, aside)
        if here is not None:
            newer = [e for e in contents.entries if e.order > entry.order]
            here.newer = [e for e in newer if not aside.names.issuperset(e.names)]
            here.skipped, here.unread = aside.skipped, bool(source and contents.unreadable)
            return here
    if source is not None:
        name, why = aside.skipped[-1]
        path = catalog.directory / name
        raise DamagedCheckpoint(_("{path} is damaged: {why}.", path=path, why=why), why)
    _refuse_to_start_over(catalog, aside.names)
    return None


def cannot_read(path: Path, reason: object) -> CheckpointError:
    """Return the error of a checkpoint that the system does not let us read now."""
    return CheckpointError(
        _("{path} cannot be read now ({reason}). It may be intact, so nothing older is taken in "
          "its place: try again, or name another checkpoint to go on from.", path=path,
          reason=reason)
    )  # fmt: skip


def _perhaps_newest(catalog: Catalog, contents: Contents) -> list[tuple[str, str]]:
    """Return the files that cannot be read now and may be newer than all that can, with the reason.

    The history may say of a file that it is older: that one is left out.
    """
    newest, perhaps = contents.newest, contents.unreadable
    if newest is None or not perhaps:
        return perhaps
    announced = catalog.history.known.announced.values()
    last = {name: event for event in announced for name in event["names"]}
    older = [
        catalog.directory / name
        for name, _reason in perhaps
        if name in last and name not in ROLES and not newest.precedes(last[name])
    ]
    return [
        (name, reason)
        for name, reason in perhaps
        if not any(filesystem.same_data(catalog.directory / name, path) for path in older)
    ]


def lost(catalog: Catalog, entry: Entry) -> tuple[int, float]:
    """Steps and minutes between `entry` and the newest that was announced and is gone.

    What went to the archive when the user went back is not lost, nor what he went back behind. In a
    loop that counts its steps anew, the steps of each count are added up.
    """
    known = catalog.history.known
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
    minutes = (_seconds(gone[-1]["time"]) - _seconds(entry.created)) / 60
    return steps, max(0.0, minutes)


def _refuse_to_start_over(catalog: Catalog, damaged: Collection[str]) -> None:
    """Raise where there was a run and all of it is damaged, now or when last looked at: a job that
    is started again and again must not end with an empty run in place of the lost one."""
    place = catalog.directory / QUARANTINE
    names = sorted(damaged) or sorted(path.name for path in place.rglob("*.pt"))
    if names:
        raise DamagedCheckpoint(
            _("Every checkpoint in {directory} is damaged ({names}); they lie in quarantine/. "
              "Training does not start over by itself: to begin anew, move quarantine/ away or "
              "choose another directory.", directory=catalog.directory, names=", ".join(names))
        )  # fmt: skip


@dataclass(slots=True)
class _Aside:
    """Damaged files that have been set aside on the way."""

    catalog: Catalog
    tell: Tell
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def names(self) -> set[str]:
        return {name for name, _reason in self.skipped}

    def put(self, name: str, reason: str, step: int | None = None) -> None:
        names = self.catalog.quarantine([name], reason)
        self.skipped.extend((each, reason) for each in names)
        if names:  # else it went with another name of its inode
            self.tell("quarantined", names=names, reason=reason, step=step)


def _read(path: Path) -> Found:
    from holdfast.checkpoint.state import codec  # needs torch, which who only lists does without

    with container.Reader(path) as reader:
        payload = codec.read(reader, arrays=True)
        entry = summary(reader.manifest, reader.size)
        if not isinstance(payload, Mapping):
            raise ForeignCheckpoint(_("{path} holds no state of a training.", path=path))
        return Found(entry, path, reader.manifest, payload, here=False)


def _read_entry(catalog: Catalog, entry: Entry, aside: _Aside) -> Found | None:
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
            found = _read(path)
        except FileNotFoundError:  # went into quarantine with another name of its inode
            continue
        except (DamagedCheckpoint, ForeignCheckpoint) as error:
            aside.put(name, error.why, entry.step)
        except OSError as error:  # says nothing about the file
            unread = unread or cannot_read(path, error)
        else:
            found.entry = replace(found.entry, names=entry.names, verified=entry.verified)
            found.here = True
            return found
    if unread is not None:
        raise unread
    return None


# ------------------------------------------------------------------------------ what was asked for


def _files(catalog: Catalog, source: str | os.PathLike[str]) -> list[Path]:
    """The files that `source` (file, glob, directory) means, the newest first.

    Looked for from the working directory, then in the run directory. Raises `CheckpointError` where
    one of several cannot be read now, since it may be the newest.
    """
    text = os.fspath(source)
    files: list[Path] = []
    for base in (Path(), catalog.directory):
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
    raise CheckpointError(_("There is no checkpoint at {source}.", source=text))


def _matches(pattern: str, base: Path) -> list[Path]:
    return [base / name for name in sorted(glob.glob(pattern, root_dir=base))]  # noqa: PTH207


def _order(path: Path) -> Order:
    try:
        return summary(container.read_manifest(path), 0).order
    except CheckpointError:
        return (-1, -1)
    except OSError as error:
        raise cannot_read(path, error) from error


def _is_one_of(catalog: Catalog, entry: Entry, files: Sequence[Path]) -> bool:
    return any(
        filesystem.same_data(catalog.directory / name, file)
        for name in entry.names
        for file in files
    )


def _first_intact(files: Sequence[Path]) -> Found:
    """Read the newest of `files` that is intact. Raises what the last one has to say."""
    for file in files:
        try:
            return _read(file)
        except (DamagedCheckpoint, ForeignCheckpoint):
            if file is files[-1]:
                raise
        except OSError as error:
            raise cannot_read(file, error) from error
    raise AssertionError("the last one returns or raises")


def _seconds(text: str) -> float:
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return 0.0
