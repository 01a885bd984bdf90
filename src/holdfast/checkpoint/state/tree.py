"""The tree of a state: plain containers and tensor leaves, and the pickle made from it.

Saving goes through `normalise`: it turns a nested state into what `torch.load(weights_only=True)`
can read back, or refuses with the path of the value. From that one tree come both the pickle for
other programs (here) and the JSON that our own reader builds objects from (codec.py).
"""

from __future__ import annotations

import codecs
import io
import pickle
import re
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from holdfast.checkpoint.format import ARCHIVE
from holdfast.checkpoint.state.names import plain_state
from holdfast.checkpoint.state.randomness import stream_of
from holdfast.checkpoint.system import Buffer
from holdfast.errors import UnsupportedValue

PICKLE = f"{ARCHIVE}/data.pkl"

# The storage classes that the `.pt` format names in its pickle. Newer dtypes have none: they are
# pickled as an untyped storage and a dtype, which torch calls "v3".
_STORAGE_TYPES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
    torch.complex128: "ComplexDoubleStorage",
    torch.complex64: "ComplexFloatStorage",
}

MAX_DEPTH = 100  # what pickle, JSON and their readers all manage on Python's default stack
_LONGEST_INT = 8 * 255 - 1  # bits: longer ones are pickled by LONG4, which weights_only lacks


def _dtypes() -> dict[str, torch.dtype]:
    """Return the dtypes of plain tensors by name: not quantised, not of 1 to 7 bits."""
    found = (getattr(torch, name) for name in dir(torch))
    names = {str(d).removeprefix("torch."): d for d in found if isinstance(d, torch.dtype)}
    strange = re.compile(r"qu?int\d.*|u?int[1-7]").fullmatch
    return {name: dtype for name, dtype in names.items() if not strange(name)}


DTYPES = _dtypes()
_SAVED_DTYPES = frozenset(DTYPES.values())

# Types whose values stand for themselves. Most of a tree is made of them, and normalising it is
# part of the stall of every snapshot: this one look spares the questions after it.
_ATOMS = frozenset({type(None), bool, float, str, torch.device})
_SMALL_INT = 1 << 62


# -------------------------------------------------------------------------------- a tree to save


@dataclass(eq=False, slots=True)
class StorageSlice:
    """The bytes of one storage that its tensors use, all that is saved of it."""

    key: int
    source: torch.UntypedStorage
    dtype: torch.dtype
    start: int  # bytes into `source`
    stop: int
    label: str = ""  # the key as the pickle says it: one object, for the pickler's memo

    def __post_init__(self) -> None:
        self.label = str(self.key)

    @property
    def record(self) -> str:
        return f"{ARCHIVE}/data/{self.key}"

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def tensor(self) -> torch.Tensor:
        """Return the bytes as a tensor on their own device."""
        whole = torch.empty(0, dtype=torch.uint8, device=self.source.device)
        return whole.set_(self.source, self.start, (self.nbytes,), (1,))

    def payload(self) -> memoryview:
        """Return the bytes in host memory, not copied if they are there already."""
        if self.nbytes == 0:
            return memoryview(b"")
        return self.tensor().cpu().numpy().data


@dataclass(eq=False, slots=True)
class TensorLeaf:
    """A tensor in the tree: a view of a `StorageSlice`. Pickles as torch pickles a tensor."""

    path: str
    tensor: torch.Tensor
    storage: StorageSlice
    array: bool = False  # of NumPy, in the live state

    @property
    def offset(self) -> int:
        """Offset into the saved storage, in elements."""
        if self.tensor.numel() == 0:
            return 0  # it has no bytes, and may point outside those that are saved
        return int(self.tensor.storage_offset()) - self.storage.start // self.tensor.element_size()

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "storage": self.storage.key,
            "dtype": str(self.tensor.dtype).removeprefix("torch."),
            "shape": list(self.tensor.shape),
            "stride": list(self.tensor.stride()),
            "offset": self.offset,
            **({"numpy": True} if self.array else {}),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        view: tuple[Any, ...] = (
            self.offset,
            tuple(self.tensor.shape),
            self.tensor.stride(),
            False,
            OrderedDict(),
        )
        if self.tensor.dtype in _STORAGE_TYPES:
            return torch._utils._rebuild_tensor_v2, (self.storage, *view)
        return torch._utils._rebuild_tensor_v3, (self.storage, *view, self.tensor.dtype)


class EmptyBytes:
    """Stands for `b""`: protocol 2 pickles that by a call that `weights_only` refuses."""

    def __reduce__(self) -> tuple[Any, ...]:
        return codecs.encode, ("", "latin1")


_EMPTY_BYTES = EmptyBytes()


@dataclass(slots=True)
class Tree:
    """A state made of plain containers and tensor leaves, ready to be written."""

    root: Any
    leaves: list[TensorLeaf]
    storages: list[StorageSlice]

    def pickled(self) -> bytes:
        buffer = io.BytesIO()
        _Pickler(buffer).dump(self.root)
        return buffer.getvalue()

    def payloads(self) -> list[tuple[str, Buffer]]:
        """Return all records but the manifest, in the order of the file."""
        return [*((s.record, s.payload()) for s in self.storages), *self.companions()]

    def companions(self) -> list[tuple[str, bytes]]:
        """Return the records behind the tensors, which tell `torch.load` what those are."""
        return [
            (PICKLE, self.pickled()),
            (f"{ARCHIVE}/byteorder", b"little"),
            (f"{ARCHIVE}/version", b"3\n"),
        ]

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes for storage in self.storages)


class _Pickler(pickle.Pickler):
    """Protocol 2 and storages by reference: the `data.pkl` that torch.save itself would write.

    A test holds it byte by byte against torch's. Every storage is tagged `cpu`, so that a file from
    a GPU opens on a machine without one.
    """

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=2)

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, StorageSlice):
            return None
        kind = _STORAGE_TYPES.get(obj.dtype)
        if kind is None:
            return "storage", torch.UntypedStorage, obj.label, "cpu", obj.nbytes
        return (
            "storage",
            getattr(torch, kind),
            obj.label,
            "cpu",
            obj.nbytes // obj.dtype.itemsize,
        )


# ------------------------------------------------------------------------------------- normalise


def normalise(state: Any) -> Tree:
    """Turn `state` into a `Tree` of what every `torch.load(weights_only=True)` reads back.

    Subclasses become their base type (IntEnum → int, np.float64 → float, defaultdict → dict, a
    named tuple → tuple), deque → list, frozenset → set, NumPy arrays → tensors. An object with a
    `state_dict` is asked for it. Aliasing survives, of tensors, storages and containers.

    Raises `UnsupportedValue` with the path of the first value that cannot be saved.
    """
    walk = _Normaliser()
    root = walk(state, "")
    return Tree(root, walk.leaves, list(walk.slices.values()))


@dataclass(slots=True)
class _Normaliser:
    leaves: list[TensorLeaf] = field(default_factory=list)
    slices: dict[tuple[torch.device, int], StorageSlice] = field(default_factory=dict)
    memo: dict[int, Any] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)  # memo holds ids: nothing may be freed meanwhile
    open: set[int] = field(default_factory=set)

    def __call__(self, value: Any, path: str) -> Any:
        kind = type(value)
        if kind in _ATOMS or (kind is int and -_SMALL_INT < value < _SMALL_INT):
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        if kind is torch.Tensor:
            return self._remember(value, self._tensor(value, path))
        scalar = self._scalar(value, path)
        if scalar is not None:
            return scalar
        if id(value) in self.open:
            raise UnsupportedValue("{path} contains itself.", path=path or "state")
        if len(self.open) >= MAX_DEPTH:
            raise UnsupportedValue(
                "{path} lies more than {depth} containers deep.", path=path, depth=MAX_DEPTH
            )
        self.open.add(id(value))
        result = self._compound(value, path)
        self.open.discard(id(value))
        return self._remember(value, result)

    def _remember(self, value: Any, result: Any) -> Any:
        self.memo[id(value)] = result
        self.alive.append(value)
        return result

    @staticmethod
    def _scalar(value: Any, path: str) -> Any:  # noqa: PLR0911 - one line a type
        """Return a number, text or bytes as its plain type; None where it is none of these.

        Subclasses are asked through the base type: their own `__str__` or `__int__` may lie.
        """
        if isinstance(value, np.generic) and not isinstance(value, np.datetime64 | np.timedelta64):
            value = value.item()
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            if value.bit_length() > _LONGEST_INT:
                raise UnsupportedValue(
                    "{path} is an integer of {bits} bits; torch.load reads at most {most}.",
                    path=path,
                    bits=value.bit_length(),
                    most=_LONGEST_INT,
                )
            return int.__index__(value)
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, complex):
            return value if type(value) is complex else complex.__pos__(value)
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, bytes):
            return bytes.__getitem__(value, slice(None)) or _EMPTY_BYTES
        if isinstance(value, torch.dtype) and value in DTYPES.values():
            return value
        return None

    def _compound(self, value: Any, path: str) -> Any:  # noqa: PLR0911, PLR0912 - one line a type
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, np.ndarray):
            leaf = self._tensor(self._from_numpy(value, path), path)
            leaf.array = True
            return leaf
        if isinstance(value, bytearray):
            return bytearray(memoryview(value))
        if isinstance(value, torch.Size):
            return value
        if isinstance(value, torch.nn.Module):
            return self(plain_state(value), path)
        if callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
            return self(value.state_dict(), path)
        if (stream := stream_of(value)) is not None:
            return self(stream.state_dict(), path)
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if isinstance(value, tuple):
            return tuple(self(item, f"{path}/{i}") for i, item in enumerate(value))
        if isinstance(value, list | deque):
            return [self(item, f"{path}/{i}") for i, item in enumerate(value)]
        if isinstance(value, set | frozenset):
            items = [self(item, f"{path}/{i}") for i, item in enumerate(value)]
            if any(isinstance(item, TensorLeaf) for item in items):
                raise UnsupportedValue("{path} is a set of tensors; use a list.", path=path)
            if not all(_hashable(item) for item in items):
                raise UnsupportedValue("{path} is a set of sets; use a list.", path=path)
            return set(items)
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise UnsupportedValue(
            "{path} is a {kind}, which a checkpoint cannot hold; give it a state_dict() "
            "or store plain values and tensors.",
            path=path or "state",
            kind=kind,
        )

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        ordered = isinstance(value, OrderedDict)
        result: dict[Any, Any] = OrderedDict() if ordered else {}
        for key, item in value.items():
            here = f"{path}/{key}" if path else str(key)
            plain = key if type(key) is str else self(key, here)
            if isinstance(plain, TensorLeaf) or not _hashable(plain):
                raise UnsupportedValue("{path} has a key that is no plain value.", path=path)
            result[plain] = self(item, here)
        if len(result) != len(value):
            raise UnsupportedValue("{path} has keys that become one when saved.", path=path)
        if ordered and vars(value):  # state_dict() hangs `_metadata` on its OrderedDict
            for name, item in vars(value).items():
                setattr(result, name, self(item, f"{path}.{name}"))
        return result

    def _tensor(self, value: torch.Tensor, path: str) -> TensorLeaf:
        if type(value) is torch.nn.Parameter:  # not the uninitialised ones of lazy modules
            value = value.data
        if not _is_dense(value):
            kind = f"{type(value).__name__} ({value.layout}, {value.dtype}, {value.device})"
            raise UnsupportedValue(
                "{path} is a {kind}; only plain dense tensors can be saved.", path=path, kind=kind
            )
        if value.requires_grad:
            value = value.detach()
        if value.is_conj() or value.is_neg():
            value = value.resolve_conj().resolve_neg()
        storage = value.untyped_storage()
        start, stop = _span(value)
        # An empty storage has no address: each is its own.
        key = (value.device, storage.data_ptr() or -len(self.leaves) - 1)
        known = self.slices.get(key)
        if known is None:
            known = StorageSlice(len(self.slices), storage, value.dtype, start, stop)
            self.slices[key] = known
        elif known.dtype != value.dtype:
            raise UnsupportedValue(
                "{path} views the memory of another tensor as a different dtype ({a}, {b}); "
                "save one of them, or a clone.",
                path=path,
                a=value.dtype,
                b=known.dtype,
            )
        elif start < stop:
            if storage.nbytes() > known.source.nbytes():
                known.source = storage  # two tensors over one address, as torch.from_numpy makes
            empty = known.start == known.stop
            known.start = start if empty else min(known.start, start)
            known.stop = stop if empty else max(known.stop, stop)
        leaf = TensorLeaf(path, value, known)
        self.leaves.append(leaf)
        return leaf

    def _from_numpy(self, value: np.ndarray[Any, Any], path: str) -> torch.Tensor:
        """Return the array's own memory as a tensor: what torch cannot share is copied.

        So a replay memory of gigabytes is copied once only, by the snapshot.
        """
        try:
            array = np.ascontiguousarray(value).reshape(value.shape)
            tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        except (TypeError, ValueError) as error:
            raise UnsupportedValue(
                "{path} is a NumPy array of {dtype}, which torch does not know.",
                path=path,
                dtype=value.dtype,
            ) from error
        known = self.slices.get((tensor.device, tensor.data_ptr()))
        return tensor.clone() if known is not None and known.dtype != tensor.dtype else tensor


def _is_dense(value: torch.Tensor) -> bool:
    return (
        type(value) is torch.Tensor
        and value.layout is torch.strided
        and not value.is_quantized
        and not value.is_nested
        and value.device.type != "meta"
        and value.dtype in _SAVED_DTYPES
    )


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the bytes of its storage that `tensor` can reach: only those of a view are saved."""
    size = tensor.element_size()
    start = int(tensor.storage_offset())
    if tensor.numel() == 0 or tensor.is_contiguous():
        return start * size, (start + tensor.numel()) * size
    last = sum((int(n) - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start * size, (start + last + 1) * size
