"""A reader of checkpoints made from docs/en/format.md alone: no code of ours is used."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path

import xxhash

COMMENT = re.compile(rb"holdfast 1 manifest (\d{20}) (\d{20}) xxh3_128 ([0-9a-f]{32})")


def xxh3(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def records_of(path: Path) -> dict[str, bytes]:
    """Return each record but the manifest by its name; every checksum is compared."""
    data = path.read_bytes()
    comment = COMMENT.fullmatch(data[-103:])
    assert comment is not None
    offset, size = int(comment[1]), int(comment[2])
    text = data[offset : offset + size]
    assert xxh3(text) == comment[3].decode()
    manifest = json.loads(text)
    assert manifest["format_version"] in (1, 2)
    found, cursor = {}, 0
    for record in manifest["records"]:
        name, size = record["name"], record["size"]
        zip64 = 20 if size >= 0xFFFFFFFF else 0
        align = 4096 if size >= 4096 else 64
        start = -(-(cursor + 30 + len(name) + zip64 + 4) // align) * align
        assert (record["offset"], data[cursor : cursor + 4]) == (start, b"PK\x03\x04")
        found[name] = data[start : start + size]
        crc = zlib.crc32(found[name])
        assert f"{crc:08x}" == record["crc32"]
        assert struct.unpack_from("<I", data, cursor + 14) == (crc,)
        cursor = start + size
    table = found.get("checkpoint/holdfast.leaves", b"")
    assert (manifest["format_version"] == 2) == ("checkpoint/holdfast.leaves" in found)
    at = 0
    for record in manifest["records"]:
        content, before, done = found[record["name"]], at, 0
        if manifest["format_version"] == 1 or not record["name"].startswith("checkpoint/data/"):
            assert xxh3(content) == record["xxh3_128"]
            continue
        while done < len(content):
            length, digest = struct.unpack_from("<I16s", table, at)
            assert 0 < length <= 256 << 10
            assert xxhash.xxh3_128_digest(content[done : done + length]) == digest
            done, at = done + length, at + 20
        assert (done, xxh3(table[before:at])) == (len(content), record["xxh3_128"])
    assert at == len(table)
    return found
