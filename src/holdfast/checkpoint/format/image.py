"""The file in memory: laid out before a byte is copied, then filled, then sealed with checksums.

Only bytes live here: no torch, no pickle, no names of directories. What stands where is settled by
names and sizes alone (layout.py), so a buffer can be filled with tensors first and its checksums
computed afterwards, while earlier parts of it are on their way to the disk already.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash
from isal import isal_zlib

from holdfast.checkpoint.format.layout import (
    ARCHIVE,
    LEAVES,
    MANIFEST,
    Record,
    local_header,
    place,
    plan,
    tail,
)
from holdfast.checkpoint.system import PAGE, Buffer
from holdfast.errors import UnsupportedValue

FORMAT_VERSION = 2  # the highest that is read; 1 is written where there is no table of leaves

MAX_MANIFEST = 1 << 30  # bytes: more than this is neither written nor believed
HASH_CHUNK = 1 << 18  # both checksums run over a piece while it is in the processor's cache

_is_data = re.compile(rf"{ARCHIVE}/data/\d+").fullmatch


def checksums(payload: Buffer) -> tuple[int, str]:
    """CRC-32 (for every ZIP tool) and xxh3-128 (against everything a CRC-32 misses)."""
    view = memoryview(payload)
    view = view.cast("B") if view.nbytes else memoryview(b"")  # an empty one cannot be cast
    crc, xxh3 = 0, xxhash.xxh3_128()
    for start in range(0, len(view), HASH_CHUNK):
        chunk = view[start : start + HASH_CHUNK]
        crc = isal_zlib.crc32(chunk, crc)
        xxh3.update(chunk)
    return crc, xxh3.hexdigest()


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A file whose every offset is known and whose checksums are not yet."""

    records: list[Record]  # all but the manifest, in the order of the file
    manifest: dict[str, Any]  # without `records`
    slot: Record  # where the manifest goes, padding included
    size: int

    def text(self, records: Sequence[Record]) -> bytes:
        """The manifest's bytes, with the checksums of `records`, padded to its slot."""
        return _text(self.manifest, records).ljust(self.slot.size, b" ")

    def ending(self, records: Sequence[Record]) -> tuple[bytes, bytes, bytes]:
        """Return what follows the last record: the manifest's header, the manifest, the tail."""
        text = self.text(records)
        crc32, xxh3 = checksums(text)
        slot = replace(self.slot, crc32=crc32, xxh3=xxh3)
        return local_header(slot), text, tail([*records, slot])


def design(
    sizes: Iterable[tuple[str, int]], manifest: dict[str, Any], *, reserve: int = 0
) -> Blueprint:
    """Lay out records of `(name, bytes)` and their `manifest` as one file.

    `manifest` gets `format`, `format_version` and `records` added. What follows the tensor records
    is padded (with spaces behind the manifest's JSON) to at least `reserve` bytes, and always to a
    whole page, so that the size of the file does not change with the digits of a loss.
    Raises `UnsupportedValue` where the plain values are far too many.
    """
    records = plan(sizes)
    version = FORMAT_VERSION if any(record.name == LEAVES for record in records) else 1
    manifest = {"format": "holdfast", "format_version": version, **manifest}
    length = len(_text(manifest, records))
    if length + reserve > MAX_MANIFEST:
        raise UnsupportedValue(
            "The plain values of the state take {size} MB; keep such data in tensors.",
            size=(length + reserve) >> 20,
        )
    data_end = max((r.end for r in records if _is_data(r.name)), default=0)

    def size_with(length: int) -> int:
        slot = place(records[-1].end, MANIFEST, length)
        return slot.end + len(tail([*records, slot]))

    length = max(length, PAGE)  # from a page on, the manifest's own alignment is settled
    wanted = -(-max(size_with(length), data_end + reserve) // PAGE) * PAGE
    length += wanted - size_with(length)
    length -= size_with(length) - wanted  # the end records grow where the file crosses 4 GiB
    slot = place(records[-1].end, MANIFEST, length)
    return Blueprint(records, manifest, slot, size_with(length))


def _text(manifest: dict[str, Any], records: Sequence[Record]) -> bytes:
    whole = {**manifest, "records": [record.to_json() for record in records]}
    body = json.dumps(whole, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return body.encode("utf-8", "surrogatepass")


# ------------------------------------------------------------------- from payloads as they lie


@dataclass(frozen=True, slots=True)
class Image:
    """A complete file as pieces `(offset, bytes)` in ascending order without gaps."""

    size: int
    manifest: dict[str, Any]
    pieces: list[tuple[int, Buffer]]


def build(
    payloads: Sequence[tuple[str, Buffer]], manifest: dict[str, Any], *, reserve: int = 0
) -> Image:
    """Lay out and hash `payloads` as one file (see `design`); nothing is copied."""
    sizes = ((name, memoryview(payload).nbytes) for name, payload in payloads)
    blueprint = design(sizes, manifest, reserve=reserve)
    records, pieces = [], []
    for record, (_name, payload) in zip(blueprint.records, payloads, strict=True):
        crc32, xxh3 = checksums(payload)
        records.append(replace(record, crc32=crc32, xxh3=xxh3))
        pieces += [(record.header, local_header(records[-1])), (record.offset, payload)]
    slot = blueprint.slot
    header, text, end = blueprint.ending(records)
    pieces += [(slot.header, header), (slot.offset, text), (slot.end, end)]
    manifest = {**blueprint.manifest, "records": [record.to_json() for record in records]}
    return Image(blueprint.size, manifest, pieces)


# ------------------------------------------------------------------------------ in one buffer


class Sealer:
    """Puts the checksums into a filled image, record by record, no further than a writer needs.

    The payloads lie in `buffer`, at the offsets of `blueprint`; or are on their way there, and
    `arrived(end)` returns when the bytes before `end` have come. Several threads may `advance`.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        buffer: memoryview,
        arrived: Callable[[int], None] = lambda _end: None,
    ) -> None:
        self._blueprint, self._buffer, self._arrived = blueprint, buffer, arrived
        self._done: list[Record] = []
        self._turn = threading.Lock()
        self.final = 0  # every byte before this one is as it will be on the disk

    def advance(self, end: int) -> None:
        """Return when the first `end` bytes are final."""
        records = self._blueprint.records
        while self.final < end:
            with self._turn:  # for one record: the disk is not to wait for the memory's last one
                if self.final >= end:
                    return
                if len(self._done) < len(records):
                    self._seal(records[len(self._done)])
                else:
                    self._end()

    def _seal(self, record: Record) -> None:
        buffer = self._buffer
        self._arrived(record.end)
        crc32, xxh3 = checksums(buffer[record.offset : record.end])
        sealed = replace(record, crc32=crc32, xxh3=xxh3)
        buffer[record.header : record.offset] = local_header(sealed)
        self._done.append(sealed)
        self.final = record.end

    def _end(self) -> None:
        end = self.final
        for part in self._blueprint.ending(self._done):
            self._buffer[end : end + len(part)] = part
            end += len(part)
        self.final = end
