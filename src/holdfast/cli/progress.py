"""One line on a terminal that says how far a long reading has come; nothing in a pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from rich.cells import cell_len, set_cell_size

from holdfast.formatting import format_bytes, format_seconds
from holdfast.i18n import _
from holdfast.manage.progress import Progress
from holdfast.table import printable

_EVERY = 0.1  # seconds between two paintings of one file
_WIDEST, _NARROWEST = 30, 6  # cells of the bar; where there is room for less there is none


class ProgressLine:
    """The last line of a terminal (stderr), painted over again and again."""

    def __init__(self, what: Callable[[Progress], str] | None = None) -> None:
        """`what` says what is being done with which file; without it, that it is checked."""
        self._what = what or _checking
        self._active = sys.stderr.isatty()
        self._shown: tuple[int, float] = (0, 0.0)  # number of the file, and when

    def show(self, progress: Progress) -> None:
        number, when = self._shown
        now = time.monotonic()
        if self._active and (number != progress.number or now - when >= _EVERY):
            self._shown = progress.number, now
            self._write("\r\x1b[K" + line(progress, _width(), self._what(progress)))

    def note(self, text: str) -> None:
        """Say what is being done, where its length is not known."""
        text, width = printable(text), _width()
        self._write(
            "\r\x1b[K" + (set_cell_size(text, width - 1) if cell_len(text) >= width else text)
        )

    def clear(self) -> None:
        """Make room for another line; the next `show` paints again."""
        self._shown = (0, 0.0)
        self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        if self._active:
            sys.stderr.write(text)
            sys.stderr.flush()


def _checking(progress: Progress) -> str:
    return _(
        "checking {number}/{of}: {name}",
        number=progress.number,
        of=progress.of,
        name=progress.path.name,
    )


def line(progress: Progress, width: int, what: str = "") -> str:
    """`progress` in less than `width` cells: which file, a bar, bytes, bytes a second, the rest."""
    text = printable(what or _checking(progress))
    share = progress.done / progress.total if progress.total else 0.0
    numbers = [
        f"{share:4.0%}",
        f"{format_bytes(progress.done)}/{format_bytes(progress.total)}",
        f"{format_bytes(round(progress.speed))}/s",
    ]
    if progress.left is not None:
        numbers.append(_("{time} left", time=format_seconds(progress.left)))
    told = "  ".join(numbers)
    room = min(_WIDEST, width - 1 - cell_len(text) - cell_len(told) - 4)
    if room >= _NARROWEST:
        full = round(share * room)
        text = f"{text}  {'█' * full}{'░' * (room - full)}  {told}"
    elif cell_len(text) + cell_len(told) + 3 <= width:
        text = f"{text}  {told}"
    return set_cell_size(text, width - 1) if cell_len(text) >= width else text


def _width() -> int:
    try:
        return int(os.environ.get("COLUMNS", "")) or 80
    except ValueError:
        pass
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80
