"""Files of JSON lines that others write, read as they grow: `tail -f` for programs."""

from __future__ import annotations

import errno
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from holdfast.checkpoint.system import filesystem

_PIECE = 1 << 20  # bytes that one look takes in at most: a long history is never whole in memory
_MOST = 4 << 30  # bytes: twenty million lines; what is larger is no history, or a sparse file
_LONGEST = 1 << 20  # bytes of a line
_AT_ONCE = 64  # lines
_DEEPEST = 8  # mappings and lists in one another
LARGEST = 1 << 63
_TAIL = 64  # bytes before the position by which the file is known again
_BEGINNING = b'{"time"'  # of every line that holdfast writes; never inside one: quotes are escaped
# Takes the place of a damaged line: what it said is lost, and a reader may have to know that.
ROTTEN = b'{"event": "rotten"}'
_SEAL_SIZE = len(', "crc": "00000000"}')
# One flipped bit in a seal leaves one half of it.
_was_seal = re.compile(rb', "cr.{15}|.{5}c": "[0-9a-f]{8}"}', re.DOTALL).fullmatch


def sealed(line: str) -> str:
    """Return `line`, an object in JSON, with the CRC-32 of its bytes as a last member. A flipped
    bit may leave a line that can be parsed and says something else."""
    head = line[:-1]
    return head + _seal(head.encode("utf-8", "surrogatepass")).decode()


def _seal(head: bytes) -> bytes:
    return b', "crc": "%08x"}' % zlib.crc32(head)


class Follower:
    """Reads what has come to a file of JSON lines since the last look.

    A line that is still being written waits for its end; one that a crash has torn is passed over,
    and what was written behind it is read. A file that was replaced or cut is read anew from its
    beginning, also where the new one is longer or has got the inode of the old one. Checksums are
    checked and taken away.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._inode = 0
        self._tail = b""  # the last bytes before the position
        self._rest = b""  # the beginning of a line whose end is not there yet
        self.restarted = False  # whether the last look began anew: forget what came before
        self.more = False  # whether there is more than the last look took in: look again

    def new(self) -> list[dict[str, Any]]:
        """Return the objects of the new lines, or of the first of many; none without a file.

        Raises OSError as it comes: the next look then takes in what this one would have.
        """
        return [value for value in objects(self.lines()) if is_sane(value)]

    def lines(self) -> list[bytes]:
        """Return the lines that have come, unparsed: their values may be of any depth and size."""
        known = self._position
        try:
            with os.fdopen(filesystem.open_regular(self._path), "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if status.st_size > _MOST:
                    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(self._path))
                file.seek(known - len(self._tail))
                if status.st_ino != self._inode or file.read(len(self._tail)) != self._tail:
                    known = file.seek(0)
                data = file.read(min(_PIECE, max(0, status.st_size - known)))
        except (FileNotFoundError, NotADirectoryError):
            known, data, status = 0, b"", None
        self.restarted = known < self._position
        if self.restarted:
            self._tail = self._rest = b""
        self._position = known + len(data)
        self._inode = 0 if status is None else status.st_ino
        self._tail = (self._tail + data)[-_TAIL:]
        self.more = status is not None and self._position < status.st_size
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST:  # no line of ours: without an end it would fill the memory
            self._rest = b""
        return [each for line in lines for each in _checked(line)]


def _checked(line: bytes) -> tuple[bytes, ...]:
    """Return `line` without its checksum, or `ROTTEN` where that is wrong. Lines of earlier
    versions have none, and neither has one that a crash has torn."""
    head, seal = line[:-_SEAL_SIZE], line[-_SEAL_SIZE:]
    if seal.startswith(b', "crc"') and seal == _seal(head):
        return (head + b"}",)
    if b'"crc": "' not in line and _was_seal(seal) is None:
        return (line,)
    start = head.rfind(_BEGINNING)
    if start > 0 and seal == _seal(head[start:]):  # the line feed before it is what rotted
        return (ROTTEN, head[start:] + b"}")
    return (ROTTEN,)


def objects(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the object of each line that holds one.

    Some lines are parsed as one text, which takes half the time. One by one where not each of them
    is an object; never all at once, since many objects are work for the garbage collector.
    """
    for start in range(0, len(lines), _AT_ONCE):
        part = lines[start : start + _AT_ONCE]
        try:
            values = json.loads(b"[%s]" % b",\n".join(part))
        except (ValueError, RecursionError):
            values = []
        if len(values) != len(part) or not all(isinstance(value, dict) for value in values):
            values = filter(None, map(_parsed, part))
        yield from values


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the object in `line`, or the one behind a torn beginning; None if there is none."""
    value = _object(line)
    beginning = line.rfind(_BEGINNING) if value is None else -1
    return value if beginning < 0 else _object(line[beginning:])


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_sane(value: object, depth: int = 0) -> bool:
    """Return True if `value` is no deeper, and no number in it larger, than what we write.

    The line may come from a stranger: a list in 900 lists ends a program that walks through it, and
    a number of 400 digits one that counts with it.
    """
    if isinstance(value, dict):
        return depth < _DEEPEST and all(is_sane(each, depth + 1) for each in value.values())
    if isinstance(value, list):
        return depth < _DEEPEST and all(is_sane(each, depth + 1) for each in value)
    return not isinstance(value, int) or abs(value) < LARGEST
