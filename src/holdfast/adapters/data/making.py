"""Make a batch where it is made, in a worker or here, with random streams of its own."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

Call = tuple[Any, tuple[int, ...]]


class Plan:
    """A sampler: what is still to be made of the epoch that has just begun."""

    calls: Iterator[Call] = iter(())

    def __iter__(self) -> Iterator[Call]:
        return self.calls


def as_it_is(value: Any) -> Any:
    return value


@dataclass(eq=False)
class Maker(Dataset[Any]):
    """Makes batches, each with random streams of its own, in a worker or in this process."""

    dataset: Any
    collate_fn: Any = None
    batched: bool = True

    def __getitem__(self, call: Call) -> Any:
        index, numbers = call
        with seeded(keys_of(*numbers)):
            return self.collate_fn(self.samples(index))

    def samples(self, index: Any) -> Any:
        if not self.batched:
            return self.dataset[index]
        if getattr(self.dataset, "__getitems__", None):
            return self.dataset.__getitems__(index)
        return [self.dataset[one] for one in index]


class Probe(Maker):
    """Hashes a few samples."""

    def __getitem__(self, which: Any) -> str:
        """Return the hash of the samples `which`; "" if the first is not the same twice."""
        first, *others = (self._hashed(one) for one in [which[0], *which])
        return digest(*others) if first == others[0] else ""

    def _hashed(self, index: int) -> str:
        with seeded(keys_of(0)):
            found = hashlib.blake2b(digest_size=8)
            _feed(found, self.samples([index]))
            return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    """Hash a sample; of what is no tensor, array, container or plain value, the type alone."""
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        value = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    if isinstance(value, Mapping):
        value = [*value.items()]
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()  # its bytes are addresses
    if isinstance(value, list | tuple):
        for item in value:
            _feed(found, item)
    elif hasattr(value, "tobytes"):  # an array, a picture of PIL
        found.update(value.tobytes())
    elif isinstance(value, str | bytes | int | float | None):
        found.update(repr(value).encode())
    found.update(type(value).__name__.encode())


@dataclass(slots=True)
class WorkerStart:
    """Starts a worker: `get_worker_info().dataset` is the user's there, as it says."""

    then: Callable[[int], Any] | None

    def __call__(self, worker: int) -> None:
        info: Any = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)  # it may be a frozen one
        if self.then is not None:
            self.then(worker)


def digest(*values: Any) -> str:
    found = hashlib.blake2b(digest_size=8)
    for value in values:
        found.update(repr(value).encode() + b"\n")
    return found.hexdigest()


# ------------------------------------------------------------------------------------------ seeds


def keys_of(*numbers: int) -> tuple[int, int, int]:
    """Return seeds for Python, NumPy and PyTorch. One for all would give the first two, which are
    the same generator, the same numbers."""
    found = hashlib.blake2b(repr(numbers).encode(), digest_size=24).digest()
    python, numpy, torch_ = (int.from_bytes(found[at : at + 8], "little") for at in (0, 8, 16))
    return python, numpy, torch_


@contextmanager
def seeded(keys: tuple[int, int, int]) -> Iterator[None]:
    """Seed the global random streams; put them back afterwards, but in a worker.

    One thread computes meanwhile, as in a worker: their number changes the bits of sums.
    """
    with nullcontext() if get_worker_info() else _kept():
        random.seed(keys[0])
        np.random.seed(_words(keys[1]))
        torch.default_generator.manual_seed(keys[2])
        yield


@contextmanager
def _kept() -> Iterator[None]:
    """Put the global random streams and the number of threads back afterwards."""
    python, numpy, torch_ = random.getstate(), np.random.get_state(), torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_)


def _words(key: int) -> list[int]:
    """Return a key as the 32-bit words that NumPy takes."""
    return [key & 0xFFFFFFFF, key >> 32]


def seed_stream(stream: Any, keys: tuple[int, int, int]) -> None:
    """Seed a generator in place; nothing if it is none."""
    if isinstance(stream, torch.Generator):
        stream.manual_seed(keys[2])
    elif isinstance(stream, np.random.RandomState):
        stream.seed(_words(keys[1]))
    elif isinstance(stream, np.random.Generator):
        bits = stream.bit_generator
        bits.state = type(bits)(keys[1]).state
    elif isinstance(stream, random.Random):
        stream.seed(keys[0])
