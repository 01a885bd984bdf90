"""The tensors of a checkpoint as its manifest lists them, and two of them streamed side by side.

Memory stays flat: a worker holds one piece of each side, never a tensor. What is read is verified
by its record's checksum, on the way where a tensor is its record, else before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from holdfast.checkpoint.format import ARCHIVE, Reader, Record, reading
from holdfast.errors import ForeignCheckpoint
from holdfast.i18n import _
from holdfast.manage.compare.sums import Kind, Scratch, Sums
from holdfast.manage.values import plain_state

STEP = 1 << 20  # elements in a piece: 4 MiB of float32 on each side
_TILE = 1 << 18  # elements of a tile, where the two lie in their files in different orders
_WASTE = 4  # bytes read for one that is wanted, before a tile is read in smaller runs
_RUN = 1 << 16  # bytes that are read at once, whatever of them is wanted

_NONSENSE = (KeyError, ValueError, TypeError, IndexError, OverflowError)

Taken = Callable[[int], None]
"""Told of bytes that have been read; what it raises ends the work."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint, by name; `offset` and `stride` in elements."""

    section: str  # the top-level key of the state
    name: str
    kind: Kind
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    record: Record

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.kind.itemsize

    @property
    def place(self) -> tuple[Any, ...]:
        """The same for two names of one tensor (tied weights)."""
        return self.record.name, self.offset, self.shape, self.strides, self.kind.name

    @property
    def strides(self) -> tuple[int, ...]:
        """`stride`, without those that say nothing: of dimensions of one element."""
        return tuple(s if n > 1 else 0 for n, s in zip(self.shape, self.stride, strict=True))

    @property
    def is_whole_record(self) -> bool:
        """Whether its elements are all that the record holds, each once, in whatever order."""
        expected, strides = 1, self.strides
        for dim in self._walk():
            if strides[dim] != expected:
                return False
            expected *= self.shape[dim]
        return self.offset == 0 and self.nbytes == self.record.size

    def index(self, position: int) -> list[int]:
        """The index of an element from its position in the file; of a whole record."""
        index = [0] * len(self.shape)
        for dim in self._walk():
            position, index[dim] = divmod(position, self.shape[dim])
        return index

    def _walk(self) -> list[int]:
        """The dimensions of more than one element, the one that moves fastest first."""
        strides = self.strides
        return sorted((d for d, n in enumerate(self.shape) if n > 1), key=strides.__getitem__)


def tensors_of(reader: Reader) -> dict[str, dict[str, Tensor]]:
    """The tensors of an open checkpoint: section → name → tensor, in the order of the state.

    Raises ForeignCheckpoint where the manifest makes no sense.
    """
    entries = reader.manifest.get("tensors")
    state = plain_state(reader.manifest, reader.path)
    known = {id(entry) for entry in entries} if isinstance(entries, list) else set()
    records = {record.name: record for record in reader.records}
    found: dict[str, dict[str, Tensor]] = {}
    try:
        for section, value in state.items():
            for name, entry in _leaves(value, known, ""):
                tensor = _tensor(str(section), name or str(section), entry, records)
                found.setdefault(str(section), {})[tensor.name] = tensor
    except _NONSENSE as error:
        raise ForeignCheckpoint(
            _("{path} has a manifest that makes no sense.", path=reader.path)
        ) from error
    return found


def _leaves(value: Any, known: set[int], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every tensor below `value`, with the keys that lead to it."""
    if id(value) in known:
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in pairs:
            yield from _leaves(item, known, f"{name}.{key}" if name else str(key))


def _tensor(
    section: str, name: str, entry: Mapping[str, Any], records: Mapping[str, Record]
) -> Tensor:
    shape, stride = ([_count(n) for n in entry[key]] for key in ("shape", "stride"))
    kind, record = Kind.of(entry["dtype"]), records[f"{ARCHIVE}/data/{_count(entry['storage'])}"]
    offset = _count(entry["offset"])
    reach = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1
    if 0 not in shape and (offset + reach) * kind.itemsize > record.size:
        raise ValueError(entry)  # before a byte is read where it says
    return Tensor(section, name, kind, tuple(shape), tuple(stride), offset, record)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


# -------------------------------------------------------------------------------------- streaming


class Side:
    """One of the two checkpoints that are streamed; several workers may share it."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._past_cache = not reader.is_mostly_cached()
        self._verified: set[str] = set()

    def stream(self, tensor: Tensor, buffer: memoryview) -> Iterator[memoryview]:
        """The bytes of a tensor that is its record, verified, in pieces of STEP elements."""
        piece = buffer[: STEP * tensor.kind.itemsize]
        large = tensor.record.size >= reading.OWN_PAGES
        return self.reader.stream(
            tensor.record, piece, past_cache=self._past_cache and large
        )  # fmt: skip

    def verify(self, tensor: Tensor) -> None:
        """Check the record of a tensor that will be read in parts; once is enough."""
        if tensor.record.name not in self._verified:
            self.reader.verify_record(tensor.record, crc=False)
            self._verified.add(tensor.record.name)

    def tile(self, tensor: Tensor, start: Sequence[int], count: Sequence[int]) -> Any:
        """The elements of a tile, as bytes [*count, itemsize], in whatever memory."""
        size, strides = tensor.kind.itemsize, tensor.strides
        first = tensor.offset + sum(i * s for i, s in zip(start, strides, strict=True))
        reach = sum((n - 1) * s for n, s in zip(count, strides, strict=True)) + 1
        if reach * size <= max(_RUN, _WASTE * size * math.prod(count)):
            raw = np.frombuffer(
                self.reader.read_part(tensor.record, first * size, reach * size), np.uint8
            )
            return np.lib.stride_tricks.as_strided(
                raw, (*count, size), (*(s * size for s in strides), 1), writeable=False
            )
        dim = max(range(len(count)), key=lambda d: strides[d] if count[d] > 1 else -1)
        one = [1 if d == dim else n for d, n in enumerate(count)]
        parts = []
        for i in range(start[dim], start[dim] + count[dim]):
            parts.append(
                self.tile(tensor, [i if d == dim else s for d, s in enumerate(start)], one)
            )
        return np.concatenate(parts, axis=dim)


class Worker:
    """One thread's memory, and what it does with two tensors."""

    def __init__(self, widest: int) -> None:
        """`widest`: bytes of the largest element that it will meet."""
        self._buffers = [_memory(STEP * widest) for _side in range(2)]
        self._scratch = Scratch()

    def compare(
        self, sides: Sequence[Side], tensors: Sequence[Tensor], taken: Taken
    ) -> tuple[Sums, list[int] | None]:
        """The sums over two tensors of one shape, and the index of the largest change.

        Raises DamagedCheckpoint, OSError.
        """
        a, b = tensors
        if a.is_whole_record and b.is_whole_record and a.strides == b.strides:
            return self._streamed(sides, tensors, taken)
        for side, tensor in zip(sides, tensors, strict=True):
            side.verify(tensor)
        return self._tiled(sides, tensors, taken)

    def _streamed(
        self, sides: Sequence[Side], tensors: Sequence[Tensor], taken: Taken
    ) -> tuple[Sums, list[int] | None]:
        kinds, sums = (tensors[0].kind, tensors[1].kind), Sums()
        streams = [
            side.stream(tensor, buffer)
            for side, tensor, buffer in zip(sides, tensors, self._buffers, strict=True)
        ]
        for x, y in zip(*streams, strict=True):
            sums.add(np.frombuffer(x, np.uint8), np.frombuffer(y, np.uint8), kinds, self._scratch)
            taken(len(x) + len(y))
        return sums, tensors[0].index(sums.position) if sums.position >= 0 else None

    def _tiled(
        self, sides: Sequence[Side], tensors: Sequence[Tensor], taken: Taken
    ) -> tuple[Sums, list[int] | None]:
        kinds, sums, index = (tensors[0].kind, tensors[1].kind), Sums(), None
        for start, count in _tiles(tensors[0].shape):
            before = sums.elements
            raw = [
                np.ascontiguousarray(side.tile(tensor, start, count)).reshape(-1)
                for side, tensor in zip(sides, tensors, strict=True)
            ]
            if sums.add(raw[0], raw[1], kinds, self._scratch):
                inside = np.unravel_index(sums.position - before, count)
                index = [s + int(i) for s, i in zip(start, inside, strict=True)]
            taken(sum(map(len, raw)))
        return sums, index


def _memory(size: int) -> memoryview:
    pages = reading.own_pages(size)
    return memoryview(bytearray(size) if pages is None else pages)


def _tiles(shape: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """(start, count) of tiles that make up `shape`, as square as they can be: so the runs of both
    tensors are long, whichever way they lie."""
    waiting = [([0] * len(shape), list(shape))]
    while waiting:
        start, count = waiting.pop()
        if math.prod(count) <= _TILE:
            if math.prod(count):
                yield start, count
            continue
        dim = max(range(len(count)), key=count.__getitem__)
        half = count[dim] // 2
        behind, rest = list(start), list(count)
        behind[dim], rest[dim] = start[dim] + half, count[dim] - half
        waiting.append((behind, rest))
        waiting.append((start, [half if d == dim else n for d, n in enumerate(count)]))
