"""`holdfast unpack`: a run directory from a packed run, or a look into it.

The directory is complete, durable and read back from the device before it has its name. What the
archive says is not believed before it is checked (archive.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from holdfast.checkpoint.format import NewerFormat, Reader
from holdfast.checkpoint.rundir import Catalog
from holdfast.checkpoint.system import drafts, filesystem
from holdfast.errors import HoldfastError
from holdfast.formatting import format_bytes
from holdfast.manage.packing.archive import Chunks, Contents, Item, PackedRun, check
from holdfast.manage.packing.pack import Packed, check_room
from holdfast.manage.progress import Meter, Show

# How much smaller than its run an archive may be: weights shrink by a sixth, texts twentyfold, and
# moments that are still zero vanish.
_MOST_RATIO, _MOST_SMALL = 100, 64 << 20
_DRAFT = ".unpacking-"


def contents_of(path: str | os.PathLike[str]) -> Packed:
    """Return the contents that the first member of a packed run states; no more is read."""
    with PackedRun(path) as packed:
        return Packed(packed.path, packed.path.stat().st_size, packed.contents)


def checked(path: str | os.PathLike[str], show: Show | None = None) -> Packed:
    """`contents_of`, after every checksum was right; `DamagedCheckpoint` where one is not."""
    found = contents_of(path)
    meter = Meter(1, found.contents.size, show)
    meter.file(found.path)
    check(path, meter.count)
    return found


def unpack(
    path: str | os.PathLike[str], directory: str | None = None, show: Show | None = None
) -> tuple[Path, Packed]:
    """Make a run directory of a packed run, and return where: `directory`, or here by the name of
    the run.

    Extracts beside the target, checks every checksum, reads the checkpoints back from the device,
    and only then gives the directory its name. Raises HoldfastError and its children where that
    cannot be done, `OSError` as it comes; nothing is left behind then.
    """
    with PackedRun(path) as packed:
        found = Packed(packed.path, packed.path.stat().st_size, packed.contents)
        target = Path(directory if directory is not None else _own_name(found))
        _check_target(target)
        _check_ratio(found)
        filesystem.make_directory(target.absolute().parent)
        check_room(target, packed.contents.size + filesystem.RESERVE)
        with drafts.folder(target.absolute().parent, _DRAFT) as place:
            meter = _meter(packed.contents, show)
            checkpoints = []
            for item, chunks in packed.members(meter.count):
                path = place / item.name
                path.parent.mkdir(parents=True, exist_ok=True)
                if item.link is not None:
                    filesystem.publish(place / item.link, path)
                    continue
                meter.file(path)
                _write(path, item, chunks)
                if item.step is not None:
                    checkpoints.append(path)
            _finish(place, checkpoints, meter)
            with contextlib.suppress(OSError):
                target.rmdir()  # it is empty; Windows renames onto nothing
            place.rename(target)
        filesystem.sync_directory(target.absolute().parent)
    return target, found


def _meter(contents: Contents, show: Show | None) -> Meter:
    """Checkpoints are counted when they are written and when they are read back."""
    again = sum(i.size for i in contents.items if i.step is not None and i.link is None)
    return Meter(contents.files + contents.checkpoints, contents.size + again, show)


def _own_name(found: Packed) -> str:
    """Return the name that the archive gives its run. Raises HoldfastError for a name that no run
    has: `.ssh` would be read by ssh, `-rf` by the next command that takes it for an option."""
    name = found.contents.top
    if name[0] in ".-":
        raise HoldfastError(
            "{path} calls its run {name}, which is no name for a run directory: name the one "
            "to unpack into.",
            path=found.path,
            name=name,
        )
    return name


def _check_ratio(found: Packed) -> None:
    """Raise HoldfastError where a small archive wants to fill the disk with zeros."""
    if found.contents.size > _MOST_SMALL + _MOST_RATIO * found.size:
        raise HoldfastError(
            "{path} has {size} and would take {unpacked}: no run can be packed so small. "
            "Nothing was unpacked.",
            path=found.path,
            size=format_bytes(found.size),
            unpacked=format_bytes(found.contents.size),
        )


def _check_target(target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise HoldfastError("{path} exists and is no directory: name another.", path=target)
    if target.is_dir() and any(target.iterdir()):
        raise HoldfastError(
            "{path} exists and is not empty: name a directory that is not there yet.", path=target
        )


def _write(path: Path, item: Item, chunks: Chunks) -> None:
    """Write one file durably; its bytes are not believed before the whole archive is read."""
    with path.open("xb", buffering=0) as file:
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                view = view[file.write(view) :]
        filesystem.sync_file(file.fileno())
    os.utime(path, (item.mtime, item.mtime))
    path.chmod(filesystem.READ_ONLY if item.name.endswith(".pt") else 0o644)


def _finish(place: Path, checkpoints: Sequence[Path], meter: Meter) -> None:
    """Read the checkpoints back from the device, and make all names durable."""
    for path in checkpoints:
        before = meter.done
        meter.file(path)
        # What a newer holdfast wrote cannot be read here, and is none the worse for it.
        with contextlib.suppress(NewerFormat), Reader(path) as reader:
            reader.verify(progress=meter.count)
        meter.count(before + path.stat().st_size - meter.done)  # the headers
    Catalog(place).write_cache()
    for folder, _folders, _names in os.walk(place):
        filesystem.sync_directory(Path(folder))
