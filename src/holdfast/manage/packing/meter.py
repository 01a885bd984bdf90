"""Tell how far packing or unpacking has come, and make sure that there is room for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from holdfast.checkpoint.system import filesystem
from holdfast.errors import ResourceError
from holdfast.formatting import format_bytes
from holdfast.i18n import _
from holdfast.manage.verify import Progress

Show = Callable[[Progress], None]


class Meter:
    """Tells how far it has come, in `files` files and `total` bytes."""

    def __init__(self, files: int, total: int, show: Show | None) -> None:
        self._of, self._total, self._show = files, total, show
        self._began, self.done, self._number = time.monotonic(), 0, 0
        self._path = Path()

    def file(self, path: Path) -> None:
        """Begin the next file."""
        self._path, self._number = path, self._number + 1
        self.count(0)

    def count(self, more: int) -> None:
        """Count `more` bytes."""
        self.done += more
        if self._show is not None:
            seconds = time.monotonic() - self._began
            self._show(
                Progress(self._number, self._of, self._path, self.done, self._total, seconds)
            )


def check_room(target: Path, needed: int) -> None:
    """Raise `ResourceError` unless there are `needed` bytes for `target`."""
    free = filesystem.free_bytes(target.absolute().parent)
    if free < needed:
        raise ResourceError(
            _(
                "The disk of {path} has {free} free, and {needed} are needed.",
                path=target,
                free=format_bytes(free),
                needed=format_bytes(needed),
            )
        )
