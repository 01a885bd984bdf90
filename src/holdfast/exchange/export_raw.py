"""Weights alone, out of a file that does not say what its model is.

There is no model to ask for logits, so every bit is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from holdfast.checkpoint.format import read_manifest
from holdfast.checkpoint.state import load, load_foreign, load_weights
from holdfast.errors import ForeignCheckpoint
from holdfast.exchange.export_check import Deviation
from holdfast.exchange.export_formats import write_state
from holdfast.i18n import _

FORMS = ("safetensors", "weights")
_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Raw:
    """Tensors by name, and what little is known of them."""

    tensors: dict[str, torch.Tensor]
    manifest: Mapping[str, Any] | None
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> int | None:
        """The step of a checkpoint of ours; None for other files."""
        return None if self.manifest is None else int(self.manifest["identity"]["step"])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> str:
        """The dtypes that there are."""
        kinds = {str(t.dtype).removeprefix("torch.") for t in self.tensors.values()}
        return ", ".join(sorted(kinds))


def read(path: Path, dtype: torch.dtype | None) -> Raw:
    """Return the weights of any file, cast to `dtype` where they are floating-point numbers."""
    try:
        manifest: Mapping[str, Any] | None = read_manifest(path)
    except ForeignCheckpoint:
        manifest = None
    tensors = load_weights(path)
    if dtype is not None:
        cast = {id(t): t.to(dtype) if t.is_floating_point() else t for t in tensors.values()}
        tensors = {name: cast[id(tensor)] for name, tensor in tensors.items()}
    return Raw(tensors, manifest)


def write(raw: Raw, form: str, draft: Path) -> None:
    """Write the tensors as `form`; of names for one tensor safetensors keeps the first."""
    if form == "weights":
        write_state({"model": raw.tensors}, draft, raw.manifest)
        return
    from safetensors.torch import save_file

    kept: dict[tuple[Any, ...], str] = {}
    single: dict[str, torch.Tensor] = {}
    for name, tensor in raw.tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        first = kept.setdefault(key, name) if tensor.numel() else name
        if first != name:
            raw.notes.append(
                _(
                    "{name} is the same tensor as {first} and is written once.",
                    name=name,
                    first=first,
                )
            )
        else:
            # A copy: tensors that share a part of their memory are refused by safetensors.
            single[name] = tensor.detach().clone().contiguous()
    save_file(single, draft / _FILE, metadata={"format": "pt"})


def insist_on_bits(raw: Raw, form: str, draft: Path) -> None:
    """Read back what `write` has written. Raises Deviation where one bit is another."""
    if form == "weights":
        found = load(draft, only="model")
        load_foreign(draft)  # as everybody else reads it
    else:
        from safetensors.torch import load_file

        found = load_file(draft / _FILE)
    for name, tensor in raw.tensors.items():
        if name not in found and form == "safetensors":
            continue  # its other name is there, and compared
        if name not in found or not _same_bits(found[name], tensor):
            raise Deviation(
                _("{name} was read back with other values; the export was not kept.", name=name)
            )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)
