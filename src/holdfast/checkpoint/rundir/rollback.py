"""Going back to an earlier state: what is newer goes to the archive.

A line in the history is what does it. It is durable before the first file moves, so a crash leaves
a run that has gone back or one that has not: what is left to move then is moved by the next start,
or by asking once more. No torch here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.checkpoint.format import Reader, read_manifest
from holdfast.checkpoint.rundir.catalog import Catalog, Entry, summary
from holdfast.checkpoint.rundir.history import ROLLED_BACK, Rollback
from holdfast.checkpoint.system import filesystem
from holdfast.errors import CheckpointError, DamagedCheckpoint

log = logging.getLogger("holdfast")


def intact(catalog: Catalog, entry: Entry) -> None:
    """Check every byte of `entry`, which becomes known as verified.

    Where its names are copies, the damaged ones are set aside as long as one is intact. Raises
    `DamagedCheckpoint` where none is; nothing has changed then.
    """
    damaged: dict[str, CheckpointError] = {}
    checked: list[Path] = []
    for name in entry.names:
        path = catalog.directory / name
        if any(filesystem.same_data(path, other) for other in checked):
            continue
        checked.append(path)
        error = damage_of(path)
        if error is not None:
            damaged[name] = error
    if len(damaged) == len(checked):
        error = next(iter(damaged.values()))
        raise DamagedCheckpoint(str(error), error.why)
    with catalog.lock():
        for name, error in damaged.items():
            catalog.quarantine([name], error.why)
        catalog.record("verified", id=entry.id, step=entry.step)


def damage_of(path: Path) -> CheckpointError | None:
    """Read every byte of `path` from the device; return what is wrong, or None."""
    try:
        with Reader(path) as reader:
            reader.verify()
    except CheckpointError as error:
        return error
    return None


def damage_of_all(catalog: Catalog, entry: Entry) -> str | None:
    """Return None if `entry` is intact under one of its names (without links they are copies), else
    what is wrong with the last of them."""
    error = None
    for name in entry.names:
        error = damage_of(catalog.directory / name)
        if error is None:
            return None
    return None if error is None else error.why


def roll_back(catalog: Catalog, entry: Entry, source: str | None = None) -> None:
    """Make `entry` the newest; `source` where it lies in the archive, else it is one of those here.

    The caller holds the run's lock and has found `entry` intact. May be repeated after a crash.
    """
    back = catalog.history.known.pending
    if back is None or back.id != entry.id:
        _decide(catalog, entry, source)
    with catalog.lock():
        _carry_out(catalog)
        catalog.assign_roles(catalog.scan())
        catalog.write_cache()


@dataclass(slots=True)
class GoBack:
    """The last act of a restore from an older state: what is newer makes way, or the restore does
    not happen. The caller holds the locks of the run and of the catalogue."""

    catalog: Catalog
    entry: Entry

    def commit(self) -> None:
        _decide(self.catalog, self.entry)
        _carry_out(self.catalog)

    def undo(self) -> None:
        """Change nothing: once its line is written the run has gone back."""


def finish(catalog: Catalog) -> None:
    """Do what a crash has left undone; the caller holds the run's lock."""
    if catalog.history.known.pending is not None:
        with catalog.lock():
            _carry_out(catalog)


def _decide(catalog: Catalog, entry: Entry, source: str | None = None) -> None:
    """Write the line that makes `entry` the newest, and begins the next generation."""
    catalog.record(ROLLED_BACK, id=entry.id, run_id=entry.run_id, step=entry.step,
                   generation=catalog.generation() + 1, source=source,
                   order=[entry.generation, entry.step, entry.sequence])  # fmt: skip


def _carry_out(catalog: Catalog) -> None:
    """Move what the line abandons; the caller holds the catalogue's lock."""
    back = catalog.history.known.pending
    if back is None:
        return
    contents = catalog.scan()
    source = None
    if back.source is not None and all(entry.id != back.id for entry in contents.entries):
        source = _source(catalog, back, back.source)
        if source is None:  # gone since: what is here has to do
            return
    abandoned = contents.abandoned(back)
    if abandoned:
        catalog.archive(abandoned, back.generation - 1)
    if source is not None:
        catalog.give_name(catalog.directory / source.names[0], source)


def _source(catalog: Catalog, back: Rollback, name: str) -> Entry | None:
    """Return the state in the archive that is to be one of those here, too."""
    path = catalog.directory / name
    try:
        entry = summary(read_manifest(path), path.stat().st_size)
    except (FileNotFoundError, CheckpointError) as error:
        log.warning("%s: %s", path, error)
        return None
    return replace(entry, names=(name,)) if entry.id == back.id else None
