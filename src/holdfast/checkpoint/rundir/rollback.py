"""Go back to an earlier state: checkpoints that are newer go to the archive.

One line in the history decides it. It is durable before the first file moves, so after a crash the
run has gone back or it has not. The next start, or the same command again, moves the rest. No torch
here.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.checkpoint.format import Reader, read_manifest
from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.checkpoint.rundir.entries import Contents, Entry, summary
from holdfast.checkpoint.rundir.history import ROLLED_BACK, Rollback
from holdfast.checkpoint.rundir.recovery import Found
from holdfast.checkpoint.system import filesystem
from holdfast.errors import CheckpointError, DamagedCheckpoint, ForeignCheckpoint

log = logging.getLogger("holdfast")


def intact(catalog: Catalog, entry: Entry) -> None:
    """Check every byte of `entry` and record it as verified.

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
        raise DamagedCheckpoint(str(error), why=error.why)
    with catalog.lock():
        for name, error in damaged.items():
            catalog.quarantine([name], error.why)
        catalog.record("verified", id=entry.id, step=entry.step)


def damage_of(path: Path) -> CheckpointError | None:
    """Read every byte of `path` from the device; return the error, or None if it is intact. Raises
    `NewerFormat`: such a file is not damaged."""
    try:
        with Reader(path) as reader:
            reader.verify()
    except (DamagedCheckpoint, ForeignCheckpoint) as error:
        return error
    return None


def damage_of_all(catalog: Catalog, entry: Entry) -> str | None:
    """Return None if `entry` is intact under one of its names (without links they are copies), else
    the damage of the last one."""
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
    with catalog.lock():
        contents = catalog.scan()
        back = contents.known.pending
        if back is None or back.id != entry.id:
            _decide(catalog, entry, contents.generation + 1, source)
        contents = _carry_out(catalog, contents)
        catalog.write_cache(catalog.assign_roles(contents))


@dataclass(slots=True)
class GoBack:
    """Last act of a restore from an older state: newer checkpoints make way, or the restore does
    not happen. The caller holds the locks of the run and of the catalogue."""

    catalog: Catalog
    found: Found
    generation: int  # the one that begins

    def commit(self) -> None:
        _decide(self.catalog, self.found.entry, self.generation)
        self.found.contents = _carry_out(self.catalog, self.found.contents)

    def undo(self) -> None:
        """Change nothing: once the line is written, the run has gone back."""


def finish(catalog: Catalog, contents: Contents) -> Contents:
    """Finish a roll-back that a crash interrupted; return what lies here then. The caller holds the
    run's lock."""
    if contents.known.pending is None:
        return contents
    with catalog.lock():
        return _carry_out(catalog, contents)


def _decide(catalog: Catalog, entry: Entry, generation: int, source: str | None = None) -> None:
    """Write the line that makes `entry` the newest, and begins `generation`."""
    catalog.record(
        ROLLED_BACK,
        id=entry.id,
        run_id=entry.run_id,
        step=entry.step,
        generation=generation,
        source=source,
        order=[entry.generation, entry.step, entry.sequence],
    )


def _carry_out(catalog: Catalog, contents: Contents) -> Contents:
    """Archive the checkpoints that the line abandons; return what lies here then. The caller holds
    the catalogue's lock."""
    back = catalog.history.known.pending
    if back is None:
        return contents
    abandoned, source = _changes(catalog, contents, back)
    if abandoned:
        catalog.archive(abandoned, back.generation - 1)
    if source is not None:
        catalog.give_name(catalog.directory / source.names[0], source)
    return catalog.scan() if abandoned or source is not None else contents


def foreseen(catalog: Catalog, contents: Contents) -> list[Entry]:
    """Return the checkpoints that will be here when a roll-back that a crash interrupted is
    finished. Nothing is moved."""
    back = contents.known.pending
    if back is None:
        return contents.entries
    abandoned, source = _changes(catalog, contents, back)
    stays = [entry for entry in contents.entries if entry not in abandoned]
    return stays if source is None else [*stays, source]


def _changes(
    catalog: Catalog, contents: Contents, back: Rollback
) -> tuple[list[Entry], Entry | None]:
    """Return the checkpoints that `back` abandons, and the archived one that it brings back."""
    source = None
    if back.source is not None and all(entry.id != back.id for entry in contents.entries):
        source = _source(catalog, back, back.source)
        if source is None:  # removed since: stay with the checkpoints here
            return [], None
    return contents.abandoned(back), source


def _source(catalog: Catalog, back: Rollback, name: str) -> Entry | None:
    """Return the entry of the archived state to go back to; None if it is gone."""
    path = catalog.directory / name
    try:
        entry = summary(read_manifest(path), path.stat().st_size)
    except (FileNotFoundError, DamagedCheckpoint, ForeignCheckpoint) as error:
        log.warning("%s: %s", path, error)
        return None
    return replace(entry, names=(name,)) if entry.id == back.id else None
