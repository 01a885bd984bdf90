"""Which checkpoint to go on from: the newest intact one, or the one that was asked for.

Damaged files are set aside on the way, with their reason. Nothing live is touched here.
"""

from __future__ import annotations

import datetime
import glob
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.checkpoint import codec, container, filesystem
from holdfast.checkpoint.catalog import Catalog, Contents, Entry, summary
from holdfast.errors import CheckpointError, DamagedCheckpoint
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
    skipped: list[tuple[str, str]] = field(default_factory=list)  # newer but damaged, and why


def find(catalog: Catalog, source: str | os.PathLike[str] | None, tell: Tell) -> Found | None:
    """Read what to go on from; None where this directory holds nothing and nothing was named.

    The caller holds the catalogue's lock. Raises `DamagedCheckpoint` where `source` is damaged or
    where everything is: nothing is ever started over in silence.
    """
    contents = catalog.scan()
    skipped: list[tuple[str, str]] = []
    wanted = None if source is None else _resolve(catalog, source, contents)
    if isinstance(wanted, Path):
        found = _read(wanted)
        found.newer = contents.entries
        return found
    for name, reason in contents.damaged:
        skipped.append(_set_aside(catalog, name, reason, None, tell))
    for entry in [wanted] if wanted else contents.entries:
        path = _read_entry(catalog, entry, skipped, tell)
        if path is not None:
            path.newer = [e for e in contents.entries if e.order > entry.order and
                          not any(name in e.names for name, _why in skipped)]  # fmt: skip
            path.skipped = skipped
            return path
    if wanted is not None:
        raise DamagedCheckpoint(skipped[-1][1])
    if skipped:
        names = ", ".join(name for name, _why in skipped)
        raise DamagedCheckpoint(
            _("Every checkpoint in {directory} is damaged ({names}); they lie in quarantine/. "
              "Training does not start over by itself: use --fresh for that.",
              directory=catalog.directory, names=names)
        )  # fmt: skip
    return None


def lost(catalog: Catalog, entry: Entry) -> tuple[int, float]:
    """Steps and minutes between `entry` and the newest that was announced and is gone."""
    announced = [
        event
        for event in catalog.events()
        if event.get("event") == "durable" and event.get("run_id") == entry.run_id
    ]
    if not announced:
        return 0, 0.0
    newest = max(announced, key=lambda event: (event["generation"], event["step"]))
    if (newest["generation"], newest["step"]) <= (entry.generation, entry.step):
        return 0, 0.0
    minutes = (_seconds(newest["time"]) - _seconds(entry.created)) / 60
    return newest["step"] - entry.step, max(0.0, minutes)


def _read(path: Path) -> Found:
    with container.Reader(path) as reader:
        payload = codec.read(reader)
        entry = summary(reader.manifest, reader.size)
        return Found(entry, path, reader.manifest, payload, here=False)


def _read_entry(
    catalog: Catalog, entry: Entry, skipped: list[tuple[str, str]], tell: Tell
) -> Found | None:
    """Read an entry by the first of its names that is intact: without links they are copies."""
    seen: set[tuple[int, int]] = set()
    for name in entry.names:
        try:
            stat = (catalog.directory / name).stat()
        except FileNotFoundError:  # went into quarantine with another name of its inode
            continue
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        try:
            found = _read(catalog.directory / name)
        except DamagedCheckpoint as error:
            skipped.append(_set_aside(catalog, name, str(error), entry.step, tell))
            continue
        found.entry, found.here = entry, True
        return found
    return None


def _set_aside(
    catalog: Catalog, name: str, reason: str, step: int | None, tell: Tell
) -> tuple[str, str]:
    names = catalog.quarantine([name], reason)
    tell("quarantined", names=names or [name], reason=reason, step=step)
    return name, reason


def _resolve(catalog: Catalog, source: str | os.PathLike[str], contents: Contents) -> Entry | Path:
    """The entry here, or the file elsewhere, that `source` (file, glob, directory) means."""
    text = os.fspath(source)
    path = Path(text)
    if not path.exists() and (catalog.directory / text).exists():
        path = catalog.directory / text
    files: list[Path] = []
    for found in [path] if path.exists() else _matches(text):
        if found.is_dir():
            newest = Catalog(found).scan().newest
            files += [found / newest.names[0]] if newest else []
        else:
            files.append(found)
    if not files:
        raise CheckpointError(_("There is no checkpoint at {source}.", source=text))
    here = [
        entry
        for entry in contents.entries
        for name in entry.names
        if any(filesystem.same_data(catalog.directory / name, file) for file in files)
    ]
    if here:
        return max(here, key=lambda entry: entry.order)
    if len(files) == 1:
        return files[0]
    return max(files, key=lambda file: summary(container.read_manifest(file), 0).order)


def _matches(pattern: str) -> list[Path]:
    return [Path(name) for name in sorted(glob.glob(pattern))]  # noqa: PTH207 - may be absolute


def _seconds(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()
