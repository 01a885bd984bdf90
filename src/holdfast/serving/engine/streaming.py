"""Tokens to text while they come: no character is cut, no stop string is shown in part.

Pure bookkeeping over a tokenizer; neither torch nor the network is known here.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Sequence

from tokenizers import Tokenizer

from holdfast.training.text.tokenizer import TextTokenizer

BROKEN = "\ufffd"
_HELD = 8  # tokens that may wait for the rest of a character, where bytes are not known
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how SentencePiece writes a single byte


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Return the table of byte-level BPE: printable bytes as themselves, the rest from U+0100
    on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in table)
    return {**table, **{chr(256 + i): byte for i, byte in enumerate(others)}}


class Vocabulary:
    """The tokens of a tokenizer as bytes."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        text = str(tokenizer.to_state()["tokenizer.json"])
        described = json.loads(text)
        self._text, self._tokenizer = tokenizer, Tokenizer.from_str(text)
        self.size = tokenizer.vocab_size
        self.byte_level = (described.get("decoder") or {}).get("type") == "ByteLevel"
        added = described.get("added_tokens") or ()
        self.special = frozenset(token["id"] for token in added if token.get("special"))
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that `token` adds to a text; those of its name where it is a special
        one."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._find_bytes(self._tokenizer.id_to_token(token) or "")
        return found

    def _find_bytes(self, name: str) -> bytes:
        if self.byte_level:
            table = _byte_of_character()
            if all(character in table for character in name):
                return bytes(table[character] for character in name)
        elif byte := _BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        return name.replace("▁", " ").encode()

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, special ones left out."""
        return self._text.decode(tokens)

    @functools.cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """The bytes that each token adds to a text; none where it is a special one."""
        return tuple(b"" if i in self.special else self.bytes_of(i) for i in range(self.size))

    @functools.cached_property
    def longest(self) -> int:
        """The most bytes that one token stands for: what a text of so many bytes needs at least."""
        return max((len(self.bytes_of(token)) for token in range(self.size)), default=1) or 1


class TextStream:
    """The text of tokens that come one by one, in pieces that are whole characters.

    Bytes that are no text become U+FFFD as soon as nothing can make them a character any more. What
    is left at the end, the first bytes of a character that was never finished, is not text.
    """

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int] = ()) -> None:
        """`before`: what stands before the first token; some tokenizers need it for its spaces."""
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._tokens = [] if vocabulary.byte_level else list(before[-_HELD:])
        self._start, self._read = 0, len(self._tokens)

    def push(self, token: int) -> str:
        """Take `token`; return the text since the last call, "" where a character is not
        complete."""
        if self._vocabulary.byte_level:
            special = token in self._vocabulary.special
            return "" if special else self._decoder.decode(self._vocabulary.bytes_of(token))
        self._tokens.append(token)
        shown = self._vocabulary.decode(self._tokens[self._start : self._read])
        text = self._vocabulary.decode(self._tokens[self._start :])
        waiting = len(self._tokens) - self._read
        if len(text) <= len(shown) or (text.endswith(BROKEN) and waiting < _HELD):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return text[len(shown) :]


class StopFilter:
    """Text without what follows the first stop string, and without that string.

    What may be the beginning of one is held back until it is sure.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take `text`; return what may be shown now, nothing more once `stopped`."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text = self._held + text
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        hold = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self) -> str:
        """Return what was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` are the beginning of `stop`."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
