"""From the name of the data to mapped token streams: what the trainer calls before it starts.

It puts corpus, tokenizer and cache together. Text that was prepared once is only hashed again.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.errors import DataError, ResourceError
from holdfast.i18n import _
from holdfast.training.text import corpus
from holdfast.training.text.cache import (
    CachedTokens,
    TokenCache,
    TokenStream,
    default_cache_dir,
    key_of,
    read_sealed,
    write_sealed,
)
from holdfast.training.text.corpus import Progress
from holdfast.training.text.damage import Damage
from holdfast.training.text.tokenizer import (
    MIN_FREQUENCY,
    SAMPLE,
    TextTokenizer,
    train_tokenizer,
)

# Raised whenever the same text, settings and tokenizer would give other tokens than before: how
# files are read, documents cut and split. A run that goes on would no longer see its own data.
RULES = 1
# Raised whenever the same text and settings would give another tokenizer than before.
TOKENIZER_RULES = 2


@dataclass(frozen=True)
class PreparedData:
    """The data as the trainer needs it."""

    tokenizer: TextTokenizer
    train: TokenStream
    val: TokenStream
    """Empty where `val_fraction` is 0."""
    documents: int
    content_hash: str
    """Identity of the data, wherever it lies (corpus.content_hash)."""
    notes: list[str]
    """Warnings for the user, in the user's language."""
    from_cache: bool
    """Nothing was tokenized this time."""
    # Removed with this object, where the cache folder could not be used.
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    @property
    def characters(self) -> int:
        """Characters of all documents."""
        return self.train.characters + self.val.characters

    @property
    def tokens(self) -> int:
        """Tokens of all documents, one end-of-text each included."""
        return len(self.train) + len(self.val)

    @property
    def characters_per_token(self) -> float:
        """Characters of text that one token stands for, end-of-text tokens not counted."""
        separators = self.train.documents + self.val.documents
        return self.characters / max(1, self.tokens - separators)

    @property
    def train_bytes(self) -> int:
        """UTF-8 bytes of the training documents."""
        return self.train.text_bytes

    @property
    def val_bytes(self) -> int:
        """UTF-8 bytes of the validation documents."""
        return self.val.text_bytes


def prepare_data(
    source: str | Path,
    *,
    vocab_size: int,
    val_fraction: float,
    seed: int,
    text_field: str = "text",
    strict: bool = False,
    cache_dir: str | Path | None = None,
    tokenizer: TextTokenizer | None = None,
    progress: Progress | None = None,
) -> PreparedData:
    """Read, split, tokenize and map the data of `source` (a file, folder or glob).

    With `tokenizer` (of a checkpoint or of a model) none is trained and `vocab_size` is not
    looked at; else one is trained on the training documents, or a sample of them. With `strict`
    text that is damaged in a single place is refused. `progress` may raise to end the work; then
    nothing half-written remains.

    Raises DataError for unusable data and ResourceError where there is no room for the tokens.
    """
    files = corpus.files_by_content(corpus.discover(source), progress)
    job = _Job(
        text=corpus.Corpus(
            files,
            val_fraction=val_fraction,
            seed=seed,
            text_field=text_field,
            strict=strict,
            progress=progress,
        ),
        split_settings=(text_field, val_fraction, seed),
        strict=strict,
        root=Path(cache_dir) if cache_dir else default_cache_dir(),
        progress=progress,
    )
    return job.run(tokenizer, vocab_size)


def reopen_data(
    content_hash: str,
    tokenizer: TextTokenizer,
    *,
    val_fraction: float,
    seed: int,
    text_field: str = "text",
    cache_dir: str | Path | None = None,
) -> PreparedData | None:
    """The data of that hash from the cache alone, where its files are gone; None: not cached."""
    key = _token_key(content_hash, (text_field, val_fraction, seed), tokenizer)
    root = Path(cache_dir) if cache_dir else default_cache_dir()
    cached = TokenCache(root).open(key)
    if cached is None:
        return None
    return PreparedData(
        tokenizer=tokenizer,
        train=cached.train,
        val=cached.val,
        documents=cached.documents,
        content_hash=content_hash,
        notes=[],
        from_cache=True,
    )


def _token_key(
    content: str, split_settings: tuple[str, float, int], tokenizer: TextTokenizer
) -> str:
    return key_of(RULES, content, split_settings, tokenizer.fingerprint)


@dataclass
class _Job:
    """One call of `prepare_data`."""

    text: corpus.Corpus
    split_settings: tuple[str, float, int]
    strict: bool
    root: Path
    progress: Progress | None
    scanned: bool = False
    notes: list[str] = field(default_factory=list)

    def run(self, tokenizer: TextTokenizer | None, vocab_size: int) -> PreparedData:
        if tokenizer is None:
            tokenizer = self.trained(vocab_size)
            if tokenizer.vocab_size < vocab_size:
                note = _(
                    "The vocabulary has {size:,} tokens instead of {wanted:,}: in the text that it "
                    "is made from, others hardly occur.",
                    size=tokenizer.vocab_size,
                    wanted=vocab_size,
                )
                self.notes.append(note)
        key = _token_key(self.text.content, self.split_settings, tokenizer)
        cached, temporary = TokenCache(self.root).open(key), None
        if cached is not None and cached.damage and self.strict:
            self.scan()  # raises, with the place
        from_cache = cached is not None
        if cached is None:
            cached, temporary = self.tokenized(key, tokenizer)
        if cached.damage:
            self.notes += Damage.from_json(cached.damage, self.text.paths).notes()
        return PreparedData(
            tokenizer=tokenizer,
            train=cached.train,
            val=cached.val,
            documents=cached.documents,
            content_hash=self.text.content,
            notes=self.notes,
            from_cache=from_cache,
            _temporary=temporary,
        )

    def scan(self) -> None:
        if not self.scanned:
            self.text.scan()
            self.scanned = True

    def about(self) -> dict[str, Any]:
        damage = self.text.damage
        about: dict[str, Any] = {"documents": self.text.documents}
        return {**about, "damage": damage.to_json(self.text.paths)} if damage.places else about

    def trained(self, vocab_size: int) -> TextTokenizer:
        """A tokenizer for the training documents, from the cache or a new one."""
        key = key_of(RULES, TOKENIZER_RULES, self.text.content, self.split_settings, vocab_size)
        path = self.root / "tokenizers" / f"{key}.json"
        if (state := read_sealed(path)) is not None:
            # DataError: written by a newer version of the library, unreadable for this one
            with contextlib.suppress(DataError):
                return TextTokenizer.from_state(state)
        self.scan()
        # In a sample everything is rarer than in the text: what occurs twice there is no chance.
        frequency = MIN_FREQUENCY if self.text.text_bytes <= SAMPLE else 2
        tokenizer = train_tokenizer(
            self.text.sample(SAMPLE), vocab_size, min_frequency=frequency, progress=self.progress
        )
        # The tokens go to the same place: tokenized() says what is wrong with it.
        with contextlib.suppress(OSError):
            write_sealed(path, tokenizer.to_state())
        return tokenizer

    def tokenized(
        self, key: str, tokenizer: TextTokenizer
    ) -> tuple[CachedTokens, tempfile.TemporaryDirectory[str] | None]:
        """A new cache entry; in a temporary folder where the cache cannot be written."""
        self.scan()

        def build(root: Path) -> CachedTokens:
            pieces = self.text.pieces(_("Encoding the text"))
            return TokenCache(root).build(key, tokenizer, pieces, self.about)

        try:
            return build(self.root), None
        except OSError as error:
            note = _(
                "The cache folder {folder} cannot be written ({reason}): the tokens go to a "
                "temporary folder and will be made again at the next start. HOLDFAST_CACHE names "
                "another folder.",
                folder=self.root,
                reason=error.strerror or error,
            )
            self.notes.append(note)
        try:
            temporary = tempfile.TemporaryDirectory(prefix="holdfast-", ignore_cleanup_errors=True)
            return build(Path(temporary.name)), temporary
        except OSError as error:
            message = _(
                "There is no room for the tokens, neither in {folder} nor in {temporary} "
                "({reason}). Free some space, or name a folder that has it in HOLDFAST_CACHE.",
                folder=self.root,
                temporary=tempfile.gettempdir(),
                reason=error.strerror or error,
            )
            raise ResourceError(message) from error
