"""The rescue of what a killed process left in shared memory: it is made durable before a resume."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from holdfast.checkpoint.records import Save
from holdfast.checkpoint.rundir import (
    Catalog,
    Contents,
    Entry,
    Reporter,
    rollback,
    shared_memory,
    tidy,
)
from holdfast.checkpoint.save.ledger import Ledger
from holdfast.checkpoint.save.options import Options
from holdfast.checkpoint.save.publisher import Publisher
from holdfast.errors import (
    DamagedCheckpoint,
    ForeignCheckpoint,
    HoldfastError,
    ResourceError,
    SaveFailed,
)
from holdfast.i18n import _


def rescue(catalog: Catalog, reporter: Reporter, *, make_room: bool = False) -> Contents:
    """Make durable what a killed process has left in shared memory and the disk lacks, and return
    what lies in the run directory then: kept saves (an epoch, a step, a best) that were still on
    their way there, and the newest snapshot if it is newer than everything intact on the disk. Then
    they are checkpoints like any other. A roll-back that was interrupted is finished first: what it
    abandoned is not to be gone on from. Temporary files of dead writers go.

    The memory is given back once all of that has been read back whole from the disk. With
    `make_room`, old checkpoints make way on a full disk as they do for a save.

    The caller holds the run's lock. Raises `SaveFailed`, or `ResourceError` for lack of room, where
    there is such a snapshot and the disk does not take it: it stays where it is. `RunLocked` where
    another process uses what lies in memory.
    """
    contents = catalog.scan()
    tidy.sweep(catalog, contents)
    contents = rollback.finish(catalog, contents)
    run = contents.known.run
    left = [] if run is None else shared_memory.left_by(catalog.directory, *run, sure=True)
    if not left:
        shared_memory.sweep(catalog.directory)
        return contents
    rescued: list[Entry] = []
    intact: set[str] = set()  # ids of what has been read here: once each
    for snapshot in reversed(_unwritten(catalog, reporter, left, intact)):
        entry = _make_durable(catalog, reporter, snapshot, make_room=make_room)
        rescued += [entry] if entry is not None else []
    for snapshot in left:
        newer = [e for e in catalog.scan().entries if e.order >= snapshot.order]
        if _any_intact(catalog, reporter, newer, intact | {entry.id for entry in rescued}):
            break
        entry = _make_durable(catalog, reporter, snapshot, make_room=make_room)
        if entry is not None:
            rescued.append(entry)
            break
        # The one before it is whole: a slot is not touched while another is filled.
    if all(entry.verified for entry in rescued):
        for remains in {snapshot.remains for snapshot in left}:
            remains.remove()
    shared_memory.sweep(catalog.directory)
    return catalog.scan()


def _unwritten(
    catalog: Catalog, reporter: Reporter, left: Sequence[shared_memory.Left], intact: set[str]
) -> list[shared_memory.Left]:
    """Return the kept saves among what is `left` that the disk never had whole. What was verified
    and is gone was removed by policy or by hand, and must not come back."""
    kept = [snapshot for snapshot in left if snapshot.kept]
    if not kept:
        return []
    over = {event.get("id") for event in catalog.events("verified", "removed")}
    entries = catalog.scan().entries
    return [
        snapshot
        for snapshot in kept
        if snapshot.id not in over
        and not _any_intact(catalog, reporter, [e for e in entries if e.id == snapshot.id], intact)
    ]


def _make_durable(
    catalog: Catalog, reporter: Reporter, snapshot: shared_memory.Left, *, make_room: bool
) -> Entry | None:
    """Publish a snapshot; None, and it is told, where it is not what was put there. Raises
    `SaveFailed` or `ResourceError` for the disk's faults."""
    try:
        return _publish(catalog, reporter, snapshot, make_room=make_room)
    except _Rotten as error:
        reporter.report("failed", step=snapshot.step, reason=str(error))
        return None
    except (OSError, HoldfastError) as error:
        kind = ResourceError if isinstance(error, ResourceError) else SaveFailed
        raise kind(
            _(
                "Step {step} lies in memory ({path}) and could not be written to the disk: {error}"
                ". Mend that and start again: it goes on from there.",
                step=snapshot.step,
                path=snapshot.path,
                error=str(error).rstrip(".。"),
            )
        ) from error


class _Rotten(Exception):
    """A snapshot in memory is not what was put there."""


def _publish(
    catalog: Catalog, reporter: Reporter, snapshot: shared_memory.Left, *, make_room: bool
) -> Entry:
    """Publish a snapshot. Raises `_Rotten` for its own faults; all others are the disk's."""
    save = Save(snapshot.step, asked=time.monotonic())
    with contextlib.ExitStack() as stack:
        try:
            manifest, image = stack.enter_context(shared_memory.opened(snapshot))
        except (DamagedCheckpoint, ForeignCheckpoint) as error:
            raise _Rotten(str(error)) from error
        save.manifest, save.size, save.ranges = manifest, len(image), [(0, image)]
        saved = Publisher(Ledger(catalog, reporter), Options(make_room=make_room)).publish(save)
    reporter.report("rescued", id=saved.entry.id, step=saved.entry.step)
    return saved.entry


def _any_intact(
    catalog: Catalog, reporter: Reporter, entries: Sequence[Entry], intact: set[str]
) -> bool:
    """Return True if one of `entries` is intact; its id joins `intact`. Damaged ones are set aside.

    Every byte is read now: memory is given back because of the answer.
    """
    for entry in entries:
        if entry.id in intact:
            return True
        try:
            reason = rollback.damage_of_all(catalog, entry)
        except OSError as error:  # it says nothing about the file: that stays, and the memory too
            reporter.warn(error)
            continue
        if reason is None:
            intact.add(entry.id)
            if not entry.verified:  # killed before it was read back
                reporter.record("verified", id=entry.id, step=entry.step)
            return True
        with catalog.lock():
            names = catalog.quarantine(entry.names, reason)
        reporter.tell("quarantined", names=names, reason=reason, step=entry.step)
    return False
