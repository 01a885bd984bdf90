"""Finds the state of a training that is in no `state_dict`: names it, or saves it where asked.

Published code of new architectures keeps momenta, fast weights and clocks in plain attributes and
dataclasses. A checkpoint of `state_dict`s alone loses them without a word.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from holdfast.checkpoint.state import normalise, stream_of, walk
from holdfast.errors import StateMismatch
from holdfast.protection import plain

_DEPTH = 6  # of containers and objects in an attribute of a module
_MANY = 10_000  # entries of a container that are looked at
_OF_TORCH = frozenset(vars(torch.nn.Module()))  # attributes that every module has
_HELD = ("_parameters", "_buffers", "_modules", "training")
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


class Objects:
    """The objects of `protect(also=...)` as a part of the state."""

    def __init__(self, objects: Sequence[Any], state: Mapping[str, Any]) -> None:
        """`state` is what the engine saves by itself: that is not saved a second time."""
        self._objects, self._state = objects, state

    def state_dict(self) -> dict[str, Any]:
        encode = _Everything(_saved_without_us(self._state))
        return {"objects": [encode(each, f"also/{i}") for i, each in enumerate(self._objects)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved, decode = state["objects"], plain.Decoder(in_place=True)
        if len(saved) != len(self._objects):
            raise StateMismatch(
                "also has {given} objects, and {saved} were saved",
                given=len(self._objects),
                saved=len(saved),
            )
        for value, content in zip(self._objects, saved, strict=True):
            decode(content, value)


class _Everything(plain.Encoder):
    """Encodes all that a checkpoint can hold of any object, once; what it cannot is left out."""

    def __init__(self, done: set[int]) -> None:
        self._done = done  # ids, of objects that are alive

    def __call__(self, value: Any, path: str) -> Any:
        if hasattr(value, "__dict__") or isinstance(value, dict | list):
            if id(value) in self._done:
                return plain.OMITTED
            self._done.add(id(value))
        return super().__call__(value, path)

    def other(self, value: Any, path: str) -> Any:
        if isinstance(value, torch.nn.Module):
            return self.object(value, _attributes(value, _HELD), path)
        if callable(getattr(value, "load_state_dict", None)):
            return plain.with_state(value.state_dict())
        if (stream := stream_of(value)) is not None:
            return plain.with_state(stream.state_dict())
        if isinstance(value, _CODE) or not hasattr(value, "__dict__"):
            return plain.OMITTED
        return self.object(value, vars(value), path)


def _saved_without_us(state: Mapping[str, Any]) -> set[int]:
    """Return the ids of what is in a state already; of a module, those of its tensors."""
    done: set[int] = set()
    for _path, value in walk(state):
        if isinstance(value, torch.nn.Module):
            done.update(map(id, value.state_dict(keep_vars=True).values()))
        else:
            done.add(id(value))
    return done


class Watch:
    """Names the tensors of modules that training changes and no `state_dict` holds, once each."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        """To be made before the first step: what is there and never changes is a constant."""
        self._state = state
        self._told: set[str] = set()
        self._before = {
            path: (weakref.ref(tensor), _version(tensor)) for path, tensor in _loose(state)
        }

    def look(self) -> list[str]:
        """Return the paths of those that have changed, or come, since and were not told yet."""
        changed = {}
        for path, tensor in _loose(self._state):
            before, version = self._before.get(path, (None, -1))
            same = before is not None and before() is tensor and version == _version(tensor)
            if not same and path not in self._told:
                changed[path] = tensor
        if not changed:
            return []
        known = {_memory(leaf.tensor) for leaf in normalise(self._state).leaves}
        found = [path for path, tensor in changed.items() if _memory(tensor) not in known]
        self._told.update(found)
        return found


def _loose(state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in plain attributes of the modules in a state, with their paths."""
    for path, value in walk(state):
        if isinstance(value, torch.nn.Module):
            for name, module in value.named_modules():
                for key, item in _attributes(module).items():
                    where = ".".join(filter(None, (path, name, key)))
                    yield from _inside(item, where, {id(module)})


def _inside(value: Any, path: str, above: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if len(above) > _DEPTH or id(value) in above or isinstance(value, _CODE):
        return
    if type(value).__module__.startswith("holdfast."):  # what protects the training is no part
        return
    items: Iterator[tuple[str, Any]]
    if isinstance(value, Mapping):
        items = ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        items = ((f"{path}[{i}]", item) for i, item in enumerate(value))
    elif isinstance(value, torch.nn.Module):  # in a list, say: no module knows of it
        items = ((f"{path}.{name}", item) for name, item in value.state_dict().items())
    else:
        fields = plain.fields_of(value) or getattr(value, "__dict__", {})
        items = ((f"{path}.{key}", item) for key, item in fields.items())
    for _number, (where, item) in zip(range(_MANY), items, strict=False):
        yield from _inside(item, where, above | {id(value)})


def _attributes(module: torch.nn.Module, held: Sequence[str] = ()) -> dict[str, Any]:
    """Return the attributes that a module has beside torch's own, and `held` of those."""
    own = vars(module)
    return {key: item for key, item in own.items() if key not in _OF_TORCH or key in held}


def _memory(tensor: torch.Tensor) -> Any:
    try:
        return tensor.device, tensor.data_ptr(), tensor.shape
    except RuntimeError:  # a subclass without memory of its own
        return id(tensor)


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
