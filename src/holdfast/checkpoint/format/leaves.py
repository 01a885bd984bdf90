"""Digests of the parts of a record (format version 2), so that several writers can share it.

A CRC-32 of a whole is combined from those of its parts; an xxh3-128 is not. Each writer hashes what
it writes in leaves of at most `LEAF` bytes, and the table of all leaves is a record of the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import xxhash

from holdfast.checkpoint.format.layout import ARCHIVE, LEAVES, Record

__all__ = ["ENTRY", "LEAF", "LEAVES", "cut", "digest", "entries", "is_divided", "parse"]

LEAF = 1 << 18  # bytes: 4 KiB ones hash at half the speed, larger ones not faster
ENTRY = struct.Struct("<I16s")  # length in bytes, xxh3-128 with its high byte first


def is_divided(name: str) -> bool:
    """Return True if a file with a table of leaves has leaves of the record called `name`."""
    return name.startswith(f"{ARCHIVE}/data/")


def cut(size: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of the leaves of `size` bytes that one writer writes in one run."""
    for start in range(0, size, LEAF):
        yield start, min(start + LEAF, size)


def entries(view: memoryview) -> bytes:
    """Return the part of the table for bytes that one writer writes in one run."""
    found = (view[start:stop] for start, stop in cut(len(view)))
    return b"".join(ENTRY.pack(len(leaf), xxhash.xxh3_128_digest(leaf)) for leaf in found)


def digest(table: bytes) -> str:
    """Return the digest of a record whose part of the table is `table`."""
    return xxhash.xxh3_128_hexdigest(table)


def parse(table: bytes, records: Sequence[Record]) -> dict[str, list[tuple[int, bytes]]]:
    """Return the leaves, `(bytes, digest)`, of each divided one of `records` by its name.

    Raises ValueError where the table is none of these records.
    """
    if len(table) % ENTRY.size:
        raise ValueError(len(table))
    result: dict[str, list[tuple[int, bytes]]] = {}
    rest, at = ENTRY.iter_unpack(table), 0
    for record in records:
        if not is_divided(record.name):
            continue
        left, found = record.size, result.setdefault(record.name, [])
        while left > 0:
            size, hashed = next(rest, (0, b""))
            if not 0 < size <= min(left, LEAF):
                raise ValueError(record.name)
            found.append((size, hashed))
            left -= size
        start, at = at, at + len(found) * ENTRY.size
        if digest(table[start:at]) != record.xxh3:
            raise ValueError(record.name)
    if at != len(table):
        raise ValueError(at)
    return result
