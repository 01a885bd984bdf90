"""Sum up two tensors element by element, in float64, a block at a time."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

_BLOCK = 1 << 16  # elements at a time: the float64 copies stay in the cache of a core
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@functools.cache
def is_numeric(name: str) -> bool:
    """Return True if torch can turn the dtype that it calls `name` into float64.

    Packed and opaque types (two 4-bit floats in a byte, say) are compared by their bits only.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        return False
    try:
        torch.zeros(1, dtype=dtype).to(torch.complex128 if dtype.is_complex else torch.float64)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@dataclass(slots=True)
class Sums:
    """Sums over two tensors of as many elements.

    The norms, the product and the difference are over the elements that are finite in both; NaN
    and the infinities are counted. `changed` counts elements whose bits differ (whose values differ
    where the dtypes do). `largest` and `values` are of the real or the imaginary part where the
    elements are complex.
    """

    elements: int = 0
    changed: int = 0
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    largest: float = 0.0  # |b - a|
    position: int = -1  # of that element in the flat tensor
    values: tuple[float, float] = (0.0, 0.0)  # a and b there
    nan: tuple[int, int] = (0, 0)
    inf: tuple[int, int] = (0, 0)
    numeric: bool = True

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor) -> Sums:
        """Return the sums over two tensors of one shape."""
        sums = cls(numeric=all(is_numeric(str(t.dtype)[len("torch.") :]) for t in (a, b)))
        a, b = a.reshape(-1), b.reshape(-1)
        for start in range(0, len(a), _BLOCK):
            sums._add(a[start : start + _BLOCK], b[start : start + _BLOCK])
        return sums

    def _add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        begin, count = self.elements, len(x)
        self.elements += count
        same_dtype = x.dtype == y.dtype
        if not self.numeric:
            self.changed += _unlike(_bits(x) != _bits(y), count) if same_dtype else count
            return
        a, b = _numbers(x), _numbers(y)
        unequal = _bits(x) != _bits(y) if same_dtype else (a != b) & ~(a.isnan() & b.isnan())
        self.changed += _unlike(unequal, count)
        aa, bb = float(a.dot(a)), float(b.dot(b))
        if not (math.isfinite(aa) and math.isfinite(bb)):
            odd = ~(a.isfinite() & b.isfinite())
            self.nan = self.nan[0] + int(a.isnan().sum()), self.nan[1] + int(b.isnan().sum())
            self.inf = self.inf[0] + int(a.isinf().sum()), self.inf[1] + int(b.isinf().sum())
            a, b = a.masked_fill(odd, 0.0), b.masked_fill(odd, 0.0)
            aa, bb = float(a.dot(a)), float(b.dot(b))
        difference = b - a
        self.aa += aa
        self.bb += bb
        self.ab += float(a.dot(b))
        self.dd += float(difference.dot(difference))
        largest = float(difference.abs_().max())
        if largest > self.largest:
            at = int(difference.argmax())
            self.largest, self.position = largest, begin + at * count // len(a)
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
        """Add the sums of another tensor, for those of a layer. `position` means nothing then."""
        self.elements, self.changed = self.elements + other.elements, self.changed + other.changed
        self.aa, self.bb = self.aa + other.aa, self.bb + other.bb
        self.ab, self.dd = self.ab + other.ab, self.dd + other.dd
        self.nan = self.nan[0] + other.nan[0], self.nan[1] + other.nan[1]
        self.inf = self.inf[0] + other.inf[0], self.inf[1] + other.inf[1]
        self.largest = max(self.largest, other.largest)
        self.numeric = self.numeric and other.numeric


def _numbers(x: torch.Tensor) -> torch.Tensor:
    """Return the elements as float64, the two parts of complex ones side by side."""
    if x.is_complex():
        return torch.view_as_real(x.to(torch.complex128)).reshape(-1)
    return x.to(torch.float64)


def _bits(x: torch.Tensor) -> torch.Tensor:
    if x.is_complex() and x.dtype != torch.complex32:
        x = torch.view_as_real(x).reshape(-1)
    return x.contiguous().view(_BITS[x.dtype.itemsize])


def _unlike(unequal: torch.Tensor, count: int) -> int:
    """Return how many of `count` elements have a part that is unequal."""
    if len(unequal) > count:
        unequal = unequal.reshape(count, -1).any(dim=1)
    return int(unequal.count_nonzero())
