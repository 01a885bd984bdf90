"""Link all files of a run into one folder while its catalogue is locked: a consistent set.

A link keeps what a running training prunes meanwhile. Where the file system has no links, a copy
does the same and takes longer.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from holdfast.checkpoint.format import Reader, read_manifest
from holdfast.checkpoint.rundir import (
    ARCHIVE,
    METADATA,
    PACKING,
    QUARANTINE,
    TEMP,
    Catalog,
    Entry,
    now,
    shared_memory,
    summary,
)
from holdfast.checkpoint.system import LOCKS, drafts, filesystem
from holdfast.errors import (
    CheckpointError,
    DamagedCheckpoint,
    ForeignCheckpoint,
    HoldfastError,
    ResourceError,
)
from holdfast.i18n import _
from holdfast.manage.locking import catalogue_lock
from holdfast.manage.packing.archive import MANIFEST, SUMS, Contents, Item, is_sane
from holdfast.manage.progress import Meter
from holdfast.manage.rundir import RunDirectory, look
from holdfast.version import __version__

_AGAIN = 5  # looks at a directory that cannot be locked and changes under us


@dataclass(slots=True)
class Data:
    """The bytes of one file under all of its names.

    `copies` are files with the same bytes, of which the first is packed. They are more than one
    where a directory has lost its links.
    """

    names: list[str]
    copies: list[Path]
    size: int
    mtime: int
    step: int | None = None
    entry: Entry | None = None  # of a checkpoint that recovery looks at


@dataclass(slots=True)
class Taken:
    """All that is to be packed. The links are gone when `taken` ends."""

    run: RunDirectory
    place: Path
    data: list[Data] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)  # what, and why

    @property
    def newest(self) -> Entry | None:
        """The newest checkpoint that is packed."""
        entries = [data.entry for data in self.data if data.entry is not None]
        return max(entries, key=lambda entry: entry.order, default=None)

    @property
    def size(self) -> int:
        return sum(data.size for data in self.data)

    @property
    def unsaved(self) -> int | None:
        """The step of a newer snapshot that a killed training has left in memory only."""
        catalog, newest = self.run.catalog, self.newest
        run = catalog.history.known.run
        left = [] if run is None else shared_memory.left_by(catalog.directory, *run)
        if left and newest is not None and left[0].order > newest.order:
            return left[0].step
        return None

    def contents(self) -> Contents:
        """Return what the archive says of itself."""
        newest = self.newest
        items = []
        for data in self.data:
            first, *others = data.names
            items.append(Item(first, data.size, None, data.step, data.mtime))
            items += [Item(name, data.size, first, data.step, data.mtime) for name in others]
        top = self.run.directory.resolve().name
        return Contents(
            top if top and is_sane(top) else "run",
            now(),
            __version__,
            None if newest is None else newest.run_id,
            None if newest is None else newest.step,
            None if newest is None else newest.epoch,
            tuple(items),
        )

    def verify(self, meter: Meter) -> bool:
        """Read every checkpoint from the device and leave out what is damaged.

        Returns True if any is left out. Raises DamagedCheckpoint where none is intact.
        """
        damaged = bool(self.run.contents.damaged)
        for data in [data for data in self.data if data.step is not None]:
            meter.file(self.run.directory / data.names[0])
            error: DamagedCheckpoint | None = None
            while data.copies and (error := _damage(data.copies[0], meter)) is not None:
                data.copies.pop(0)
            if error is not None:
                self.data.remove(data)
                self.left_out.append((data.names[0], error.why))
                damaged = True
                if self.newest is None:
                    path = self.run.directory / data.names[0]
                    raise DamagedCheckpoint("{path} is damaged: {why}.", path=path, why=error.why)
        return damaged


def _damage(path: Path, meter: Meter) -> DamagedCheckpoint | None:
    before = meter.done
    try:
        with Reader(path) as reader:
            reader.verify(crc=False, progress=meter.count)
    except DamagedCheckpoint as error:
        return error
    finally:
        meter.count(before + path.stat().st_size - meter.done)  # the headers
    return None


@contextlib.contextmanager
def taken(run: RunDirectory, target: Path, *, slim: bool) -> Iterator[Taken]:
    """Link everything of `run`; `slim`: of the checkpoints the newest and the best, and no archive.

    Raises `CheckpointError` where something here cannot be read now, RunLocked where the catalogue
    is not given free, OSError as it comes.
    """
    # A link needs the run's own file system. A directory that cannot be written is copied.
    place = run.directory if os.access(run.directory, os.W_OK) else target.absolute().parent
    (place / PACKING).mkdir(exist_ok=True)
    try:
        with drafts.folder(place / PACKING, "") as folder:
            found = _link_all(run.catalog, folder, slim=slim)
            _look_inside(found)
            yield found
    finally:
        with contextlib.suppress(OSError):  # another packing is at work
            (place / PACKING).rmdir()


def _link_all(catalog: Catalog, folder: Path, *, slim: bool) -> Taken:
    for attempt in range(_AGAIN):
        place = folder / str(attempt)
        try:
            with contextlib.ExitStack() as stack:
                with contextlib.suppress(ResourceError):  # it cannot be written: reading is enough
                    stack.enter_context(catalogue_lock(catalog))
                return _link(Taken(look(catalog.directory), place), slim=slim)
        except FileNotFoundError:  # it could not be locked, and another process prunes
            if attempt + 1 == _AGAIN:
                raise
    raise AssertionError("unreachable")


def _link(found: Taken, *, slim: bool) -> Taken:
    """Give every file of the run a second name in `place`, links to one file once."""
    contents = found.run.contents
    if contents.unreadable:
        name, reason = contents.unreadable[0]
        raise CheckpointError("{name} cannot be read now: {reason}", name=name, reason=reason)
    found.left_out += contents.damaged
    out = {name for name, _why in contents.damaged}
    both = [entry for entry in (contents.newest, contents.best) if entry is not None]
    wanted = {name for entry in both for name in entry.names}
    by_inode: dict[tuple[int, int], Data] = {}
    for name, status in _files(found, slim=slim):
        if name in out or (slim and name.endswith(".pt") and name not in wanted):
            continue
        known = by_inode.get((status.st_dev, status.st_ino))
        if known is not None:
            known.names.append(name)
            continue
        copy = found.place / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        filesystem.publish(found.run.directory / name, copy)
        size = copy.stat().st_size  # a history grows: what is there now is packed
        data = Data([name], [copy], size, int(status.st_mtime))
        by_inode[status.st_dev, status.st_ino] = data
        found.data.append(data)
    return found


def _files(found: Taken, *, slim: bool) -> Iterator[tuple[str, os.stat_result]]:
    """Yield everything that belongs to the run; note what cannot be packed as left out."""
    for folder, folders, names in os.walk(found.run.directory):
        place = Path(folder).relative_to(found.run.directory)
        if place == Path():
            aside = {QUARANTINE, *([ARCHIVE] if slim else [])} & set(folders)
            found.left_out += [(f"{each}/", _("set aside")) for each in sorted(aside)]
            folders[:] = [each for each in folders if each not in {*aside, PACKING}]
        folders.sort()
        links = [each for each in folders if (Path(folder) / each).is_symlink()]
        for each in sorted([*names, *links]):
            name = (place / each).as_posix()
            if _not_of_the_run(name):
                continue
            status = (Path(folder) / each).lstat()
            if stat.S_ISLNK(status.st_mode):
                found.left_out.append((name, _("a symbolic link")))
            elif not stat.S_ISREG(status.st_mode):
                found.left_out.append((name, _("neither a file nor a directory")))
            elif not is_sane(name):
                found.left_out.append((name, _("its name cannot be packed")))
            else:
                yield name, status


def _not_of_the_run(name: str) -> bool:
    place, _slash, last = name.rpartition("/")
    if place in ("", TEMP) and last.startswith(".holdfast-"):
        return True  # the unfinished file of a writer
    return name in (*LOCKS, METADATA, MANIFEST, SUMS)


def _look_inside(found: Taken) -> None:
    """Read the manifests, make one of all copies of a checkpoint, and sort.

    The names of the telling order come first, small files before checkpoints.
    """
    by_state: dict[tuple[int, str], Data] = {}
    every, found.data = found.data, []
    for data in every:
        manifest = _manifest(data.copies[0]) if data.names[0].endswith(".pt") else None
        if manifest is not None:
            step = manifest["identity"].get("step")
            data.step = step if type(step) is int else None
            if any(name.partition("/")[0] != ARCHIVE for name in data.names):
                with contextlib.suppress(ForeignCheckpoint):
                    data.entry = summary(manifest, data.size)
            # All checksums stand in the manifest: equal ones have equal bytes everywhere.
            text = repr(manifest).encode("utf-8", "surrogatepass")
            state = (data.size, str(xxhash.xxh3_128(text).hexdigest()))
            known = by_state.setdefault(state, data)
            if known is not data:
                known.names += data.names
                known.copies += data.copies
                known.entry = known.entry or data.entry
                continue
        found.data.append(data)
    entries = [name for entry in found.run.entries for name in entry.names]
    order = {name: i for i, name in enumerate(entries)}

    def rank(name: str) -> tuple[int, str]:
        return order.get(name, len(order)), name

    for data in found.data:
        data.names.sort(key=rank)
    found.data.sort(key=lambda data: (data.names[0].endswith(".pt"), rank(data.names[0])))


def _manifest(path: Path) -> dict[str, Any] | None:
    """Return what a checkpoint says of itself; None for what is not ours."""
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return None
    return manifest if isinstance(manifest.get("identity"), dict) else None


def run_of(directory: str | os.PathLike[str]) -> RunDirectory:
    """Look into `directory`. Raises HoldfastError where there is no run to pack."""
    run = look(directory)
    if not run.entries:
        raise HoldfastError(
            "There is no checkpoint in {directory}: nothing to pack.", directory=run.directory
        )
    return run
