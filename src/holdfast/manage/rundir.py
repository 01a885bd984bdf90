"""Look into a run directory for the desk: its checkpoints, its history, its true size on the disk.

Nothing is written or locked, so this works while training goes on and on read-only disks. No torch
in this room.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint.rundir import ARCHIVE, QUARANTINE, TEMP, Catalog, Contents, Entry
from holdfast.checkpoint.system import filesystem
from holdfast.errors import HoldfastError
from holdfast.i18n import N_, _

DAMAGED = "damaged"  # the event that `holdfast verify` records for what it finds wrong


_KINDS = {"epoch": N_("epoch"), "step": N_("step"), "best": N_("best"), "temp": N_("temp")}


def kind_in_words(kind: str) -> str:
    """Return the kind of a checkpoint for a person; kinds of a newer version stay as they are."""
    return _(_KINDS[kind]) if kind in _KINDS else kind


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Result of a look into a run directory."""

    directory: Path
    catalog: Catalog
    contents: Contents
    distrusted: frozenset[str]  # ids whose last check found damage, whatever was true before

    @property
    def entries(self) -> list[Entry]:
        """Checkpoints, newest first."""
        return self.contents.entries

    @property
    def events(self) -> list[dict[str, Any]]:
        """History as it is now, oldest first. Reads all of the file."""
        return list(self.catalog.events())


def look(
    directory: str | os.PathLike[str], catalog: Catalog | None = None, *, cached: bool = False
) -> RunDirectory:
    """Look into `directory`, with the `catalog` of an earlier look, which knows its history;
    `cached` as `Catalog.scan` has it.

    Raises HoldfastError where there is none, OSError as it comes.
    """
    path = Path(directory)
    if not path.exists():
        filesystem.check_links(path)
        raise HoldfastError(
            "There is no directory {directory}. Name the run directory, the one that "
            "--checkpoint-dir named for the training.",
            directory=path,
        )
    if not path.is_dir():
        raise HoldfastError("{path} is not a directory: name the run directory.", path=path)
    catalog = catalog or Catalog(path)
    contents = catalog.scan(cached=cached)
    return RunDirectory(path, catalog, contents, frozenset(catalog.history.known.damaged))


def number(value: object) -> float | None:
    """Return a metric as a number: manifests hold NaN and the infinities by name."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


# ------------------------------------------------------------------------------------- the disk


def checkpoint_files(directory: Path) -> Iterator[Path]:
    """Yield every name of a checkpoint that recovery looks at, damaged and foreign ones
    included."""
    for place in (directory, directory / TEMP):
        yield from _files_in(place)


def names_of(event: Mapping[str, Any]) -> list[str]:
    """Return the files that an event names; none where the line holds something else."""
    names = event.get("names")
    return [str(name) for name in names] if isinstance(names, list) else []


def set_aside(directory: Path, place: str) -> list[Path]:
    """Return every file under `quarantine/` or `archive/` (`place`), in the order of their
    names."""
    assert place in (QUARANTINE, ARCHIVE), place
    found = []
    for folder, _folders, names in os.walk(directory / place):
        found += [Path(folder) / name for name in names]
    return sorted(found)


def disk_use(paths: Iterable[Path]) -> int:
    """Return the bytes that `paths` occupy as `du` counts them, links to the same data once."""
    sizes: dict[tuple[int, int], int] = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            stat = path.lstat()
            sizes[stat.st_dev, stat.st_ino] = occupied(stat)
    return sum(sizes.values())


def reclaimable(paths: Iterable[Path]) -> int:
    """Return the bytes that removing `paths` frees: none while another link holds the data."""
    sizes: dict[tuple[int, int], int] = {}
    links: dict[tuple[int, int], int] = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            stat = path.lstat()
            key = (stat.st_dev, stat.st_ino)
            sizes[key] = occupied(stat)
            links[key] = links.get(key, stat.st_nlink) - 1
    return sum(size for key, size in sizes.items() if links[key] <= 0)


def occupied(stat: os.stat_result) -> int:
    """Return the bytes of a file on the disk: whole blocks, fewer where the file system compresses.
    Its length where the system does not tell."""
    return getattr(stat, "st_blocks", 0) * 512 or stat.st_size


def _files_in(place: Path) -> Iterator[Path]:
    try:
        with os.scandir(place) as items:
            names = sorted(item.name for item in items if item.is_file(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from (place / name for name in names if name.endswith(".pt"))
