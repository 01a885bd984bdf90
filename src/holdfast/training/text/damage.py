"""Count damaged places of a text: leave out a few, refuse the text if there are many.

Texts as they are found have a broken byte here and there. A training that ends at the first one
does not help, and one that drops half of a file silently harms. So every place is counted, the
first ones are shown, and above a share of `TOLERATED` the text is refused with the first place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.errors import DataError
from holdfast.i18n import N_, _

TOLERATED = 0.001  # of the bytes of the text
_SHOWN = 5  # places that a note names
_HOPELESS = 1 << 20  # bytes left out after which reading ends early where they are over 1 %

NO_CHARACTER = N_("no character of its encoding")
UTF8_AMONG = N_("UTF-8 in the middle of another encoding")
NO_UTF8 = N_("not UTF-8")  # in Parquet, where a place is a row
ZERO = N_("a zero byte")
NO_JSON = N_("no JSON")
NO_OBJECT = N_("no JSON object")
NO_FIELD = N_("without the text field")
NO_TEXT = N_("no text in the text field")


@dataclass(frozen=True, slots=True)
class Place:
    """A place where text was left out, and the reason."""

    path: Path
    number: int
    """The line, counted from 1; in Parquet the row."""
    byte: int | None
    """Its offset in the file (in what a compressed one holds); None: unknown."""
    reason: str
    """One of the messages above, untranslated."""

    def __str__(self) -> str:
        words = {"path": self.path, "number": f"{self.number:,}", "reason": _(self.reason)}
        if self.reason == NO_UTF8:
            return _("{path}, row {number} ({reason})", **words)
        if self.byte is None:
            return _("{path}, line {number} ({reason})", **words)
        return _("{path}, line {number}, byte {byte} ({reason})", byte=self.byte, **words)


@dataclass(slots=True)
class Damage:
    """Text that one reading of the data left out."""

    strict: bool = False
    """Refuse at the first place."""
    size: int = 0
    """Bytes of text read so far, the damaged ones included."""
    left_out: int = 0
    """Bytes."""
    places: int = 0
    shown: list[Place] = field(default_factory=list)
    """The first few places."""
    _first: str = ""

    @property
    def wants_places(self) -> bool:
        """True while places will be shown: finding out where one is may take time."""
        return len(self.shown) < _SHOWN

    def add(self, place: Place, size: int, message: str) -> None:
        """Count `size` bytes as left out; `message` refuses the text because of this place.

        Raises DataError where nothing may be left out, or where most of the text would be.
        """
        self.left_out += size
        self.places += 1
        self._first = self._first or message
        if self.wants_places:
            self.shown.append(place)
        if self.strict:
            raise DataError(message)
        if self.left_out > max(_HOPELESS, self.size / 100):
            raise self._refusal()

    def judge(self) -> None:
        """Raise DataError where more than a share of `TOLERATED` was left out."""
        if self.left_out > TOLERATED * self.size:
            raise self._refusal()

    @property
    def _share(self) -> float:
        return min(1.0, self.left_out / max(1, self.size))

    def _refusal(self) -> DataError:
        more = _(
            "There are {count} such places with {share} of the text; up to {most} is left out.",
            count=f"{self.places:,}",
            share=_percent(self._share),
            most=_percent(TOLERATED),
        )
        return DataError(f"{self._first} {more}" if self.places > 1 else self._first)

    def notes(self) -> list[str]:
        """The warning for the user; empty where nothing was left out."""
        if not self.places:
            return []
        places = "; ".join(map(str, self.shown)) + ("; …" if self.places > len(self.shown) else "")
        return [
            _(
                "Damage in the text was left out (places: {count}, bytes: {bytes}, {share} of "
                "it): {places}.",
                count=f"{self.places:,}",
                bytes=f"{self.left_out:,}",
                share=_percent(self._share),
                places=places,
            )
        ]

    def to_json(self, paths: Sequence[Path]) -> dict[str, Any]:
        """Plain values, for a cache that must not depend on names: a path is its place in
        `paths`."""
        return {
            "size": self.size,
            "left_out": self.left_out,
            "places": self.places,
            "shown": [[paths.index(p.path), p.number, p.byte, p.reason] for p in self.shown],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], paths: Sequence[Path]) -> Damage:
        """Return what `to_json` described, of files that lie at `paths` now."""
        shown = [Place(paths[file], *rest) for file, *rest in data["shown"]]
        return cls(False, data["size"], data["left_out"], data["places"], shown)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
