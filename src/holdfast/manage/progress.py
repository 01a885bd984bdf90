"""Tell how far a long reading or writing of files has come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a long reading of files."""

    number: int  # of the file that is waited for, from 1
    of: int
    path: Path
    done: int  # bytes, of all files
    total: int
    seconds: float

    @property
    def speed(self) -> float:
        """Bytes a second until now."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def left(self) -> float | None:
        """Seconds that it will still take; None where that is not known yet."""
        return (self.total - self.done) / self.speed if self.speed else None


Show = Callable[[Progress], None]


class Meter:
    """Tells how far it has come, in `files` files and `total` bytes."""

    def __init__(self, files: int, total: int, show: Show | None) -> None:
        self._of, self._total, self._show = files, total, show
        self._began, self.done, self._number = time.monotonic(), 0, 0
        self._path = Path()
        self._turn = threading.Lock()

    def file(self, path: Path) -> None:
        """Begin the next file."""
        self._path, self._number = path, self._number + 1
        self.count(0)

    def count(self, more: int) -> None:
        """Count `more` bytes, from any thread."""
        with self._turn:
            self.done += more
            if self._show is not None:
                seconds = time.monotonic() - self._began
                self._show(
                    Progress(self._number, self._of, self._path, self.done, self._total, seconds)
                )
