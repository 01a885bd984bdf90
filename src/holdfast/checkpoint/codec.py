"""Between a tree and the manifest's JSON, and reading a checkpoint back without unpickling.

The encoding (docs/en/format.md has the table): null, booleans, strings, finite floats and lists
stand for themselves; everything else is an object with one key that names its type.
"""

from __future__ import annotations

import base64
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from holdfast.checkpoint.container import ARCHIVE, Reader, Record
from holdfast.checkpoint.tree import EmptyBytes, TensorLeaf, Tree
from holdfast.errors import ForeignCheckpoint
from holdfast.i18n import _


def _dtypes() -> dict[str, torch.dtype]:
    names = (name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))
    return {
        str(getattr(torch, name)).removeprefix("torch."): getattr(torch, name) for name in names
    }


_DTYPES = _dtypes()


def to_json(tree: Tree) -> dict[str, Any]:
    """The manifest's part of a state: the index of its `tensors`, and the `tree` of its values."""
    return {"tensors": [leaf.to_json() for leaf in tree.leaves], "tree": _Encoder(tree).run()}


class _Encoder:
    """Writes a tree as JSON; a container that stands in several places is written once."""

    def __init__(self, tree: Tree) -> None:
        self._root = tree.root
        self._index = {id(leaf): i for i, leaf in enumerate(tree.leaves)}
        self._count: dict[int, int] = {}
        self._names: dict[int, int] = {}

    def run(self) -> Any:
        self._count_uses(self._root)
        return self._encode(self._root)

    def _count_uses(self, value: Any) -> None:
        if not isinstance(value, dict | list | tuple | set):
            return
        self._count[id(value)] = self._count.get(id(value), 0) + 1
        if self._count[id(value)] > 1:
            return
        children = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        for child in children:
            self._count_uses(child)
        if isinstance(value, OrderedDict):
            for child in vars(value).values():
                self._count_uses(child)

    def _encode(self, value: Any) -> Any:
        if isinstance(value, dict | list | tuple | set) and self._count[id(value)] > 1:
            if id(value) in self._names:
                return {"ref": self._names[id(value)]}
            name = self._names[id(value)] = len(self._names)
            return {"shared": name, "value": self._encode_new(value)}
        return self._encode_new(value)

    def _encode_new(self, value: Any) -> Any:  # noqa: PLR0911, PLR0912 - one line a type
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, TensorLeaf):
            return {"tensor": self._index[id(value)]}
        if isinstance(value, torch.Size):
            return {"size": list(value)}
        if isinstance(value, int):
            return value if -(2**53) <= value <= 2**53 else {"int": str(value)}
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
        if isinstance(value, complex):
            return {"complex": struct.pack(">dd", value.real, value.imag).hex()}
        if isinstance(value, EmptyBytes):
            return {"bytes": ""}
        if isinstance(value, bytes | bytearray):
            kind = "bytes" if isinstance(value, bytes) else "bytearray"
            return {kind: base64.b64encode(value).decode()}
        if isinstance(value, list):
            return [self._encode(item) for item in value]
        if isinstance(value, tuple):
            return {"tuple": [self._encode(item) for item in value]}
        if isinstance(value, set):
            return {"set": [self._encode(item) for item in value]}
        if isinstance(value, dict):
            pairs = [[self._encode(key), self._encode(item)] for key, item in value.items()]
            if not isinstance(value, OrderedDict):
                return {"dict": pairs}
            attributes = {name: self._encode(item) for name, item in vars(value).items()}
            return {"odict": pairs, **({"attributes": attributes} if attributes else {})}
        kind = "dtype" if isinstance(value, torch.dtype) else "device"
        return {kind: str(value).removeprefix("torch.")}


class Decoder:
    """Builds the objects of a manifest's tree; `tensor(i)` gives the i-th tensor of its index."""

    def __init__(self, tensor: Callable[[int], torch.Tensor]) -> None:
        self._tensor = tensor
        self._shared: dict[int, Any] = {}
        self._simple: dict[str, Callable[[Any], Any]] = {
            "tensor": tensor,
            "size": torch.Size,
            "int": int,
            "float": lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
            "complex": lambda text: complex(*struct.unpack(">dd", bytes.fromhex(text))),
            "bytes": base64.b64decode,
            "bytearray": lambda text: bytearray(base64.b64decode(text)),
            "dtype": _DTYPES.__getitem__,
            "device": torch.device,
            "ref": self._shared.__getitem__,
            "tuple": lambda items: tuple(self(item) for item in items),
            "set": lambda items: {self(item) for item in items},
            "dict": lambda pairs: {self(key): self(item) for key, item in pairs},
        }

    def __call__(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "shared" in node:
            value = self._shared[node["shared"]] = self(node["value"])
            return value
        if "odict" in node:
            value = OrderedDict((self(key), self(item)) for key, item in node["odict"])
            for name, item in node.get("attributes", {}).items():
                setattr(value, name, self(item))
            return value
        (kind, content), *rest = node.items()
        if rest:
            raise ValueError(kind)
        return self._simple[kind](content)


# ------------------------------------------------------------------------------------- reading


def read(reader: Reader, *, only: str | None = None) -> Any:
    """The state in an open checkpoint, every byte that is used verified before it is believed.

    With `only`, that one top-level key alone: other tensors are neither read nor allocated.
    Raises `DamagedCheckpoint`; `ForeignCheckpoint` where the manifest makes no sense.
    """
    reader.check_structure()
    tensors = _TensorSource(reader)
    try:
        tree = reader.manifest["tree"]
        if only is not None:
            tree = next(item for key, item in tree["dict"] if key == only)
        return Decoder(tensors)(tree)
    except (KeyError, ValueError, TypeError, IndexError, RecursionError, StopIteration,
            struct.error) as error:  # fmt: skip
        raise ForeignCheckpoint(
            _("{path} has a manifest that makes no sense.", path=reader.path)
        ) from error


class _TensorSource:
    """The tensors of an open checkpoint by index, each storage read once, when first asked for."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._entries = reader.manifest["tensors"]
        self._by_name: dict[str, Record] = {record.name: record for record in reader.records}
        self._storages: dict[int, torch.Tensor] = {}
        self._tensors: dict[int, torch.Tensor] = {}

    def __call__(self, index: int) -> torch.Tensor:
        if index not in self._tensors:
            self._tensors[index] = self._build(self._entries[index])
        return self._tensors[index]

    def _build(self, entry: Mapping[str, Any]) -> torch.Tensor:
        dtype, shape, stride = _DTYPES[entry["dtype"]], entry["shape"], entry["stride"]
        key, offset = entry["storage"], entry["offset"]
        raw = self._storages.get(key)
        if raw is None:
            raw = self._storages[key] = self._load(self._by_name[f"{ARCHIVE}/data/{key}"])
        # Bounds first: a stride or shape that reaches outside must never become a tensor.
        if len(shape) != len(stride) or min([offset, *shape, *stride], default=0) < 0:
            raise ValueError(entry["path"])
        reach = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1
        if 0 in shape:
            reach = 0
        if (offset + reach) * dtype.itemsize > raw.nbytes:
            raise ValueError(entry["path"])
        result = torch.empty(0, dtype=dtype)
        return result.set_(raw.untyped_storage(), offset, shape, stride)

    def _load(self, record: Record) -> torch.Tensor:
        raw = torch.empty(record.size, dtype=torch.uint8)
        if record.size:
            self._reader.read_into(record, raw.numpy().data)
        else:
            self._reader.check(record, [])
        return raw
