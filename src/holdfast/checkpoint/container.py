"""Reading the file: a ZIP of stored records that is a standard `.pt`, verified before it is used.

Only bytes live here: no torch, no pickle, no names of directories. `docs/en/format.md` specifies
the format; this module, layout.py and image.py are the one place that implements it.

    checkpoint/data/0 … data/N     one record a storage, aligned
    checkpoint/data.pkl            for everybody else's `torch.load`; we never unpickle it
    checkpoint/byteorder, version  what torch expects beside it
    checkpoint/holdfast.json       the manifest: identity, records with checksums, tensors, values
    central directory, end record  with a comment of fixed length that says where the manifest is

Every byte that is not payload is known from the records alone (layout.py). So verifying is: hash
the manifest, compute what the headers must be and compare, hash each payload. No byte of the file
is left out of that.
"""

from __future__ import annotations

import json
import os
import re
import struct
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash
from isal import isal_zlib

from holdfast.checkpoint.image import FORMAT_VERSION, MAX_MANIFEST, checksums
from holdfast.checkpoint.layout import (
    ARCHIVE,
    COMMENT_RE,
    COMMENT_SIZE,
    MANIFEST,
    PADDING_ID,
    Buffer,
    Record,
    local_header,
    place,
    tail,
)
from holdfast.errors import DamagedCheckpoint, ForeignCheckpoint
from holdfast.i18n import _

_NAME_RE = re.compile(r"[\x21-\x7e]{1,255}")
_seek_lock = threading.Lock()
CHUNK = 1 << 22  # what is hashed and read at a time: fits the caches, hides the system call


# ---------------------------------------------------------------------------------------- reading


class NewerFormat(ForeignCheckpoint):
    """A checkpoint that a later holdfast wrote: intact for all we know, and not ours to judge."""


class Reader:
    """An open checkpoint whose manifest and headers have been checked, its payloads not yet.

    Everything is read with `pread` into memory of our own: a map of a file that shrinks is a
    SIGBUS, and what was hashed must be what is used.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path`; raise `ForeignCheckpoint` or `DamagedCheckpoint`, `OSError` as it comes."""
        self.path = Path(path)
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        self._fd = os.open(self.path, flags)
        try:
            self.size = os.fstat(self._fd).st_size
            self.manifest, self._slot = self._read_manifest()
            self.records = [*self._parse_records(), self._slot]
        except BaseException:  # whatever ends this, an interrupt too, leaks no descriptor
            self.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def check_structure(self) -> None:
        """Compare every byte outside the payloads with what the manifest says it must be."""
        for record in self.records:
            expected = local_header(record)
            if self._pread(record.header, len(expected)) != expected:
                raise self._damaged(_("the header of record {name} is wrong", name=record.name))
        end = self.records[-1].end
        expected = tail(self.records)
        if self.size != end + len(expected):
            raise self._damaged(
                _("it has {size} bytes instead of {expected}", size=self.size,
                  expected=end + len(expected))
            )  # fmt: skip
        if self._pread(end, len(expected)) != expected:
            raise self._damaged(_("its directory is wrong"))

    def check(self, record: Record, chunks: Iterable[Buffer]) -> None:
        """Hash `chunks`, the payload of `record`, and compare."""
        crc, xxh3 = 0, xxhash.xxh3_128()
        for chunk in chunks:
            crc = isal_zlib.crc32(chunk, crc)
            xxh3.update(chunk)
        if crc != record.crc32 or xxh3.hexdigest() != record.xxh3:
            raise self._damaged(_("the content of record {name} has changed", name=record.name))

    def read_into(self, record: Record, buffer: memoryview) -> None:
        """Fill `buffer` (`record.size` bytes, writable) with the payload and verify it."""
        assert buffer.nbytes == record.size, (buffer.nbytes, record.size)

        def fill() -> Iterator[Buffer]:
            for start in range(0, record.size, CHUNK):
                part = buffer[start : start + CHUNK]
                self._preadinto(record.offset + start, part)
                yield part

        self.check(record, fill())

    def read(self, record: Record) -> bytes:
        buffer = bytearray(record.size)
        self.read_into(record, memoryview(buffer))
        return bytes(buffer)

    def verify(self, *, threads: int = 2) -> None:
        """Check every byte of the file; raise `DamagedCheckpoint` with the first fault found."""
        self.check_structure()
        with ThreadPoolExecutor(threads, thread_name_prefix="holdfast-verify") as pool:
            for _done in pool.map(self.verify_record, self.records):
                pass

    def verify_record(self, record: Record) -> None:
        """Check the payload of one record in bounded memory."""
        scratch = memoryview(bytearray(min(record.size, CHUNK)))

        def stream() -> Iterator[Buffer]:
            for start in range(0, record.size, CHUNK):
                part = scratch[: min(CHUNK, record.size - start)]
                self._preadinto(record.offset + start, part)
                yield part

        self.check(record, stream())

    def forget_cached(self) -> None:
        """Ask the kernel to drop the file's pages, so that the next read comes from the device."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def record(self, name: str) -> Record:
        for record in self.records:
            if record.name == name:
                return record
        raise self._damaged(_("record {name} is missing", name=name))

    # ------------------------------------------------------------------------------ the first look

    def _read_manifest(self) -> tuple[dict[str, Any], Record]:
        comment = self._pread(max(0, self.size - COMMENT_SIZE), COMMENT_SIZE, short=True)
        found = COMMENT_RE.fullmatch(comment)
        if found is None:
            raise self._not_ours()
        offset, size, digest = int(found[1]), int(found[2]), found[3].decode()
        if size > min(self.size, MAX_MANIFEST) or offset + size > self.size:
            raise self._damaged(_("its manifest lies outside the file"))
        text = self._pread(offset, size)
        crc32, xxh3 = checksums(text)
        if xxh3 != digest:
            raise self._damaged(_("its manifest has changed"))
        try:
            manifest = json.loads(text.decode("utf-8", "surrogatepass"))
            version = manifest["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._senseless() from error
        if not isinstance(version, int) or version < FORMAT_VERSION:
            raise self._senseless()
        if version > FORMAT_VERSION:
            raise NewerFormat(
                _("{path} has format version {version}; this holdfast reads {ours}: update it.",
                  path=self.path, version=version, ours=FORMAT_VERSION)
            )  # fmt: skip
        return manifest, Record(MANIFEST, -1, offset, size, crc32, xxh3)

    def _parse_records(self) -> list[Record]:
        """The records, each where the layout rule puts it: stated offsets are not believed."""
        stated = self.manifest.get("records")
        if not isinstance(stated, list) or not stated:
            raise self._senseless()
        records: list[Record] = []
        names = {MANIFEST}
        for entry in stated:
            try:
                name, size, crc32 = entry["name"], entry["size"], int(entry["crc32"], 16)
                offset, xxh3 = entry["offset"], entry["xxh3_128"]
                sane = type(size) is int and size >= 0 and _NAME_RE.fullmatch(name) is not None
            except (ValueError, KeyError, TypeError) as error:
                raise self._senseless() from error
            if not sane or name in names or not 0 <= crc32 < 1 << 32:
                raise self._senseless()
            record = place(records[-1].end if records else 0, name, size, crc32, xxh3)
            if record.offset != offset or record.end > self.size:
                raise self._damaged(_("record {name} lies outside the file", name=name))
            records.append(record)
            names.add(name)
        slot = place(records[-1].end, MANIFEST, self._slot.size, self._slot.crc32, self._slot.xxh3)
        if slot.offset != self._slot.offset:
            raise self._damaged(_("its manifest is not where it belongs"))
        self._slot = slot
        return records

    def _not_ours(self) -> DamagedCheckpoint | ForeignCheckpoint:
        if self.size == 0:
            return self._damaged(_("it is empty"))
        head = self._pread(0, min(self.size, 256), short=True)
        if f"{ARCHIVE}/data".encode() in head and struct.pack("<H", PADDING_ID) in head:
            return self._damaged(_("its end is missing: it was cut or overwritten"))
        if not any(head):
            return self._damaged(_("it begins with zeros: its data never reached the disk"))
        return ForeignCheckpoint(_("{path} was not written by holdfast.", path=self.path))

    def _senseless(self) -> ForeignCheckpoint:
        return ForeignCheckpoint(_("{path} has a manifest that makes no sense.", path=self.path))

    def _damaged(self, why: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(_("{path} is damaged: {why}.", path=self.path, why=why))

    # ------------------------------------------------------------------------------ system calls

    def _pread(self, offset: int, size: int, *, short: bool = False) -> bytes:
        buffer = bytearray(size)
        got = self._fill(offset, memoryview(buffer))
        if got != size and not short:
            raise self._damaged(_("it ends at byte {offset}", offset=offset + got))
        return bytes(buffer[:got])

    def _preadinto(self, offset: int, buffer: memoryview) -> None:
        got = self._fill(offset, buffer)
        if got != buffer.nbytes:
            raise self._damaged(_("it ends at byte {offset}", offset=offset + got))

    def _fill(self, offset: int, buffer: memoryview) -> int:
        got = 0
        while got < buffer.nbytes:
            count = _preadv(self._fd, buffer[got:], offset + got)
            if count == 0:
                break
            got += count
        return got


def _preadv(fd: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    with _seek_lock:  # Windows has no positional read
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, buffer.nbytes)
    buffer[: len(data)] = data
    return len(data)


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of `path`, its own checksum verified, the payloads unread."""
    with Reader(path) as reader:
        return reader.manifest
