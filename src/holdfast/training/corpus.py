"""Which files are the data, which documents they hold, and which of these are for validation.

Everything here depends on the content alone, never on names, places or times: a run directory
that was carried elsewhere finds its data, its split and its cache again. No tokenizer enters.
"""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import xxhash

from holdfast.errors import DataError
from holdfast.i18n import _
from holdfast.training.formats import COMPRESSIONS, FORMATS, documents_in, format_of

Progress = Callable[[str, int, int], None]
"""(what is being done, done, total): called now and then; what it raises ends the work."""

# The smallest preset reads 128 tokens at a time and needs a window for training and one for
# validation; a small text has about one token a character.
MIN_CHARACTERS = 200

_BLOCK = 1 << 24  # bytes hashed between two calls of progress
_SENTENCE_END = re.compile(r"(?:[\n。！？!?…]|\.(?=\s))+[”’」』）)\"]*")


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
    """What the data is, whatever its files are called and wherever they lie (32 hex digits)."""
    return combined_hash(files_by_content(paths, progress))


def read_documents(
    paths: Iterable[Path], *, text_field: str = "text", progress: Progress | None = None
) -> list[str]:
    """All documents of the files, in the order given, stripped, the empty ones dropped.

    `progress` counts files.

    Raises DataError where a file cannot be read or where there is too little text to train on.
    """
    paths = list(paths)
    documents: list[str] = []
    for done, path in enumerate(paths):
        if progress:
            progress(_("Reading the text"), done, len(paths))
        documents += documents_in(path, text_field=text_field)
    characters = sum(map(len, documents))
    where = str(paths[0]) if len(paths) == 1 else _("These {count} files", count=len(paths))
    if not characters:
        raise DataError(_("{where}: empty, there is no text to train on.", where=where))
    if characters < MIN_CHARACTERS:
        message = _(
            "{where}: {characters} characters of text, too few to train on; "
            "at least {needed} are needed, and a useful model needs 100,000 or more.",
            where=where,
            characters=characters,
            needed=MIN_CHARACTERS,
        )
        raise DataError(message)
    return documents


def split_documents(
    documents: Sequence[str], val_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of the (training, validation) documents, each in ascending order.

    A document is for validation where the hash of its text and the seed falls below
    `val_fraction`. So it stays on its side when the data is reordered or added to, and two copies
    of one document do not sit on different sides. Among few documents chance could give the
    validation part far too little or too much: it takes or returns documents, in the order of the
    hashes, until it has between half and twice its share of the characters, and at least one
    document is on each side. Where `val_fraction` is 0 there is no validation.
    """
    assert 0 <= val_fraction < 1, val_fraction
    everything = list(range(len(documents)))
    if val_fraction == 0:
        return everything, []
    assert len(documents) >= 2, "cut_long_documents() makes two of one"
    scores = [xxhash.xxh3_64_intdigest(text.encode(), seed % 2**64) / 2**64 for text in documents]
    order = sorted(everything, key=lambda index: (scores[index], index))
    size = sum(score < val_fraction for score in scores)  # of validation: order[:size]
    share = val_fraction * sum(map(len, documents))
    taken = sum(len(documents[index]) for index in order[:size])
    while size < 1 or (size < len(order) - 1 and taken < share / 2):
        taken += len(documents[order[size]])
        size += 1
    while size == len(order) or (size > 1 and taken > share * 2):
        size -= 1
        taken -= len(documents[order[size]])
    return sorted(order[size:]), sorted(order[:size])


def cut_long_documents(documents: Sequence[str], val_fraction: float) -> list[str]:
    """The documents, those longer than the whole validation share cut at line or sentence ends.

    With a single long text, or with one that outweighs all others, whole documents cannot give
    the validation part its size. Pieces of a quarter of the share can. At least two pieces come
    out of any text that has MIN_CHARACTERS.
    """
    total = sum(map(len, documents))
    share = total * val_fraction
    if val_fraction == 0 or all(len(text) <= share for text in documents):
        return list(documents)
    size = max(int(share / 4), min(MIN_CHARACTERS, total // 4))
    return [
        piece
        for text in documents
        for piece in (_pieces(text, size) if len(text) > share else [text])
    ]


def _pieces(text: str, size: int) -> list[str]:
    """`text` cut at the first sentence end after every `size` characters (or right there)."""
    pieces, start = [], 0
    while len(text) - start > size * 3 // 2:  # what is left over joins the last piece
        end = _SENTENCE_END.search(text, start + size, start + size * 3 // 2)
        cut = end.end() if end else start + size
        pieces.append(text[start:cut].strip())
        start = cut
    pieces.append(text[start:].strip())
    return [piece for piece in pieces if piece]
