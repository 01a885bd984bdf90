"""From bytes to text: which encoding a file is in, and its text without what is no character.

Everything works on blocks, so that a file of any size takes the same memory. Formats and documents
are not known here.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import DataError
from holdfast.i18n import _
from holdfast.training.text.damage import NO_CHARACTER, TOLERATED, UTF8_AMONG, ZERO

Blocks = Callable[[], Iterable[bytes]]
"""Read the file once more from its beginning."""

Report = Callable[[int, int, int, str], None]
"""(offset in the file, bytes, line, reason) of something that is left out."""

# The commonest characters of modern and classical Chinese, simplified and traditional. Big5,
# EUC-KR, EUC-JP and Shift-JIS mostly decode as GB18030 without an error, into rare characters and
# private-use code points: of those, 0 to 1 % are in this list; of real Chinese, 11 % (Song lyrics)
# to 33 % (modern prose), of Japanese in GB18030 6 %.
_COMMON = (
    "的一是不了在人有我他这中大来上国个到说们为子和你地出会时要也得里以那就自之于而者其与无此何如"
    "日月风山花天春水这這國來時為個們說無"
)
_COMMON_SHARE = 0.03
_WIDE = re.compile("[^\0-\x7f，。！？、；：“”‘’《》（）…—\u3000\ufffd]+")
_LOOK = 4_000_000  # characters in which common ones are counted

_BOMS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
_LONGEST_CHARACTER = 4  # bytes, in every encoding here
# Files of two encodings put together: Chinese in UTF-8 mostly decodes as GB18030 or Big5 without an
# error, into other characters. In real text of those, no twelve bytes in a row look like this.
_WIDE_UTF8 = rb"(?:(?:[\xe3-\xe9][\x80-\xbf]|\xef[\xbc\xbd])[\x80-\xbf])"
_UTF8 = re.compile(_WIDE_UTF8 + rb"{4,}(?:[\t\n\r -~]{0,64}" + _WIDE_UTF8 + rb"{2,})*")
_UTF8_SIGNS = [sign.encode() for sign in "，。、的"]  # found sooner than the runs are
_BLANK_LINE = re.compile(r"\n\s*\n")


@dataclass(frozen=True, slots=True)
class Encoding:
    """The encoding of one file."""

    codec: str
    bom: int
    """Bytes at the beginning that are no text."""


def find_encoding(blocks: Blocks, path: Path) -> Encoding:
    """UTF-8, UTF-16, GB18030 (with the euro of cp936) or Big5; a few broken bytes do not matter.

    `path` is for the message only. Raises DataError where the file is in none of these.
    """
    head = b"".join(_first(blocks(), 3))
    for bom, codec in _BOMS.items():
        if head.startswith(bom) and (codec == "utf-8" or _look(blocks, codec).mostly_text):
            return Encoding(codec, len(bom))
    if (bad := _first_damage(blocks, "utf-8")) is None:
        return Encoding("utf-8", 0)
    looks = [_look(blocks, codec) for codec in ("utf-8", "gb18030", "big5hkscs")]
    if looks[0].zeros:  # half of the bytes of Western text in UTF-16 are zero
        looks = [*(_look(blocks, codec) for codec in ("utf-16-le", "utf-16-be")), *looks]
    if found := [look for look in looks if look.plausible]:
        return Encoding(min(found, key=lambda look: look.bad).codec, 0)
    raise _not_text(path, *bad, zeros=looks[-1].zeros)


def _first(blocks: Iterable[bytes], size: int) -> Iterator[bytes]:
    for block in blocks:
        yield block
        size -= len(block)
        if size <= 0:
            return


def not_a_character(path: Path, codec: str, offset: int, line: int, reason: str) -> str:
    """The message that refuses a text because of one place."""
    if reason == ZERO:
        return _(
            "{path} is not a text file: byte {offset} is zero, as in binary data. "
            "Choose a .txt, .jsonl or .parquet file.",
            path=path,
            offset=offset,
        )
    if reason == UTF8_AMONG:
        return _(
            "{path} is {encoding} text, but from byte {offset} (line {line}) on there is UTF-8 in "
            "it, as in files put together. Save each as UTF-8 before that.",
            path=path,
            encoding=_NAMES[codec],
            offset=offset,
            line=line,
        )
    return _(
        "{path} is {encoding} text, but byte {offset} (line {line}) is no character of it. "
        "Mend that place, or save the file as UTF-8 anew.",
        path=path,
        encoding=_NAMES[codec],
        offset=offset,
        line=line,
    )


_NAMES = {
    "utf-8": "UTF-8",
    "utf-16-le": "UTF-16",
    "utf-16-be": "UTF-16",
    "gb18030": "GB18030",
    "big5hkscs": "Big5",
}


def _not_text(path: Path, offset: int, line: int, reason: str, *, zeros: int) -> DataError:
    if zeros and reason != ZERO:
        offset, reason = zeros - 1, ZERO
    if reason == ZERO:
        return DataError(not_a_character(path, "utf-8", offset, line, reason))
    return DataError(
        "{path} is neither UTF-8 nor GB18030 nor Big5 text: byte {offset} (line {line}) is "
        "where it stops being UTF-8. Save the file as UTF-8 and try again.",
        path=path,
        offset=offset,
        line=line,
    )


class _Found(Exception):
    pass


def _first_damage(blocks: Blocks, codec: str) -> tuple[int, int, str] | None:
    """(offset, line, reason) of the first thing that is no text in `codec`."""

    def stop(offset: int, _size: int, line: int, reason: str) -> None:
        raise _Found(offset, line, reason)

    try:
        for _text in decoded(blocks(), Encoding(codec, 0), stop):
            pass
    except _Found as found:
        offset, line, reason = found.args
        return offset, line, reason
    return None


@dataclass(slots=True)
class _Look:
    """Counts over a whole file, read in one encoding."""

    codec: str
    size: int = 0
    bad: int = 0  # places that are no character
    zeros: int = 0  # 1 + the offset of the first zero byte
    wide: int = 0  # characters that are neither ASCII nor Chinese punctuation
    common: int = 0  # those of them that are in _COMMON
    characters: int = 0

    @property
    def plausible(self) -> bool:
        if self.codec == "utf-8":
            return self.bad <= max(TOLERATED * self.size, 0.1 * (self.bad + self.wide))
        reads_like_chinese = self.common >= _COMMON_SHARE * self.wide
        return self.mostly_text and reads_like_chinese

    @property
    def mostly_text(self) -> bool:
        return self.bad <= max(1, 0.05 * self.characters)


def _look(blocks: Blocks, codec: str) -> _Look:
    look = _Look(codec)
    decoder = codecs.getincrementaldecoder(codec)("replace")
    for block in blocks():
        if not look.zeros and (at := block.find(b"\0")) >= 0:
            look.zeros = look.size + at + 1
        look.size += len(block)
        text = decoder.decode(block)
        look.bad += text.count("\ufffd") + text.count("\0")
        look.characters += len(text)
        if look.characters <= _LOOK:
            look.wide += sum(map(len, _WIDE.findall(text)))
            look.common += sum(map(text.count, _COMMON))
    return look


def has_blank_lines(texts: Iterable[str]) -> bool:
    """True where there is a blank line between two lines that are not blank."""
    before = ""  # the last character of text and the white space after it
    for text in texts:
        both = before + text
        if _BLANK_LINE.search(both.strip()):
            return True
        before = both[max(len(both.rstrip()) - 1, 0) :]
    return False


def decoded(blocks: Iterable[bytes], encoding: Encoding, report: Report) -> Iterator[str]:
    """The text of the blocks in a row, with "\\n" line ends, without what is no character.

    Zero bytes are none, except in UTF-16. What `report` raises ends the work.
    """
    decoder, bom = _Decoder(encoding, report), encoding.bom
    for block in blocks:
        yield decoder.decode(block[bom:])
        bom = max(0, bom - len(block))
    yield decoder.decode(b"", final=True)


class _Decoder:
    def __init__(self, encoding: Encoding, report: Report) -> None:
        self._codec, self._report = encoding.codec, report
        self._zeros_are_text = self._codec.startswith("utf-16")
        self._may_have_utf8 = not self._codec.startswith("utf-")
        self._offset = encoding.bom  # in the file, of the first byte that is not decoded yet
        self._line = 1  # there
        self._rest = b""  # bytes that may be the beginning of a character
        self._held = ""  # a carriage return whose line feed may come

    def decode(self, block: bytes, *, final: bool = False) -> str:
        data = self._rest + block
        try:
            if self._utf8_in(data, 0):
                text = self._mended(data, final)
            else:
                text, self._rest = data.decode(self._codec), b""
                self._pass_over(data, text)
        except UnicodeDecodeError:
            text = self._mended(data, final)
        text = self._held + text
        self._held = "\r" if text.endswith("\r") and not final else ""
        text = text[: len(text) - len(self._held)]
        text = text.replace("\ufeff", "")  # the byte order marks of files put together
        return _newlines(text if self._zeros_are_text else text.replace("\0", ""))

    def _mended(self, data: bytes, final: bool) -> str:
        """Decode around whatever is no character; the beginning of one at the end waits."""
        parts, position = [], 0
        while position < len(data):
            other = self._utf8_in(data, position)
            bad, reason = (other[0], UTF8_AMONG) if other else (b"", NO_CHARACTER)
            try:
                good = data[position : other.start() if other else None]
                parts.append(good.decode(self._codec))
            except UnicodeDecodeError as error:
                bad, reason = good[error.start : error.end], NO_CHARACTER
                good = good[: error.start]
                parts.append(good.decode(self._codec))
            self._pass_over(good, parts[-1])
            position += len(good)
            if not final and len(data) - position < _LONGEST_CHARACTER:
                break
            if self._codec == "gb18030" and bad[:1] == b"\x80":  # Windows' cp936 has its euro here
                bad = bad[:1]
                parts.append("€")
            elif bad:
                self._report(self._offset, len(bad), self._line, reason)
                parts.append("\n" * bad.count(b"\n"))
            self._pass_over(bad, parts[-1] if bad else "")
            position += len(bad)
        self._rest = data[position:]
        return "".join(parts)

    def _utf8_in(self, data: bytes, position: int) -> re.Match[bytes] | None:
        if self._may_have_utf8 and any(sign in data for sign in _UTF8_SIGNS):
            return _UTF8.search(data, position)
        return None

    def _pass_over(self, data: bytes, text: str) -> None:
        """Count bytes and lines, and report zero bytes."""
        if not self._zeros_are_text and b"\0" in data:
            for found in re.finditer(b"\0+", data):
                line = self._line + data.count(b"\n", 0, found.start())
                self._report(self._offset + found.start(), len(found[0]), line, ZERO)
        self._offset += len(data)
        self._line += text.count("\n") or text.count("\r")


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
