"""Compute the place and the value of every byte of the file that is not payload.

A ZIP of stored records: local headers padded so that payloads are aligned, the central directory,
the end records with a comment of fixed length. All of it is a pure function of (name, size, CRC-32)
of the records in their order, so it can be computed before writing and compared after reading.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.checkpoint.system import PAGE

ARCHIVE = "checkpoint"
MANIFEST = f"{ARCHIVE}/holdfast.json"
LEAVES = f"{ARCHIVE}/holdfast.leaves"

SMALL = 64  # smaller ones on a cache line: a state with thousands of scalars stays small

PADDING_ID = 0x4648  # "HF": the extra field whose zeros move a payload to its alignment
COMMENT = "holdfast 1 manifest {offset:020d} {size:020d} xxh3_128 {digest}"
COMMENT_RE = re.compile(rb"holdfast 1 manifest (\d{20}) (\d{20}) xxh3_128 ([0-9a-f]{32})")
COMMENT_SIZE = len(COMMENT.format(offset=0, size=0, digest="0" * 32))

_LOCAL = struct.Struct("<IHHHHHIIIHH")  # local file header
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")  # central directory entry
_END = struct.Struct("<IHHHHIIH")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<IIQI")
_U32 = 0xFFFFFFFF
_DOS_DATE = (1980 - 1980) << 9 | 1 << 5 | 1  # a fixed date: the same state gives the same bytes


@dataclass(frozen=True, slots=True)
class Record:
    """One stored record: `offset` is where its payload starts, `header` its local header."""

    name: str
    header: int
    offset: int
    size: int
    crc32: int = 0
    xxh3: str = "0" * 32

    @property
    def end(self) -> int:
        return self.offset + self.size

    def to_json(self) -> dict[str, Any]:
        # Fixed-width checksums: the size of a manifest is known before the first byte is hashed.
        return {
            "name": self.name,
            "offset": self.offset,
            "size": self.size,
            "crc32": f"{self.crc32:08x}",
            "xxh3_128": self.xxh3,
        }


def place(cursor: int, name: str, size: int, crc32: int = 0, xxh3: str = "0" * 32) -> Record:
    """Put a record behind `cursor`: its header there, its payload on the next alignment."""
    align = PAGE if size >= PAGE else SMALL
    earliest = cursor + _LOCAL.size + len(name.encode()) + _zip64_local(size) + 4
    offset = -(-earliest // align) * align
    return Record(name, cursor, offset, size, crc32, xxh3)


def plan(sizes: Iterable[tuple[str, int]]) -> list[Record]:
    """Offsets of `(name, size in bytes)` in their order; a pure function of names and sizes."""
    records: list[Record] = []
    cursor = 0
    for name, size in sizes:
        records.append(place(cursor, name, size))
        cursor = records[-1].end
    return records


def _zip64_local(size: int) -> int:
    return 20 if size >= _U32 else 0


def local_header(record: Record) -> bytes:
    """The bytes from `record.header` to `record.offset`."""
    name = record.name.encode()
    extra = b""
    size = record.size
    if _zip64_local(size):
        extra = struct.pack("<HHQQ", 1, 16, size, size)
        size = _U32
    padding = record.offset - record.header - _LOCAL.size - len(name) - len(extra) - 4
    extra += struct.pack("<HH", PADDING_ID, padding) + bytes(padding)
    version = 45 if record.size >= _U32 else 20
    return (
        _LOCAL.pack(
            0x04034B50, version, 0, 0, 0, _DOS_DATE, record.crc32, size, size, len(name), len(extra)
        )
        + name
        + extra
    )


def tail(records: Sequence[Record]) -> bytes:
    """Central directory and end records; the last record is the manifest."""
    start = records[-1].end
    entries = b"".join(_central_entry(record) for record in records)
    manifest = records[-1]
    comment = COMMENT.format(
        offset=manifest.offset, size=manifest.size, digest=manifest.xxh3
    ).encode()
    end64 = b""
    count, size, offset = len(records), len(entries), start
    if count >= 0xFFFF or offset >= _U32 or size >= _U32:
        at = start + size
        end64 = _END64.pack(0x06064B50, 44, 45, 45, 0, 0, count, count, size, offset)
        end64 += _LOCATOR64.pack(0x07064B50, 0, at, 1)
        count, size, offset = min(count, 0xFFFF), min(size, _U32), min(offset, _U32)
    end = _END.pack(0x06054B50, 0, 0, count, count, size, offset, len(comment))
    return entries + end64 + end + comment


def _central_entry(record: Record) -> bytes:
    name = record.name.encode()
    wide = b""
    size, header = record.size, record.header
    if size >= _U32:
        wide += struct.pack("<QQ", size, size)
        size = _U32
    if header >= _U32:
        wide += struct.pack("<Q", header)
        header = _U32
    extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
    version = 45 if wide else 20
    fields = (0x02014B50, version, version, 0, 0, 0, _DOS_DATE, record.crc32, size, size)
    lengths = (len(name), len(extra), 0, 0, 0, 0)
    return _CENTRAL.pack(*fields, *lengths, header) + name + extra
