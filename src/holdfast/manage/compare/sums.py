"""Two tensors as numbers, piece by piece: what is summed up, in float64, while they stream by.

Pieces are raw bytes, so a type that NumPy lacks (bfloat16, the 8-bit floats) is decoded here. The
scratch memory is one block a worker, however large the tensors are. No torch in this room but to
ask it, once, what the 256 values of an 8-bit float are.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 16  # elements at a time: three blocks of float64 stay in a core's own cache
_SHORT = 1 << 13  # elements of a scalar product that one thread of BLAS does alone

Floats = npt.NDArray[np.float64]
Raw = npt.NDArray[np.uint8]

_PLAIN = {
    "float64": "<f8", "float32": "<f4", "float16": "<f2", "int64": "<i8", "int32": "<i4",
    "int16": "<i2", "int8": "<i1", "uint64": "<u8", "uint32": "<u4", "uint16": "<u2",
    "uint8": "<u1", "bool": "<u1",
}  # fmt: skip
_COMPLEX = {"complex32": "<f2", "complex64": "<f4", "complex128": "<f8"}  # as pairs of floats
_BITS = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}


@dataclass(frozen=True, slots=True)
class Kind:
    """A dtype as it lies in a file: the bytes of an element, and how they become numbers."""

    name: str  # as torch calls it
    itemsize: int
    parts: int  # numbers an element has: 2 where it is complex
    plain: str  # of NumPy; "" for what is decoded here
    numeric: bool  # False: only bits can be compared

    @classmethod
    def of(cls, name: str) -> Kind:
        """The dtype that torch calls `name`. Raises ValueError where it has none of that name."""
        if name in _PLAIN:
            return cls(name, np.dtype(_PLAIN[name]).itemsize, 1, _PLAIN[name], True)
        if name in _COMPLEX:
            return cls(name, 2 * np.dtype(_COMPLEX[name]).itemsize, 2, _COMPLEX[name], True)
        if name == "bfloat16":
            return cls(name, 2, 1, "", True)
        itemsize = _size_of(name)
        return cls(name, itemsize, 1, "", itemsize == 1 and _values_of(name) is not None)


def _size_of(name: str) -> int:
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or dtype.itemsize not in _BITS:
        raise ValueError(name)
    return dtype.itemsize


@functools.cache
def _values_of(name: str) -> Floats | None:
    """The numbers that the 256 bytes of an 8-bit float stand for; None where torch cannot say."""
    import torch

    every = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    try:
        values: Floats = every.view(getattr(torch, name)).to(torch.float64).numpy()
    except (RuntimeError, TypeError):  # packed or opaque: two numbers in a byte, say
        return None
    return values


class Scratch:
    """The memory of one worker."""

    def __init__(self) -> None:
        self.a, self.b, self.d = (np.empty(BLOCK, np.float64) for _number in range(3))
        self._wide = np.empty(BLOCK, np.uint32)

    def decode(self, raw: Raw, kind: Kind, out: Floats) -> Floats:
        """The numbers that `raw` holds, at the beginning of `out`."""
        if kind.plain:
            values = raw.view(kind.plain)
            np.copyto(out[: len(values)], values)
            return out[: len(values)]
        if kind.name == "bfloat16":  # the upper half of a float32
            halves = raw.view("<u2")
            wide = self._wide[: len(halves)]
            np.left_shift(halves, 16, out=wide, dtype=np.uint32, casting="unsafe")
            np.copyto(out[: len(halves)], wide.view(np.float32))
            return out[: len(halves)]
        table = _values_of(kind.name)
        assert table is not None, kind
        return np.take(table, raw, out=out[: len(raw)], mode="clip")


@dataclass(slots=True)
class Sums:
    """What two tensors of as many elements have come to so far.

    The norms, the product and the difference are over the elements that are finite in both; NaN
    and the infinities are counted. `changed` counts elements whose bits differ (where the dtypes
    do, whose values do).
    """

    elements: int = 0
    changed: int = 0
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    largest: float = 0.0  # |b - a|; of the real or imaginary part where it is complex
    position: int = -1  # of that element, in the order in which they were added
    values: tuple[float, float] = (0.0, 0.0)  # a and b there
    nan: tuple[int, int] = (0, 0)
    inf: tuple[int, int] = (0, 0)
    numeric: bool = True

    def add(self, a: Raw, b: Raw, kinds: tuple[Kind, Kind], scratch: Scratch) -> bool:
        """Take the next elements; whether the largest change is among them. May be any number of
        them, and of any dtype on each side."""
        sizes = kinds[0].itemsize, kinds[1].itemsize
        count, before = len(a) // sizes[0], self.position
        assert count * sizes[1] == len(b), (len(a), len(b), kinds)
        step = BLOCK // kinds[0].parts
        with np.errstate(all="ignore"):
            for start in range(0, count, step):
                stop = min(start + step, count)
                x, y = (r[start * s : stop * s] for r, s in zip((a, b), sizes, strict=True))
                self._block(x, y, kinds, scratch)
                self.elements += stop - start
        return self.position != before

    def _block(self, x: Raw, y: Raw, kinds: tuple[Kind, Kind], scratch: Scratch) -> None:
        same_kind = kinds[0] == kinds[1]
        bits = _BITS[kinds[0].itemsize // kinds[0].parts]
        changed = same_kind and _count_different(x.view(bits), y.view(bits), kinds[0].parts)
        self.numeric = kinds[0].numeric and kinds[1].numeric
        if not self.numeric:
            self.changed += changed if same_kind else len(x) // kinds[0].itemsize
            return
        a = scratch.decode(x, kinds[0], scratch.a)
        aa = _product(a, a)
        if same_kind and not changed and math.isfinite(aa):
            self.aa, self.bb, self.ab = self.aa + aa, self.bb + aa, self.ab + aa
            return
        b = scratch.decode(y, kinds[1], scratch.b)
        if not same_kind:
            unequal = (a != b) & ~(np.isnan(a) & np.isnan(b))
            changed = _count(unequal, kinds[0].parts)
        self.changed += changed
        bb = _product(b, b)
        if not (math.isfinite(aa) and math.isfinite(bb)):
            self._count_odd(a, b)
            aa, bb = _product(a, a), _product(b, b)
        difference = np.subtract(b, a, out=scratch.d[: len(a)])
        self.aa, self.bb = self.aa + aa, self.bb + bb
        self.ab += _product(a, b)
        self.dd += _product(difference, difference)
        self._look_for_largest(a, b, difference, kinds[0].parts)

    def _count_odd(self, a: Floats, b: Floats) -> None:
        """Count what is not finite, and make zeros of it on both sides."""
        self.nan = self.nan[0] + _ones(np.isnan(a)), self.nan[1] + _ones(np.isnan(b))
        self.inf = self.inf[0] + _ones(np.isinf(a)), self.inf[1] + _ones(np.isinf(b))
        odd = ~(np.isfinite(a) & np.isfinite(b))
        a[odd] = b[odd] = 0.0

    def _look_for_largest(self, a: Floats, b: Floats, difference: Floats, parts: int) -> None:
        high, low = float(difference.max()), float(difference.min())
        largest = max(high, -low)
        if largest > self.largest:
            at = int(difference.argmax() if high == largest else difference.argmin())
            self.largest, self.position = largest, self.elements + at // parts
            self.values = float(a[at]), float(b[at])

    @property
    def relative(self) -> float | None:
        """||b - a|| / ||a||: 0 where nothing changed, infinite where `a` is all zeros."""
        if not self.numeric or math.isinf(self.aa):  # squares of a float64 beyond 1e154
            return None
        if self.dd == 0:
            return 0.0
        return math.sqrt(self.dd) / math.sqrt(self.aa) if self.aa else math.inf

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between the two; None where one of them is all zeros."""
        scale = math.sqrt(self.aa) * math.sqrt(self.bb)
        if not self.numeric or not scale or math.isinf(scale):
            return None
        return 1.0 if self.dd == 0 else max(-1.0, min(1.0, self.ab / scale))

    def join(self, other: Sums) -> None:
        """Take in what another tensor has come to: the sums of a layer. `position` means nothing
        then."""
        self.elements, self.changed = self.elements + other.elements, self.changed + other.changed
        self.aa, self.bb = self.aa + other.aa, self.bb + other.bb
        self.ab, self.dd = self.ab + other.ab, self.dd + other.dd
        self.nan = self.nan[0] + other.nan[0], self.nan[1] + other.nan[1]
        self.inf = self.inf[0] + other.inf[0], self.inf[1] + other.inf[1]
        self.largest = max(self.largest, other.largest)
        self.numeric = self.numeric and other.numeric


def _product(a: Floats, b: Floats) -> float:
    """The scalar product, in pieces so short that BLAS does not wake its threads for them, under
    those that we have."""
    whole = len(a) // _SHORT * _SHORT
    rows, columns = a[:whole].reshape(-1, 1, _SHORT), b[:whole].reshape(-1, _SHORT, 1)
    rest = np.einsum("i,i->", a[whole:], b[whole:])
    return float(np.matmul(rows, columns).sum() + rest)


def _count_different(a: npt.NDArray[Any], b: npt.NDArray[Any], parts: int) -> int:
    return _count(a != b, parts)


def _count(unequal: npt.NDArray[Any], parts: int) -> int:
    return _ones(unequal if parts == 1 else unequal.reshape(-1, parts).any(axis=1))


def _ones(mask: Any) -> int:
    return int(np.count_nonzero(mask))
