"""What a training state is: live objects and values, and what restoring them will change.

A state is a mapping (nested at will) of objects with `state_dict`/`load_state_dict`, tensors and
plain values. Restoring first checks that everything fits, without touching anything; then staged
and live bytes change places (transaction.py).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from holdfast.checkpoint.transaction import (
    Act,
    Assign,
    Exchange,
    ExtraState,
    LoadObject,
    LoadOptimizer,
    LoadScheduler,
    Transaction,
)
from holdfast.errors import StateMismatch
from holdfast.i18n import _

_MISSING = object()

# State of torch's own optimizers that has its parameter's shape: checked before anything moves.
_LIKE_PARAMETER = {
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "momentum_buffer",
    "square_avg",
    "sum",
}


# --------------------------------------------------------------------------------- random numbers


class RandomState:
    """The random streams of this process: Python, NumPy (global), torch on every device."""

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        bits = np.random.get_state(legacy=False)
        assert isinstance(bits, dict)
        state: dict[str, Any] = {
            # As tensors, because 625 integers as plain values change the size of the file.
            "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
            "numpy": {
                "bit_generator": bits["bit_generator"],
                "key": torch.from_numpy(bits["state"]["key"].astype(np.int64)),
                "pos": int(bits["state"]["pos"]),
                "has_gauss": int(bits["has_gauss"]),
                "gauss": float(bits["gauss"]),
            },
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        if torch.backends.mps.is_available():
            state["mps"] = torch.mps.get_rng_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        python, numpy = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
        key = numpy["key"].numpy().astype(np.uint32)
        np.random.set_state(
            {
                "bit_generator": numpy["bit_generator"],
                "state": {"key": key, "pos": numpy["pos"]},
                "has_gauss": numpy["has_gauss"],
                "gauss": numpy["gauss"],
            }
        )
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available():
            for device, stream in enumerate(state["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(stream, device)
        if "mps" in state and torch.backends.mps.is_available():
            torch.mps.set_rng_state(state["mps"])


# ------------------------------------------------------------------------------------ the plan


def plan_restore(
    live: MutableMapping[str, Any],
    saved: Mapping[str, Any],
    *,
    configured: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> Transaction:
    """Compare `saved` with the live state and plan the exchange; nothing is changed yet.

    `configured` are the optimizers' settings when the saved run began (`configuration_of`): where
    the live ones differ, the user changed them, and theirs win. With `strict`, whatever is live
    must be in the checkpoint.

    Raises `StateMismatch` that lists every difference.
    """
    planner = _Planner(configured or {}, strict)
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
    def __init__(self, configured: Mapping[str, Any], strict: bool) -> None:
        self.transaction = Transaction()
        self._configured, self._strict = configured, strict
        self._exchanges: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor, str]] = {}
        self._late: list[Act] = []  # schedulers read their optimizer's groups: after it

    def container(self, live: Any, saved: Any, path: str) -> None:
        items = live.items() if isinstance(live, Mapping) else enumerate(live)
        for key, value in list(items):
            here = f"{path}/{key}" if path else str(key)
            found = _lookup(saved, key)
            if found is not _MISSING:
                self._one(live, key, value, found, here)
            elif self._strict and not _is_plain(value):
                self._problem(_("{path} is not in the checkpoint", path=here))
            # a plain value that is new keeps what it is

    def _one(self, parent: Any, key: Any, live: Any, saved: Any, path: str) -> None:
        if isinstance(live, torch.nn.Module):
            self._module(live, saved, path)
        elif isinstance(live, Optimizer) and _loads_like_torch(live):
            self._optimizer(live, saved, path)
        elif isinstance(live, torch.Tensor):
            self._tensor(live, saved, path)
        elif callable(getattr(live, "load_state_dict", None)):
            if isinstance(live, LRScheduler):
                self._late.append(LoadScheduler(live, saved))
            else:
                self.transaction.acts.append(LoadObject(live, saved))
        elif isinstance(live, MutableMapping | list) and not _is_plain(live):
            self.container(live, saved, path)
        else:
            self.transaction.acts.append(Assign(parent, key, saved))

    def _problem(self, text: str) -> None:
        self.transaction.problems.append(text)

    def _tensor(self, live: torch.Tensor, saved: Any, path: str) -> None:
        if not isinstance(saved, torch.Tensor):
            self._problem(_("{path} is no tensor in the checkpoint", path=path))
        elif saved.shape != live.shape or saved.dtype != live.dtype:
            self._problem(
                _("{path} is {saved} in the checkpoint and {live} here", path=path,
                  saved=_shape(saved), live=_shape(live))
            )  # fmt: skip
        elif live.numel():
            # Tied weights are one memory under two names: exchanged once, or they swap back.
            key = (live.device, live.data_ptr(), live.shape, live.stride())
            known = self._exchanges.setdefault(key, (live, saved, path))
            if known[1] is not saved and not _same_bytes(known[1], saved):
                self._problem(
                    _("{a} and {b} are one tensor here and two different ones in the checkpoint",
                      a=known[2], b=path)
                )  # fmt: skip

    def _module(self, live: torch.nn.Module, saved: Any, path: str) -> None:
        if not isinstance(saved, Mapping):
            self._problem(_("{path} is no model in the checkpoint", path=path))
            return
        mine = live.state_dict()
        extra: dict[str, Any] = {}
        for name in mine.keys() - saved.keys():
            self._problem(_("{path}/{name} is not in the checkpoint", path=path, name=name))
        for name in saved.keys() - mine.keys():
            self._problem(_("{path}/{name} is only in the checkpoint", path=path, name=name))
        for name, value in mine.items():
            if name not in saved:
                continue
            if isinstance(value, torch.Tensor):
                self._tensor(value, saved[name], f"{path}/{name}")
            else:
                extra[name] = saved[name]
        if extra:
            self.transaction.acts.append(LoadObject(ExtraState(live, list(extra)), extra))

    def _optimizer(self, live: Optimizer, saved: Any, path: str) -> None:
        groups, params = saved["param_groups"], _parameters(live)
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(group["params"]) for group in live.param_groups]:
            self._problem(_("{path} has other parameter groups in the checkpoint", path=path))
            return
        by_index = dict(zip((i for g in groups for i in g["params"]), params, strict=True))
        state: dict[torch.Tensor, dict[str, Any]] = {}
        for index, entry in saved["state"].items():
            param, group = by_index[index], self._group_of(live, by_index[index])
            state[param] = {
                name: self._placed(name, value, param, group, path) for name, value in entry.items()
            }
        wanted = self._wanted_groups(live, groups, path)
        self.transaction.acts.append(LoadOptimizer(live, state, wanted))

    @staticmethod
    def _group_of(live: Optimizer, param: torch.Tensor) -> dict[str, Any]:
        return next(g for g in live.param_groups if any(p is param for p in g["params"]))

    def _placed(
        self, name: str, value: Any, param: torch.Tensor, group: Mapping[str, Any], path: str
    ) -> Any:
        """A state value on its parameter's device, in its own dtype (fp32 moments stay fp32)."""
        if not isinstance(value, torch.Tensor):
            return value
        if name in _LIKE_PARAMETER and value.shape != param.shape:
            self._problem(
                _("{path} is {saved} in the checkpoint and {live} here", path=f"{path}/{name}",
                  saved=_shape(value), live=_shape(param))
            )  # fmt: skip
        if name == "step" and not (group.get("capturable") or group.get("fused")):
            return value
        return value.to(param.device)

    def _wanted_groups(
        self, live: Optimizer, groups: Sequence[Mapping[str, Any]], path: str
    ) -> list[dict[str, Any]]:
        """The saved settings, except those that the user has changed since that run began."""
        began = self._configured.get(path, [{}] * len(groups))
        now = configuration_of(live)
        result = []
        for saved, then, current in zip(groups, began, now, strict=False):
            wanted = {key: value for key, value in saved.items() if key != "params"}
            changed = {k for k, v in current.items() if k in then and _plain(then[k]) != _plain(v)}
            if "initial_lr" in current and "initial_lr" in then:
                changed.discard("lr")  # the schedule's, not the user's
                if "initial_lr" in changed and then["initial_lr"]:
                    wanted["lr"] = saved["lr"] * (current["initial_lr"] / then["initial_lr"])
            wanted.update({key: current[key] for key in changed})
            result.append(wanted)
        return result

    def finish(self) -> None:
        pairs = [(live, saved) for live, saved, _path in self._exchanges.values()]
        self.transaction.acts.insert(0, Exchange(_apart(pairs)))
        self.transaction.acts.extend(self._late)


# ------------------------------------------------------------------------------- small questions


def configuration_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The plain settings of each parameter group, as the user made them."""
    return [
        {k: v for k, v in group.items() if isinstance(v, bool | int | float | str | tuple | None)}
        for group in optimizer.param_groups
    ]


def configurations(
    state: Mapping[Any, Any] | list[Any], path: str = ""
) -> dict[str, list[dict[str, Any]]]:
    """`configuration_of` every optimizer in a state, by path."""
    found: dict[str, list[dict[str, Any]]] = {}
    items = state.items() if isinstance(state, Mapping) else enumerate(state)
    for key, value in items:
        here = f"{path}/{key}" if path else str(key)
        if isinstance(value, Optimizer):
            found[here] = configuration_of(value)
        elif isinstance(value, Mapping | list):
            found.update(configurations(value, here))
    return found


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _loads_like_torch(optimizer: Optimizer) -> bool:
    return type(optimizer).load_state_dict is Optimizer.load_state_dict


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # JSON has no tuples


def _is_plain(value: Any) -> bool:
    """Whether `value` holds no object or tensor that is restored in place."""
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return not isinstance(value, torch.Tensor) and not hasattr(value, "load_state_dict")


def _lookup(saved: Any, key: Any) -> Any:
    if isinstance(saved, Mapping):
        return saved.get(key, _MISSING)
    if isinstance(saved, list | tuple) and isinstance(key, int) and key < len(saved):
        return saved[key]
    return _MISSING


def _shape(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    flat = (a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    return torch.equal(*flat)  # bytes, because NaN is not equal to itself


def _apart(
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Give each live tensor staged bytes of its own: two that were tied when saved may not be."""
    seen: set[int] = set()
    result = []
    for live, staged in pairs:
        shared = staged.untyped_storage().data_ptr() in seen
        seen.add(staged.untyped_storage().data_ptr())
        result.append((live, staged.clone() if shared else staged))
    return result
