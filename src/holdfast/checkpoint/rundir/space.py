"""Check the room for the next checkpoint before its first byte, and make it if policies keep much.

What a policy keeps beyond the floor is a wish; the next state is a need. So the oldest of it goes
first, no more than is needed, and never anything of the floor.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from holdfast.checkpoint.policy import select
from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.checkpoint.rundir.entries import Contents, Entry
from holdfast.checkpoint.system import filesystem
from holdfast.errors import ResourceError


def check_room(catalog: Catalog, contents: Contents, needed: int) -> None:
    """Raise `ResourceError` unless `needed` bytes fit, with what `make_room` could free of the run
    in `contents`."""
    spare = sum(_frees(catalog, entry) for entry in _beyond_floor(contents))
    check_space(catalog.directory, needed, spare=spare)


def check_space(directory: Path, needed: int, *, spare: int = 0) -> None:
    """Raise `ResourceError` unless `needed` bytes and the reserve fit on the disk of `directory`.

    `spare` bytes count as free: they belong to files that may go.
    """
    free, wanted = filesystem.free_bytes(directory) + spare, needed + filesystem.RESERVE
    if free < wanted:
        raise ResourceError(
            "The disk of {directory} has {free} MB free; the next checkpoint needs {needed} "
            "MB. Free some space, or keep fewer checkpoints.",
            directory=directory,
            free=(free - spare) >> 20,
            needed=wanted >> 20,
        )


def make_room(catalog: Catalog, needed: int, run_id: str, *, refused: bool = False) -> list[Entry]:
    """Let go, oldest first, of what policies keep of a run beyond the floor until `needed` bytes
    fit. Another run's checkpoints are not ours to give up.

    Nothing goes where all of it would not be enough. `refused`: the disk would not take so many
    bytes, whatever it says is free (a quota, inodes, another process that was faster): so many must
    come free. Returns what is gone; each has its line in the history."""
    missing = needed
    if not refused:
        missing += filesystem.RESERVE - filesystem.free_bytes(catalog.directory)
    if missing <= 0:
        return []
    with catalog.lock():
        contents = catalog.scan()
        going = _enough(catalog, _beyond_floor(contents.of(run_id)), missing)
        for entry in going:
            catalog.delete(entry, "space")
        if going:
            kept = [entry for entry in contents.entries if entry not in going]
            catalog.write_cache(Contents(kept))
    return going


def _beyond_floor(contents: Contents) -> list[Entry]:
    """Return the entries that the floor does not need, oldest first."""
    floor = select([entry.candidate() for entry in contents.entries], ())
    spare = [entry for entry, needed in zip(contents.entries, floor, strict=True) if not needed]
    return sorted(spare, key=lambda entry: entry.order)


def _enough(catalog: Catalog, spare: Iterable[Entry], missing: int) -> list[Entry]:
    """Return the first of `spare` that free `missing` bytes together; none if all are not
    enough."""
    chosen = []
    for entry in spare:
        freed = _frees(catalog, entry)
        if freed:
            chosen.append(entry)
            missing -= freed
        if missing <= 0:
            return chosen
    return []


def _frees(catalog: Catalog, entry: Entry) -> int:
    """Return the bytes that removing `entry` frees: none for data that has names elsewhere too."""
    found: dict[tuple[int, int], list[os.stat_result]] = {}
    for name in entry.names:
        with contextlib.suppress(FileNotFoundError):
            status = (catalog.directory / name).lstat()
            found.setdefault((status.st_dev, status.st_ino), []).append(status)
    return sum(
        getattr(same[0], "st_blocks", -(-same[0].st_size // 512)) * 512
        for same in found.values()
        if same[0].st_nlink <= len(same)
    )
