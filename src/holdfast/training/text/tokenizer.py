"""Text to token ids and back: byte-level BPE, trained on the data or brought along by a model.

The saved form is Hugging Face's, and the same texts travel inside every checkpoint. Files, splits
and caches are not known here.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from holdfast.checkpoint.system import filesystem
from holdfast.errors import DataError
from holdfast.i18n import _
from holdfast.training.plausible import check_tokenizer

if TYPE_CHECKING:
    from holdfast.training.text.corpus import Progress

T = TypeVar("T")

END_OF_TEXT = "<|endoftext|>"  # its id is 0: BOS, EOS, separator of documents and padding

# A merge is worth a row of the embedding when its pair occurs at least 4 times. On 20,000, 50,000
# and 200,000 characters of Song lyrics an n-gram model's bits per byte on held-out text are lowest
# with 3 to 5; with 2 half of all rows are seen twice or less.
MIN_FREQUENCY = 4

_LISTEN_EVERY = 0.1  # seconds between two looks at the progress of a training
CHUNK = 250_000  # characters encoded at a time: what an Encoding holds is many times its text
_CUTTABLE = re.compile(r"(?<=\S)[\n。！？!?…](?=\w)")  # a line or a sentence ends, another begins
_CUTS_TRIED = 20
_AROUND = 200  # characters on both sides of a cut that are compared

# Bytes of text that a tokenizer is trained on: the trainer holds 80 bytes for each of them.
SAMPLE = 5_600_000
# What the trainer takes for one word is held as a chain, and walked through for every merge in it.
_LONGEST_WORD = 1000
_WORD = re.compile(r"[^\W\d_]+|\d+|\s+|(?:[^\w\s]|_)+")

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")  # of sentencepiece
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", *_PIECES)
"""One of these lies in a directory of Hugging Face that brings a tokenizer."""


# BERT's tokenizers write a space before every word, and each Chinese character is one of them.
_WIDE = "\u2014\u2018\u2019\u201c\u201d\u2026\u3000-\u303f\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
_SPACE_IN_CHINESE = re.compile(rf"(?<=[{_WIDE}]) (?=[{_WIDE}\U00020000-\U0003ffff])")


class TextTokenizer:
    """A tokenizer of the `tokenizers` library and the id that separates documents.

    It is made by `train_tokenizer`, `from_state` or `from_directory`. Special tokens that occur
    in a text are encoded as such, as transformers does it; none is added.
    """

    def __init__(self, files: Mapping[str, str], eos_id: int) -> None:
        """`files`: name to text, "tokenizer.json" among them."""
        self._files = dict(files)
        check_tokenizer(files["tokenizer.json"])
        self._tokenizer: Any = Tokenizer.from_str(files["tokenizer.json"])
        self._tokenizer.no_truncation()  # some models' files ask for it; it would lose text here
        self._tokenizer.no_padding()
        decoder = json.loads(files["tokenizer.json"]).get("decoder") or {}
        self._spaces_characters = decoder.get("type") == "WordPiece"
        self.eos_id = eos_id
        self.fingerprint = xxhash.xxh3_128_hexdigest(files["tokenizer.json"].encode())
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        # There may be holes: a model needs all rows.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if not 0 <= eos_id < self.vocab_size:
            raise DataError(
                "The tokenizer has no token {token}, which is to end a text.", token=eos_id
            )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, nothing added. Raises DataError where the tokenizer,
        which may be a stranger's, cannot."""
        with _in_words():
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text, special tokens left out; bytes that are no whole character become
        U+FFFD, and Chinese has no spaces. Raises DataError as `encode` does."""
        with _in_words():
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return _SPACE_IN_CHINESE.sub("", text) if self._spaces_characters else text

    @property
    def json(self) -> str:
        """The text of tokenizer.json, as it travels in checkpoints."""
        return self._files["tokenizer.json"]

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens by their ids, the end of text among them."""
        added = self._tokenizer.get_added_tokens_decoder()
        return [token.content for _id, token in sorted(added.items()) if token.special]

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """The smallest of little-endian uint16 and uint32 that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def encode_batch(
        self, documents: Iterable[str]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """The tokens of all documents in a row, and how many each has.

        Every document is followed by the end-of-text id, which its length includes. Documents are
        encoded in parallel, long ones in parts: what encoding holds is some hundred times the text.
        """
        parts = (part for document in documents for part in self._parts(document))
        tokens: list[npt.NDArray[Any]] = []
        lengths: list[int] = []
        length = 0
        for group in in_chunks(parts, lambda part: len(part[0])):
            texts = [text for text, _ends in group]
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ids: list[int] = []
            for encoding, (_text, ends) in zip(encodings, group, strict=True):
                before = len(ids)
                ids += encoding.ids
                if ends:
                    ids.append(self.eos_id)
                length += len(ids) - before
                if ends:
                    lengths.append(length)
                    length = 0
            tokens.append(np.array(ids, dtype=self.token_dtype))
        flat = np.concatenate(tokens) if tokens else np.empty(0, self.token_dtype)
        return flat, np.array(lengths, dtype=np.int64)

    def encode_chunks(
        self, documents: Iterable[str]
    ) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]]:
        """Yield what `encode_batch` gives, for some documents at a time."""
        for chunk in in_chunks(documents, len):
            yield self.encode_batch(chunk)

    def _parts(self, document: str) -> Iterator[tuple[str, bool]]:
        """A document and True; a long one cut where that gives the same tokens, True with its end.

        Tokenizers that change the beginning of every text (SentencePiece puts a space there) give
        other tokens wherever it is cut: for those it stays whole.
        """
        start = 0
        while len(document) - start > 2 * CHUNK:
            places = islice(_CUTTABLE.finditer(document, start + CHUNK), _CUTS_TRIED)
            ends = (place.end() for place in places)
            cut = next((end for end in ends if self._may_be_cut(document, end)), None)
            if cut is None:
                break
            yield document[start:cut], False
            start = cut
        yield document[start:], True

    def _may_be_cut(self, text: str, place: int) -> bool:
        """True where the text around `place` has the same tokens in one piece and in two."""
        before, after = text[max(0, place - _AROUND) : place], text[place : place + _AROUND]
        return self.encode(before + after) == self.encode(before) + self.encode(after)

    def to_state(self) -> dict[str, str | int]:
        """Plain values that a checkpoint carries: the texts of the files by name, and `eos_id`."""
        return {**self._files, "eos_id": self.eos_id}

    @classmethod
    def from_state(cls, state: Mapping[str, str | int]) -> TextTokenizer:
        """The tokenizer that `to_state` described, with the same fingerprint.

        Raises DataError where `state` describes none.
        """
        # Only names that we know: a checkpoint from elsewhere must not choose what save() writes.
        files = {name: text for name in _FILES if isinstance(text := state.get(name), str)}
        eos_id = state.get("eos_id")
        if "tokenizer.json" not in files or not isinstance(eos_id, int):
            raise DataError("The checkpoint holds no complete tokenizer.")
        _check_loads(files, _("the checkpoint"))
        return cls(files, eos_id)

    def save(self, directory: str | Path) -> None:
        """Write the files that `transformers.AutoTokenizer.from_pretrained` reads."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self._files.items():
            # newline="": the fingerprint is over these bytes, on Windows too
            with (folder / name).open("w", encoding="utf-8", newline="") as file:
                file.write(text)

    @classmethod
    def from_directory(cls, path: str | Path) -> TextTokenizer:
        """The tokenizer of a Hugging Face model: a folder, or a name that transformers can load.

        Raises DataError where there is none, or none that knows an end-of-text token.
        """
        files = _read_files(Path(path))
        if "tokenizer.json" not in files:
            files = _converted(str(path))
        tokenizer = _check_loads(files, str(path))
        eos_id = tokenizer.token_to_id(_end_of_text(files))
        if eos_id is None:
            message = _(
                "The tokenizer of {path} names no end-of-text token that is in its vocabulary; "
                "one is needed between documents. Set eos_token in its tokenizer_config.json.",
                path=path,
            )
            raise DataError(message)
        return cls(files, eos_id)


def in_chunks(items: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """The items in lists of about CHUNK characters."""
    chunk: list[T] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += length(item)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def train_tokenizer(
    documents: Sequence[str],
    vocab_size: int,
    *,
    min_frequency: int = MIN_FREQUENCY,
    progress: Progress | None = None,
) -> TextTokenizer:
    """Train byte-level BPE with NFC on `documents`; the same input gives the same tokenizer.

    The vocabulary has at most `vocab_size` entries: the end-of-text token, 256 bytes, and merges
    of pairs that occur `min_frequency` times. Where the text has too few of these it is smaller.
    """
    assert vocab_size >= 257, "256 bytes and the end-of-text token; the configuration checks it"
    tokenizer: Any = Tokenizer(models.BPE())
    # NFC, not NFKC: that turns ，！？ into ASCII, and the text does not come back.
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _train(tokenizer, trainer, documents, progress)
    eos_id = tokenizer.token_to_id(END_OF_TEXT)
    return TextTokenizer({"tokenizer.json": tokenizer.to_str(), **_config_files()}, eos_id)


def _train(
    tokenizer: Any, trainer: Any, documents: Sequence[str], progress: Progress | None
) -> None:
    """Train in a thread of its own: the library merges for minutes in one call, and a signal that
    comes meanwhile must be heard here, where `progress` may end the work."""
    label, done, total = _("Training the tokenizer"), 0, sum(map(len, documents))
    stopped = False

    def fed() -> Iterator[list[str]]:
        nonlocal done
        for start in range(0, len(documents), 1000):
            if stopped:
                raise InterruptedError
            batch = list(documents[start : start + 1000])
            yield [piece for text in batch for piece in _without_long_words(text)]
            done += sum(map(len, batch))

    outcome: Future[None] = Future()

    def work() -> None:
        try:
            outcome.set_result(tokenizer.train_from_iterator(fed(), trainer))
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            outcome.set_exception(error)

    # A daemon: an abandoned training must not keep the process from ending.
    threading.Thread(target=work, name="holdfast-tokenizer", daemon=True).start()
    try:
        while wait([outcome], _LISTEN_EVERY).not_done:
            if progress:
                progress(label, min(done, total - 1), total)
        if progress:
            progress(label, total, total)
    finally:
        stopped = True
    outcome.result()


def _without_long_words(text: str) -> Iterator[str]:
    """`text`, cut within words of more than _LONGEST_WORD characters (text without punctuation)."""
    start = 0
    for word in _WORD.finditer(text):
        while word.end() - max(start, word.start()) > _LONGEST_WORD:
            cut = max(start, word.start()) + _LONGEST_WORD
            yield text[start:cut]
            start = cut
    yield text[start:]


def _config_files() -> dict[str, str]:
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    return {
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }


def _read_files(folder: Path) -> dict[str, str]:
    files = {}
    for name in _FILES:
        try:
            _check_link(folder / name)
            data = filesystem.read_small(folder / name, follow=True)
            files[name] = data.decode("utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            message = _("Cannot read {path}: {reason}.", path=folder / name, reason=error)
            raise DataError(message) from error
    return files


def _check_link(path: Path) -> None:
    """Raise DataError for a link out of the directory: what it leads to would be copied into every
    checkpoint. The cache of huggingface_hub, `snapshots/REVISION/x -> ../../blobs/y`, is one."""
    folder, target = path.parent.resolve(), path.resolve()
    hub = folder.parents[1] / "blobs" if len(folder.parents) > 1 else folder
    if path.is_symlink() and not (target.is_relative_to(folder) or target.is_relative_to(hub)):
        message = _(
            "{path} is a link out of its directory, to {target}: copy the file there "
            "if you trust it.",
            path=path,
            target=target,
        )
        raise DataError(message)


def _converted(name: str) -> dict[str, str]:
    """Files of a tokenizer that only transformers can load (older kinds, names on the hub)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of files that a stranger wrote it raises whatever they make it
        pieces = any((Path(name) / file).is_file() for file in _PIECES)
        if pieces and find_spec("sentencepiece") is None:
            # What transformers says is about the last thing that it has tried instead.
            message = _(
                "The tokenizer of {path} is one of sentencepiece: pip install "
                "sentencepiece protobuf",
                path=name,
            )
        else:
            message = _(
                "There is no tokenizer in {path} that transformers can load ({reason}).",
                path=name,
                reason=why_not_loaded(error),
            )
        raise DataError(message) from error
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = _read_files(Path(folder))
    if "tokenizer.json" not in files:
        raise DataError("The tokenizer of {path} has no fast form (tokenizer.json).", path=name)
    return files


def why_not_loaded(error: Exception) -> str:
    """Return the reason of transformers in one line; for a model that brings code, our own words,
    since theirs tell the user to run it."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return _("it needs program code that lies beside it, which holdfast never runs")
    return text.partition("\n")[0] or type(error).__name__


def _check_loads(files: Mapping[str, str], where: str) -> Any:
    with _in_words(
        _(
            "{where}: tokenizer.json is damaged or of an unknown kind ({reason}).",
            where=where,
            reason="{reason}",
        )
    ):
        return Tokenizer.from_str(files["tokenizer.json"])


@contextlib.contextmanager
def _in_words(message: str = "") -> Iterator[None]:
    """Raise what the library raises as a DataError. A panic of its Rust code is no Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).partition("\n")[0]
        message = message or _("The tokenizer cannot do this: {reason}", reason="{reason}")
        raise DataError(message.replace("{reason}", reason)) from error


def _end_of_text(files: Mapping[str, str]) -> str:
    """Return the token that ends a text as the config files name it: eos, else sep, as the Chinese
    GPT-2 models with a BertTokenizer have it; our own where they name none."""
    for kind in ("eos_token", "sep_token"):
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            try:
                token = json.loads(files.get(name, "{}")).get(kind)
            except (ValueError, AttributeError):
                continue  # an unreadable config names nothing
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                return token
    return END_OF_TEXT
