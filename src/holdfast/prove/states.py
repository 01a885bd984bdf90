"""Two states side by side: what differs, by its dotted name, to the last bit.

States are what `load` gives: plain containers, values and tensors. NaN is equal to the same NaN,
0.0 is not equal to -0.0, and a number is not equal to a text or to a number of another type.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.i18n import _

_CHUNK = 1 << 22  # elements that are compared at a time: a mask of a whole model would not fit
_LONGEST = 80  # characters of a value that a message shows


@dataclass(frozen=True, slots=True)
class Difference:
    """One place where two states differ; `a` and `b` are the two values as text."""

    path: str  # dotted, as in "model.layers.0.weight"
    index: tuple[int, ...] | None  # of the first element that differs, where it is a tensor
    a: str
    b: str

    @property
    def name(self) -> str:
        """The path with its index: `model.layers.0.weight[3, 5]`."""
        if not self.index:
            return self.path or "state"
        return f"{self.path or 'state'}[{', '.join(map(str, self.index))}]"

    def __str__(self) -> str:
        return f"{self.name}: {self.a} ≠ {self.b}"

    def to_json(self) -> dict[str, Any]:
        index = None if self.index is None else list(self.index)
        return {"path": self.path, "index": index, "a": self.a, "b": self.b}


def first_difference(a: Any, b: Any, path: str = "") -> Difference | None:
    """The first place where `a` and `b` differ, in the order of `a`; None where they are equal."""
    return next(differences(a, b, path), None)


def differences(a: Any, b: Any, path: str = "") -> Iterator[Difference]:
    """Every place where `a` and `b` differ, one for each tensor or value, in the order of `a`."""
    if type(a) is not type(b):
        yield _plain_difference(path, type(a).__name__, type(b).__name__)
    elif isinstance(a, torch.Tensor):
        yield from _tensors(a, b, path)
    elif isinstance(a, Mapping):
        yield from _mappings(a, b, path)
    elif isinstance(a, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from differences(x, y, _join(path, i))
        if len(a) != len(b):
            x, y = (_("{count} entries", count=len(items)) for items in (a, b))
            yield Difference(path, None, x, y)
    elif not _equal(a, b):
        yield _plain_difference(path, a, b)


def count_values(state: Any) -> tuple[int, int]:
    """Return the numbers of tensors and of other values in a state."""
    if isinstance(state, torch.Tensor):
        return 1, 0
    if isinstance(state, Mapping):
        counts = [count_values(item) for item in state.values()]
    elif isinstance(state, list | tuple):
        counts = [count_values(item) for item in state]
    else:
        return 0, 1
    return sum(tensors for tensors, _values in counts), sum(values for _tensors, values in counts)


# ------------------------------------------------------------------------------------ the details


def _mappings(a: Mapping[Any, Any], b: Mapping[Any, Any], path: str) -> Iterator[Difference]:
    missing = _("nothing")
    for key, value in a.items():
        here = _join(path, key)
        if key in b:
            yield from differences(value, b[key], here)
        else:
            yield Difference(here, None, _shown(value), missing)
    for key, value in b.items():
        if key not in a:
            yield Difference(_join(path, key), None, missing, _shown(value))


def _tensors(a: torch.Tensor, b: torch.Tensor, path: str) -> Iterator[Difference]:
    if a.dtype != b.dtype or a.shape != b.shape:
        yield Difference(path, None, _shown(a), _shown(b))
        return
    flat = [tensor.detach().cpu().reshape(-1) for tensor in (a, b)]
    for start in range(0, a.numel(), _CHUNK):
        x, y = (part[start : start + _CHUNK] for part in flat)
        size = a.element_size()
        unequal = _bytes(x, size) != _bytes(y, size)
        if unequal.any():
            at = int(unequal.any(dim=1).nonzero()[0])
            index = _unravel(start + at, a.shape)
            yield _plain_difference(path, x[at].item(), y[at].item(), index)
            return


def _bytes(flat: torch.Tensor, size: int) -> torch.Tensor:
    """The bytes of each element, a row each; bytes, because NaN is not equal to itself."""
    return flat.contiguous().view(torch.uint8).reshape(-1, size)


def _unravel(position: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The index of an element from its position in row-major order."""
    index = []
    for size in reversed(shape):
        position, rest = divmod(position, size)
        index.append(rest)
    return tuple(reversed(index))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return struct.pack("dd", a.real, a.imag) == struct.pack("dd", b.real, b.imag)
    return bool(a == b)


def _plain_difference(
    path: str, a: Any, b: Any, index: tuple[int, ...] | None = None
) -> Difference:
    x, y = _shown(a), _shown(b)
    if x == y and isinstance(a, float):  # two NaNs, say
        x, y = (f"{x} ({struct.pack('>d', value).hex()})" for value in (a, b))
    return Difference(path, index, x, y)


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
