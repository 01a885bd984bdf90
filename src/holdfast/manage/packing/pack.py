"""`holdfast pack`: a run in one file.

The archive is durable and was read back before it has its name. contents.py says what goes into it,
archive.py reads it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import xxhash

from holdfast.checkpoint.system import drafts, filesystem
from holdfast.errors import ConfigError, DamagedCheckpoint, HoldfastError, ResourceError
from holdfast.formatting import NOTHING, format_bytes, format_time
from holdfast.i18n import _
from holdfast.manage.packing.archive import CHUNK, MANIFEST, SUMS, Contents, Item, check, zstandard
from holdfast.manage.packing.contents import Taken, run_of, taken
from holdfast.manage.progress import Meter, Show
from holdfast.table import Column, Screen, printable, render

COMPRESSED = (".tar.zst", ".tzst")
SUFFIXES = (".tar", *COMPRESSED)

# Measured on checkpoints of the trainer (fp32 weights with AdamW's moments; 2 cores, level -> size,
# MB/s): -1 -> 98.2 %, 880; 1 -> 91.4 %, 540; 3 -> 91.3 %, 170; 9 -> 91.3 %, 170. Noise does not
# compress: what level 1 does not find no other finds.
_LEVEL = 1
_ALL_CORES = -1
_DRAFT = ".holdfast-pack-"


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed run, as it was written or found."""

    path: Path
    size: int  # of the archive, in bytes
    contents: Contents
    left_out: tuple[tuple[str, str], ...] = ()  # what, and why
    damaged: bool = False  # whether any of it was left out because it is
    unsaved: int | None = None  # a step that is in memory only

    def to_json(self) -> dict[str, Any]:
        """The documented form."""
        contents = self.contents
        return {
            "file": str(self.path),
            "file_bytes": self.size,
            "run": contents.top,
            "run_id": contents.run_id,
            "created": contents.created,
            "step": contents.step,
            "epoch": contents.epoch,
            "checkpoints": contents.checkpoints,
            "bytes": contents.size,
            "members": [
                {"name": i.name, "size": i.size, "step": i.step, "link": i.link}
                for i in contents.items
            ],
            "left_out": [{"name": name, "reason": why} for name, why in self.left_out],
            "step_in_memory": self.unsaved,
        }

    def lines(self, screen: Screen) -> list[str]:
        """Write the contents, a row a file."""
        names: dict[str, list[str]] = {}
        for item in self.contents.items:
            names.setdefault(item.link or item.name, []).append(item.name)
        table = [
            [
                item.name,
                NOTHING if item.step is None else str(item.step),
                format_bytes(item.size),
                ", ".join(names[item.name][1:]),
            ]
            for item in self.contents.items
            if item.link is None
        ]
        columns = [
            Column(_("file")),
            Column(_("step"), right=True),
            Column(_("size"), right=True),
            Column(_("also called"), hide=1),
        ]
        title = _(
            "{run}, packed {time} by holdfast {version}",
            run=self.contents.top,
            time=format_time(self.contents.created),
            version=self.contents.holdfast,
        )
        lines = [screen.bold(printable(title)), "", *render(columns, table, screen)]
        return [*lines, "", self.summary()]

    def summary(self) -> str:
        """Write how much is in it and its newest step."""
        contents = self.contents
        text = _(
            "{files} files ({size}), {checkpoints} of them checkpoints",
            files=contents.files,
            checkpoints=contents.checkpoints,
            size=format_bytes(contents.size),
        )
        if contents.step is None:
            return text
        if contents.epoch is None:
            return text + _("; the newest is step {step}", step=contents.step)
        return text + _(
            "; the newest is step {step} (epoch {epoch})", step=contents.step, epoch=contents.epoch
        )


# -------------------------------------------------------------------------------------- packing


def target_of(directory: str | os.PathLike[str], given: str | None) -> Path:
    """Return the path of the archive: `given`, a name in the directory `given`, or the name of the
    run here. Raises ConfigError where that cannot be."""
    run = Path(directory).resolve()
    name = f"{run.name or 'run'}.tar"
    target = Path(given) if given is not None else Path(name)
    if target.is_dir():
        target = target / name
    if not target.name.endswith(SUFFIXES):
        raise ConfigError(
            "{path}: an archive is called something.tar, or something.tar.zst to be compressed.",
            path=target,
        )
    if run in target.resolve().parents:
        raise ConfigError(
            "{path} lies in the run directory, which it would have to hold: name a place outside.",
            path=target,
        )
    return target


def pack(
    directory: str | os.PathLike[str],
    target: Path,
    *,
    slim: bool = False,
    force: bool = False,
    show: Show | None = None,
) -> Packed:
    """Write the run in `directory` to `target`, compressed where its name says so.

    Works while a training runs there. A checkpoint that turns out to be damaged is left out.
    `slim`: of the checkpoints only the newest and the best. `force`: replace `target`, at the
    moment when the new one is complete.

    Raises HoldfastError and its children where it cannot be done, `OSError` as it comes; `target`
    is then as it was.
    """
    if target.exists() and not force:
        raise HoldfastError(
            "{path} exists: name another file, or add --force to replace it.", path=target
        )
    if target.name.endswith(COMPRESSED):
        zstandard()  # missing: said before anything long begins
    run = run_of(directory)
    filesystem.free_bytes(target.absolute().parent)  # it must be there
    with taken(run, target, slim=slim) as found:
        if target.name.endswith(".tar"):  # the size of a compressed one is not known before
            check_room(target, found.size)
        # Checkpoints are read to verify them, everything to write it and to read it back.
        checkpoints = [data.size for data in found.data if data.step is not None]
        files = len(checkpoints) + len(found.data) + 1
        meter = Meter(files, sum(checkpoints) + 2 * found.size, show)
        damaged = found.verify(meter)
        return _write(found, target, meter, damaged=damaged)


def _write(found: Taken, target: Path, meter: Meter, *, damaged: bool) -> Packed:
    contents = found.contents()
    drafts.sweep(target.absolute().parent, _DRAFT)
    with filesystem.replacing(target, _DRAFT) as file, drafts.held(Path(file.name)):
        with _compressing(file, target) as stream:
            writer = Writer(stream, contents)
            for data in found.data:
                path = found.run.directory / data.names[0]
                meter.file(path)
                with data.copies[0].open("rb") as source:
                    try:
                        writer.file(Item(data.names[0], data.size, mtime=data.mtime), source, meter)
                    except tarfile.ReadError as error:
                        raise HoldfastError(
                            "{path} has become shorter while it was packed: try again.", path=path
                        ) from error
                for name in data.names[1:]:
                    writer.link(Item(name, data.size, data.names[0], mtime=data.mtime))
            writer.close()
        file.flush()
        filesystem.sync_file(file.fileno())
        meter.file(target)
        try:
            check(file.name, meter.count)
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(str(error).replace(str(file.name), str(target))) from error
        size = file.seek(0, os.SEEK_END)
    return Packed(target, size, contents, tuple(found.left_out), damaged, found.unsaved)


@contextlib.contextmanager
def _compressing(file: BinaryIO, target: Path) -> Iterator[BinaryIO]:
    if not target.name.endswith(COMPRESSED):
        yield file
        return
    compressor = zstandard().ZstdCompressor(level=_LEVEL, threads=_ALL_CORES, write_checksum=True)
    with compressor.stream_writer(file, closefd=False) as stream:
        yield stream


def check_room(target: Path, needed: int) -> None:
    """Raise `ResourceError` unless there are `needed` bytes for `target`."""
    free = filesystem.free_bytes(target.absolute().parent)
    if free < needed:
        raise ResourceError(
            "The disk of {path} has {free} free, and {needed} are needed.",
            path=target,
            free=format_bytes(free),
            needed=format_bytes(needed),
        )


# -------------------------------------------------------------------------------------- members


def encode(contents: Contents) -> bytes:
    """Return the first member."""
    return json.dumps(contents.to_json(), indent=1).encode() + b"\n"


def encode_sums(sums: Mapping[str, str]) -> bytes:
    """Return the last member: a line a file."""
    return "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()


class Writer:
    """Writes members one behind the other, and their checksums at the end."""

    def __init__(self, file: BinaryIO, contents: Contents) -> None:
        self._tar = tarfile.TarFile(
            fileobj=file, mode="w", format=tarfile.PAX_FORMAT, copybufsize=CHUNK
        )
        self._top, self._now = contents.top, int(time.time())
        self.sums: dict[str, str] = {}
        self._small(MANIFEST, encode(contents))

    def file(self, item: Item, source: BinaryIO, meter: Meter | None = None) -> None:
        """Add a file; tarfile.ReadError where `source` has fewer bytes than `item` says."""
        hashing = _Hashing(source, meter)
        self._tar.addfile(self._info(item.name, item.size, item.mtime), cast(BinaryIO, hashing))
        self._tar.members = []  # type: ignore[attr-defined] # a hundred thousand are memory
        self.sums[item.name] = hashing.xxh3.hexdigest()

    def link(self, item: Item) -> None:
        info = self._info(item.name, 0, item.mtime)
        info.type, info.linkname = tarfile.LNKTYPE, f"{self._top}/{item.link}"
        self._tar.addfile(info)
        self._tar.members = []  # type: ignore[attr-defined] # a hundred thousand are memory

    def close(self) -> None:
        """Add the checksums and the end."""
        self._small(SUMS, encode_sums(self.sums))
        self._tar.close()

    def _small(self, name: str, content: bytes) -> None:
        self.file(Item(name, len(content), mtime=self._now), io.BytesIO(content))

    def _info(self, name: str, size: int, mtime: int) -> tarfile.TarInfo:
        info = tarfile.TarInfo(f"{self._top}/{name}")
        info.size, info.mtime = size, mtime
        info.mode = 0o444 if name.endswith(".pt") else 0o644
        return info


class _Hashing:
    """A file that hashes and counts the bytes that are read of it."""

    def __init__(self, file: BinaryIO, meter: Meter | None) -> None:
        self._file, self._meter, self.xxh3 = file, meter, xxhash.xxh3_128()

    def read(self, size: int) -> bytes:
        found = self._file.read(size)
        self.xxh3.update(found)
        if self._meter is not None:
            self._meter.count(len(found))
        return found
