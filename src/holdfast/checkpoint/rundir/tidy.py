"""Change a run directory around a save: make way, read back, let go, sweep.

Each function leaves the directory, at every moment, with all states that had been announced; a
crash in the middle of any of them is repaired by doing it again.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence
from pathlib import Path

from holdfast.checkpoint.format import container
from holdfast.checkpoint.policy import Policy, select
from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.checkpoint.rundir.entries import ARCHIVE, PACKING, REPLACED, Contents, Entry
from holdfast.checkpoint.system import drafts, filesystem
from holdfast.errors import DamagedCheckpoint
from holdfast.i18n import _


def keep_old(catalog: Catalog, target: Path, name: str, before: Contents) -> Path | None:
    """Give the file that already has the name `target` a second name and return it: nothing is
    silently overwritten. A checkpoint, or a file that cannot be read now, stays where retention
    sees it; a file that is no checkpoint of ours goes to `archive/replaced/`."""
    if not target.exists():
        return None
    stays = any(name in entry.names for entry in before.entries) or name in dict(before.unreadable)
    place = target.parent if stays else catalog.directory / ARCHIVE / REPLACED
    filesystem.make_directory(place)
    old = place / f"{target.stem}-{uuid.uuid4().hex[:8]}.pt"
    with catalog.lock():
        filesystem.publish(target, old)
    filesystem.sync_directory(place)
    return old


def verify_back(entry: Entry, target: Path) -> None:
    """Read the new file back past the page cache; only after this may anything old go.

    Raises `CheckpointError` where what was read is wrong, or there is nothing to read. `OSError`
    and `MemoryError` say nothing about the file: it is as durable as it was, and not verified.
    """
    try:
        with container.Reader(target) as reader:
            # Its CRC-32s are of the very bytes that were hashed, and compared with the headers.
            reader.verify(crc=False)
            if reader.manifest["identity"]["id"] != entry.id:
                raise DamagedCheckpoint(
                    "{path} holds another checkpoint.",
                    path=target,
                    why=_("it holds another checkpoint"),
                )
    except FileNotFoundError as error:
        raise DamagedCheckpoint(str(error)) from error


def take_back(
    catalog: Catalog, entry: Entry, target: Path, old: Path | None, why: str
) -> list[str]:
    """Quarantine a file that reading back has found damaged, and give the names back to what they
    stood for before. `old` as `keep_old` gave it. Return the quarantined names."""
    with catalog.lock():
        names = catalog.quarantine(entry.names, why)
        if old is not None:
            filesystem.move(old, target)
        catalog.assign_roles(catalog.scan())
    return names


def settle_old(catalog: Catalog, entry: Entry, before: Contents, old: Path) -> None:
    """Remove the predecessor of the same name if it is the same moment of the same run, saved
    again.

    Another moment, as where steps are counted anew in each epoch, keeps the name that `keep_old`
    gave it, and retention decides; so does a pinned one.
    """
    name, last = entry.names[0], before.newest
    if old.parent.name == REPLACED:
        catalog.record("archived", names=[name], to=f"{ARCHIVE}/{REPLACED}/{old.name}")
    elif last is not None and name in last.names and not last.pinned:
        moments = [(e.run_id, e.generation, e.epoch, e.step) for e in (last, entry)]
        if moments[0] == moments[1]:
            filesystem.remove(old)


def archive_others(catalog: Catalog, run_id: str) -> tuple[int, Path] | None:
    """Move checkpoints of other runs to the archive, now that this run has a verified state here:
    they must neither win the next recovery nor be pruned. Return how many, and where they lie."""
    with catalog.lock():
        others = [entry for entry in catalog.scan().entries if entry.run_id != run_id]
        if not others:
            return None
        return len(others), catalog.archive(others, others[0].generation)


def prune(catalog: Catalog, policies: Sequence[Policy]) -> None:
    """Remove the checkpoints that neither a policy nor the floor keeps."""
    with catalog.lock():
        contents = catalog.scan()
        mask = select([entry.candidate() for entry in contents.entries], policies)
        for entry, keep in zip(contents.entries, mask, strict=True):
            if not keep:
                catalog.delete(entry, "retention")
        kept = [entry for entry, keep in zip(contents.entries, mask, strict=True) if keep]
        catalog.write_cache(Contents(kept))


def sweep(catalog: Catalog, contents: Contents) -> None:
    """Remove temporary files of dead writers, and the links of a packing that was killed.

    The caller holds the run's lock and writes nothing, so that no writer is alive.
    """
    for name in contents.temporaries:
        filesystem.remove(catalog.directory / name)
    drafts.sweep(catalog.directory / PACKING, "")
    with contextlib.suppress(OSError):  # there is none, or a packing is at work
        (catalog.directory / PACKING).rmdir()
