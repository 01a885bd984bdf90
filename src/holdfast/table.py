"""Tables in text: tidy on a terminal, plain complete lines in a pipe.

In a pipe nothing is cut, wrapped or coloured, so that grep and awk find whole rows. On a terminal
that is too narrow the least important columns step back. Widths are cells: Chinese takes two.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.cells import cell_len

from holdfast.formatting import wrap_cells

_GAP = "  "
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True, slots=True)
class Column:
    """A column: on a narrow terminal the one with the highest `hide` goes first, 0 never."""

    title: str
    right: bool = False
    hide: int = 0


@dataclass(frozen=True, slots=True)
class Screen:
    """The place that text goes to: `width` in cells, None for a pipe, which has none."""

    width: int | None = None
    colour: bool = False

    @classmethod
    def of(cls, stream: TextIO) -> Screen:
        """Return the screen behind `stream`: a terminal of some width, or a pipe or file."""
        if not stream.isatty():
            return cls()
        plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        return cls(shutil.get_terminal_size().columns, not plain)

    @property
    def terminal(self) -> bool:
        return self.width is not None

    def bold(self, text: str) -> str:
        return f"{_BOLD}{text}{_PLAIN}" if self.colour else text


PIPE = Screen()  # whole lines, as they come


def render(columns: Sequence[Column], rows: Sequence[Sequence[str]], screen: Screen) -> list[str]:
    """The lines of a table, its header first. Cells are shown as they are, on one line each."""
    clean = [[printable(cell) for cell in row] for row in rows]
    widths = [
        max(cell_len(column.title), *(cell_len(row[i]) for row in clean), 0)
        for i, column in enumerate(columns)
    ]
    shown = _fitting(columns, clean, widths, screen.width)

    def line(cells: Sequence[str]) -> str:
        padded = []
        for i in shown:
            space = " " * (widths[i] - cell_len(cells[i]))
            padded.append(space + cells[i] if columns[i].right else cells[i] + space)
        return _GAP.join(padded).rstrip()

    header = line([column.title for column in columns])
    return [screen.bold(header), *map(line, clean)]


def _fitting(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int],
    width: int | None,
) -> list[int]:
    """Choose the columns to show: all in a pipe; on a terminal those that fit and are not empty."""
    shown = list(range(len(columns)))
    if width is None:
        return shown
    shown = [i for i in shown if not columns[i].hide or any(row[i] for row in rows)]
    while sum(widths[i] for i in shown) + len(_GAP) * (len(shown) - 1) > width:
        weakest = max(shown, key=lambda i: columns[i].hide)
        if not columns[weakest].hide:
            break
        shown.remove(weakest)
    return shown


def wrapped(text: str, screen: Screen, head: str = "") -> list[str]:
    """`head` and `text` in lines that fit a terminal, the further ones under the beginning of
    `text`; one whole line in a pipe. What is meant for copying, a command, does not come here."""
    if screen.width is None or cell_len(head) + cell_len(text) <= screen.width:
        return [head + text]
    indent = cell_len(head)
    if indent > screen.width // 2:  # too little room beside it
        first, *rest = wrap_cells(head + text, screen.width)
        return [first, *(_GAP + line for line in wrap_cells(" ".join(rest), screen.width - 2))]
    first, *rest = wrap_cells(text, screen.width - indent)
    return [head + first, *(" " * indent + line for line in rest)]


def printable(text: str) -> str:
    """`text` with control characters made visible: a name of a file must not drive a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
