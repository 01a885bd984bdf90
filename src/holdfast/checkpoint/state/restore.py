"""Plan what restoring a training state changes in live objects and values.

A state is a mapping (nested at will) of objects with `state_dict`/`load_state_dict`, tensors and
plain values. Restoring first checks that everything fits, without touching anything; then staged
and live bytes change places (transaction.py).
"""

from __future__ import annotations

import enum
import itertools
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from holdfast.checkpoint.state import names, paths
from holdfast.checkpoint.state.configured import Configured
from holdfast.checkpoint.state.randomness import stream_of
from holdfast.checkpoint.state.steppers import Steppers
from holdfast.checkpoint.state.transaction import (
    Act,
    Derived,
    Exchange,
    LoadModule,
    LoadObject,
    Refill,
    Transaction,
)
from holdfast.errors import StateMismatch
from holdfast.i18n import _

_EXTRA_STATE = "_extra_state"  # the last part of the key under which modules keep theirs
_SEQUENCES = (list, bytearray, set)


# ------------------------------------------------------------------------------------ the plan


def plan_restore(
    live: MutableMapping[str, Any],
    saved: Mapping[str, Any],
    *,
    manifest: Mapping[str, Any] | None = None,
    configured: Configured | None = None,
    strict: bool = True,
) -> Transaction:
    """Compare `saved` with the live state and plan the exchange; nothing is changed yet.

    `manifest` says what was configured when `saved` was made and whose the slots of its optimizers
    are; `configured` is what is configured here. Where the two differ the user has changed it, and
    that takes effect (`Transaction.decisions`). With `strict`, every object and tensor that is live
    must be in the checkpoint, and nested ones may not hold others there.

    Raises `StateMismatch` that lists every difference.
    """
    planner = _Planner(live, manifest or {}, configured or Configured(live), strict)
    try:
        planner.container(live, saved, "")
        planner.finish()
    except BaseException:
        planner.transaction.forget()
        raise
    if planner.transaction.problems:
        planner.transaction.forget()
        lines = planner.transaction.problems
        more = _(" … and {count} more", count=len(lines) - 8) if len(lines) > 8 else ""
        raise StateMismatch(
            "The checkpoint does not fit; nothing was changed: {lines}",
            lines="; ".join(lines[:8]) + more,
        )
    return planner.transaction


class _Planner:
    """Walks the live state beside the saved one and plans the acts that make it the same.

    `container`, `_one` and `_plain` return what will stand in the place of `live`.
    """

    def __init__(
        self, live: Any, manifest: Mapping[str, Any], configured: Configured, strict: bool
    ) -> None:
        self.transaction = Transaction()
        self._strict, self._problem = strict, self.transaction.problem
        self._steppers = Steppers(self.transaction, live, manifest, configured)
        self._exchanges: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor, str]] = {}
        self._derived: list[Derived] = []
        self._schedulers: list[tuple[LRScheduler, Any, str]] = []

    def container(self, live: Any, saved: Any, path: str) -> Any:
        if not isinstance(saved, Mapping | list | tuple):
            self._problem(_("{path} is no group of values in the checkpoint", path=path))
            return live
        content = dict(paths.items_of(live))
        changed = False
        for key, value in [*content.items()]:
            here = paths.join(path, key)
            found = paths.at(saved, key)
            if found is not paths.MISSING:
                content[key] = self._one(value, found, here)
                changed = changed or content[key] is not value
            elif self._strict and not _is_plain(value):
                self._problem(_("{path} is not in the checkpoint", path=here))
            # a plain value that is new keeps what it is
        for key, value in paths.items_of(saved) if path and self._strict else ():
            if paths.at(live, key) is paths.MISSING and not _is_plain(value):
                self._problem(_("{path} is only in the checkpoint", path=paths.join(path, key)))
        if not changed:
            return live
        values = content if isinstance(live, Mapping) else list(content.values())
        if isinstance(live, tuple):
            return _like(live, values)
        self.transaction.act(Refill(live, values))
        return live

    def _one(self, live: Any, saved: Any, path: str) -> Any:
        inner = names.unwrapped(live)
        if isinstance(live, torch.nn.Module):
            self._module(live, saved, path)
        elif isinstance(inner, Optimizer):
            self._steppers.optimizer(inner, saved, path)
        elif isinstance(live, torch.Tensor):
            self._tensor(live, saved, path)
        elif isinstance(inner, LRScheduler):
            self._schedulers.append((inner, saved, path))
        elif callable(getattr(live, "load_state_dict", None)):
            self.transaction.act(LoadObject(live, saved, path))
        elif (stream := stream_of(live)) is not None:
            self.transaction.act(LoadObject(stream, saved, path))
        elif callable(getattr(live, "state_dict", None)):
            self._problem(_("{path} has a state_dict() but no load_state_dict()", path=path))
        elif isinstance(live, Mapping | list | tuple) and not _is_plain(live):
            return self.container(live, saved, path)
        else:
            return self._plain(live, saved, path)
        return live

    def _plain(self, live: Any, saved: Any, path: str) -> Any:
        """Return a saved value in the type of the live one; live containers stay themselves."""
        if isinstance(live, MutableMapping) and isinstance(saved, Mapping):
            content = {
                key: self._plain(live[key], value, paths.join(path, key)) if key in live else value
                for key, value in saved.items()
            }
            self.transaction.act(Refill(live, content))
            return live
        if isinstance(live, np.ndarray) and isinstance(saved, np.ndarray):
            saved = torch.from_numpy(saved)
        if isinstance(live, np.ndarray) and isinstance(saved, torch.Tensor):
            return self._array(live, saved)
        refillable = isinstance(live, _SEQUENCES) or hasattr(live, "maxlen")
        if refillable and isinstance(saved, _SEQUENCES):
            self.transaction.act(Refill(live, saved))
            return live
        return _like(live, saved)

    def _array(self, live: np.ndarray[Any, Any], saved: torch.Tensor) -> np.ndarray[Any, Any]:
        """Put the bytes of a NumPy array, saved as a tensor, into the live one where they fit."""
        array: np.ndarray[Any, Any] = saved.numpy()
        fits = array.shape == live.shape and array.dtype == live.dtype
        if fits and live.flags.writeable and live.flags.c_contiguous and live.size:
            self._exchanges[live.ctypes.data, live.shape] = torch.from_numpy(live), saved, ""
            return live
        return array.copy()

    # --------------------------------------------------------------------------------- tensors

    def _tensor(self, live: torch.Tensor, saved: Any, path: str) -> None:
        if isinstance(saved, np.ndarray):  # it was one when it was saved
            saved = torch.from_numpy(saved)
        if not isinstance(saved, torch.Tensor):
            self._problem(_("{path} is no tensor in the checkpoint", path=path))
        elif saved.shape != live.shape or saved.dtype != live.dtype:
            self.transaction.differs(path, saved, live)
        elif live.numel():
            # Tied weights are one memory under two names: exchanged once, or they swap back.
            key = (live.device, live.data_ptr(), live.shape, live.stride())
            known = self._exchanges.setdefault(key, (live, saved, path))
            if known[1] is not saved and not _same_bytes(known[1], saved):
                self._problem(
                    _(
                        "{a} and {b} are one tensor here and two different ones in the checkpoint",
                        a=known[2],
                        b=path,
                    )
                )

    def _module(self, live: torch.nn.Module, saved: Any, path: str) -> None:
        if not isinstance(saved, Mapping):
            self._problem(_("{path} is no model in the checkpoint", path=path))
            return
        mine = live.state_dict()
        pairs = names.matched_in(live, list(mine), list(saved))
        fits = pairs is not None and all(_fits(mine[n], saved[s]) for n, s in pairs.items())
        if not fits and _converts(live):  # it may know how to load what is of another form
            self._load_module(live, saved, path, whole=True)
            return
        if pairs is None:
            for name in [name for name in mine if name not in saved]:
                self._problem(_("{path}/{name} is not in the checkpoint", path=path, name=name))
            for name in [name for name in saved if name not in mine]:
                self._problem(_("{path}/{name} is only in the checkpoint", path=path, name=name))
            pairs = {name: name for name in mine if name in saved}
        found = OrderedDict((name, saved[there]) for name, there in pairs.items())
        _keep_metadata(live, found, mine, saved)
        extra = {name for name in mine if str(name).rpartition(".")[2] == _EXTRA_STATE}
        if not _is_memory_of(live, [v for name, v in mine.items() if name not in extra]):
            # state_dict() gives copies here: bytes exchanged with those would change nothing.
            self.transaction.act(LoadObject(live, found, path))
            return
        for name in found.keys() - extra if extra else found:
            self._tensor(mine[name], found[name], f"{path}/{name}")
        if extra or _listens(live):
            found.update((name, mine[name]) for name in found if name not in extra)
            self._load_module(live, found, path, whole=False)

    def _load_module(self, live: torch.nn.Module, state: Any, path: str, *, whole: bool) -> None:
        self._derived.append(Derived(live, whole=whole))
        self.transaction.act(LoadModule(live, state, path))

    def finish(self) -> None:
        for scheduler, state, path in self._schedulers:  # last: they read their optimizer's groups
            self._steppers.scheduler(scheduler, state, path)
        pairs = [(live, staged) for live, staged, _path in self._exchanges.values()]
        # `Derived` comes first, so that it is undone last: over the tensors as they were.
        acts = self.transaction.acts
        acts[:0] = [*self._derived, Exchange(_apart(pairs, acts))]


# -------------------------------------------------------------------------------------- details


def _fits(live: Any, saved: Any) -> bool:
    if not isinstance(live, torch.Tensor) or not isinstance(saved, torch.Tensor):
        return True
    return live.shape == saved.shape and live.dtype == saved.dtype


def _keep_metadata(live: torch.nn.Module, found: Any, mine: Any, saved: Any) -> None:
    """Hang the versions of the modules that were saved on the state that their hooks will see."""
    said, own = getattr(saved, "_metadata", None), getattr(mine, "_metadata", None)
    if isinstance(said, Mapping) and isinstance(own, Mapping):
        pairs = names.matched([f"{n}." for n in own], [f"{n}." for n in said])
        if pairs is None:  # several wrappers' versions gave way to that of one inner module
            plain = names.without_wrappers_of(live)
            pairs = {f"{n}.": plain(f"{n}.") for n in own}
            pairs = {n: there for n, there in pairs.items() if there.removesuffix(".") in said}
        said = {
            here.removesuffix("."): said[there.removesuffix(".")] for here, there in pairs.items()
        }
        found._metadata = OrderedDict(said)


def _listens(module: torch.nn.Module) -> bool:
    """Return True if loading the module does more than copy tensors: hooks, methods of its own."""
    return type(module).load_state_dict is not torch.nn.Module.load_state_dict or any(
        part._load_state_dict_pre_hooks
        or part._load_state_dict_post_hooks
        or type(part)._load_from_state_dict is not torch.nn.Module._load_from_state_dict
        for part in module.modules()
    )


def _converts(module: torch.nn.Module) -> bool:
    """Return True if the module may convert a state of another form while it loads it."""
    return type(module).load_state_dict is not torch.nn.Module.load_state_dict or any(
        part._load_state_dict_pre_hooks
        or not type(part)._load_from_state_dict.__module__.startswith("torch.nn.modules.")
        for part in module.modules()
    )


def _like(live: Any, saved: Any) -> Any:
    """Return a saved plain value in the type of the live one, which saving had made plain."""
    if isinstance(live, tuple) and hasattr(live, "_fields") and isinstance(saved, Sequence):
        return type(live)(*saved) if len(saved) == len(live._fields) else tuple(saved)
    if isinstance(live, tuple) and isinstance(saved, list):
        return tuple(saved)
    if isinstance(live, frozenset) and isinstance(saved, set):
        return frozenset(saved)
    if isinstance(live, np.generic) and isinstance(saved, int | float | complex):
        return type(live)(saved)
    if isinstance(live, enum.Enum) and saved in (member.value for member in type(live)):
        return type(live)(saved)
    return saved


def _is_plain(value: Any) -> bool:
    """Return True if `value` holds no object or tensor that is restored in place."""
    if any(hasattr(value, method) for method in ("load_state_dict", "state_dict")):
        return False
    if stream_of(value) is not None:
        return False
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return not isinstance(value, torch.Tensor)


def _is_memory_of(module: torch.nn.Module, values: Sequence[Any]) -> bool:
    """Return True if `values` are the module's own memory: writing into them changes it."""
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in itertools.chain(module.parameters(), module.buffers())
    }
    return all(
        isinstance(value, torch.Tensor)
        and (value.numel() == 0 or value.untyped_storage().data_ptr() in own)
        for value in values
    )


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    flat = [torch.empty(t.numel(), dtype=t.dtype).copy_(t.reshape(-1)) for t in (a, b)]
    return torch.equal(*(t.view(torch.uint8) for t in flat))  # bytes: NaN is not equal to itself


def _apart(
    pairs: list[tuple[torch.Tensor, torch.Tensor]], others: Sequence[Act]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Give each live tensor staged bytes of its own.

    Exchanging changes the staged bytes, and the checkpoint may have several tensors in them: tied
    weights that no longer are, or a model's weights that another object has saved as well.
    """
    seen = _addresses(others)
    result = []
    for live, staged in pairs:
        address = staged.untyped_storage().data_ptr()
        result.append((live, staged.clone() if address in seen else staged))
        seen.add(address)
    return result


def _addresses(acts: Sequence[Act]) -> set[int]:
    """Return the addresses of all tensors in what `acts` will hand to live objects."""
    found: set[int] = set()
    visited: set[int] = set()
    names = ("state", "value", "content")
    waiting = [getattr(act, name) for act in acts for name in names if hasattr(act, name)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            found.add(value.untyped_storage().data_ptr())
        elif isinstance(value, np.ndarray):
            found.add(value.ctypes.data)
        elif isinstance(value, Mapping | list | tuple) and id(value) not in visited:
            visited.add(id(value))
            waiting.extend(value.values() if isinstance(value, Mapping) else value)
    return found
