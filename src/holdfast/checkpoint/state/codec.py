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

from holdfast.checkpoint.format import ARCHIVE, Reader, Record, plain, reading
from holdfast.checkpoint.state.tree import DTYPES, EmptyBytes, TensorLeaf, Tree
from holdfast.errors import ForeignCheckpoint

_INT64 = 1 << 63
_SHAREABLE = (dict, list, tuple, set, bytearray)


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
        if not isinstance(value, _SHAREABLE):
            return
        self._count[id(value)] = self._count.get(id(value), 0) + 1
        if self._count[id(value)] > 1 or isinstance(value, bytearray):
            return
        children = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        for child in children:
            self._count_uses(child)
        if isinstance(value, OrderedDict):
            for child in vars(value).values():
                self._count_uses(child)

    def _encode(self, value: Any) -> Any:
        if isinstance(value, _SHAREABLE) and self._count[id(value)] > 1:
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


class Decoder(plain.Decoder):
    """Builds torch's own objects where the plain decoder leaves text."""

    def __init__(
        self, tensor: Callable[[int], Any], definitions: Mapping[Any, Any] | None = None
    ) -> None:
        """`tensor(i)` gives the i-th tensor of the manifest's index."""
        super().__init__((), definitions)
        self._tensor = tensor

    def tensor(self, index: Any) -> Any:
        return self._tensor(index)

    def size(self, items: Any) -> Any:
        return torch.Size(super().size(items))

    def dtype(self, name: Any) -> Any:
        return DTYPES[name]

    def device(self, name: Any) -> Any:
        try:
            return torch.device(plain.text_of(name))
        except RuntimeError as error:
            raise ValueError(name) from error


# ------------------------------------------------------------------------------------- reading


def read(reader: Reader, *, only: str | None = None, arrays: bool = False) -> Any:
    """The state in an open checkpoint, every byte that is used verified before it is believed.

    With `only`, that one top-level key alone: other tensors are neither read nor allocated. Without
    it every byte of the file is verified, the pickle for other people's `torch.load` too. With
    `arrays`, what was saved as a NumPy array is one, where `torch.load` gives a tensor.
    Raises `DamagedCheckpoint`; `ForeignCheckpoint` where the manifest makes no sense.
    """
    try:
        tensors, tree = _TensorSource(reader, arrays), reader.manifest["tree"]
        if only is None:
            state = Decoder(tensors)(tree)
        else:
            part = [item for key, item in tree["dict"] if key == only]
            state = Decoder(tensors, _definitions(tree))(part[0]) if part else None
    except plain.NONSENSE as error:
        raise ForeignCheckpoint(
            "{path} has a manifest that makes no sense.", path=reader.path
        ) from error
    reader.load(tensors.buffers, rest=only is None)
    if only is not None and not part:
        raise ForeignCheckpoint("{path} holds no {name}.", path=reader.path, name=only)
    return state


def keys(reader: Reader) -> list[str]:
    """The top-level keys of the state in an open checkpoint. Raises `ForeignCheckpoint`."""
    try:
        return [key for key, _item in reader.manifest["tree"]["dict"] if isinstance(key, str)]
    except plain.NONSENSE as error:
        raise ForeignCheckpoint(
            "{path} has a manifest that makes no sense.", path=reader.path
        ) from error


def _definitions(tree: Any) -> dict[Any, Any]:
    """Every node that defines a shared container, by its name."""
    found: dict[Any, Any] = {}
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            if "shared" in node:
                found.setdefault(node["shared"], node)
            nodes.extend(node.values())
        elif isinstance(node, list):
            nodes.extend(node)
    return found


class _TensorSource:
    """The tensors of an open checkpoint by index, over memory that `buffers` say is to be filled.

    The manifest, whose own digest is right, says all there is to know before a payload is read; so
    everything can be read at once, in the order of the file.
    """

    def __init__(self, reader: Reader, arrays: bool) -> None:
        self._arrays = arrays
        self.buffers: list[tuple[Record, memoryview]] = []
        self._entries: list[Any] = reader.manifest["tensors"]
        self._by_name: dict[str, Record] = {record.name: record for record in reader.records}
        self._storages: dict[str, torch.Tensor] = {}
        self._values: dict[int, Any] = {}

    def __call__(self, index: int) -> Any:
        index = plain.whole(index, len(self._entries))
        if index not in self._values:
            entry = self._entries[index]
            tensor = self._build(entry)
            is_array = self._arrays and entry.get("numpy") is True
            self._values[index] = tensor.numpy() if is_array else tensor
        return self._values[index]

    def _build(self, entry: Mapping[str, Any]) -> torch.Tensor:
        dtype, offset = DTYPES[entry["dtype"]], plain.whole(entry["offset"])
        shape = [plain.whole(n) for n in entry["shape"]]
        stride = [plain.whole(n) for n in entry["stride"]]
        name = f"{ARCHIVE}/data/{plain.whole(entry['storage'])}"
        record = self._by_name[name]
        # Bounds first: a stride or shape that reaches outside must never become a tensor.
        reach = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1
        if 0 in shape:
            reach = 0
        elements = math.prod(max(n, 1) for n in shape)
        if (offset + reach) * dtype.itemsize > record.size or elements >= _INT64:
            raise ValueError(entry)
        if name not in self._storages:
            self._storages[name] = self._allocate(record)
        result = torch.empty(0, dtype=dtype)
        return result.set_(self._storages[name].untyped_storage(), offset, shape, stride)

    def _allocate(self, record: Record) -> torch.Tensor:
        pages = reading.own_pages(record.size)
        if pages is not None:
            raw = torch.frombuffer(pages, dtype=torch.uint8, count=record.size)
        else:
            raw = torch.empty(record.size, dtype=torch.uint8)
        self.buffers.append((record, raw.numpy().data))
        return raw


class OneByOne:
    """The tensors of an open checkpoint by their index, one storage in memory at a time."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._storage: Any = None
        self._source = _TensorSource(reader, arrays=False)

    def __call__(self, index: int) -> torch.Tensor:
        """Return the tensor, its bytes verified. Raises `DamagedCheckpoint`, `ForeignCheckpoint`.

        Two tensors of one storage that are asked for one after the other cost one reading.
        """
        try:
            storage = self._reader.manifest["tensors"][index]["storage"]
            if storage != self._storage:
                self._storage, self._source = storage, _TensorSource(self._reader, arrays=False)
            tensor: torch.Tensor = self._source(index)
        except plain.NONSENSE as error:
            raise ForeignCheckpoint(
                "{path} has a manifest that makes no sense.", path=self._reader.path
            ) from error
        while self._source.buffers:
            self._reader.fill(*self._source.buffers.pop())
        return tensor
