"""Measure how far the weights of two checkpoints are apart, by tensor and by layer.

One tensor of each file is in memory at a time. The form of `--json` is `Drift.to_json`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast.checkpoint.format import Reader
from holdfast.checkpoint.state import OneByOne
from holdfast.errors import HoldfastError
from holdfast.manage.compare.sums import Sums, is_numeric
from holdfast.manage.progress import Progress
from holdfast.manage.tensors import Tensor, tensors_of

MODEL, ALL = "model", "all"
_UNASKED = ("rng",)  # the state of random generators is no numbers that drift

Show = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class TensorDrift:
    """One tensor that both have, in one shape."""

    a: Tensor
    b: Tensor
    sums: Sums
    index: list[int] | None  # of the largest change; None where nothing changed
    same_as: str | None = None  # the name under which this pair was seen before (tied weights)

    @property
    def layer(self) -> str:
        return layer_of(self.a.dotted)

    def to_json(self, labels: Sequence[str]) -> dict[str, Any]:
        a, b = labels
        dtypes = {a: self.a.dtype, b: self.b.dtype}
        largest = None
        if self.index is not None:
            values = dict(zip(labels, self.sums.values, strict=True))
            largest = {"change": self.sums.largest, "index": self.index, "values": values}
        return {
            "section": self.a.section,
            "name": self.a.dotted,
            "layer": self.layer,
            "shape": list(self.a.shape),
            "dtypes": dtypes,
            **_numbers(self.sums, labels),
            "largest": largest,
            "same_as": self.same_as,
        }


@dataclass(slots=True)
class LayerDrift:
    """The sums of the tensors of one layer; `tensors` without those that are tied to one
    that was seen before."""

    section: str
    name: str
    sums: Sums = field(default_factory=Sums)
    tensors: list[TensorDrift] = field(default_factory=list)

    @property
    def most(self) -> TensorDrift | None:
        """The tensor with the largest change; None where nothing changed."""
        changed = [tensor for tensor in self.tensors if tensor.index is not None]
        return max(changed, key=lambda tensor: tensor.sums.largest, default=None)

    def to_json(self, labels: Sequence[str]) -> dict[str, Any]:
        most = self.most
        largest = None
        if most is not None:
            largest = {"change": most.sums.largest, "tensor": most.a.dotted, "index": most.index}
        return {
            "section": self.section,
            "name": self.name,
            "tensors": len(self.tensors),
            **_numbers(self.sums, labels),
            "largest": largest,
        }


@dataclass(frozen=True, slots=True)
class Unlike:
    """A tensor that both have and that cannot be subtracted: of other shape, or of odd dtypes."""

    a: Tensor
    b: Tensor

    def to_json(self, labels: Sequence[str]) -> dict[str, Any]:
        sides = zip(labels, (self.a, self.b), strict=True)
        return {
            "section": self.a.section,
            "name": self.a.dotted,
            **{label: {"shape": list(t.shape), "dtype": t.dtype} for label, t in sides},
        }


@dataclass(frozen=True, slots=True)
class Drift:
    """All that is to be said of two checkpoints, `labels[1]` against `labels[0]`."""

    labels: tuple[str, str]
    sections: list[str]
    tensors: list[TensorDrift]
    unlike: list[Unlike]
    only: dict[str, list[Tensor]]  # label → tensors that the other one lacks

    @property
    def layers(self) -> list[LayerDrift]:
        """The layers, the most changed first; among equals in the order of the state. One that
        has nothing but the tensors of another is none of its own."""
        found: dict[tuple[str, str], LayerDrift] = {}
        for tensor in self.tensors:
            if tensor.same_as is None:
                key = tensor.a.section, tensor.layer
                layer = found.setdefault(key, LayerDrift(*key))
                layer.tensors.append(tensor)
                layer.sums.join(tensor.sums)
        return sorted(found.values(), key=lambda layer: -_change(layer.sums))

    @property
    def total(self) -> Sums:
        """All compared tensors as one; tied ones once."""
        total = Sums()
        for tensor in self.tensors:
            if tensor.same_as is None:
                total.join(tensor.sums)
        return total

    @property
    def tied(self) -> list[TensorDrift]:
        """The tensors that are another one in both checkpoints."""
        return [tensor for tensor in self.tensors if tensor.same_as is not None]

    @property
    def identical(self) -> bool:
        """True if both have the same tensors with the same bits."""
        same = all(t.sums.changed == 0 and t.a.dtype == t.b.dtype for t in self.tensors)
        return same and not self.unlike and not any(self.only.values())

    def to_json(self) -> dict[str, Any]:
        """The documented form."""
        return {
            "identical": self.identical,
            "sections": self.sections,
            "total": _numbers(self.total, self.labels),
            "layers": [layer.to_json(self.labels) for layer in self.layers],
            "tensors": [tensor.to_json(self.labels) for tensor in self.tensors],
            "unlike": [unlike.to_json(self.labels) for unlike in self.unlike],
            "only_in": {
                label: [
                    {
                        "section": t.section,
                        "name": t.dotted,
                        "shape": list(t.shape),
                        "dtype": t.dtype,
                    }
                    for t in tensors
                ]
                for label, tensors in self.only.items()
            },
        }


def _numbers(sums: Sums, labels: Sequence[str]) -> dict[str, Any]:
    norms = [math.sqrt(square) if sums.numeric else None for square in (sums.aa, sums.bb)]
    return {
        "elements": sums.elements,
        "changed": sums.changed,
        "relative": sums.relative,
        "cosine": sums.cosine,
        "norms": dict(zip(labels, norms, strict=True)),
        "difference_norm": math.sqrt(sums.dd) if sums.numeric else None,
        "nan": dict(zip(labels, sums.nan, strict=True)),
        "inf": dict(zip(labels, sums.inf, strict=True)),
    }


def _change(sums: Sums) -> float:
    """Return the key that layers are sorted by: NaN and the infinities come first."""
    if any(sums.nan) or any(sums.inf):
        return math.inf
    return -1.0 if sums.relative is None else sums.relative


def layer_of(name: str) -> str:
    """The layer a tensor belongs to: its name up to the first number ("model.layers.3"), or
    without its last part where it has none ("model.norm")."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1]) or name


# ------------------------------------------------------------------------------------- comparing


def drift(
    first: tuple[str, Path],
    second: tuple[str, Path],
    *,
    wanted: Sequence[str] = (),
    show: Show = lambda _progress: None,
    file: tuple[int, int] = (1, 1),
) -> Drift:
    """Compare the tensors of two checkpoints, each given as (label, path).

    `wanted` names sections (top-level keys of the state) or `ALL`; nothing: the model, or all where
    a checkpoint has no such section. `show` is told the progress of `file`, (number, of). Only what
    both have in one shape is read, and all of that is verified.

    Raises HoldfastError where there is no such section, DamagedCheckpoint, ForeignCheckpoint.
    """
    labels = first[0], second[0]
    with Reader(first[1]) as a, Reader(second[1]) as b:
        for reader in (a, b):
            reader.check_structure()
        states = _by_section(a), _by_section(b)
        sections = _sections(states, wanted)
        pairs: list[tuple[Tensor, Tensor]] = []
        unlike: list[Unlike] = []
        only: dict[str, list[Tensor]] = {label: [] for label in labels}
        for section in sections:
            mine, theirs = (state.get(section, {}) for state in states)
            for name, tensor in mine.items():
                other = theirs.get(name)
                if other is None:
                    only[labels[0]].append(tensor)
                elif _comparable(tensor, other):
                    pairs.append((tensor, other))
                else:
                    unlike.append(Unlike(tensor, other))
            only[labels[1]] += [t for name, t in theirs.items() if name not in mine]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # waking the others takes longer than adding up a block
        try:
            measured = _measure(a, b, pairs, show, file)
        finally:
            torch.set_num_threads(threads)
    return Drift(labels, sections, measured, unlike, only)


def _by_section(reader: Reader) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for tensor in tensors_of(reader.manifest, reader.path):
        found.setdefault(tensor.section, {})[tensor.name] = tensor
    return found


def _sections(states: Iterable[Mapping[str, Any]], wanted: Sequence[str]) -> list[str]:
    known = list(dict.fromkeys(section for state in states for section in state))
    usual = [section for section in known if section not in _UNASKED]
    if not wanted:
        return [MODEL] if all(MODEL in state for state in states) else usual
    strange = [name for name in wanted if name not in known and name != ALL]
    if strange:
        raise HoldfastError(
            "There are no tensors in a section {name}; these have some: {known}.",
            name=", ".join(strange),
            known=", ".join(known) or "-",
        )
    return usual if ALL in wanted else [section for section in known if section in wanted]


def _comparable(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype.startswith("complex") != b.dtype.startswith("complex"):
        return False
    return a.dtype == b.dtype or (is_numeric(a.dtype) and is_numeric(b.dtype))


def _measure(
    a: Reader,
    b: Reader,
    pairs: Sequence[tuple[Tensor, Tensor]],
    show: Show,
    file: tuple[int, int],
) -> list[TensorDrift]:
    """Read and sum up the pairs, in the order of the first file: a disk that turns reads on."""
    began, done = time.monotonic(), 0
    sides = OneByOne(a), OneByOne(b)
    first = {(x.place, y.place): (x, y) for x, y in reversed(pairs)}
    ordered = sorted(first.values(), key=lambda pair: pair[0].storage)
    total = sum(x.numel for x, _y in ordered)
    size = sum(record.size for reader in (a, b) for record in reader.records)
    results: dict[Any, tuple[Sums, list[int] | None]] = {}
    for x, y in ordered:
        share = done * size // max(total, 1)
        show(Progress(*file, b.path, share, size, time.monotonic() - began))
        sums = Sums.of(sides[0](x.index), sides[1](y.index))
        done += x.numel
        index = None
        if sums.position >= 0:
            index = [int(i) for i in np.unravel_index(sums.position, x.shape)]
        results[x.place, y.place] = sums, index
    found = []
    for x, y in pairs:
        original = first[x.place, y.place][0]
        sums, index = results[x.place, y.place]
        found.append(TensorDrift(x, y, sums, index, None if original is x else original.dotted))
    return found
