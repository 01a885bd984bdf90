"""Turn values of a loop and objects without a `state_dict` into what a checkpoint holds, and back.

A checkpoint holds plain containers, numbers and tensors. What that would lose is written beside
the value, in a mapping whose first key is `holdfast`: the device of a tensor, the type of a NumPy
number, the class of a named tuple or a dataclass.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from holdfast.errors import StateMismatch, UnsupportedValue

_TAG = "holdfast"
_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.Size)


def encode(value: Any, path: str) -> Any:  # noqa: PLR0911 - one line a kind
    """Return `value` as a checkpoint can hold it. Raises `UnsupportedValue` with its path."""
    kind = type(value)
    if kind in _ATOMS or kind is np.ndarray:
        return value
    if isinstance(value, torch.Tensor):
        if value.device.type == "cpu" and not value.requires_grad:
            return value
        return {
            _TAG: "tensor",
            "device": str(value.device),
            "grad": value.requires_grad,
            "value": value.detach(),
        }
    if isinstance(value, np.generic):
        return {_TAG: "scalar", "value": np.array(value)}
    if kind in (list, deque, set, frozenset) or (kind is tuple):
        items = [encode(item, f"{path}/{i}") for i, item in enumerate(value)]
        if kind in (list, tuple):
            return kind(items)
        length = value.maxlen if kind is deque else None
        return {_TAG: kind.__name__, "value": items, "length": length}
    if kind in (dict, OrderedDict):
        content = {key: encode(item, f"{path}/{key}") for key, item in value.items()}
        if kind is dict and _TAG not in content:
            return content
        return {_TAG: kind.__name__, "value": content}
    fields = fields_of(value)
    if fields is None:
        raise UnsupportedValue(
            "{path} is a {kind}: a loop's values are numbers, text, tensors, NumPy arrays and "
            "containers of them. Give an object with a state_dict() to protect(name=...).",
            path=path,
            kind=f"{kind.__module__}.{kind.__qualname__}",
        )
    content = {key: encode(item, f"{path}/{key}") for key, item in fields.items()}
    return {_TAG: "class", "name": f"{kind.__module__}:{kind.__qualname__}", "value": content}


def decode(saved: Any, live: Any = None) -> Any:  # noqa: PLR0911 - one line a kind
    """Return what `encode` was given; `live`, what the loop has in its place now, says where a
    tensor goes whose device is not here."""
    if type(saved) in (list, tuple):
        beside = live if isinstance(live, list | tuple) else ()
        return type(saved)(
            decode(item, beside[i] if i < len(beside) else None) for i, item in enumerate(saved)
        )
    if not isinstance(saved, Mapping):
        return saved
    kind = saved.get(_TAG)
    if kind is None:
        given = live if isinstance(live, Mapping) else {}
        return {key: decode(item, given.get(key)) for key, item in saved.items()}
    value = saved["value"]
    if kind == "tensor":
        return _placed(value, saved["device"], live).requires_grad_(saved["grad"])
    if kind == "scalar":
        return value[()]
    if kind == "class":
        return _instance(saved["name"], {key: decode(item) for key, item in value.items()})
    if kind in ("dict", "OrderedDict"):
        items = ((key, decode(item)) for key, item in value.items())
        return OrderedDict(items) if kind == "OrderedDict" else dict(items)
    content = [decode(item) for item in value]
    if kind == "deque":
        return deque(content, saved["length"])
    return set(content) if kind == "set" else frozenset(content)


def fields_of(value: Any) -> dict[str, Any] | None:
    """Return the fields of a named tuple or a dataclass by name; None of anything else."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _placed(tensor: torch.Tensor, device: str, live: Any) -> torch.Tensor:
    if isinstance(live, torch.Tensor) and live.device.type == torch.device(device).type:
        return tensor.to(live.device)
    try:
        return tensor.to(device)
    except (RuntimeError, AssertionError):  # no such device here, or this torch knows none
        return tensor.to(live.device) if isinstance(live, torch.Tensor) else tensor


def _instance(name: str, content: dict[str, Any]) -> Any:
    """Make a named tuple or dataclass of a class that this program has loaded already.

    A checkpoint is data: it may name no other class, and no code of the class's own runs but
    `tuple.__new__`.
    """
    module, _colon, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields"):
        return tuple.__new__(found, content.values())
    if isinstance(found, type) and dataclasses.is_dataclass(found):
        made = object.__new__(found)
        for key, item in content.items():
            object.__setattr__(made, key, item)
        return made
    raise StateMismatch(
        "The checkpoint has a value of the class {name}, which this program has not loaded.",
        name=name,
    )
