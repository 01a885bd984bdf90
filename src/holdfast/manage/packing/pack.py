"""`holdfast pack`: a run in one file.

The archive is durable and was read back before it has its name. held.py says what goes into it,
archive.py reads it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import xxhash

from holdfast.checkpoint.system import drafts, filesystem
from holdfast.errors import ConfigError, DamagedCheckpoint, HoldfastError, ResourceError
from holdfast.formatting import NOTHING, format_bytes, format_time
from holdfast.i18n import _
from holdfast.manage.packing.archive import CHUNK, MANIFEST, SUMS, Contents, Item, check, zstandard
from holdfast.manage.packing.held import Data, Held, Payloads, held
from holdfast.manage.verify import Progress
from holdfast.table import Column, Screen, printable, render

COMPRESSED = (".tar.zst", ".tzst")
SUFFIXES = (".tar", *COMPRESSED)

# Measured on checkpoints of the trainer (fp32 weights with AdamW's moments; 2 cores, level -> size,
# MB/s): -1 -> 98.2 %, 880; 1 -> 91.4 %, 540; 3 -> 91.3 %, 170; 9 -> 91.3 %, 170. Noise does not
# compress: what level 1 does not find no other finds.
_LEVEL = 1
_ALL_CORES = -1
_DRAFT = ".holdfast-pack-"

Show = Callable[[Progress], None]


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
        """What is in it, a row a file."""
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
            Column(_("file")), Column(_("step"), right=True), Column(_("size"), right=True),
            Column(_("also called"), hide=1),
        ]  # fmt: skip
        title = _("{run}, packed {time} by holdfast {version}", run=self.contents.top,
                  time=format_time(self.contents.created),
                  version=self.contents.holdfast)  # fmt: skip
        lines = [screen.bold(printable(title)), "", *render(columns, table, screen)]
        return [*lines, "", self.summary()]

    def summary(self) -> str:
        """How much is in it, and which step is the newest."""
        contents = self.contents
        text = _("{files} files ({size}), {checkpoints} of them checkpoints", files=contents.files,
                 checkpoints=contents.checkpoints, size=format_bytes(contents.size))  # fmt: skip
        if contents.step is None:
            return text
        if contents.epoch is None:
            return text + _("; the newest is step {step}", step=contents.step)
        return text + _("; the newest is step {step} (epoch {epoch})", step=contents.step,
                        epoch=contents.epoch)  # fmt: skip


# -------------------------------------------------------------------------------------- packing


def target_of(directory: str | os.PathLike[str], given: str | None) -> Path:
    """Where the archive goes: what was said, in a directory that was said, or here by the name of
    the run. Raises ConfigError where that cannot be."""
    run = Path(directory).resolve()
    name = f"{run.name or 'run'}.tar"
    target = Path(given) if given is not None else Path(name)
    if target.is_dir():
        target = target / name
    if not target.name.endswith(SUFFIXES):
        raise ConfigError(
            _("{path}: an archive is called something.tar, or something.tar.zst to be compressed.",
              path=target)
        )  # fmt: skip
    if run in target.resolve().parents:
        raise ConfigError(
            _("{path} lies in the run directory, which it would have to hold: name a place "
              "outside.", path=target)
        )  # fmt: skip
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
        raise HoldfastError(_("{path} exists: name another file, or add --force to replace it.",
                              path=target))  # fmt: skip
    if target.name.endswith(COMPRESSED):
        zstandard()  # missing: said before anything long begins
    with held(directory, slim=slim) as run:
        damaged = bool(run.run.contents.damaged)
        while True:
            if target.name.endswith(".tar"):  # of a compressed one nobody knows
                check_room(target, run.size)
            broken = _Broken()
            try:
                # Each byte is counted when it is read and when it is read back.
                meter = Meter(len(run.data) + 1, 2 * run.size, show)
                return _write(run, target, meter, broken, damaged=damaged)
            except DamagedCheckpoint as error:
                if broken.data is None:  # what was written, not what was read
                    raise
                damaged |= not run.drop(broken.data, error.why)
                if run.newest is None:
                    raise


@dataclass(slots=True)
class _Broken:
    """Which file is damaged, if one is."""

    data: Data | None = None


def _write(run: Held, target: Path, meter: Meter, broken: _Broken, *, damaged: bool) -> Packed:
    contents = run.contents()
    drafts.sweep(target.absolute().parent, _DRAFT)
    with filesystem.replacing(target, _DRAFT) as file, drafts.held(Path(file.name)):
        with _compressing(file, target) as stream:
            writer = Writer(stream, contents)
            items = iter(contents.items)
            for data in run.data:
                item = next(items)
                path = run.run.directory / item.name
                meter.file(path)
                broken.data = data
                source = _source(data, path, meter)
                writer.file(item, source)
                broken.data = None
                for _name in data.names[1:]:
                    writer.link(next(items))
            writer.close()
        file.flush()
        filesystem.sync_file(file.fileno())
        meter.file(target)
        temporary = str(file.name)
        try:
            check(temporary, meter.count)
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(str(error).replace(temporary, str(target))) from error
        size = file.seek(0, os.SEEK_END)
    return Packed(target, size, contents, tuple(run.left_out), damaged, run.unsaved)


def _source(data: Data, path: Path, meter: Meter) -> Hashing:
    def read(size: int, offset: int) -> bytes:
        found = _pread(data.fd, min(size, data.size - offset), offset)
        if not found:
            raise HoldfastError(_("{path} has become shorter while it was packed: try again.",
                                  path=path))  # fmt: skip
        meter.count(len(found))
        return found

    return Hashing(read, Payloads(data, path).take)


def _pread(fd: int, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(fd, size, offset)
    os.lseek(fd, offset, os.SEEK_SET)  # Windows; nobody else reads by this descriptor
    return os.read(fd, size)


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
        raise ResourceError(_("The disk of {path} has {free} free, and {needed} are needed.",
                              path=target, free=format_bytes(free),
                              needed=format_bytes(needed)))  # fmt: skip


# --------------------------------------------------------------------------------------- how far


class Meter:
    """Tells how far it has come, in `files` files and `total` bytes."""

    def __init__(self, files: int, total: int, show: Show | None) -> None:
        self._of, self._total, self._show = files, total, show
        self._began, self.done, self._number = time.monotonic(), 0, 0
        self._path = Path()

    def file(self, path: Path) -> None:
        """The next file begins."""
        self._path, self._number = path, self._number + 1
        self.count(0)

    def count(self, more: int) -> None:
        """So many bytes more."""
        self.done += more
        if self._show is not None:
            seconds = time.monotonic() - self._began
            self._show(
                Progress(self._number, self._of, self._path, self.done, self._total, seconds)
            )


# -------------------------------------------------------------------------------------- members


def encode(contents: Contents) -> bytes:
    """The first member."""
    return json.dumps(contents.to_json(), indent=1).encode() + b"\n"


def encode_sums(sums: Mapping[str, str]) -> bytes:
    """The last member: a line a file."""
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

    def file(self, item: Item, source: Hashing) -> None:
        """Add a file; OSError where `source` has fewer bytes than `item` says."""
        info = self._info(item.name, item.size, item.mtime)
        self._tar.addfile(info, cast(BinaryIO, source))
        self._tar.members = []  # type: ignore[attr-defined] # a hundred thousand are memory
        self.sums[item.name] = source.hexdigest()

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
        self.sums[name] = xxhash.xxh3_128(content).hexdigest()
        self._tar.addfile(self._info(name, len(content), self._now), io.BytesIO(content))

    def _info(self, name: str, size: int, mtime: int) -> tarfile.TarInfo:
        info = tarfile.TarInfo(f"{self._top}/{name}")
        info.size, info.mtime = size, mtime
        info.mode = 0o444 if name.endswith(".pt") else 0o644
        return info


class Hashing:
    """A source of bytes for `Writer.file` that hashes what passes, and shows it to `watch`."""

    def __init__(self, read: Callable[[int, int], bytes], watch: Callable[[bytes], None]) -> None:
        """`read(size, offset)` gives at least one byte."""
        self._read, self._watch = read, watch
        self._xxh3, self._at = xxhash.xxh3_128(), 0

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`."""
        found = self._read(size, self._at)
        self._at += len(found)
        self._xxh3.update(found)
        self._watch(found)
        return found

    def hexdigest(self) -> str:
        return str(self._xxh3.hexdigest())
