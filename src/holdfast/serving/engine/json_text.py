"""JSON as it is written: which tokens may come next, so that a text that ends is a JSON object.

A machine over bytes, RFC 8259 with less: strings are UTF-8, no half surrogates, and nothing goes on
for ever that a reader would choke on. Neither torch nor any model is known here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

# What comes next, what is open ("{", "[", and "k" in a key), and what is known of the value that is
# being written: the rest of a word, the kind and length of a number, what a string waits for.
State = tuple[str, str, str]

START: State = ("start", "", "")
_DEPTH = 64  # objects and lists within each other: parsers have limits
_SPACES = 64  # white space in one place: a model that knows nothing else writes it for ever
_DIGITS = 25  # characters of a number
_WORDS = {"t": "rue", "f": "alse", "n": "ull"}

# By the last character's kind: which kind may follow. A number may end after 0, i, f, and x.
_NUMBER = {
    "-": {"0": "0", "1": "i"},
    "0": {".": ".", "e": "e"},
    "i": {"0": "i", "1": "i", ".": ".", "e": "e"},
    ".": {"0": "f", "1": "f"},
    "f": {"0": "f", "1": "f", "e": "e"},
    "e": {"0": "x", "1": "x", "+": "+", "-": "+"},
    "+": {"0": "x", "1": "x"},
    "x": {"0": "x", "1": "x"},
}
_KIND = {
    **dict.fromkeys("123456789", "1"),
    "0": "0",
    ".": ".",
    "e": "e",
    "E": "e",
    "+": "+",
    "-": "-",
}
# UTF-8 (RFC 3629): the ranges of bytes that a string may wait for, by a letter.
_RANGES = {
    "c": (0x80, 0xBF),
    "A": (0xA0, 0xBF),
    "B": (0x80, 0x9F),
    "C": (0x90, 0xBF),
    "D": (0x80, 0x8F),
}
_WAITS = {  # by the first byte of a character
    **dict.fromkeys(range(0xC2, 0xE0), "c"),
    **dict.fromkeys(range(0xE1, 0xF0), "cc"),
    **dict.fromkeys(range(0xF1, 0xF4), "ccc"),
    **{0xE0: "Ac", 0xED: "Bc", 0xF0: "Ccc", 0xF4: "Dcc"},
}


def after(state: State, byte: int) -> State | None:
    """Return the state behind one more byte; None where it makes the text no beginning of JSON."""
    what, open_, known = state
    character = chr(byte)
    if what == "string":
        return _in_string(open_, known, byte)
    if what == "word":
        left = known[1:] if character == known[0] else None
        return None if left is None else ("word" if left else "next", open_, left)
    if what == "number":
        kind = _NUMBER[known[0]].get(_KIND.get(character, ""))
        if kind is not None:
            return (what, open_, kind + known) if len(known) < _DIGITS else None
        if known[0] not in "0ifx":
            return None
        what, known = "next", ""  # the number has ended before this byte
    if character in " \t\n\r" and what != "start":
        return (what, open_, known + " ") if len(known) < _SPACES else None
    return _between(what, open_, character)


def _between(what: str, open_: str, character: str) -> State | None:
    """Return the state behind a bracket, a comma, a colon, or a value that is complete."""
    closes = {"next": open_[-1:], "first key": "{", "first item": "["}.get(what, "")
    if closes and character == {"{": "}", "[": "]"}[closes]:
        return ("next" if open_[1:] else "end", open_[:-1], "")
    if what in ("value", "first item"):
        return _begun(open_, character)
    key: State = ("string", open_ + "k", "")
    item: State = ("key" if open_[-1:] == "{" else "value", open_, "")
    wanted: dict[str, tuple[str, State]] = {
        "start": ("{", ("first key", "{", "")),
        "first key": ('"', key),
        "key": ('"', key),
        "colon": (":", ("value", open_, "")),
        "next": (",", item),
    }
    expected, behind = wanted.get(what, ("", START))  # at the end there is nothing
    return behind if character == expected else None


def _begun(open_: str, character: str) -> State | None:
    """Return the state in a value that begins with `character`."""
    if character == '"':
        return ("string", open_, "")
    if character in _WORDS:
        return ("word", open_, _WORDS[character])
    if character in "{[":
        what = "first key" if character == "{" else "first item"
        return (what, open_ + character, "") if len(open_) < _DEPTH else None
    kind = {"-": "-", "0": "0", "1": "i"}.get(_KIND.get(character, ""))
    return ("number", open_, kind) if kind else None


def _in_string(open_: str, waits: str, byte: int) -> State | None:
    """Return the state in a string. `waits`: "" for any character, a backslash for what is escaped,
    "u" and the digits that have come, or the ranges of the bytes that finish a character."""
    character = chr(byte)
    if not waits and character == '"':
        return ("colon", open_[:-1], "") if open_[-1] == "k" else ("next", open_, "")
    left: str | None
    if not waits:
        ascii_ = None if byte < 0x20 else "\\" if character == "\\" else ""
        left = ascii_ if byte < 0x80 else _WAITS.get(byte)
    elif waits == "\\":
        left = "u" if character == "u" else "" if character in '"\\/bfnrt' else None
    elif waits[0] == "u":
        # After "d" only the digits that make no half of a surrogate pair.
        digits = "01234567" if waits.lower() == "ud" else "0123456789abcdefABCDEF"
        longer = "" if len(waits) == 4 else waits + character
        left = longer if character in digits else None
    else:
        least, most = _RANGES[waits[0]]
        left = waits[1:] if least <= byte <= most else None
    return None if left is None else ("string", open_, left)


@functools.lru_cache(maxsize=4096)
def first_bytes(state: State) -> tuple[bool, ...]:
    """Return for each byte, and for a token without any, whether it may come next."""
    return (*(after(state, byte) is not None for byte in range(256)), False)


class JsonText:
    """One text that becomes a JSON object."""

    __slots__ = ("pieces", "state")

    def __init__(self, pieces: Sequence[bytes]) -> None:
        """`pieces`: the bytes of every token; none for those that are no text."""
        self.pieces = pieces
        self.state = START

    @property
    def done(self) -> bool:
        """True when the object is complete."""
        return self.state[0] == "end"

    def allows(self, token: int) -> bool:
        """Return whether the text may go on with `token`."""
        return self._behind(token) is not None

    def take(self, token: int) -> None:
        """Go on with `token`."""
        behind = self._behind(token)
        assert behind is not None, "what is not allowed is not drawn"
        self.state = behind

    def _behind(self, token: int) -> State | None:
        piece = self.pieces[token] if token < len(self.pieces) else b""
        state: State | None = self.state if piece else None
        for byte in piece:
            if state is None:
                break
            state = after(state, byte)
        return state
