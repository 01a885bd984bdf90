"""Continue a text with a trained model, and measure how well the model predicts one.

For comparing checkpoints: the same prompt with the same seed, the same text in every tokenizer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from holdfast.errors import ConfigError, DataError
from holdfast.i18n import _
from holdfast.training import models
from holdfast.training.inference.generate import (
    CONTEXT,
    END_OF_TEXT,
    LENGTH,
    RUINED,
    Sampling,
    TextStream,
)
from holdfast.training.inference.loading import Loaded
from holdfast.training.text import corpus
from holdfast.training.text.batches import EVALUATION_ROWS, IGNORED, bits_per_byte, streamed_batches
from holdfast.training.text.damage import Damage
from holdfast.training.text.formats import documents_in
from holdfast.training.text.tokenizer import TextTokenizer

LOGITS = 1 << 26  # numbers that a batch's logits may be: 256 MiB of float32, and as much again

_ENDS = {LENGTH: "length", CONTEXT: "context", END_OF_TEXT: "end", RUINED: "nan"}

Show = Callable[[int, int], None]
"""(bytes of text done, all): called now and then; what it raises ends the work."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """The continuation of a prompt."""

    text: str  # without the prompt
    ended: str  # "length", "context" (the model can see no more), "end" (of text), or "nan"
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "ended": self.ended, "seconds": self.seconds}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The measure of a model on a text."""

    tokens: int  # of its tokenizer, an end-of-text one for each document
    text_bytes: int
    loss: float  # nats a token
    bits_per_byte: float
    seconds: float
    context_length: int
    precision: str
    tokenizer: str  # fingerprint

    @property
    def perplexity(self) -> float:
        return math.inf if self.loss >= 700 else math.exp(self.loss)  # NaN stays NaN

    @property
    def speed(self) -> float:
        """Bytes of text a second."""
        return self.text_bytes / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "bytes_per_second": self.speed,
            "seconds": self.seconds,
            "context_length": self.context_length,
            "precision": self.precision,
            "tokenizer": self.tokenizer,
        }


def continue_text(
    loaded: Loaded, prompt: str, *, tokens: int, seed: int, temperature: float
) -> Continuation:
    """Return up to `tokens` more tokens, drawn with `seed`; the likeliest at `temperature` 0.

    Raises ConfigError where the prompt leaves no room in what the model can see.
    """
    given = len(loaded.tokenizer.encode(prompt) or [loaded.tokenizer.eos_id])
    room = loaded.max_context - given
    if room < 1:
        message = _(
            "The prompt has {given} tokens, and the model in {path} sees {context} at most: use "
            "a shorter one.",
            given=given,
            path=loaded.path,
            context=loaded.max_context,
        )
        raise ConfigError(message)
    stream = TextStream(
        loaded.model,
        loaded.tokenizer,
        prompt,
        tokens,
        context_length=loaded.max_context,
        sampling=Sampling(seed=seed, temperature=temperature),
    )
    began = time.perf_counter()
    _prompt, *pieces = stream
    seconds = time.perf_counter() - began
    return Continuation("".join(pieces), _ENDS[stream.ended], seconds)


# ------------------------------------------------------------------------------------ evaluation


def read_text(source: str, warn: Callable[[str], None] = lambda _note: None) -> list[str]:
    """The documents of a data file, folder or glob; `warn` is told of damage that was left out.

    Raises DataError where there is no text, or where too much of it is damaged.
    """
    damage, files = Damage(), corpus.discover(source)
    documents = [text for path in files for text in documents_in(path, damage=damage)]
    damage.judge()
    for note in damage.notes():
        warn(note)
    if not documents:
        raise DataError("{where}: there is no text in it.", where=source)
    return documents


def shorten(documents: Sequence[str], tokenizer: TextTokenizer, most: int) -> list[str]:
    """The beginning of a text that has up to `most` tokens in `tokenizer`, ends of documents
    included: cut once, so that every tokenizer gets the same text."""
    taken: list[str] = []
    left = most
    for text in documents:
        ids = tokenizer.encode(text)
        if len(ids) >= left:
            head = tokenizer.decode(ids[: max(left - 1, 1)]).rstrip("\ufffd")
            return [*taken, head] if head.strip() else taken or [text[:1]]
        taken.append(text)
        left -= len(ids) + 1
    return taken


@torch.no_grad()
def evaluate(
    loaded: Loaded, documents: Sequence[str], show: Show = lambda _done, _all: None
) -> Evaluation:
    """Measure `loaded` on `documents` as the trainer measures its validation text: every token is a
    target once, in windows of the context that it was trained with, in the same precision."""
    device, context = loaded.device, loaded.context_length
    wanted = (loaded.config.get("model") or {}).get("precision", "auto")
    precision = models.choose_precision(str(wanted), device)
    wide = precision is torch.float32
    rows = max(1, min(EVALUATION_ROWS, LOGITS // (context * loaded.tokenizer.vocab_size)))
    feed = _Feed(documents, loaded.tokenizer)
    nats, count, began = 0.0, 0, time.perf_counter()
    for inputs, targets in streamed_batches(feed, loaded.tokenizer.eos_id, context, rows):
        counted = int((targets != IGNORED).sum())
        with torch.autocast(device.type, precision, enabled=not wide):
            logits = loaded.model(input_ids=inputs.to(device), use_cache=False).logits
            loss = models.next_token_loss(logits, targets.to(device))
        nats += loss.item() * counted
        count += counted
        show(feed.bytes_of(count), feed.total)
    return Evaluation(
        count,
        feed.total,
        nats / count,
        bits_per_byte(nats, feed.total),
        time.perf_counter() - began,
        context,
        str(precision).removeprefix("torch."),
        loaded.tokenizer.fingerprint,
    )


class _Feed:
    """The tokens of some documents, about a million characters at a time."""

    def __init__(self, documents: Sequence[str], tokenizer: TextTokenizer) -> None:
        self._sizes = [len(text.encode()) for text in documents]
        self._documents, self._tokenizer = documents, tokenizer
        self._bytes = self._tokens = 0  # of what has been encoded
        self.total = sum(self._sizes)

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        position = 0
        for tokens, lengths in self._tokenizer.encode_chunks(self._documents):
            self._bytes += sum(self._sizes[position : position + len(lengths)])
            self._tokens += len(tokens)
            position += len(lengths)
            yield tokens

    def bytes_of(self, tokens: int) -> int:
        """About how many bytes the first `tokens` tokens stand for; no more than there are."""
        return min(self._bytes, self._bytes * tokens // max(1, self._tokens))
