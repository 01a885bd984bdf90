"""Files of JSON lines that somebody else writes, read as they grow: `tail -f` for programs."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

from holdfast.checkpoint import filesystem

_PIECE = 8 << 20  # bytes that one look takes in at most: a long history is never whole in memory
_MOST = 4 << 30  # bytes: twenty million lines; what is larger is no history, or a sparse file
_LONGEST = 1 << 20  # bytes of a line
_DEEPEST = 8  # mappings and lists in one another
_LARGEST = 1 << 63
_HEAD = 64  # bytes at the beginning by which a file is known: its first time, to the millisecond
_BEGINNING = b'{"time"'  # of every line that holdfast writes; never inside one: quotes are escaped


class Follower:
    """Reads what has come to a file of JSON lines since the last look.

    A line that is still being written waits for its end; one that a crash has torn is passed over,
    and what was written behind it is read. A file that was replaced or cut is read anew from its
    beginning, also where the new one has got the inode of the old one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._inode = 0
        self._head = b""
        self._rest = b""  # the beginning of a line whose end is not there yet
        self.restarted = False  # whether the last look began anew: forget what came before
        self.more = False  # whether there is more than the last look took in: look again

    def new(self) -> list[dict[str, Any]]:
        """The lines that have come, or the first of many; none where there is no file. Raises
        OSError as it comes."""
        self.restarted = self.more = False
        try:
            with os.fdopen(filesystem.open_regular(self._path), "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size > _MOST:
                    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(self._path))
                head = file.read(_HEAD)
                if self._position and (
                    status.st_ino != self._inode
                    or status.st_size < self._position
                    or not head.startswith(self._head)
                ):
                    self._begin_anew()
                self._inode, self._head = status.st_ino, head
                file.seek(self._position)
                data = file.read(_PIECE)
                self.more = self._position + len(data) < status.st_size
        except (FileNotFoundError, NotADirectoryError):
            if self._position:
                self._begin_anew()
            return []
        self._position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST:  # no line of ours: without an end it would fill the memory
            self._rest = b""
        return [line for line in map(_parsed, lines) if line is not None]

    def _begin_anew(self) -> None:
        self._position, self._head, self._rest, self.restarted = 0, b"", b"", True


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object that `line` holds, or that follows there on a torn one; None where none does."""
    for beginning in (0, line.rfind(_BEGINNING)):
        if beginning >= 0:
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(line[beginning:].decode("utf-8", "surrogatepass"))
                if isinstance(value, dict) and _sane(value):
                    return value
    return None


def _sane(value: object, depth: int = 0) -> bool:
    """Return whether `value` is no deeper, and no number in it larger, than what we write.

    Anybody may have written the line: a list in 900 lists ends whoever walks through it, and a
    number of 400 digits whoever counts with it.
    """
    if isinstance(value, dict):
        return depth < _DEEPEST and all(_sane(each, depth + 1) for each in value.values())
    if isinstance(value, list):
        return depth < _DEEPEST and all(_sane(each, depth + 1) for each in value)
    return not isinstance(value, int) or abs(value) < _LARGEST
