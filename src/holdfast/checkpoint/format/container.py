"""Reading the file: a ZIP of stored records that is a standard `.pt`, verified before it is used.

Only bytes live here: no torch, no pickle, no names of directories. `docs/en/format.md` specifies
the format; this module, layout.py and image.py are the one place that implements it.

    checkpoint/data/0 … data/N     one record a storage, aligned
    checkpoint/holdfast.leaves     digests of the parts of these records, where several ranks wrote
    checkpoint/data.pkl            for other programs' `torch.load`; we never unpickle it
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash
from isal import isal_zlib

from holdfast.checkpoint.format import leaves, reading
from holdfast.checkpoint.format.image import FORMAT_VERSION, HASH_CHUNK, MAX_MANIFEST, checksums
from holdfast.checkpoint.format.layout import (
    ARCHIVE,
    COMMENT_RE,
    COMMENT_SIZE,
    MANIFEST,
    PADDING_ID,
    Record,
    local_header,
    place,
    tail,
)
from holdfast.errors import CheckpointError, DamagedCheckpoint, ForeignCheckpoint
from holdfast.i18n import _

_NAME_RE = re.compile(r"[\x21-\x7e]{1,255}")
LOADERS = 8  # threads that load: most wait for the disk, some hash, some wait for their turn


# ---------------------------------------------------------------------------------------- reading


class NewerFormat(CheckpointError):
    """A checkpoint that a later holdfast wrote: intact for all we know, and not ours to judge.

    It is neither damaged nor foreign: code that moves, removes or passes over those must not do it
    to this one.
    """


def newer_format(path: Path, version: int) -> NewerFormat:
    """Return the error to raise for a file of a `version` that this holdfast cannot read."""
    return NewerFormat(
        "{path} has format version {version}, and this holdfast reads versions up to {ours}. "
        "Install a newer one (pip install --upgrade holdfast-train); the file stays as it is.",
        path=path,
        version=version,
        ours=FORMAT_VERSION,
    )


class Reader:
    """An open checkpoint whose manifest has been checked; headers and payloads are, when read."""

    def __init__(self, path: str | os.PathLike[str], *, patient: bool = True) -> None:
        """Open `path`; raise `ForeignCheckpoint`, `DamagedCheckpoint` or `NewerFormat`; `OSError`
        as it comes, which says nothing about the file. `patient`: try again what the system
        refuses."""
        self.path = Path(path)
        self._file = reading.File(self.path, patient=patient)
        try:
            self.size = self._file.size
            self.manifest, self._slot = self._read_manifest()
            self.records = [*self._parse_records(), self._slot]
            self._table: dict[str, list[tuple[int, bytes]]] | None = None
        except BaseException:  # whatever ends this, an interrupt too, leaks no descriptor
            self.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def check_structure(self) -> None:
        """Compare every byte outside the payloads with what the manifest says it must be."""
        self._run(self._structure())

    def verify(
        self,
        *,
        threads: int = 2,
        crc: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Check every byte as the device has it; raise `DamagedCheckpoint`, the first fault found.

        Direct I/O reads past the page cache; where there is none the file's pages are dropped from
        it first. Memory is bounded. Without `crc` the CRC-32 of payloads, which is there for other
        people's tools, is only compared between headers and manifest: enough where xxh3-128 is to
        find what the disk has done, not what a writer has computed. `progress` is called with
        the bytes of payload that have been checked since the last time, from any of the threads;
        what it raises ends the check.
        """
        payloads = [self._payload(record, crc=crc, progress=progress) for record in self.records]
        self._run([*self._structure(), *payloads], threads=threads, fresh=True)

    def load(
        self, buffers: Iterable[tuple[Record, memoryview]], *, rest: bool, threads: int = LOADERS
    ) -> None:
        """Fill each record's buffer (`record.size` bytes, writable) with its payload, verified by
        xxh3-128, and check the structure; with `rest`, verify all other payloads too.

        Buffers of `reading.own_pages` are filled without a copy between. Raises as `verify` does;
        what stands in the buffers is not to be used then.
        """
        payloads = {r.name: self._payload(r, buffer) for r, buffer in buffers}
        for record in self.records if rest else ():
            if record.name not in payloads:
                payloads[record.name] = self._payload(record)
        self._run([*self._structure(), *payloads.values()], threads=threads)

    def fill(self, record: Record, buffer: memoryview, *, threads: int = LOADERS) -> None:
        """Fill `buffer` (`record.size` bytes, writable) with one payload, verified by xxh3-128."""
        self._run([self._payload(record, buffer)], threads=threads)

    def read(self, record: Record) -> bytes:
        buffer = bytearray(record.size)
        self._run([self._payload(record, memoryview(buffer))])
        return bytes(buffer)

    def forget_cached(self) -> None:
        """Ask the kernel to drop the file's pages, so that the next read comes from the device."""
        self._file.forget_cached()

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
        text = bytes(self._pread(offset, size))
        crc32, xxh3 = checksums(text)
        if xxh3 != digest:
            raise self._damaged(_("its manifest has changed"))
        try:
            manifest = json.loads(text.decode("utf-8", "surrogatepass"))
            version = manifest["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._senseless() from error
        if type(version) is not int or version < 1:
            raise self._senseless()
        if version > FORMAT_VERSION:
            raise newer_format(self.path, version)
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
                sane = sane and len(bytes.fromhex(xxh3)) == 16
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

    def _leaves(self, record: Record) -> Iterator[tuple[int, bytes]]:
        """Return the parts of a record that have a digest each: `(bytes, xxh3-128)`."""
        if self._table is None:
            self._table = {}
            if self.manifest["format_version"] > 1:
                self._table = self._read_table()
        whole = [(record.size, bytes.fromhex(record.xxh3))] if record.size else []
        return iter(self._table.get(record.name, whole))

    def _read_table(self) -> dict[str, list[tuple[int, bytes]]]:
        record = self.record(leaves.LEAVES)
        table = bytes(self._pread(record.offset, record.size))
        if checksums(table) != (record.crc32, record.xxh3):
            raise self._damaged(_("the content of record {name} has changed", name=record.name))
        try:
            return leaves.parse(table, self.records)
        except ValueError as error:
            raise self._senseless() from error

    def _not_ours(self) -> DamagedCheckpoint | ForeignCheckpoint:
        if self.size == 0:
            return self._damaged(_("it is empty"))
        head = self._pread(0, min(self.size, 256), short=True)
        if f"{ARCHIVE}/data".encode() in head and struct.pack("<H", PADDING_ID) in head:
            return self._damaged(_("its end is missing: it was cut or overwritten"))
        if not any(head):
            return self._damaged(_("it begins with zeros: its data never reached the disk"))
        return ForeignCheckpoint(
            "{path} was not written by holdfast.", path=self.path, why=_("not written by holdfast")
        )

    def _senseless(self) -> ForeignCheckpoint:
        return ForeignCheckpoint("{path} has a manifest that makes no sense.", path=self.path)

    def _damaged(self, why: str) -> DamagedCheckpoint:
        return DamagedCheckpoint("{path} is damaged: {why}.", path=self.path, why=why)

    # ---------------------------------------------------------------------------- what is checked

    def _run(self, parts: list[reading.Part], *, threads: int = 1, fresh: bool = False) -> None:
        parts.sort(key=lambda part: part.start)
        try:
            reading.run(self._file, parts, threads=threads, fresh=fresh)
        except EOFError as error:
            raise self._damaged(_("it ends at byte {offset}", offset=error.args[0])) from None

    def _structure(self) -> list[reading.Part]:
        """Every byte outside the payloads, to be compared with what it must be."""
        end, expected = self.records[-1].end, tail(self.records)
        if self.size != end + len(expected):
            raise self._damaged(
                _(
                    "it has {size} bytes instead of {expected}",
                    size=self.size,
                    expected=end + len(expected),
                )
            )
        parts = []
        for record in self.records:
            wrong = _("the header of record {name} is wrong", name=record.name)
            parts.append(self._fixed(record.header, local_header(record), wrong))
        return [*parts, self._fixed(end, expected, _("its directory is wrong"))]

    def _fixed(self, start: int, expected: bytes, wrong: str) -> reading.Part:
        done = 0

        def compare(found: memoryview) -> None:
            nonlocal done
            if found != expected[done : done + len(found)]:
                raise self._damaged(wrong)
            done += len(found)

        return reading.Part(start, start + len(expected), compare)

    def _payload(
        self,
        record: Record,
        buffer: memoryview | None = None,
        *,
        crc: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> reading.Part:
        """The payload of `record`, to be hashed and compared, in `buffer` if there is one."""
        crc32, xxh3, parts, done = 0, xxhash.xxh3_128(), self._leaves(record), 0
        left, digest = next(parts, (0, b""))  # of the part that is being hashed

        def check(found: memoryview) -> None:
            nonlocal crc32, done, left, digest
            wrong, start = False, 0
            while start < len(found):
                size = min(left, HASH_CHUNK) if crc else left
                chunk = found[start : start + size]  # both, while it is in the caches
                xxh3.update(chunk)
                crc32 = isal_zlib.crc32(chunk, crc32) if crc else 0
                start, left = start + len(chunk), left - len(chunk)
                if not left:
                    wrong = wrong or xxh3.digest() != digest
                    xxh3.reset()
                    left, digest = next(parts, (0, b""))
            done += len(found)
            if wrong or (crc and done == record.size and crc32 != record.crc32):
                raise self._damaged(_("the content of record {name} has changed", name=record.name))
            if progress is not None:
                progress(len(found))

        if not record.size and (record.crc32, record.xxh3) != checksums(b""):
            raise self._damaged(_("the content of record {name} has changed", name=record.name))
        return reading.Part(record.offset, record.end, check, buffer)

    def _pread(self, offset: int, size: int, *, short: bool = False) -> bytearray:
        buffer = bytearray(size)
        got = self._file.read(offset, memoryview(buffer))
        if got != size and not short:
            raise self._damaged(_("it ends at byte {offset}", offset=offset + got))
        return buffer[:got] if got < size else buffer


def read_manifest(path: str | os.PathLike[str], *, patient: bool = True) -> dict[str, Any]:
    """The manifest of `path`, its own checksum verified, the payloads unread. As `Reader`."""
    with Reader(path, patient=patient) as reader:
        return reader.manifest
