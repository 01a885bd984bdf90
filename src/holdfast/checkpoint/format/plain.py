"""Build the plain values of a state from the manifest's tree.

docs/en/format.md has the table of the encoding. Here a tensor stays its entry in the manifest's
index, and dtypes and devices stay text; state/codec.py makes torch's objects of them.
"""

from __future__ import annotations

import base64
import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import ForeignCheckpoint

# What a decoder raises over a manifest that no encoder wrote.
NONSENSE = (
    KeyError,
    ValueError,
    TypeError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
    struct.error,
)


class Decoder:
    """Builds the objects of a manifest's tree; `tensors` is the manifest's index of tensors.

    `definitions` are the nodes of shared containers by name, where only a part of the tree is
    decoded: the part may refer to what stands elsewhere. Whatever makes no sense is one of
    `NONSENSE`.
    """

    def __init__(
        self, tensors: Sequence[Any], definitions: Mapping[Any, Any] | None = None
    ) -> None:
        self._tensors = tensors
        self._definitions = definitions or {}
        self._shared: dict[Any, Any] = {}

    def __call__(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "shared" in node:
            if node["shared"] not in self._shared:
                self._shared[node["shared"]] = self(node["value"])
            return self._shared[node["shared"]]
        if "odict" in node:
            return self._ordered(node["odict"], node.get("attributes", {}))
        (kind, content), *rest = node.items()
        if rest:
            raise ValueError(kind)
        return _SIMPLE[kind](self, content)

    def tensor(self, index: Any) -> Any:
        return self._tensors[whole(index, len(self._tensors))]

    def size(self, items: Any) -> Any:
        return tuple(whole(item) for item in items)

    def dtype(self, name: Any) -> Any:
        return text_of(name)

    def device(self, name: Any) -> Any:
        return text_of(name)

    def refer(self, name: Any) -> Any:
        if name not in self._shared:
            self(self._definitions[name])
        return self._shared[name]

    def _ordered(self, pairs: Any, attributes: Mapping[str, Any]) -> OrderedDict[Any, Any]:
        value = OrderedDict((self(key), self(item)) for key, item in pairs)
        for name, item in attributes.items():
            if hasattr(OrderedDict, name):
                raise ValueError(name)  # a dictionary whose methods are data would fail later
            setattr(value, name, self(item))
        return value


# A table outside of the decoder: one inside would make a ring with it, and the tensors of a load
# that failed would stay in memory until the garbage collector comes by.
_SIMPLE: dict[str, Callable[[Decoder, Any], Any]] = {
    "tensor": lambda decode, index: decode.tensor(index),
    "size": lambda decode, items: decode.size(items),
    "int": lambda _d, text: int(text_of(text)),
    "float": lambda _d, text: struct.unpack(">d", bytes.fromhex(text))[0],
    "complex": lambda _d, text: complex(*struct.unpack(">dd", bytes.fromhex(text))),
    "bytes": lambda _d, text: base64.b64decode(text, validate=True),
    "bytearray": lambda _d, text: bytearray(base64.b64decode(text, validate=True)),
    "dtype": lambda decode, name: decode.dtype(name),
    "device": lambda decode, name: decode.device(name),
    "ref": lambda decode, name: decode.refer(name),
    "tuple": lambda decode, items: tuple(decode(item) for item in items),
    "set": lambda decode, items: {decode(item) for item in items},
    "dict": lambda decode, pairs: {decode(key): decode(item) for key, item in pairs},
}


def text_of(value: Any) -> str:
    """Return `value` if it is a text; JSON might hold anything."""
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def whole(value: Any, end: int = 1 << 63) -> int:
    """Return `value` if it is an integer from 0 to `end` - 1; JSON might hold anything."""
    if type(value) is not int:
        raise TypeError(value)
    if not 0 <= value < end:
        raise ValueError(value)
    return value


def plain_state(manifest: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Return the saved state by its top-level keys, without the bytes of its tensors.

    `path` is for the message of the ForeignCheckpoint that is raised where the manifest makes no
    sense.
    """
    try:
        state = Decoder(manifest["tensors"])(manifest["tree"])
    except NONSENSE as error:
        raise ForeignCheckpoint(
            "{path} has a manifest that makes no sense.", path=Path(path)
        ) from error
    return state if isinstance(state, dict) else {}
