"""A packed run, the file: a tar that says first what it holds and last what that must hash to.

    run/holdfast-pack.json     what this is, and every member in its order, with its size
    run/config.json, …         the files of the run; second names of one file are hard links
    run/holdfast-pack.xxh128   xxh3-128 of every file, as `xxhsum -c` reads it

Any tar unpacks it; ours believes nothing: each member must be the one that was announced, nothing
else is read into memory, and no byte counts before its checksum is right. No torch in this room.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import xxhash

from holdfast.errors import CheckpointError, ConfigError, DamagedCheckpoint, ForeignCheckpoint
from holdfast.i18n import _

VERSION = 1
MANIFEST, SUMS = "holdfast-pack.json", "holdfast-pack.xxh128"
CHUNK = 1 << 20  # bytes that are in memory at once
_MOST = 64 << 20  # bytes of manifest or sums: a hundred thousand files and more
_HEADERS = 1 << 20  # bytes of headers between two members that are read at most
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_DEEPEST = 100  # directories in each other; a path of thousands ends in a RecursionError
_NOT_ON_WINDOWS = set(':*?"<>|')

Count = Callable[[int], None]
Chunks = Iterator[bytes]


@dataclass(frozen=True, slots=True)
class Item:
    """One file of the run, or one more name of the file `link`."""

    name: str  # relative to the run directory, with slashes
    size: int
    link: str | None = None
    step: int | None = None  # of a checkpoint
    mtime: int = 0


@dataclass(frozen=True, slots=True)
class Contents:
    """The contents of a packed run, as it states them."""

    top: str  # the directory that all members lie in
    created: str  # ISO 8601 with the zone
    holdfast: str  # the version that packed it
    run_id: str | None
    step: int | None  # of the newest checkpoint in it
    epoch: int | None
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        """Bytes of all files, links counted once."""
        return sum(item.size for item in self.items if item.link is None)

    @property
    def files(self) -> int:
        """The number of files, links counted once."""
        return sum(item.link is None for item in self.items)

    @property
    def checkpoints(self) -> int:
        """The number of checkpoints, links counted once."""
        return sum(item.step is not None and item.link is None for item in self.items)

    def to_json(self) -> dict[str, Any]:
        """The form in the archive."""
        return {"format": "holdfast-pack", "format_version": VERSION, **asdict(self)}


def is_sane(name: str) -> bool:
    """Return True if `name` can only mean a file below the directory that it is unpacked in."""
    if not name.isprintable() or "\\" in name or len(name) > 4096 or name.count("/") > _DEEPEST:
        return False
    if os.name == "nt" and not _NOT_ON_WINDOWS.isdisjoint(name):
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


# ---------------------------------------------------------------------------------- compression


def zstandard() -> Any:
    """The package. Raises ConfigError where it is not installed."""
    try:
        import zstandard as package
    except ModuleNotFoundError:
        raise ConfigError(
            "A .tar.zst needs the package zstandard: pip install 'holdfast-train[desk]'. A plain "
            ".tar needs nothing."
        ) from None
    return package


class _Source(io.RawIOBase):
    """The bytes of the tar, unpacked if they are compressed; at most so many as are allowed."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self.allowed = 0
        self._error: type[Exception] = OSError  # what zstandard raises: never where it is not used
        self._source: BinaryIO = file
        magic = file.read(len(_ZSTD_MAGIC))
        file.seek(0)
        if magic == _ZSTD_MAGIC:
            package = zstandard()
            self._error = package.ZstdError
            # Windows above 128 MiB are refused by default: a hostile file asks for no memory.
            self._source = package.ZstdDecompressor().stream_reader(file, closefd=False)

    def read(self, size: int = -1) -> bytes:
        """Like a file's; tarfile.ReadError where it is broken or has an endless header."""
        if self.allowed <= 0:
            raise tarfile.ReadError("a header without an end")
        try:
            found = self._source.read(size if size >= 0 else CHUNK)
        except self._error as error:
            raise tarfile.ReadError(str(error)) from error
        self.allowed -= len(found)
        return found


# -------------------------------------------------------------------------------------- reading


class PackedRun:
    """An open packed run, of which the first member has been read and makes sense."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path`. Raises `ForeignCheckpoint` where it is no packed run, `DamagedCheckpoint`
        where it was one, ConfigError where a package is missing, `OSError` as it comes."""
        self.path = Path(path)
        self._sums: dict[str, str] = {}
        self._expected = MANIFEST
        self._file = self.path.open("rb")
        try:
            self._source = _Source(self._file)
            self._source.allowed = _HEADERS + CHUNK
            try:
                stream = cast(BinaryIO, self._source)
                self._tar = tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK)  # noqa: SIM115
            except (tarfile.TarError, EOFError, ValueError) as error:
                raise self._foreign() from error
            self.contents = self._first_member()
        except BaseException:  # whatever ends this, an interrupt too, leaks no descriptor
            self.close()
            raise

    def __enter__(self) -> PackedRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def members(self, count: Count = lambda _bytes: None) -> Iterator[tuple[Item, Chunks]]:
        """Yield every file with its bytes, and every link without, in the order of the archive.

        The bytes are not to be believed before the end is reached without an error. Raises
        `DamagedCheckpoint`, which names the first member that is not what it must be.
        """
        for item in self.contents.items:
            member = self._member(item.name, item.size, link=item.link)
            chunks = iter(()) if item.link else self._chunks(member, item.name, count)
            yield item, chunks
            for _chunk in chunks:  # what the caller has not taken is hashed all the same
                pass
        member = self._member(SUMS, None)
        self._compare(b"".join(self._chunks(member, "", lambda _bytes: None)))
        self._end()

    # ------------------------------------------------------------------------------ the details

    def _first_member(self) -> Contents:
        member = self._next()
        if member is None or not self._is(member, None, member.name.partition("/")[0]):
            raise self._foreign()
        content = b"".join(self._chunks(member, MANIFEST, lambda _bytes: None))
        try:
            contents = _contents(json.loads(content))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._damaged(MANIFEST) from None
        if contents is None:
            raise CheckpointError(
                "{path} was packed by a newer holdfast: update it.", path=self.path
            )
        if contents.top != member.name.partition("/")[0]:
            raise self._damaged(MANIFEST)
        return contents

    def _member(self, name: str, size: int | None, *, link: str | None = None) -> tarfile.TarInfo:
        """The next member, which must be this one."""
        self._expected = name
        member = self._next()
        if member is None:
            raise self._damaged(name, _("it ends, or cannot be read, before {name}", name=name))
        if not self._is(member, size, self.contents.top, link):
            raise self._damaged(name)
        return member

    def _next(self) -> tarfile.TarInfo | None:
        self._source.allowed = _HEADERS + CHUNK
        try:
            member = self._tar.next()
            if member is not None and hasattr(tarfile, "data_filter"):
                tarfile.data_filter(member, ".")  # a second opinion on names, links and kinds
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise self._damaged(self._expected) from error
        self._tar.members = []  # type: ignore[attr-defined] # they are not needed again
        return member

    def _is(
        self, member: tarfile.TarInfo, size: int | None, top: str, link: str | None = None
    ) -> bool:
        if member.name != f"{top}/{self._expected}":
            return False
        if link is not None:
            return member.islnk() and member.linkname == f"{top}/{link}"
        plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
        return plain and (0 <= member.size <= _MOST if size is None else member.size == size)

    def _chunks(self, member: tarfile.TarInfo, name: str, count: Count) -> Chunks:
        """The bytes of a member, hashed under `name` when the last one has been taken."""
        xxh3, left = xxhash.xxh3_128(), member.size
        content = self._tar.extractfile(member)
        assert content is not None, "only plain files come here"
        while left:
            self._source.allowed = _HEADERS + CHUNK
            try:
                chunk = content.read(min(left, CHUNK))
            except (tarfile.TarError, EOFError):
                chunk = b""
            if not chunk:
                why = _("it ends, or cannot be read, in {name}", name=self._expected)
                raise self._damaged(self._expected, why)
            xxh3.update(chunk)
            left -= len(chunk)
            count(len(chunk))
            yield chunk
        self._sums[name] = xxh3.hexdigest()

    def _compare(self, content: bytes) -> None:
        """Raise where a checksum is not what the last member says."""
        stated = {}
        for line in content.decode("utf-8", "replace").splitlines():
            digest, _spaces, name = line.partition("  ")
            stated[name] = digest
        self._sums.pop("", None)
        for name, digest in self._sums.items():
            if stated.get(name) != digest:
                raise self._damaged(name, _("the content of {name} has changed", name=name))
        if stated.keys() != self._sums.keys():
            raise self._damaged(SUMS)

    def _end(self) -> None:
        """Refuse what follows the last file, but for zeros: it was not announced."""
        self._expected = SUMS
        if self._next() is not None:
            raise self._damaged(SUMS, _("more follows after {name}", name=SUMS))

    def _damaged(self, name: str, why: str = "") -> DamagedCheckpoint:
        why = why or _("{name} is not what it should be", name=name)
        return DamagedCheckpoint("{path} is damaged: {why}.", path=self.path, why=why)

    def _foreign(self) -> ForeignCheckpoint:
        return ForeignCheckpoint("{path} is no run that holdfast has packed.", path=self.path)


def check(path: str | os.PathLike[str], count: Count = lambda _bytes: None) -> Contents:
    """Read all of a packed run and compare every checksum. Raises as `PackedRun` does."""
    with PackedRun(path) as packed:
        with contextlib.suppress(AttributeError, OSError):  # read the device, not the page cache
            os.posix_fadvise(packed._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for _item, _chunks in packed.members(count):
            pass
        return packed.contents


def _contents(found: Mapping[str, Any]) -> Contents | None:
    """The first member, understood; None where a newer version wrote it. Raises ValueError,
    KeyError or TypeError where it makes no sense."""
    if found["format"] != "holdfast-pack" or type(found["format_version"]) is not int:
        raise ValueError("format")
    if found["format_version"] > VERSION:
        return None
    items = tuple(
        Item(str(i["name"]), _whole(i["size"]), i["link"], i["step"], _whole(i["mtime"]))
        for i in found["items"]
    )
    files: set[str] = set()
    names = {MANIFEST, SUMS}
    folders: set[str] = set()
    for item in items:
        parts = item.name.split("/")
        above = {"/".join(parts[:i]) for i in range(1, len(parts))}
        folders |= above
        taken = item.name in names or item.name in folders or not names.isdisjoint(above)
        sane = is_sane(item.name) and not taken
        if not sane or not (item.link is None or item.link in files):
            raise ValueError(item.name)
        names.add(item.name)
        if item.link is None:
            files.add(item.name)
    top, created, version = (str(found[key]) for key in ("top", "created", "holdfast"))
    if not is_sane(top) or "/" in top:
        raise ValueError(top)
    steps = [found["step"], found["epoch"], *(item.step for item in items)]
    if not all(step is None or type(step) is int for step in steps):
        raise TypeError("step")
    run_id = found["run_id"]
    return Contents(
        top,
        created,
        version,
        None if run_id is None else str(run_id),
        found["step"],
        found["epoch"],
        items,
    )


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise TypeError(value)
    return value
