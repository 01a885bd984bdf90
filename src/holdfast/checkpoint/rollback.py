"""Going back for good: an earlier state becomes the newest, and nothing is overwritten.

The line in the history is what does it. It is durable before the first file moves, so a crash
leaves a run that has gone back or one that has not: what is left to move then is moved by the next
start, or by asking once more. The line also begins the generation that the next start goes on in.
No torch here.
"""

from __future__ import annotations

import logging
from pathlib import Path

from holdfast.checkpoint import filesystem
from holdfast.checkpoint.catalog import Catalog, Entry, summary
from holdfast.checkpoint.container import Reader, read_manifest
from holdfast.checkpoint.history import ROLLED_BACK, Rollback
from holdfast.errors import CheckpointError, DamagedCheckpoint

log = logging.getLogger("holdfast")


def intact(catalog: Catalog, entry: Entry) -> None:
    """Check every byte of `entry`, which becomes known as verified.

    Where its names are copies, the damaged ones are set aside as long as one is intact. Raises
    `DamagedCheckpoint` where none is; nothing has changed then.
    """
    damaged: dict[str, str] = {}
    checked: list[Path] = []
    for name in entry.names:
        path = catalog.directory / name
        if any(filesystem.same_data(path, other) for other in checked):
            continue
        checked.append(path)
        reason = damage_of(path)
        if reason is not None:
            damaged[name] = reason
    if len(damaged) == len(checked):
        raise DamagedCheckpoint(next(iter(damaged.values())))
    with catalog.lock():
        for name, reason in damaged.items():
            catalog.quarantine([name], reason)
        catalog.record("verified", id=entry.id, step=entry.step)


def damage_of(path: Path) -> str | None:
    """What is wrong with the bytes of `path` on the device; None where nothing is."""
    try:
        with Reader(path) as reader:
            reader.verify()
    except CheckpointError as error:
        return str(error)
    return None


def damage_of_all(catalog: Catalog, entry: Entry) -> str | None:
    """What is wrong with the last of the names of `entry`; None where one of them is intact."""
    reason = None
    for name in entry.names:
        reason = damage_of(catalog.directory / name)
        if reason is None:
            break
    return reason


def roll_back(catalog: Catalog, entry: Entry, source: str | None = None) -> Rollback:
    """Make `entry` the newest; `source` where it lies in the archive, else it is one of those here.

    The caller holds the run's lock and has found `entry` intact. May be repeated after a crash.
    """
    back = catalog.history.known.pending
    if back is None or back.id != entry.id:
        generation = catalog.generation() + 1
        catalog.record(ROLLED_BACK, id=entry.id, run_id=entry.run_id, step=entry.step,
                       generation=generation, source=source,
                       order=[entry.generation, entry.step, entry.sequence])  # fmt: skip
        back = Rollback(entry.id, entry.run_id, entry.order, entry.step, generation, source)
    finish(catalog)
    with catalog.lock():
        contents = catalog.scan()
        catalog.assign_roles(contents)
        catalog.write_cache()
    return back


def finish(catalog: Catalog) -> None:
    """Do what a crash has left undone of a roll-back; the caller holds the run's lock."""
    back = catalog.history.known.pending
    if back is None:
        return
    with catalog.lock():
        entries = catalog.scan().entries
        newer = [e for e in entries if e.order > back.order and e.generation < back.generation]
        if newer:
            catalog.archive(newer, back.label)
        if back.source is not None and all(entry.id != back.id for entry in entries):
            _bring_back(catalog, back, back.source)


def _bring_back(catalog: Catalog, back: Rollback, source: str) -> None:
    """Let the state that lies in the archive be one of those here, too."""
    path = catalog.directory / source
    try:
        entry = summary(read_manifest(path), path.stat().st_size)
    except (FileNotFoundError, CheckpointError) as error:  # gone since: what is here has to do
        log.warning("%s: %s", path, error)
        return
    if entry.id == back.id:
        catalog.give_name(path, entry)
