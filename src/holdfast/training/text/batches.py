"""Cut tokens into batches: each one is a pure function of (seed, epoch, position).

So there is no state to save, skipping ahead costs nothing, and a resumed run sees what it would
have seen. Where the tokens come from is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from holdfast.errors import DataError
from holdfast.i18n import _
from holdfast.permutation import derive_key, permute

if TYPE_CHECKING:
    from holdfast.training.text.cache import TokenStream

IGNORED = -100
"""The target that `torch.nn.functional.cross_entropy` leaves out by default."""

EVALUATION_ROWS = 8  # sequences a validation batch has at least; training ones may be tiny


class Batches:
    """The training stream as batches of windows, in an order of its own in every epoch.

    The stream is taken as a ring and cut, at an offset that each epoch draws anew, into windows
    of `context_length` tokens that do not overlap. An epoch sees every token once, but for the
    remainders: less than a window of the stream and less than a batch of the windows.

    Raises DataError where the stream is shorter than one window.
    """

    def __init__(
        self, stream: TokenStream, *, context_length: int, batch_size: int, seed: int
    ) -> None:
        if len(stream) < context_length + 1:
            message = _(
                "The training text has {tokens} tokens, too few for a context of {context}: "
                "use a longer text or --context-length {possible} or less.",
                tokens=len(stream),
                context=context_length,
                possible=max(1, len(stream) - 1),
            )
            raise DataError(message)
        self._tokens = stream.tokens
        self._span = np.arange(context_length + 1)
        self.context_length = context_length
        self.batch_size = batch_size
        self.seed = seed
        self.samples_per_epoch = len(stream) // context_length
        self.micro_batches_per_epoch = max(1, self.samples_per_epoch // batch_size)

    def batch(self, epoch: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (inputs moved on by one token), each int64 [batch, context].

        `position` counts micro-batches in the epoch from 0. With fewer windows than a batch has
        rows, windows repeat.
        """
        assert 0 <= position < self.micro_batches_per_epoch, (position, epoch)
        rows = np.arange(position * self.batch_size, (position + 1) * self.batch_size)
        windows = permute(
            rows % self.samples_per_epoch,
            self.samples_per_epoch,
            derive_key(self.seed, epoch, 0),
        )
        offset = derive_key(self.seed, epoch, 1) % len(self._tokens)
        starts = offset + windows * self.context_length
        tokens = self._tokens[(starts[:, None] + self._span) % len(self._tokens)]
        return _tensor(tokens[:, :-1]), _tensor(tokens[:, 1:])


def validation_batches(
    stream: TokenStream, context_length: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets, int64 [batch, context], with every token as a target exactly once.

    The first token is predicted from an end-of-text token, as every later document's first is.
    All batches have the same shape: the last one is filled up with end-of-text inputs and
    `IGNORED` targets. With the sum of the loss over all targets, in nats, bits per byte are
    `bits_per_byte(loss, stream.text_bytes)`.
    """
    size = batch_size * context_length
    for start in range(0, len(stream), size):
        before = stream.tokens[start - 1] if start else stream.eos_id
        part = stream.tokens[start : start + size]
        yield _filled_up(part, int(before), stream.eos_id, (batch_size, context_length))


def streamed_batches(
    pieces: Iterable[npt.NDArray[Any]], eos_id: int, context_length: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield what `validation_batches` gives for the tokens of `pieces` in a row, none kept."""
    size, before, waiting = batch_size * context_length, eos_id, np.empty(0, dtype=np.int64)
    for piece in pieces:
        waiting = np.concatenate([waiting, piece])
        whole = len(waiting) // size * size
        for start in range(0, whole, size):
            part = waiting[start : start + size]
            yield _filled_up(part, before, eos_id, (batch_size, context_length))
            before = int(part[-1])
        waiting = waiting[whole:]
    if len(waiting):
        yield _filled_up(waiting, before, eos_id, (batch_size, context_length))


def _filled_up(
    part: npt.NDArray[Any], before: int, eos_id: int, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens as the targets of one batch, and its inputs; `before` stands in front of them."""
    targets = np.full(shape[0] * shape[1], IGNORED, dtype=np.int64)
    targets[: len(part)] = part
    inputs = np.full(shape[0] * shape[1], eos_id, dtype=np.int64)
    inputs[1 : len(part)] = part[:-1]
    inputs[0] = before
    return torch.from_numpy(inputs.reshape(shape)), torch.from_numpy(targets.reshape(shape))


def validation_batch_count(stream: TokenStream, context_length: int, batch_size: int) -> int:
    """Return the number of batches of `validation_batches`."""
    return math.ceil(len(stream) / (batch_size * context_length))


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Summed loss in nats -> bits per UTF-8 byte of the text, which no vocabulary can flatter."""
    return nats / math.log(2) / text_bytes


def unigram_bits_per_byte(
    train: TokenStream, val: TokenStream, val_bytes: int, vocab_size: int
) -> float:
    """Return what a model reaches on `val` that only knows how often tokens occur in `train`.

    Cross entropy of add-one smoothed counts, p(t) = (count(t) + 1) / (tokens + vocab_size), over
    all tokens of `val`, end-of-text included, in bits per UTF-8 byte (`val_bytes`) of its text.
    """
    counts = _counts(train, vocab_size)
    nats = -np.log((counts + 1) / (len(train) + vocab_size))
    return bits_per_byte(float(nats @ _counts(val, vocab_size)), val_bytes)


def _counts(stream: TokenStream, vocab_size: int) -> npt.NDArray[np.int64]:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(stream), 1 << 24):  # bincount makes 8 bytes of every token
        counts += np.bincount(stream.tokens[start : start + (1 << 24)], minlength=vocab_size)
    return counts


def _tensor(tokens: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(tokens.astype(np.int64))
