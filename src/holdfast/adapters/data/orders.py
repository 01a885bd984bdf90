"""The order of an epoch: the global batches, as a function of seed and epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from holdfast.adapters.data.making import digest, keys_of, seed_stream, seeded
from holdfast.errors import ConfigError
from holdfast.permutation import derive_key, permute

_BLOCK = 8192  # samples whose places are computed at once: 0.3 µs each, alone 100 µs


@dataclass(frozen=True, slots=True)
class Order:
    """The global batches of one epoch."""

    count: int
    digest: str  # of all of them
    after: Callable[[int], Iterator[Any]]  # the batches from a position on


def draw(loader: DataLoader[Any], seed: int, epoch: int) -> Order:
    """Return the batches of an epoch: computed, or drawn from a sampler of the user's.

    Raises ConfigError where that has no end.
    """
    drawn: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    sampler, size, drop_last = drawn, None, False
    if type(drawn) is BatchSampler:
        sampler, size, drop_last = drawn.sampler, drawn.batch_size, drawn.drop_last
    shuffled = type(sampler) is RandomSampler and not (sampler.replacement or sampler._num_samples)
    if shuffled or type(sampler) is SequentialSampler:
        key = derive_key(seed, epoch) if shuffled else None
        return _even(len(sampler), size, key, drop_last=drop_last)
    return _drawn_from(drawn, seed, epoch)


def _even(samples: int, size: int | None, key: int | None, *, drop_last: bool) -> Order:
    """Return all samples in batches of `size` (None: one by one), permuted by `key` if any."""
    width = size or 1
    count = samples // width if drop_last else -(-samples // width)

    def after(position: int) -> Iterator[Any]:
        rows = max(_BLOCK // width, 1) * width
        for start in range(position * width, count * width, rows):
            places = np.arange(start, min(start + rows, samples))
            if key is not None:
                places = permute(places, samples, key)
            block = places.tolist()
            for first in range(0, len(block), width):
                batch = block[first : first + width]
                if size is None:
                    yield batch[0]
                elif len(batch) == width or not drop_last:
                    yield batch

    return Order(count, digest(samples, size, key, drop_last), after)


def _drawn_from(sampler: Any, seed: int, epoch: int) -> Order:
    """Return what a sampler of the user's draws for this epoch, with all its streams seeded."""
    try:
        expected = len(sampler)
    except TypeError as error:
        raise ConfigError(
            "{kind} has no len(): an epoch has no end that could be gone on to. Give it a "
            "__len__, of the batches of one epoch.",
            kind=type(sampler).__name__,
        ) from error
    keys = keys_of(seed, epoch)
    with seeded(keys):
        part = sampler
        while part is not None:
            for stream in vars(part).values() if hasattr(part, "__dict__") else ():
                seed_stream(stream, keys)
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)
            part = getattr(part, "batch_sampler", None) or getattr(part, "sampler", None)
        batches = list(islice(sampler, expected + 1))
    if len(batches) > expected:
        raise ConfigError(
            "{kind} draws more than its len() says, {expected}. Let it end there.",
            kind=type(sampler).__name__,
            expected=expected,
        )
    plain = (batch.tolist() if hasattr(batch, "tolist") else batch for batch in batches)
    return Order(len(batches), digest(*plain), lambda position: iter(batches[position:]))
