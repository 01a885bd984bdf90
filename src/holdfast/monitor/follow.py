"""Files of JSON lines that somebody else writes, read as they grow: `tail -f` for programs."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


class Follower:
    """Reads what has come to a file of JSON lines since the last look.

    A line that is still being written waits for its end; one that a crash has torn is passed over.
    A file that was replaced or cut is read anew from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._inode = 0
        self._rest = b""  # the beginning of a line whose end is not there yet
        self.restarted = False  # whether the last look began anew: forget what came before

    def new(self) -> list[dict[str, Any]]:
        """The lines that have come; none where there is no file. Raises OSError as it comes."""
        self.restarted = False
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if self._position and (
                    status.st_ino != self._inode or status.st_size < self._position
                ):
                    self._position, self._rest, self.restarted = 0, b"", True
                self._inode = status.st_ino
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            self.restarted = self._position > 0
            self._position, self._rest = 0, b""
            return []
        self._position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line for line in map(_parsed, lines) if line is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(line.decode("utf-8", "surrogatepass"))
        if isinstance(value, dict):
            return value
    return None
