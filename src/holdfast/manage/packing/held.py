"""What `holdfast pack` takes of a run directory: a consistent set, held open.

Everything is opened while the catalogue is locked, and read afterwards: what is open stays there
whatever a running training prunes meanwhile, and nothing is left behind by a packing that is
killed. No torch in this room.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from holdfast.checkpoint.format import Reader, Record, read_manifest
from holdfast.checkpoint.rundir import (
    ARCHIVE,
    METADATA,
    QUARANTINE,
    TEMP,
    Catalog,
    Entry,
    now,
    shared_memory,
    summary,
)
from holdfast.checkpoint.system import LOCKS, filesystem
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
from holdfast.manage.rundir import RunDirectory, look
from holdfast.version import __version__

_AGAIN = 5  # looks at a directory that cannot be locked and changes under us
_SPARE = 64  # descriptors beside those of the run


@dataclass(slots=True)
class Data:
    """The bytes of one file under all of its names; `copies` are descriptors of the same bytes, of
    which one is packed. They are more than one where a directory has lost its links."""

    names: list[str]
    size: int
    mtime: int
    copies: list[int]
    entry: Entry | None = None  # of a checkpoint that recovery looks at
    step: int | None = None

    @property
    def fd(self) -> int:
        return self.copies[0]


@dataclass(slots=True)
class Held:
    """What is to be packed, open until `close`."""

    run: RunDirectory
    data: list[Data] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)  # what, and why
    unsaved: int | None = None  # a step that a killed training has left in memory, not on the disk

    @property
    def newest(self) -> Entry | None:
        """The newest checkpoint that is packed."""
        entries = [data.entry for data in self.data if data.entry is not None]
        return max(entries, key=lambda entry: entry.order, default=None)

    @property
    def size(self) -> int:
        return sum(data.size for data in self.data)

    def contents(self) -> Contents:
        """What the archive will say of itself."""
        newest = self.newest
        items = []
        for data in self.data:
            first = data.names[0]
            items.append(Item(first, data.size, None, data.step, data.mtime))
            items += [Item(n, data.size, first, data.step, data.mtime) for n in data.names[1:]]
        top = self.run.directory.resolve().name
        return Contents(
            top if top and is_sane(top) else "run", now(), __version__,
            None if newest is None else newest.run_id,
            None if newest is None else newest.step,
            None if newest is None else newest.epoch, tuple(items),
        )  # fmt: skip

    def drop(self, data: Data, why: str) -> bool:
        """Do without a copy that is damaged; without the file, where it was the only one. Returns
        whether there is another one."""
        os.close(data.copies.pop(0))
        if not data.copies:
            self.data.remove(data)
            self.left_out.append((data.names[0], why))
        return bool(data.copies)

    def close(self) -> None:
        for data in self.data:
            while data.copies:
                os.close(data.copies.pop())


@contextlib.contextmanager
def held(directory: str | os.PathLike[str], *, slim: bool) -> Iterator[Held]:
    """Open what there is to pack in `directory`; `slim`: of the checkpoints the newest and the best
    only, and no archive.

    Raises HoldfastError where there is no run, `CheckpointError` where something here cannot be
    read now, RunLocked where the catalogue is not given free, OSError as it comes.
    """
    run = look(directory)
    if not run.entries:
        raise HoldfastError(_("There is no checkpoint in {directory}: nothing to pack.",
                              directory=run.directory))  # fmt: skip
    with _many_descriptors(run.directory):
        found = _hold(run.catalog, slim=slim)
        try:
            found.unsaved = _only_in_memory(run.catalog, found.newest)
            yield found
        finally:
            found.close()


def _hold(catalog: Catalog, *, slim: bool) -> Held:
    for attempt in range(_AGAIN):
        try:
            with _locked(catalog):
                return _open(look(catalog.directory), slim=slim)
        except FileNotFoundError:  # it could not be locked, and somebody prunes
            if attempt + 1 == _AGAIN:
                raise
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _locked(catalog: Catalog) -> Iterator[None]:
    """The catalogue's lock, or nothing where the directory cannot be written: reading is enough."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ResourceError):
            stack.enter_context(catalogue_lock(catalog))
        yield


def _open(run: RunDirectory, *, slim: bool) -> Held:
    """Open everything; the names of the telling order first, links and copies of one file once."""
    if run.contents.unreadable:
        name, reason = run.contents.unreadable[0]
        raise CheckpointError(_("{name} cannot be read now: {reason}", name=name, reason=reason))
    found = Held(run)
    found.left_out += run.contents.damaged
    entries = {name: entry for entry in run.entries for name in entry.names}
    wanted = _slim(run) if slim else None
    out = {name for name, _why in run.contents.damaged}
    by_key: dict[object, Data] = {}
    try:
        for name, status in _files(run, found, slim=slim):
            entry = entries.get(name)
            skipped = wanted is not None and name.endswith(".pt") and entry not in wanted
            if not skipped and name not in out:
                _take(found, by_key, name, status, entry)
    except BaseException:  # an interrupt, too, leaks no descriptor
        found.close()
        raise
    order = {name: i for i, name in enumerate(entries)}
    for data in found.data:
        data.names.sort(key=lambda name: (order.get(name, len(order)), name))
    found.data.sort(key=lambda data: (order.get(data.names[0], len(order)),
                                      data.names[0]))  # fmt: skip
    found.data.sort(key=lambda data: data.names[0].endswith(".pt"))  # small files first
    return found


def _slim(run: RunDirectory) -> list[Entry]:
    both = (run.contents.newest, run.contents.best)
    return [entry for entry in both if entry is not None]


def _files(run: RunDirectory, found: Held, *, slim: bool) -> Iterator[tuple[str, os.stat_result]]:
    """Everything that belongs to the run, by name; what cannot be packed is noted as left out."""
    for folder, folders, names in os.walk(run.directory):
        place = Path(folder).relative_to(run.directory)
        if place == Path():
            aside = {QUARANTINE, *([ARCHIVE] if slim else [])} & set(folders)
            found.left_out += [(f"{each}/", _("set aside")) for each in sorted(aside)]
            folders[:] = [each for each in folders if each not in aside]
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
        return True  # a writer's, which nobody was told of
    return name in (*LOCKS, METADATA, MANIFEST, SUMS)


def _take(
    found: Held,
    by_key: dict[object, Data],
    name: str,
    status: os.stat_result,
    entry: Entry | None,
) -> None:
    """Open `name`, or note it as one more name of what is open already."""
    known = by_key.get((status.st_dev, status.st_ino))
    if known is not None:
        known.names.append(name)
        return
    path = found.run.directory / name
    fd = filesystem.open_regular(path)
    try:
        status = os.fstat(fd)
        manifest = _manifest(by_descriptor(fd, path)) if name.endswith(".pt") else None
    except BaseException:  # an interrupt, too, leaks no descriptor
        os.close(fd)
        raise
    state = None if manifest is None else (status.st_size, _digest(manifest))
    known = by_key.get(state) if state is not None else None
    if known is not None:
        known.copies.append(fd)
        known.names.append(name)
    else:
        if entry is None and manifest is not None and name.partition("/")[0] != ARCHIVE:
            entry = _entry(manifest, status.st_size)  # written since the scan: that takes no lock
        step = (manifest or {}).get("identity", {}).get("step")
        known = Data([name], status.st_size, int(status.st_mtime), [fd], entry,
                     step if type(step) is int else None)  # fmt: skip
        found.data.append(known)
    known.entry = known.entry or entry
    by_key[status.st_dev, status.st_ino] = known
    if state is not None:
        by_key[state] = known


def _manifest(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself; None for what is not ours."""
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return None
    return manifest if isinstance(manifest.get("identity"), dict) else None


def _entry(manifest: Mapping[str, Any], size: int) -> Entry | None:
    try:
        return summary(manifest, size)
    except ForeignCheckpoint:
        return None


def _digest(manifest: Mapping[str, Any]) -> str:
    """Equal exactly where every byte of two checkpoints must be: all checksums stand in it."""
    return str(xxhash.xxh3_128(repr(manifest).encode("utf-8", "surrogatepass")).hexdigest())


def _only_in_memory(catalog: Catalog, newest: Entry | None) -> int | None:
    """The step of a newer snapshot that a killed training has left in shared memory."""
    run = catalog.history.known.run
    left = [] if run is None else shared_memory.left_by(catalog.directory, *run)
    if left and newest is not None and left[0].order > newest.order:
        return left[0].step
    return None


@contextlib.contextmanager
def _many_descriptors(directory: Path) -> Iterator[None]:
    """Let this process open as many files as lie in `directory`, as far as the system allows it."""
    if sys.platform == "win32":
        yield
        return
    import resource

    needed = _SPARE + sum(len(names) for _folder, _folders, names in os.walk(directory))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    more = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft == resource.RLIM_INFINITY or more <= soft:
        yield
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -------------------------------------------------------------------------------- what is read


def by_descriptor(fd: int, path: Path) -> Path:
    """A name of what is open as `fd`, where the system gives one: `path` may be gone by now."""
    name = Path(f"/proc/self/fd/{fd}")
    return name if name.exists() else path


class Payloads:
    """Compares the payloads of a checkpoint with its manifest while its bytes pass by."""

    def __init__(self, data: Data, path: Path) -> None:
        """Checks everything but the payloads. Raises `DamagedCheckpoint`."""
        self._path, self._at = path, 0
        self._records: list[Record] = []
        self._xxh3 = xxhash.xxh3_128()
        if data.step is None:  # not a checkpoint of ours
            return
        name = by_descriptor(data.fd, path)
        try:
            with Reader(name) as reader:
                reader.check_structure()
                self._records = sorted(reader.records, key=lambda record: record.offset)
        except DamagedCheckpoint as error:
            told = str(error).replace(str(name), str(path))
            raise DamagedCheckpoint(told, error.why) from error

    def take(self, chunk: bytes) -> None:
        """The next bytes of the file. Raises `DamagedCheckpoint`."""
        end = self._at + len(chunk)
        view = memoryview(chunk)
        while self._records and self._records[0].offset <= end:
            record = self._records[0]
            self._xxh3.update(view[max(0, record.offset - self._at) : record.end - self._at])
            if record.end > end:
                break
            if self._xxh3.hexdigest() != record.xxh3:
                why = _("the content of record {name} has changed", name=record.name)
                told = _("{path} is damaged: {why}.", path=self._path, why=why)
                raise DamagedCheckpoint(told, why)
            self._records.pop(0)
            self._xxh3 = xxhash.xxh3_128()
        self._at = end
