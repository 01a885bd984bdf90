"""The plain values of a checkpoint for people and for JSON, read from its manifest without torch.

The encoding is that of checkpoint/state/codec.py, whose decoder builds tensors. Here a tensor stays
what the manifest says of it.
"""

from __future__ import annotations

import base64
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import ForeignCheckpoint
from holdfast.i18n import _


def plain_state(manifest: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[Any, Any]:
    """The saved state by its top-level keys, without the bytes of its tensors.

    Tensors stand as their entry in the manifest's index (a dict with "path", "dtype", "shape"),
    dtypes and devices as text; everything else is what was saved. `path` is for the message of the
    ForeignCheckpoint that is raised where the manifest makes no sense.
    """
    try:
        state = _Reader(manifest["tensors"])(manifest["tree"])
    except (KeyError, ValueError, TypeError, IndexError, RecursionError, struct.error) as error:
        raise ForeignCheckpoint(
            _("{path} has a manifest that makes no sense.", path=Path(path))
        ) from error
    return state if isinstance(state, dict) else {}


class _Reader:
    """Builds plain objects from a manifest's tree."""

    def __init__(self, tensors: list[dict[str, Any]]) -> None:
        self._shared: dict[int, Any] = {}
        self._kinds: dict[str, Callable[[Any], Any]] = {
            "tensor": tensors.__getitem__,
            "size": tuple,
            "int": int,
            "float": lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
            "complex": lambda text: complex(*struct.unpack(">dd", bytes.fromhex(text))),
            "bytes": base64.b64decode,
            "bytearray": lambda text: bytearray(base64.b64decode(text)),
            "dtype": str,
            "device": str,
            "ref": self._shared.__getitem__,
            "tuple": lambda items: tuple(self(item) for item in items),
            "set": lambda items: {self(item) for item in items},
            "dict": self._pairs,
            "odict": self._pairs,
        }

    def _pairs(self, pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        return {self(key): self(item) for key, item in pairs}

    def __call__(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "shared" in node:
            value = self._shared[node["shared"]] = self(node["value"])
            return value
        # The attributes of an ordered dict (`_metadata` of a module) mean nothing to a person, but
        # what they share with the rest has to be met in the order in which it was written.
        kind, *_attributes = node
        value = self._kinds[kind](node[kind])
        for item in node.get("attributes", {}).values():
            self(item)
        return value


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and sequences as one: {"training.epochs": 3, "betas.0": 0.9}."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple) and any(isinstance(v, list | tuple | dict) for v in value):
        items = enumerate(value)
    else:
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat or ({prefix: value} if prefix else {})


def json_ready(value: Any) -> Any:
    """`value` as strict JSON can hold it.

    Numbers that are not finite become "nan", "inf" or "-inf", as in a manifest; tuples lists; what
    else JSON lacks becomes text.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
