"""The tensors of a checkpoint as a person reads them: by section, and by layer in a few rows.

From the manifest alone, no torch: names, shapes and dtypes, and which of them share their bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.manage.tensors import Tensor

MODEL, OPTIMIZER, OTHER = "model", "optimizer", "other"
ROWS = 24  # rows of layers that a screen holds beside the rest; more are drawn together
_MODEL_KEYS = ("model", "model_state_dict", "state_dict")


@dataclass(slots=True)
class Row:
    """Tensors of one kind in all layers of a kind: `layers.{0..11}.mlp.up_proj.weight`."""

    pattern: tuple[str, ...]  # parts of the name, "*" for a number
    numbers: list[set[int]]  # those that stand for each "*"
    tensors: int = 0
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    dtypes: set[str] = field(default_factory=set)
    numel: int = 0
    nbytes: int = 0

    @property
    def name(self) -> str:
        """The name of all of them."""
        numbers = iter(self.numbers)
        return ".".join(_range(next(numbers)) if part == "*" else part for part in self.pattern)

    def to_json(self) -> dict[str, Any]:
        """The documented form; `shape` is null where they differ."""
        return {
            "name": self.name,
            "tensors": self.tensors,
            "shape": list(next(iter(self.shapes))) if len(self.shapes) == 1 else None,
            "dtypes": sorted(self.dtypes),
            "parameters": self.numel,
            "bytes": self.nbytes,
        }


@dataclass(frozen=True, slots=True)
class Section:
    """The tensors below one key of the state; `kind` is MODEL, OPTIMIZER or OTHER."""

    name: str
    kind: str
    tensors: int
    numel: int
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """The documented form."""
        return {
            "name": self.name,
            "kind": self.kind,
            "tensors": self.tensors,
            "elements": self.numel,
            "bytes": self.nbytes,
        }


def sections_of(tensors: Iterable[Tensor], state: Mapping[Any, Any]) -> list[Section]:
    """The sections in their order; `state` is the plain state, which says what each is."""
    by_name: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        by_name.setdefault(tensor.section, []).append(tensor)
    return [
        Section(
            name,
            _kind(name, state.get(name)),
            len(own),
            sum(t.numel for t in own if t.same_as is None),
            sum(t.nbytes for t in own),
        )
        for name, own in by_name.items()
    ]


def _kind(name: str, value: object) -> str:
    if not isinstance(value, Mapping):
        return OTHER
    if "param_groups" in value:
        return OPTIMIZER
    flat = bool(value) and all(isinstance(v, Mapping) and "storage" in v for v in value.values())
    return MODEL if flat or name in _MODEL_KEYS else OTHER


def rows_of(tensors: Sequence[Tensor], most: int = ROWS) -> list[Row]:
    """At most `most` rows (where the names allow it) for the layers of a model.

    Layers that differ in their number alone share a row; where that is not enough, those of several
    shapes do too, then what has the same beginning, as much of it as possible.
    """
    names = [tuple(tensor.name.replace("/", ".").split(".")) for tensor in tensors]
    rows = _grouped(tensors, names, None)
    for depth in range(max(map(len, names), default=0), 0, -1):
        if len(rows) <= most:
            break
        rows = _grouped(tensors, names, depth)
    return rows


def _grouped(
    tensors: Sequence[Tensor], names: Sequence[tuple[str, ...]], depth: int | None
) -> list[Row]:
    """A row for all whose first `depth` parts are the same but for numbers; None: for all parts,
    shape and dtype."""
    rows: dict[tuple[Any, ...], Row] = {}
    for tensor, name in zip(tensors, names, strict=True):
        parts = name[:depth]
        pattern = tuple("*" if part.isdecimal() else part for part in parts)
        kind = (tensor.shape, tensor.dtype, tensor.same_as is None) if depth is None else ()
        row = rows.setdefault((pattern, *kind), Row(pattern, [set() for p in pattern if p == "*"]))
        for numbers, part in zip(row.numbers, filter(str.isdecimal, parts), strict=True):
            numbers.add(int(part))
        row.tensors += 1
        row.shapes.add(tensor.shape)
        row.dtypes.add(tensor.dtype)
        row.numel += tensor.numel if tensor.same_as is None else 0
        row.nbytes += tensor.nbytes
    return list(rows.values())


def _range(numbers: set[int]) -> str:
    """7, {0..11} or {0,2,5}."""
    ordered = sorted(numbers)
    if len(ordered) == 1:
        return str(ordered[0])
    if ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{{{ordered[0]}..{ordered[-1]}}}"
    return "{" + ",".join(map(str, ordered)) + "}"
