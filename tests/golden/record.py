"""Put what a run directory holds, and what was said, into lines that tell of the same thing in the
same words wherever they were made."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import xxhash

from tests.golden.frozen import ID

_ID = re.compile(ID)
_SHM = Path("/dev/shm")
_LONG = 24  # elements of a list that stand in a record; of longer ones its hash does
_LONG_TEXT = 400
_MANIFEST = "checkpoint/holdfast.json"
# Fields that name a process, an inode or a time of the disk, and what they get.
_HERE = {"pid": 1, "stamp": "STAMP"}


class Recorder:
    """The lines of one walk."""

    def __init__(self, top: Path) -> None:
        self.lines: list[str] = []
        self._top = str(top)
        self._ids: dict[str, str] = {}
        self._seen: set[str] = set()  # checkpoints that were described
        self._last: dict[str, Any] = {}  # parts of the checkpoint described last
        self._told: dict[Path, int] = {}  # lines of each history so far

    # ---------------------------------------------------------------------------------- in words

    def plain(self, text: str) -> str:
        """Name ids by the order in which they appear first, and the folder of the walk `TOP`."""
        return _ID.sub(lambda found: self._id(found[0]), text).replace(self._top, "TOP")

    def _id(self, found: str) -> str:
        number = self._ids.setdefault(found[:8], f"{len(self._ids) + 1:08x}")
        return number + found[8:]

    def title(self, text: str) -> None:
        self.lines += ["", f"## {text}"]

    def say(self, text: str) -> None:
        self.lines += [line.rstrip() for line in self.plain(text).splitlines()]

    def json(self, head: str, value: Any) -> None:
        text = json.dumps(_abridged(_without_here(value)), ensure_ascii=False)
        self.lines.append(self.plain(f"{head} {text}"))

    def json_text(self, head: str, text: str) -> None:
        """What `--json` has printed, a line for each entry of it."""
        try:
            value = json.loads(text)
        except ValueError:  # an error has come instead
            self.say(text)
            return
        rows = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in rows:
            if isinstance(each, list) and each and isinstance(each[0], dict):
                for number, one in enumerate(each):
                    self.json(f"{head}.{key}.{number}", one)
            else:
                self.json(f"{head}.{key}", each)

    # -------------------------------------------------------------------------------- on the disk

    def directory(self, directory: Path) -> None:
        """What is new in the history, every file with what it is linked to, and each checkpoint
        that was not there before."""
        events = (directory / "events.jsonl").read_text("utf-8").splitlines()
        known = self._told.get(directory, 0)
        for line in events[known:] if len(events) >= known else events:
            self.json("event", _checked(line))
        self._told[directory] = len(events)
        files = sorted(p for p in directory.rglob("*") if p.is_file() and "logs" not in p.parts)
        first: dict[int, str] = {}
        for path in sorted(files, key=lambda path: len(path.relative_to(directory).parts)):
            name = str(path.relative_to(directory))
            if path.suffix != ".pt":
                self.lines.append(self.plain(f"file {name}"))
                continue
            inode, mode = path.stat().st_ino, path.stat().st_mode & 0o777
            data = self.canonical(path.read_bytes())
            link = f" = {first[inode]}" if inode in first else ""
            first.setdefault(inode, name)
            self.lines.append(self.plain(f"file {name} {mode:o} {_sha(data)}{link}"))
            if not link:
                self._checkpoint(name, data)
        metadata = directory / "metadata.json"
        if metadata.exists():
            value = json.loads(metadata.read_text("utf-8"))
            value.pop("xxh3_128")  # of what holds the inodes and times of files
            self.json_text("metadata.json", json.dumps(value))

    def _checkpoint(self, name: str, data: bytes) -> None:
        """What a file holds, so that a difference of one bit in it can be found: each record, and
        the manifest in words. What is as in the checkpoint described last is left out."""
        if _sha(data) in self._seen:
            return
        self._seen.add(_sha(data))
        parts: dict[str, Any] = {}
        for record, offset, payload in _records(data):
            parts[record] = f"at {offset}: {len(payload)} {_sha(payload)[:16]}"
            if record == _MANIFEST:
                manifest = json.loads(payload)
                tree = manifest.pop("tree")["dict"]
                del manifest["records"]
                parts |= manifest | {f"tree/{key}": value for key, value in tree}
        for key, value in parts.items():
            if key not in self._last or self._last[key] != value:
                self.json(f"  {name} {key}", value)
        self.lines += [f"  {name} has no {key}" for key in self._last if key not in parts]
        self._last = parts

    def canonical(self, data: bytes) -> bytes:
        """The file as it had been written with ids of this record's own: its two checksums of the
        manifest made anew. A damaged file stays as it is."""
        found = _manifest_of(data)
        if found is None:
            return data
        offset, size = found
        manifest = _ID.sub(
            lambda id_: self._id(id_[0]), data[offset : offset + size].decode("utf-8")
        ).encode("utf-8")
        if len(manifest) != size or manifest == data[offset : offset + size]:
            return data
        made = bytearray(data)
        made[offset : offset + size] = manifest
        old, new = zlib.crc32(data[offset : offset + size]), zlib.crc32(manifest)
        head = data.rindex(b"PK\3\4", 0, offset)
        entry = data.rindex(b"PK\1\2")
        for place in (head + 14, entry + 16):
            assert made[place : place + 4] == struct.pack("<I", old)
            made[place : place + 4] = struct.pack("<I", new)
        made[-32:] = xxhash.xxh3_128_hexdigest(manifest).encode()
        return bytes(made)

    # ----------------------------------------------------------------------------------- in memory

    def memory(self, directory: Path) -> None:
        """Names and heads of what lies in shared memory for this run directory."""
        stat = directory.stat()
        mine = f"holdfast-{os.getuid()}-{stat.st_dev}-{stat.st_ino}-"
        for place in sorted(_SHM.glob(f"{mine}*")):
            name = place.name.replace(mine, "holdfast-UID-DEVICE-INODE-")
            for path in sorted(place.iterdir()):
                size = f" {path.stat().st_size}" if path.suffix == ".pt" else ""
                self.lines.append(self.plain(f"memory {name}/{path.name}{size}"))
                if path.suffix == ".head":
                    text, _space, seal = path.read_bytes().rstrip(b"\0\n").rpartition(b" ")
                    right = xxhash.xxh3_128_hexdigest(text).encode() == seal
                    self.say(f"  head {text.decode()} {'right' if right else seal!r}")
                elif path.name == "run":
                    self.say(f"  run {path.read_text('utf-8')}")


def _manifest_of(data: bytes) -> tuple[int, int] | None:
    """Where the comment at the end of a checkpoint says that its manifest is, if it is there."""
    words = data[-103:].split()
    if len(words) != 7 or words[:3] != [b"holdfast", b"1", b"manifest"]:
        return None
    offset, size = int(words[3]), int(words[4])
    whole = xxhash.xxh3_128_hexdigest(data[offset : offset + size]).encode() == words[6]
    return (offset, size) if whole else None


def _checked(line: str) -> Any:
    """The object in a line of the history, less its checksum, which is of ids that differ."""
    value = json.loads(line)
    head, crc = line.rpartition(', "crc"')[0], value.pop("crc", None)  # earlier versions: none
    assert crc is None or int(crc, 16) == zlib.crc32(head.encode()), line
    return value


def _records(data: bytes) -> list[tuple[str, int, bytes]]:
    import io

    found = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
            begin = info.header_offset + 30 + name + extra
            found.append((info.filename, begin, data[begin : begin + info.file_size]))
    return found


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _without_here(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _HERE.get(key, _without_here(each)) for key, each in value.items()}
    return [_without_here(each) for each in value] if isinstance(value, list) else value


def _abridged(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _abridged(each) for key, each in value.items()}
    if isinstance(value, str) and len(value) > _LONG_TEXT:
        return f"{len(value)} characters, sha256 {_sha(value.encode())}"
    if isinstance(value, list):
        text = json.dumps(value)
        plain = all(isinstance(each, int | float) for each in value)
        if plain and len(value) > _LONG:
            return f"{len(value)} numbers, sha256 {_sha(text.encode())}"
        return [_abridged(each) for each in value]
    return value
