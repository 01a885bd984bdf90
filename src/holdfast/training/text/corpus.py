"""Find the files of a data set, read their documents, and split them for validation.

Everything here depends on the content alone, never on names, places or times: a run directory
that was carried elsewhere finds its data, its split and its cache again. No tokenizer enters.
"""

from __future__ import annotations

import difflib
import glob
import random
import re
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from holdfast.errors import DataError
from holdfast.i18n import _
from holdfast.training.text.damage import Damage
from holdfast.training.text.formats import COMPRESSIONS, FORMATS, DataFile, Part, format_of

Progress = Callable[[str, int, int], None]
"""(what is being done, done, total): called now and then; what it raises ends the work."""

# The smallest preset reads 128 tokens at a time and needs a window for training and one for
# validation; a small text has about one token a character.
MIN_CHARACTERS = 200

_BLOCK = 1 << 20  # bytes hashed between two calls of progress
LONGEST = 1 << 26  # characters of a document that is held as a whole
_SCORES = 1 << 25  # documents whose scores are held, for a split of few documents
_SAMPLED = 2000  # characters of a long document that are drawn into a sample together
SENTENCE_END = re.compile(r"(?:[\n。！？!?…]|\.(?=\s))+[”’」』）)\"]*")


def discover(source: str | Path) -> list[Path]:
    """The data files that `source` names: a file, a folder (with all below it) or a glob.

    Folders and globs give the files with a known suffix, sorted, hidden ones left out.
    Raises DataError where there is none.
    """
    path = Path(source).expanduser()
    try:
        return _found(path)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        message = _("Cannot read {path}: {reason}.", path=path, reason=error.strerror or error)
        raise DataError(message) from error


def _found(path: Path) -> list[Path]:
    if path.is_dir():
        return _known(path.rglob("*"), path, base=path)
    if path.is_file():
        if format_of(path) is None:
            message = _(
                "{path} has an unknown suffix; known are {suffixes}. Rename or convert it.",
                path=path,
                suffixes=_suffixes(),
            )
            raise DataError(message)
        return [path]
    if any(char in str(path) for char in "*?["):
        found = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207 (absolute globs)
        return _known(found, path, base=None)
    raise DataError(_missing(path))


def _known(found: Iterable[Path], source: Path, *, base: Path | None) -> list[Path]:
    def wanted(path: Path) -> bool:
        # A glob skips hidden names by itself, and one that names a hidden folder means it.
        inside = path.relative_to(base).parts if base else ()
        hidden = any(part.startswith(".") for part in inside)
        return not hidden and format_of(path) is not None and path.is_file()

    files = sorted(filter(wanted, found))
    if not files:
        message = _(
            "There are no data files in {source}: none ends in {suffixes}.",
            source=source,
            suffixes=_suffixes(),
        )
        raise DataError(message)
    return files


def _suffixes() -> str:
    return _(
        "{formats} (and each with {compressions})",
        formats=", ".join(FORMATS),
        compressions=" / ".join(COMPRESSIONS),
    )


def _missing(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return _("{path} does not exist: there is no folder {folder}.", path=path, folder=folder)
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:  # a folder that may be entered but not listed: nothing to suggest
        names = []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    if near:
        return _("{path} does not exist. Did you mean {names}?", path=path, names=", ".join(near))
    return _("{path} does not exist. Check the path of the data.", path=path)


def files_by_content(
    paths: Iterable[Path], progress: Progress | None = None
) -> list[tuple[str, Path]]:
    """(xxh3-128 of format and raw bytes, path) of each file, in the order of the hashes.

    This is the order in which the files are read, so that renaming files changes nothing.
    """
    paths = list(paths)
    label, done = _("Looking at the data"), 0
    hashed = []
    try:
        total = sum(path.stat().st_size for path in paths)
        for path in paths:
            digest = xxhash.xxh3_128((format_of(path) or "").encode())
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    done += len(block)
                    if progress:
                        progress(label, done, total)
            hashed.append((digest.hexdigest(), path))
    except OSError as error:
        message = _("Cannot read {path}: {reason}.", path=error.filename, reason=error.strerror)
        raise DataError(message) from error
    return sorted(hashed)


def combined_hash(files: Iterable[tuple[str, Path]]) -> str:
    """One hash (32 hex digits) for what `files_by_content` gave."""
    return xxhash.xxh3_128_hexdigest("\n".join(digest for digest, _path in files).encode())


def content_hash(paths: Iterable[Path], progress: Progress | None = None) -> str:
    """Return the identity of the data, whatever its files' names and places (32 hex digits)."""
    return combined_hash(files_by_content(paths, progress))


class Corpus:
    """The documents of some files, read in the order given, each on its side of the split.

    It is read from the disk once more for every use, in memory that does not grow with it. After
    `scan` has been called, `pieces` and `sample` give what is in it.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, Path]],
        *,
        val_fraction: float,
        seed: int,
        text_field: str = "text",
        strict: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """`files`: what `files_by_content` gave. `strict`: damage in the text is refused."""
        assert 0 <= val_fraction < 1, val_fraction
        self.content, self.paths = combined_hash(files), [path for _digest, path in files]
        self.documents = self.characters = self.text_bytes = 0
        self.damage = Damage(strict)
        self._files = [DataFile(path) for path in self.paths]
        self._val_fraction, self._seed, self._text_field = val_fraction, seed, text_field
        self._progress = progress
        self._longest = 0  # characters of a document
        self._cut = Cut(LONGEST, LONGEST // 4)
        self._boundary = (val_fraction, -1)

    # ----------------------------------------------------------------------------------- reading

    def scan(self) -> None:
        """Count the documents and decide the split.

        Raises DataError where a file cannot be read, where more of it is damaged than may be left
        out, or where there is too little text to train on.
        """
        scores = self._count(self.damage)
        self.damage.judge()
        self._check_enough()
        if self._val_fraction:
            share = self.characters * self._val_fraction
            if self._longest > share:
                longest = min(share, LONGEST)
                least = min(MIN_CHARACTERS, self.characters // 4)
                self._cut = Cut(longest, max(int(longest / 4), least))
                scores = self._count(Damage())
            self._boundary = scores.boundary(self._val_fraction)

    def pieces(self, label: str = "") -> Iterator[tuple[bool, str]]:
        """(is for validation, text) of every document, or piece of a long one.

        `label`: what is being done, for the progress.
        """
        for number, text in enumerate(self._texts(Damage(), label)):
            score = _score(text.encode(), self._seed) if self._val_fraction else 1.0
            yield (score, number) < self._boundary, text

    def sample(self, most: int) -> list[str]:
        """The training documents, or a seeded sample of them of about `most` bytes.

        Short documents are drawn whole, long ones in pieces; which of them depends on the seed and
        on their place in the data alone.
        """
        share = most / self.text_bytes
        texts = (text for for_validation, text in self.pieces() if not for_validation)
        if share >= 1:
            return list(texts)
        draw = random.Random(self._seed)
        pieces = (piece for text in texts for piece in _pieces(text, _SAMPLED))
        return [piece for piece in pieces if draw.random() < share]

    def _texts(self, damage: Damage, label: str = "") -> Iterator[str]:
        """All documents once, long ones cut. Raises DataError where the data was changed: what is
        made of the text would be kept under the hash of another."""
        yield from self._cut.applied(self._parts(damage, label or _("Reading the text")))
        if content_hash(self.paths, self._progress) != self.content:
            raise DataError(
                "The data changed while it was read. Try again when nobody writes to it."
            )

    def _parts(self, damage: Damage, label: str) -> Iterator[Part]:
        done, total = 0, sum(map(_size, self.paths))

        def seen(size: int) -> None:
            if self._progress:
                self._progress(label, min(done + size, total), total)

        self.documents, length = 0, 0
        for file in self._files:
            seen(0)
            for text, ends in file.parts(self._text_field, damage, seen):
                length += len(text)
                self._longest = max(self._longest, length)
                if ends:
                    self.documents, length = self.documents + 1, 0
                yield text, ends
            done += _size(file.path)

    def _count(self, damage: Damage) -> _Scores:
        scores = _Scores()
        self.characters = self.text_bytes = 0
        for text in self._texts(damage):
            data = text.encode()
            self.characters += len(text)
            self.text_bytes += len(data)
            scores.add(_score(data, self._seed), len(text))
        return scores

    def _check_enough(self) -> None:
        count = len(self.paths)
        where = str(self.paths[0]) if count == 1 else _("These {count} files", count=count)
        if not self.characters:
            raise DataError("{where}: empty, there is no text to train on.", where=where)
        if self.characters < MIN_CHARACTERS:
            message = _(
                "{where}: {characters} characters of text, too few to train on; "
                "at least {needed} are needed, and a useful model needs 100,000 or more.",
                where=where,
                characters=self.characters,
                needed=MIN_CHARACTERS,
            )
            raise DataError(message)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # reading it says what is wrong


# ------------------------------------------------------------------------------------- the split


def _score(data: bytes, seed: int) -> float:
    """A number in [0, 1) that depends on a document's text and the seed alone."""
    return xxhash.xxh3_64_intdigest(data, seed % 2**64) / 2**64


class _Scores:
    """Scores and lengths of all documents, in their order: 16 bytes each, of the first 2²⁵."""

    def __init__(self) -> None:
        self._count = 0
        self._scores, self._lengths = array("d"), array("q")

    def add(self, score: float, length: int) -> None:
        self._count += 1
        if self._count <= _SCORES:
            self._scores.append(score)
            self._lengths.append(length)

    def boundary(self, val_fraction: float) -> tuple[float, int]:
        """(score, number): the documents whose own lies below are for validation.

        A document is for validation where its score falls below `val_fraction`. So it stays on its
        side when the data is reordered or added to, and two copies of one document do not sit on
        different sides. Among few documents chance could give the validation part far too little or
        too much: it takes or returns documents, in the order of the scores, until it has between
        half and twice its share of the characters, and at least one document is on each side. Among
        more than 2²⁵ it does not.
        """
        if self._count > _SCORES:
            return val_fraction, -1
        assert self._count >= 2, "a single document is longer than its share, and was cut"
        scores, lengths = np.frombuffer(self._scores), np.frombuffer(self._lengths, dtype="q")
        below = scores < val_fraction
        size, taken = int(below.sum()), int(lengths[below].sum())
        share = val_fraction * int(lengths.sum())
        too_few = size < 1 or (size < len(scores) - 1 and taken < share / 2)
        if not too_few and size < len(scores) and (size == 1 or taken <= share * 2):
            return val_fraction, -1
        order = np.argsort(scores, kind="stable")
        while size < 1 or (size < len(order) - 1 and taken < share / 2):
            taken += int(lengths[order[size]])
            size += 1
        while size == len(order) or (size > 1 and taken > share * 2):
            size -= 1
            taken -= int(lengths[order[size]])
        return float(scores[order[size]]), int(order[size])


@dataclass(frozen=True, slots=True)
class Cut:
    """Cut documents of more than `longest` characters, after the first line or sentence end behind
    every `size` of them.

    With a single long text, or with one that outweighs all others, whole documents cannot give the
    validation part its size. Pieces of a quarter of its share can. At least two pieces come out of
    any text that has MIN_CHARACTERS.
    """

    longest: float
    size: int

    def applied(self, parts: Iterable[Part]) -> Iterator[str]:
        """Whole documents, and pieces of long ones."""
        waiting: list[str] = []
        length = 0
        for part, ends in parts:
            waiting.append(part)
            length += len(part)
            if length > self.longest:
                rest = yield from _pieces_so_far("".join(waiting), self.size)
                waiting = [rest]
            if ends:
                text = "".join(waiting)
                text = text.strip() if length > self.longest else text
                if text:
                    yield text
                waiting, length = [], 0


def _pieces(text: str, size: int) -> Iterator[str]:
    """`text` cut at the first sentence end after every `size` characters (or right there)."""
    return Cut(0, size).applied([(text, True)])


def _pieces_so_far(text: str, size: int) -> Generator[str, None, str]:
    """Pieces of a text that may go on; returns what is left, for the last piece at the latest."""
    start = 0
    while len(text) - start > size * 3 // 2:  # what is left over joins the last piece
        end = SENTENCE_END.search(text, start + size, start + size * 3 // 2)
        cut = end.end() if end else start + size
        if piece := text[start:cut].strip():
            yield piece
        start = cut
    return text[start:]
