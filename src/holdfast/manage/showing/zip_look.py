"""Look into a `.pt` that is damaged or not ours. Nothing is unpickled."""

from __future__ import annotations

import pickletools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from isal import isal_zlib

TORCH, ZIP, PICKLE, EMPTY, UNKNOWN = "torch", "zip", "pickle", "empty", "unknown"
_CHUNK = 1 << 22
_LARGEST_PICKLE = 1 << 26  # bytes; a larger one is not looked into
_HEADER = struct.Struct("<4sHHHHHIIIHH")
_LOCAL = b"PK\x03\x04"
_ZIP64, _TOO_LARGE = 1, 0xFFFFFFFF
_ENCRYPTED = 1  # a bit among the flags of a record


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the archive; `whole` is None where its bytes were not read."""

    name: str
    size: int
    whole: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """The documented form."""
        return {"name": self.name, "bytes": self.size, "whole": self.whole}


@dataclass(frozen=True, slots=True)
class Look:
    """A file as its first bytes and its directory show it; `imports` is what its pickle names."""

    form: str  # TORCH, ZIP, PICKLE, EMPTY or UNKNOWN
    records: list[Record]
    imports: list[str]


def look_into(path: Path) -> Look:
    """Return the kind of the file `path` and its records. Raises OSError as it comes."""
    with path.open("rb") as file:
        head = file.read(2)
    if not head:
        return Look(EMPTY, [], [])
    try:
        with zipfile.ZipFile(path) as archive:
            items = archive.infolist()
            records = [Record(item.filename, item.file_size) for item in items]
            pickles = [item for item in items if item.filename.endswith("data.pkl")]
            imports = _imports(archive, pickles[0]) if len(pickles) == 1 else []
            return Look(TORCH if pickles else ZIP, records, imports)
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, EOFError):
        return Look(PICKLE if head[:1] == b"\x80" and head[1] <= 5 else UNKNOWN, [], [])


def salvage(path: Path) -> list[Record]:
    """The records of a damaged checkpoint of ours, from the front, each read and checked against
    the CRC-32 of its header: it needs no directory, which stands at the end that is often missing.
    """
    with path.open("rb") as file:
        return list(_walk(file, path.stat().st_size))


def _walk(file: BinaryIO, end: int) -> Iterator[Record]:
    at = 0
    while at + _HEADER.size <= end:
        file.seek(at)
        fields = _HEADER.unpack(file.read(_HEADER.size))
        signature, *_skip, crc, _packed, size, name_length, extra_length = fields
        if signature != _LOCAL:
            return
        name = file.read(name_length).decode("ascii", "replace")
        extra = file.read(extra_length)
        if size == _TOO_LARGE and len(extra) >= 12 and extra[:2] == struct.pack("<H", _ZIP64):
            size = struct.unpack("<Q", extra[4:12])[0]
        at += _HEADER.size + name_length + extra_length
        yield Record(name, size, at + size <= end and _crc(file, at, size) == crc)
        at += size


def _crc(file: BinaryIO, at: int, size: int) -> int:
    file.seek(at)
    crc = 0
    while size:
        piece = file.read(min(size, _CHUNK))
        if not piece:
            return -1
        crc = isal_zlib.crc32(piece, crc)
        size -= len(piece)
    return crc


def _imports(archive: zipfile.ZipFile, item: zipfile.ZipInfo) -> list[str]:
    """Return the names that unpickling would import; nothing is built or run."""
    plain = item.compress_type == zipfile.ZIP_STORED and not item.flag_bits & _ENCRYPTED
    if not plain or item.file_size > _LARGEST_PICKLE:
        return []
    found: dict[str, None] = {}
    texts: list[str] = []
    try:
        for opcode, argument, _at in pickletools.genops(archive.read(item)):
            if opcode.name == "GLOBAL":
                found[str(argument).replace(" ", ".")] = None
            elif opcode.name == "STACK_GLOBAL" and len(texts) > 1:
                found[".".join(texts[-2:])] = None
            elif "UNICODE" in opcode.name:
                texts = [*texts[-1:], str(argument)]
    except (ValueError, OSError, zipfile.BadZipFile, EOFError, IndexError, UnicodeError):
        pass  # it is damaged: what was found until here
    return list(found)
