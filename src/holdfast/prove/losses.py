"""Logged losses: what a training has said about its steps, on the terminal and in text files.

A line counts if it names where it is (step, iteration, epoch, …) and a loss or the like, or if it
is a whole number and another one, as in `10 2.31`. The first identifies it, the second is compared
as it was written. Times and speeds are not looked at. No torch here.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf)"
_PLACE = re.compile(
    r"(?<![a-z])((?:global[_ ]?)?step|iter(?:ation)?|epoch|batch|episode|update)(?:_?idx|_?num)?"
    r"[\"']?\s*[:=#]?\s*\[?\s*(\d+(?:\.\d+)?)",
    re.IGNORECASE,
)
_OF = re.compile(r"(?<![\w./])(\d+)/\d+(?![\w./])")
_VALUE = re.compile(
    rf"([\w./]*(?:loss|validation|ppl|perplexity|acc|accuracy|nll|bpb|reward|grad_norm|\blr|learning_rate))"
    rf"[\"']?\s*[:=]?\s*({_NUMBER})(?![\w%])",
    re.IGNORECASE,
)
_BARE = re.compile(rf"\s*(\d+)[\s:,]+({_NUMBER})\s*$")  # a step and a number, and no word
_LARGEST = 1 << 23  # bytes of a text file that is looked at

Place = tuple[tuple[str, str], ...]  # as in (("epoch", "1"), ("step", "20"))
Values = tuple[tuple[str, str], ...]  # as in (("loss", "2.31"),)


@dataclass(frozen=True, slots=True)
class Logged:
    """One place that a training has told of, and what it said there."""

    place: Place
    values: Values

    @property
    def where(self) -> str:
        """The place in words: `epoch 1, step 20`."""
        return ", ".join(f"{name} {number}" for name, number in self.place if name != "of")


def logged(lines: Iterable[str]) -> list[Logged]:
    """Return what `lines` say about steps, in their order."""
    found = []
    for line in lines:
        named = [(name.lower(), number) for name, number in _PLACE.findall(line)]
        values: dict[str, str] = {}
        for name, number in _VALUE.findall(line):
            key = name.lower()
            values[f"{key} ({len(values) + 1})" if key in values else key] = number
        if bare := _BARE.match(line):
            named, values = [("step", bare[1])], {"loss": bare[2]}
        if named and values:
            counts = [("of", number) for number in _OF.findall(line)]
            found.append(Logged((*named, *counts), tuple(values.items())))
    return found


def lines_of(path: Path) -> list[str] | None:
    """Return the lines of a text file, rows of a CSV with their names; None where it is none."""
    try:
        if path.stat().st_size > _LARGEST:
            return None
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if "\0" in text:
        return None
    if path.suffix == ".csv":
        rows = csv.DictReader(text.splitlines())
        return [" ".join(f"{name}={value}" for name, value in row.items()) for row in rows]
    return text.splitlines()


def by_place(entries: Sequence[Logged]) -> Mapping[tuple[Place, str], str]:
    """Return each value by its place and name; what was said twice in two ways is left out."""
    found: dict[tuple[Place, str], str] = {}
    twice = set()
    for entry in entries:
        for name, number in entry.values:
            key = entry.place, name
            if found.setdefault(key, number) != number:
                twice.add(key)
    return {key: number for key, number in found.items() if key not in twice}
