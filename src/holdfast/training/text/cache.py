"""Tokens on disk: a memory-mapped file per data set, sealed with hashes and never built twice.

A cache entry appears whole or not at all, and one that is not exactly what was written counts as
missing. It can be deleted at any time, so nothing in it is fsynced.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from holdfast.training.text.tokenizer import CHUNK

if TYPE_CHECKING:
    from holdfast.training.text.tokenizer import TextTokenizer

SPLITS = ("train", "val")
_TEMPORARY = "building-"
_ABANDONED_AFTER = 24 * 3600  # seconds; no data set that one machine prepares takes longer


@dataclass(frozen=True)
class TokenStream:
    """One side of the split as a row of tokens, every document followed by the end-of-text id."""

    tokens: npt.NDArray[Any]
    """Shape [tokens], uint16 or uint32, read-only and memory-mapped."""
    ends: npt.NDArray[np.int64]
    """Shape [documents]: where each document ends in `tokens`, its end-of-text id included."""
    eos_id: int
    characters: int
    text_bytes: int
    """UTF-8 bytes of the documents: the denominator of bits per byte."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def documents(self) -> int:
        """Number of documents, after long ones were cut for the split."""
        return len(self.ends)


@dataclass(frozen=True)
class CachedTokens:
    """The contents of one cache entry."""

    train: TokenStream
    val: TokenStream
    documents: int
    """Documents in the data, before long ones were cut."""
    damage: Mapping[str, Any] | None = None
    """Text that was left out (Damage.to_json); None: nothing."""


def key_of(*parts: object) -> str:
    """A name of 32 hex digits for what `parts` (plain values) say."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, ensure_ascii=True).encode())


def default_cache_dir() -> Path:
    """$HOLDFAST_CACHE, else $XDG_CACHE_HOME/holdfast, else ~/.cache/holdfast."""
    if chosen := os.environ.get("HOLDFAST_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "holdfast"


def write_sealed(path: Path, body: Mapping[str, Any]) -> None:
    """Write `body` as JSON with its own hash, atomically. Raises OSError."""
    text = json.dumps(body, ensure_ascii=False, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path.parent)
    try:
        with temporary.open("x", encoding="utf-8", newline="") as file:
            file.write(f"{xxhash.xxh3_128_hexdigest(text.encode())}\n{text}\n")
        temporary.replace(path)
    except BaseException:  # an interrupt, too, leaves nothing half-written
        temporary.unlink(missing_ok=True)
        raise


def read_sealed(path: Path) -> dict[str, Any] | None:
    """Return what `write_sealed` wrote; None if it is missing, unreadable or changed."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            digest, text = file.read().removesuffix("\n").split("\n", 1)
    except (OSError, ValueError):  # UnicodeDecodeError is a ValueError
        return None
    if digest != xxhash.xxh3_128_hexdigest(text.encode()):
        return None
    body: dict[str, Any] = json.loads(text)
    return body


class TokenCache:
    """The token files below one folder, each entry a folder of its own under a key.

    `tokens.bin` holds the training stream and then the validation stream, `ends.bin` their
    document ends (int64), and `about.json` counts, sizes and hashes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "tokens"

    def open(self, key: str) -> CachedTokens | None:
        """The entry, checked byte for byte against its hashes; None: it has to be built."""
        folder = self.root / key
        about = read_sealed(folder / "about.json")
        if about is None:
            return None
        try:
            intact = all(
                _digest(folder / name) == digest for name, digest in about["files"].items()
            )
        except OSError:
            intact = False
        return _mapped(folder, about) if intact else None

    def build(
        self,
        key: str,
        tokenizer: TextTokenizer,
        pieces: Iterable[tuple[bool, str]],
        about: Callable[[], Mapping[str, Any]],
    ) -> CachedTokens:
        """Encode (is for validation, text) of all documents into a new entry and open it.

        `about` is asked afterwards for what else the entry is to hold: `documents`, `damage`.
        Raises OSError where the folder cannot be written. Whatever ends it early, no part of the
        entry remains.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        with _temporary_folder(self.root) as folder:
            written = _write_entry(folder, tokenizer, pieces)
            write_sealed(folder / "about.json", {**written, **about()})
            self._publish(folder, key)
        cached = self.open(key)
        if cached is None:
            raise OSError(None, "the token cache could not be read back", str(self.root / key))
        return cached

    def _publish(self, folder: Path, key: str) -> None:
        final = self.root / key
        try:
            folder.rename(final)
        except OSError:  # the name is taken: by another process just now, or by a damaged entry
            if self.open(key) is not None:
                return
            shutil.rmtree(final, ignore_errors=True)
            folder.rename(final)

    def _remove_abandoned(self) -> None:
        """Remove the folders of builds that were killed, known by their age."""
        for folder in self.root.glob(f"{_TEMPORARY}*"):
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > _ABANDONED_AFTER:
                    shutil.rmtree(folder, ignore_errors=True)


def _temporary_name(folder: Path) -> Path:
    # Not tempfile's: it shuts other users out of what becomes part of a cache they may share.
    return folder / f"{_TEMPORARY}{secrets.token_hex(8)}"


@contextlib.contextmanager
def _temporary_folder(root: Path) -> Iterator[Path]:
    folder = _temporary_name(root)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # after a rename there is nothing to remove


def _write_entry(
    folder: Path, tokenizer: TextTokenizer, pieces: Iterable[tuple[bool, str]]
) -> dict[str, Any]:
    with _SplitFile(folder, "train") as train, _SplitFile(folder, "val") as val:
        for for_validation, text in pieces:
            (val if for_validation else train).add(text, tokenizer)
        for split in (train, val):
            split.flush(tokenizer)
    files = {}
    for name in ("tokens.bin", "ends.bin"):
        (folder / f"train-{name}").rename(folder / name)
        _append(folder / f"val-{name}", folder / name)
        files[name] = _digest(folder / name)
    return {
        "dtype": tokenizer.token_dtype.str,
        "eos_id": tokenizer.eos_id,
        "splits": {"train": train.counts, "val": val.counts},
        "files": files,
    }


class _SplitFile:
    """The tokens of one side of the split on their way to the disk."""

    def __init__(self, folder: Path, name: str) -> None:
        self._tokens = (folder / f"{name}-tokens.bin").open("xb")
        self._ends = (folder / f"{name}-ends.bin").open("xb")
        self._waiting: list[str] = []
        self._size = 0  # characters that wait
        self.counts = dict.fromkeys(("tokens", "documents", "characters", "text_bytes"), 0)

    def add(self, text: str, tokenizer: TextTokenizer) -> None:
        self._waiting.append(text)
        self._size += len(text)
        if self._size >= CHUNK:
            self.flush(tokenizer)

    def flush(self, tokenizer: TextTokenizer) -> None:
        tokens, lengths = tokenizer.encode_batch(self._waiting)
        self._tokens.write(tokens.tobytes())
        self._ends.write((self.counts["tokens"] + np.cumsum(lengths)).astype("<i8").tobytes())
        self.counts["tokens"] += len(tokens)
        self.counts["documents"] += len(self._waiting)
        self.counts["characters"] += self._size
        self.counts["text_bytes"] += sum(len(text.encode()) for text in self._waiting)
        self._waiting, self._size = [], 0

    def __enter__(self) -> _SplitFile:
        return self

    def __exit__(self, *_error: object) -> None:
        with self._tokens, self._ends:
            pass


def _append(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("ab") as write:
        shutil.copyfileobj(read, write, 1 << 20)
    source.unlink()


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _mapped(folder: Path, about: Mapping[str, Any]) -> CachedTokens:
    tokens = _map(folder / "tokens.bin", np.dtype(about["dtype"]))
    ends = _map(folder / "ends.bin", np.dtype("<i8"))
    streams = []
    token, document = 0, 0
    for name in SPLITS:
        counts = about["splits"][name]
        streams.append(
            TokenStream(
                tokens=tokens[token : token + counts["tokens"]],
                ends=ends[document : document + counts["documents"]],
                eos_id=about["eos_id"],
                characters=counts["characters"],
                text_bytes=counts["text_bytes"],
            )
        )
        token += counts["tokens"]
        document += counts["documents"]
    return CachedTokens(streams[0], streams[1], about["documents"], about.get("damage"))


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    # A plain view of the map: np.memmap as a subclass makes every small gather slower.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
