"""Going back for good: an earlier state becomes the newest, and nothing is overwritten.

The line in the history is what does it. It is durable before the first file moves, so a crash
leaves a run that has gone back or one that has not: what is left to move then is moved by the next
start, or by asking once more. The line also begins the generation that the next start goes on in.
No torch here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from holdfast.checkpoint import filesystem
from holdfast.checkpoint.catalog import ARCHIVE, Catalog, Entry, is_later, summary
from holdfast.checkpoint.container import Reader, read_manifest
from holdfast.checkpoint.retention import Order
from holdfast.errors import CheckpointError, DamagedCheckpoint

log = logging.getLogger("holdfast")

EVENT = "rolled_back"
_GONE_ON = ("began", "resumed", "durable")  # after one of these it is a matter of the past


@dataclass(frozen=True, slots=True)
class Rollback:
    """A line of the history: to which state the run went back."""

    id: str
    order: Order  # of the state, as Entry.order
    step: int
    generation: int  # the one that begins with it
    source: str | None  # where the state lies in the archive; None: among the others

    @property
    def label(self) -> str:
        """Where under `archive/` the abandoned ones go."""
        return f"generation_{self.generation - 1}"

    def abandons(self, event: Mapping[str, Any]) -> bool:
        """Whether what `event`, one of `Catalog.announced`, tells of lies behind us now."""
        return event["generation"] < self.generation and is_later(event, self.order, self.step)


def last(catalog: Catalog) -> Rollback | None:
    """The last roll-back of this run directory, if there ever was one."""
    found = None
    for event in catalog.events(EVENT):
        found = _read(event) or found
    return found


def pending(catalog: Catalog) -> Rollback | None:
    """The roll-back that no training has gone on from yet."""
    found = None
    for event in catalog.events(EVENT, *_GONE_ON):
        found = None if event["event"] in _GONE_ON else _read(event) or found
    return found


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


def roll_back(catalog: Catalog, entry: Entry, source: str | None = None) -> Rollback:
    """Make `entry` the newest; `source` where it lies in the archive, else it is one of those here.

    The caller holds the run's lock and has found `entry` intact. May be repeated after a crash.
    """
    back = pending(catalog)
    if back is None or back.id != entry.id:
        generation = catalog.generation() + 1
        catalog.record(EVENT, id=entry.id, run_id=entry.run_id, step=entry.step,
                       generation=generation, source=source,
                       order=[entry.generation, entry.step, entry.sequence])  # fmt: skip
        back = Rollback(entry.id, entry.order, entry.step, generation, source)
    finish(catalog)
    with catalog.lock():
        contents = catalog.scan()
        catalog.assign_roles(contents)
        catalog.write_cache()
    return back


def finish(catalog: Catalog) -> None:
    """Do what a crash has left undone of a roll-back; the caller holds the run's lock."""
    back = pending(catalog)
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


def _read(event: Mapping[str, Any]) -> Rollback | None:
    """The roll-back of a line of the history; anybody may have written it."""
    id_, order, generation = (event.get(name) for name in ("id", "order", "generation"))
    source = event.get("source")
    if event.get("event") != EVENT or not isinstance(generation, int) or not isinstance(id_, str):
        return None
    if not isinstance(order, list) or [type(number) for number in order] != [int] * 3:
        return None
    if source is not None and not is_archived(source):
        return None
    return Rollback(id_, (order[0], order[2]), order[1], generation, source)


def is_archived(source: object) -> bool:
    """Whether `source`, relative to a run directory, is the name of a file in its archive."""
    parts = PurePosixPath(source).parts if isinstance(source, str) else ()
    return parts[:1] == (ARCHIVE,) and ".." not in parts
