"""Turn values that no `state_dict` holds into what a checkpoint holds, and back.

A checkpoint holds plain containers, numbers and tensors. What that would lose is written beside
the value, in a mapping whose first key is `holdfast`: the device of a tensor, the type of a NumPy
number, the class of a named tuple or a dataclass.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict, deque
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import torch

from holdfast.checkpoint.state import stream_of
from holdfast.errors import StateMismatch, UnsupportedValue

_TAG = "holdfast"
_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.Size)
OMITTED = {_TAG: "omitted"}  # in the place of what is not saved: what is there stays


class Encoder:
    """Turns values into what a checkpoint can hold."""

    def __call__(self, value: Any, path: str) -> Any:  # noqa: PLR0911 - one line a kind
        """Return `value` encoded. Raises `UnsupportedValue` with the path of what cannot be."""
        kind = type(value)
        if kind in _ATOMS or kind is np.ndarray:
            return value
        if isinstance(value, torch.Tensor):
            return _encoded_tensor(value)
        if isinstance(value, np.generic):
            return {_TAG: "scalar", "value": np.array(value)}
        if isinstance(value, list | deque | set | frozenset) or kind is tuple:
            items = [self(item, f"{path}/{i}") for i, item in enumerate(value)]
            if kind in (list, tuple):
                return kind(items)
            length = value.maxlen if isinstance(value, deque) else None
            return {_TAG: kind.__name__, "value": items, "length": length}
        if isinstance(value, dict):
            content = {key: self(item, f"{path}/{key}") for key, item in value.items()}
            plain = kind is dict and _TAG not in content
            return content if plain else {_TAG: kind.__name__, "value": content}
        fields = fields_of(value)
        return self.other(value, path) if fields is None else self.object(value, fields, path)

    def other(self, value: Any, path: str) -> Any:
        """Return what is no plain value encoded; here it is refused."""
        kind = type(value)
        raise UnsupportedValue(
            "{path} is a {kind}: a loop's values are numbers, text, tensors, NumPy arrays and "
            "containers of them. Give an object with a state_dict() to protect(name=...).",
            path=path,
            kind=f"{kind.__module__}.{kind.__qualname__}",
        )

    def object(self, value: Any, fields: Mapping[str, Any], path: str) -> Any:
        """Return an object that is made of `fields` encoded."""
        kind = type(value)
        content = {key: self(item, f"{path}.{key}") for key, item in fields.items()}
        return {_TAG: "class", "name": f"{kind.__module__}:{kind.__qualname__}", "value": content}


def with_state(state: Mapping[str, Any]) -> Any:
    """Return the `state_dict` of an object encoded, for that object to load."""
    return {_TAG: "state", "value": state}


def _encoded_tensor(value: torch.Tensor) -> Any:
    if value.device.type == "cpu" and not value.requires_grad:
        return value
    device, grad = str(value.device), value.requires_grad
    return {_TAG: "tensor", "device": device, "grad": grad, "value": value.detach()}


def _is_omitted(saved: Any) -> bool:
    return isinstance(saved, Mapping) and saved.get(_TAG) == "omitted"


def fields_of(value: Any) -> dict[str, Any] | None:
    """Return the fields of a named tuple or a dataclass by name; None of anything else."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    return None


class Decoder:
    """Turns what an `Encoder` has made into values again.

    With `in_place`, live tensors and containers stay themselves and get the saved content: others
    hold them under names of their own. Else nothing live is touched: a batch may be a view of the
    data set.
    """

    def __init__(self, *, in_place: bool) -> None:
        self._in_place = in_place

    def __call__(self, saved: Any, live: Any = None) -> Any:  # noqa: PLR0911 - one line a kind
        """Return the value of `saved`; `live` is what there is in its place."""
        kind = saved.get(_TAG) if isinstance(saved, Mapping) else None
        if kind == "omitted":
            return live
        if kind == "class":
            return self._object(saved["name"], saved["value"], live)
        if kind == "state":
            target = stream_of(live) or live
            if not callable(getattr(target, "load_state_dict", None)):
                raise StateMismatch("there is no object here to load a saved state into")
            target.load_state_dict(saved["value"])
            return live
        if kind == "scalar":
            return saved["value"][()]
        if kind == "tensor":
            return self._tensor(saved["value"], live, saved["device"], grad=saved["grad"])
        if isinstance(saved, torch.Tensor):
            return self._tensor(saved, live, "cpu", grad=False)
        if isinstance(saved, np.ndarray):
            return self._array(saved, live)
        content = saved if kind is None else saved["value"]
        if isinstance(content, Mapping):
            return self._mapping(content, live, kind)
        if isinstance(content, list | tuple):
            length = None if kind is None else saved["length"]
            return self._sequence(content, live, kind or type(saved).__name__, length)
        return saved

    def _tensor(self, saved: torch.Tensor, live: Any, device: str, *, grad: bool) -> torch.Tensor:
        beside = live if isinstance(live, torch.Tensor) else None
        same = beside is not None and (beside.shape, beside.dtype) == (saved.shape, saved.dtype)
        if self._in_place and beside is not None and same:
            with torch.no_grad():
                beside.detach().copy_(saved)
            return beside
        if beside is not None and beside.device.type == torch.device(device).type:
            return saved.to(beside.device).requires_grad_(grad)
        try:
            return saved.to(device).requires_grad_(grad)
        except (RuntimeError, AssertionError):  # there is no such device, or torch knows none
            return (saved if beside is None else saved.to(beside.device)).requires_grad_(grad)

    def _array(self, saved: np.ndarray[Any, Any], live: Any) -> np.ndarray[Any, Any]:
        if not (self._in_place and isinstance(live, np.ndarray) and live.flags.writeable):
            return saved
        if (live.shape, live.dtype) != (saved.shape, saved.dtype):
            return saved
        live[...] = saved
        return live

    def _mapping(self, saved: Mapping[Any, Any], live: Any, kind: str | None) -> Any:
        beside = live if isinstance(live, Mapping) else {}
        content = {
            key: self(item, beside.get(key))
            for key, item in saved.items()
            if key in beside or not _is_omitted(item)
        }
        if self._in_place and isinstance(live, MutableMapping):
            live.clear()
            live.update(content)
            return live
        return OrderedDict(content) if kind == "OrderedDict" else content

    def _sequence(self, saved: Any, live: Any, kind: str, length: int | None) -> Any:
        beside = live if isinstance(live, list | tuple | deque) else ()
        content = [
            self(item, beside[i] if i < len(beside) else None) for i, item in enumerate(saved)
        ]
        if self._in_place and isinstance(live, list | deque | set):
            live.clear()
            live.update(content) if isinstance(live, set) else live.extend(content)
            return live
        if kind == "deque":
            return deque(content, length)
        makers = {"tuple": tuple, "set": set, "frozenset": frozenset}
        return makers.get(kind, list)(content)

    def _object(self, name: str, saved: Mapping[str, Any], live: Any) -> Any:
        """Put fields into a live object of the class `name`; else make a new one.

        A checkpoint is data: it may only name a named tuple or a dataclass that this program has
        loaded already, and no code of that class is run.
        """
        same = live is not None and name == f"{type(live).__module__}:{type(live).__qualname__}"
        made = live if same else None
        module, _colon, path = name.partition(":")
        found: Any = sys.modules.get(module)
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields"):
            return tuple.__new__(found, [self(item) for item in saved.values()])
        if not (self._in_place and same):
            if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
                raise StateMismatch(
                    "it has a value of the class {name}, which this program has not loaded",
                    name=name,
                )
            made = object.__new__(found)
        for key, item in saved.items():
            if not _is_omitted(item):
                object.__setattr__(made, key, self(item, getattr(live, key, None)))
        return made
