"""What a training state is: live objects and values, and what restoring them will change.

A state is a mapping (nested at will) of objects with `state_dict`/`load_state_dict`, tensors and
plain values. Restoring first checks that everything fits, without touching anything; then staged
and live bytes change places (transaction.py).
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from holdfast.checkpoint.randomness import RandomState  # noqa: F401 - part of this room
from holdfast.checkpoint.transaction import (
    Act,
    Assign,
    Exchange,
    ExtraState,
    LoadObject,
    LoadOptimizer,
    LoadScheduler,
    Refill,
    Transaction,
)
from holdfast.errors import StateMismatch
from holdfast.i18n import _

_MISSING = object()
_EXTRA_STATE = "_extra_state"  # the last part of the key under which modules keep theirs
_SEQUENCES = (list, bytearray, set)

# State of torch's own optimizers that has its parameter's shape: checked before anything moves.
_LIKE_PARAMETER = {
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "momentum_buffer",
    "square_avg",
    "sum",
}


# ------------------------------------------------------------------------------------ the plan


def plan_restore(
    live: MutableMapping[str, Any],
    saved: Mapping[str, Any],
    *,
    configured: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> Transaction:
    """Compare `saved` with the live state and plan the exchange; nothing is changed yet.

    `configured` are the optimizers' settings when the saved run began (`configurations`): where
    the live ones differ, the user changed them, and theirs win. With `strict`, every object and
    tensor that is live must be in the checkpoint, and nested ones may not hold others there.

    Raises `StateMismatch` that lists every difference.
    """
    planner = _Planner(configured if isinstance(configured, Mapping) else {}, strict)
    planner.container(live, saved, "")
    planner.finish()
    if planner.transaction.problems:
        lines = planner.transaction.problems
        more = _(" … and {count} more", count=len(lines) - 8) if len(lines) > 8 else ""
        raise StateMismatch(
            _("The checkpoint does not fit; nothing was changed: {lines}",
              lines="; ".join(lines[:8]) + more)
        )  # fmt: skip
    return planner.transaction


class _Planner:
    """Walks the live state beside the saved one. `_one` returns what will stand there."""

    def __init__(self, configured: Mapping[str, Any], strict: bool) -> None:
        self.transaction = Transaction()
        self._configured, self._strict = configured, strict
        self._exchanges: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor, str]] = {}
        self._schedulers: list[tuple[LRScheduler, Any, str]] = []
        self._rebased: set[int] = set()  # optimizers whose learning rate the user has changed

    def container(self, live: Any, saved: Any, path: str) -> Any:
        if not isinstance(saved, Mapping | list | tuple):
            self._problem(_("{path} is no group of values in the checkpoint", path=path))
            return live
        changed: dict[Any, Any] = {}
        for key, value in list(_items(live)):
            here = _join(path, key)
            found = _lookup(saved, key)
            if found is not _MISSING:
                new = self._one(value, found, here)
                if new is not value:
                    changed[key] = new
            elif self._strict and not _is_plain(value):
                self._problem(_("{path} is not in the checkpoint", path=here))
            # a plain value that is new keeps what it is
        for key, value in _items(saved) if path and self._strict else ():
            if _lookup(live, key) is _MISSING and not _is_plain(value):
                self._problem(_("{path} is only in the checkpoint", path=_join(path, key)))
        if changed and isinstance(live, tuple):
            return _like(live, [changed.get(i, value) for i, value in enumerate(live)])
        for key, value in changed.items():
            self._act(Assign(live, key, value))
        return live

    def _one(self, live: Any, saved: Any, path: str) -> Any:
        if isinstance(live, torch.nn.Module):
            self._module(live, saved, path)
        elif isinstance(live, Optimizer) and _is_like_torch(live):
            self._optimizer(live, saved, path)
        elif isinstance(live, torch.Tensor):
            self._tensor(live, saved, path)
        elif isinstance(live, LRScheduler):
            self._schedulers.append((live, saved, path))
        elif callable(getattr(live, "load_state_dict", None)):
            self._act(LoadObject(live, saved, path))
        elif callable(getattr(live, "state_dict", None)):
            self._problem(_("{path} has a state_dict() but no load_state_dict()", path=path))
        elif isinstance(live, Mapping | list | tuple) and not _is_plain(live):
            return self.container(live, saved, path)
        else:
            return self._plain(live, saved, path)
        return live

    def _plain(self, live: Any, saved: Any, path: str) -> Any:
        """A saved value in the type of the live one; live containers stay the objects they are."""
        if isinstance(live, MutableMapping) and isinstance(saved, Mapping):
            content = {
                key: self._plain(live[key], value, _join(path, key)) if key in live else value
                for key, value in saved.items()
            }
            self._act(Refill(live, content))
            return live
        if isinstance(live, np.ndarray) and isinstance(saved, torch.Tensor):
            return self._array(live, saved)
        refillable = isinstance(live, _SEQUENCES) or hasattr(live, "maxlen")
        if refillable and isinstance(saved, _SEQUENCES):
            self._act(Refill(live, saved))
            return live
        return _like(live, saved)

    def _array(self, live: np.ndarray[Any, Any], saved: torch.Tensor) -> np.ndarray[Any, Any]:
        """A NumPy array was saved as a tensor: its bytes go into the live one where they fit."""
        array: np.ndarray[Any, Any] = saved.numpy()
        fits = array.shape == live.shape and array.dtype == live.dtype
        if fits and live.flags.writeable and live.flags.c_contiguous and live.size:
            self._exchanges[live.ctypes.data, live.shape] = torch.from_numpy(live), saved, ""
            return live
        return array.copy()

    def _act(self, act: Act) -> None:
        self.transaction.acts.append(act)

    def _problem(self, text: str) -> None:
        self.transaction.problems.append(text)

    # --------------------------------------------------------------------------------- tensors

    def _tensor(self, live: torch.Tensor, saved: Any, path: str) -> None:
        if not isinstance(saved, torch.Tensor):
            self._problem(_("{path} is no tensor in the checkpoint", path=path))
        elif saved.shape != live.shape or saved.dtype != live.dtype:
            self._differ(path, saved, live)
        elif live.numel():
            # Tied weights are one memory under two names: exchanged once, or they swap back.
            key = (live.device, live.data_ptr(), live.shape, live.stride())
            known = self._exchanges.setdefault(key, (live, saved, path))
            if known[1] is not saved and not _same_bytes(known[1], saved):
                self._problem(
                    _("{a} and {b} are one tensor here and two different ones in the checkpoint",
                      a=known[2], b=path)
                )  # fmt: skip

    def _differ(self, path: str, saved: torch.Tensor, live: torch.Tensor) -> None:
        self._problem(
            _("{path} is {saved} in the checkpoint and {live} here", path=path,
              saved=_shape(saved), live=_shape(live))
        )  # fmt: skip

    def _module(self, live: torch.nn.Module, saved: Any, path: str) -> None:
        if not isinstance(saved, Mapping):
            self._problem(_("{path} is no model in the checkpoint", path=path))
            return
        mine = live.state_dict()
        for name in [name for name in mine if name not in saved]:
            self._problem(_("{path}/{name} is not in the checkpoint", path=path, name=name))
        for name in [name for name in saved if name not in mine]:
            self._problem(_("{path}/{name} is only in the checkpoint", path=path, name=name))
        extra = [name for name in mine if name.rpartition(".")[2] == _EXTRA_STATE]
        if not _is_memory_of(live, [v for name, v in mine.items() if name not in extra]):
            # What state_dict() gives is made for the occasion: bytes put there would go nowhere.
            self._act(LoadObject(live, saved, path))
            return
        found = [name for name in mine if name in saved]
        for name in found:
            if name not in extra:
                self._tensor(mine[name], saved[name], f"{path}/{name}")
        if extra:
            states = {name: saved[name] for name in found if name in extra}
            self._act(LoadObject(ExtraState(live, list(states)), states, path))

    # ------------------------------------------------------------------------------ optimizers

    def _optimizer(self, live: Optimizer, saved: Any, path: str) -> None:
        try:
            groups, entries = list(saved["param_groups"]), dict(saved["state"])
            indices = [list(group["params"]) for group in groups]
        except (TypeError, KeyError, ValueError):
            self._problem(_("{path} is no optimizer in the checkpoint", path=path))
            return
        if [len(group) for group in indices] != [len(g["params"]) for g in live.param_groups]:
            self._problem(_("{path} has other parameter groups in the checkpoint", path=path))
            return
        slots = {
            index: (param, group)
            for numbers, group in zip(indices, live.param_groups, strict=True)
            for index, param in zip(numbers, group["params"], strict=True)
        }
        state: dict[Any, Any] = {}
        for index, entry in entries.items():
            if index in slots and isinstance(entry, Mapping):
                param, group = slots[index]
                state[param] = {
                    name: self._placed(name, value, param, group, f"{path}/{index}/{name}")
                    for name, value in entry.items()
                }
            else:
                state[index] = entry  # what an optimizer keeps for itself and not for a parameter
        self._act(LoadOptimizer(live, state, self._wanted_groups(live, groups, path)))

    def _placed(
        self, name: str, value: Any, param: torch.Tensor, group: Mapping[str, Any], path: str
    ) -> Any:
        """A state value on its parameter's device, in its own dtype (fp32 moments stay fp32)."""
        if isinstance(value, list | tuple):
            return type(value)([self._placed(name, v, param, group, path) for v in value])
        if isinstance(value, Mapping):
            return {k: self._placed(name, v, param, group, path) for k, v in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        if name in _LIKE_PARAMETER and value.shape != param.shape:
            self._differ(path, value, param)
        if name == "step" and not (group.get("capturable") or group.get("fused")):
            return value
        return value.to(param.device)

    def _wanted_groups(
        self, live: Optimizer, groups: Sequence[Mapping[str, Any]], path: str
    ) -> list[dict[str, Any]]:
        """The saved settings, except those that the user has changed since that run began."""
        began = self._configured.get(path)
        known = isinstance(began, list) and all(isinstance(then, Mapping) for then in began)
        if began is None or not known or len(began) != len(groups):
            began = [{} for _group in groups]
        result = []
        for saved, then, now, group in zip(
            groups, began, configuration_of(live), live.param_groups, strict=True
        ):
            changed = {key for key, value in now.items() if key in then and then[key] != value}
            wanted = {key: value for key, value in saved.items() if key != "params"}
            if "initial_lr" in now and "initial_lr" in then:
                changed.discard("lr")  # the schedule's, not the user's
                if "initial_lr" in changed:
                    self._rebased.add(id(live))
                    old, new = then["initial_lr"], group["initial_lr"]
                    wanted["lr"] = saved["lr"] * (new / old) if old and "lr" in saved else new
            result.append(
                {k: _dressed(v, group.get(k)) for k, v in wanted.items() if k not in changed}
            )
        return result

    def finish(self) -> None:
        pairs = [(live, staged) for live, staged, _path in self._exchanges.values()]
        for scheduler, state, path in self._schedulers:  # last: they read their optimizer's groups
            rebased = id(getattr(scheduler, "optimizer", None)) in self._rebased
            self._act(LoadScheduler(scheduler, state, path, rebased=rebased))
        self.transaction.acts.insert(0, Exchange(_apart(pairs, self.transaction.acts)))


# ------------------------------------------------------------------------------- small questions


def configuration_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The plain settings of each parameter group, as the user made them, as JSON holds them."""
    settings = [{k: _setting(v) for k, v in group.items()} for group in optimizer.param_groups]
    return [{k: v for k, v in group.items() if v is not _MISSING} for group in settings]


def _setting(value: Any) -> Any:
    """`value` as JSON gives it back, or `_MISSING` where it is no plain setting."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()  # learning rates may be tensors: 0.01 in fp32 is the user's 0.01
        value = float(f"{value:.7g}") if isinstance(value, float) else value
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, tuple | list):
        items = [_setting(item) for item in value]
        return _MISSING if any(item is _MISSING for item in items) else items
    return value if isinstance(value, bool | int | float | str | None) else _MISSING


def _dressed(value: Any, live: Any) -> Any:
    """A saved setting as the live one is: learning rates may be tensors, or no longer be."""
    if isinstance(live, torch.Tensor):
        return value.to(live.device) if isinstance(value, torch.Tensor) else live.new_tensor(value)
    if isinstance(value, torch.Tensor) and isinstance(live, float) and value.numel() == 1:
        return value.item()
    return value


def configurations(state: Any, path: str = "") -> dict[str, list[dict[str, Any]]]:
    """`configuration_of` every optimizer in a state, by path."""
    found: dict[str, list[dict[str, Any]]] = {}
    for key, value in _items(state):
        here = _join(path, key)
        if isinstance(value, Optimizer):
            found[here] = configuration_of(value)
        elif isinstance(value, Mapping | list | tuple):
            found.update(configurations(value, here))
    return found


def _items(container: Any) -> Iterator[tuple[Any, Any]]:
    return iter(container.items() if isinstance(container, Mapping) else enumerate(container))


def _join(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def _lookup(container: Any, key: Any) -> Any:
    if isinstance(container, Mapping):
        return container.get(key, _MISSING)
    if isinstance(container, list | tuple) and isinstance(key, int) and key < len(container):
        return container[key]
    return _MISSING


def _like(live: Any, saved: Any) -> Any:
    """A plain value in the type that stands there now; saving had made it a plain one."""
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
    """Whether `value` holds no object or tensor that is restored in place."""
    if any(hasattr(value, method) for method in ("load_state_dict", "state_dict")):
        return False
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return not isinstance(value, torch.Tensor)


def _is_like_torch(optimizer: Optimizer) -> bool:
    """Whether its state is kept as torch keeps it, so that we can put it there ourselves."""
    kind = type(optimizer)
    return (
        kind.load_state_dict is Optimizer.load_state_dict
        and kind.state_dict is Optimizer.state_dict
    )


def _is_memory_of(module: torch.nn.Module, values: Sequence[Any]) -> bool:
    """Whether `values` are the module's own memory, so that writing into them changes it."""
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in itertools.chain(module.parameters(), module.buffers())
    }
    return all(
        isinstance(value, torch.Tensor)
        and (value.numel() == 0 or value.untyped_storage().data_ptr() in own)
        for value in values
    )


def _shape(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


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
    """The storages of all tensors in what `acts` will hand to live objects."""
    found: set[int] = set()
    visited: set[int] = set()
    names = ("state", "value", "content")
    waiting = [getattr(act, name) for act in acts for name in names if hasattr(act, name)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            found.add(value.untyped_storage().data_ptr())
        elif isinstance(value, Mapping | list | tuple) and id(value) not in visited:
            visited.add(id(value))
            waiting.extend(value.values() if isinstance(value, Mapping) else value)
    return found
