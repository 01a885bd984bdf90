"""Plan what restoring a training state changes in live objects and values.

A state is a mapping (nested at will) of objects with `state_dict`/`load_state_dict`, tensors and
plain values. Restoring first checks that everything fits, without touching anything; then staged
and live bytes change places (transaction.py).
"""

from __future__ import annotations

import enum
import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from holdfast.checkpoint.state import names
from holdfast.checkpoint.state.configured import (
    LAMBDAS,
    Configured,
    Decision,
    changed_schedule,
    changed_settings,
    epoch_of,
    setting_of,
    settings_of,
)
from holdfast.checkpoint.state.randomness import RandomState, stream_of  # noqa: F401 - part of this room
from holdfast.checkpoint.state.transaction import (
    Act,
    Assign,
    Derived,
    Exchange,
    LoadModule,
    LoadObject,
    LoadOptimizer,
    LoadScheduler,
    Refill,
    Transaction,
    dressed,
)
from holdfast.errors import StateMismatch
from holdfast.i18n import _

_MISSING = object()
_EXTRA_STATE = "_extra_state"  # the last part of the key under which modules keep theirs
_SEQUENCES = (list, bytearray, set)
_DERIVED = {"base_lrs", "_schedule_phases"}  # of a schedule's other settings: not told beside them

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
            _(
                "The checkpoint does not fit; nothing was changed: {lines}",
                lines="; ".join(lines[:8]) + more,
            )
        )
    return planner.transaction


class _Planner:
    """Walks the live state beside the saved one. `_one` returns what will stand there."""

    def __init__(
        self, live: Any, manifest: Mapping[str, Any], configured: Configured, strict: bool
    ) -> None:
        self.transaction = Transaction()
        self._live, self._strict = live, strict
        self._then, self._now = _mapping(manifest.get("configured")), configured
        self._parameters = _mapping(manifest.get("parameters"))
        self._names: dict[Hashable, list[str]] | None = None
        self._exchanges: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor, str]] = {}
        self._derived: list[Derived] = []
        self._schedulers: list[tuple[LRScheduler, Any, str]] = []
        self._began: dict[int, list[Mapping[str, Any]]] = {}  # by optimizer: what was configured

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
        inner = names.unwrapped(live)
        if isinstance(live, torch.nn.Module):
            self._module(live, saved, path)
        elif isinstance(inner, Optimizer):
            self._optimizer(inner, saved, path)
        elif isinstance(live, torch.Tensor):
            self._tensor(live, saved, path)
        elif isinstance(inner, LRScheduler):
            self._schedulers.append((inner, saved, path))
        elif callable(getattr(live, "load_state_dict", None)):
            self._act(LoadObject(live, saved, path))
        elif (stream := stream_of(live)) is not None:
            self._act(LoadObject(stream, saved, path))
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
        if isinstance(live, np.ndarray) and isinstance(saved, np.ndarray):
            saved = torch.from_numpy(saved)
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
        if isinstance(saved, np.ndarray):  # it was one when it was saved
            saved = torch.from_numpy(saved)
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
                    _(
                        "{a} and {b} are one tensor here and two different ones in the checkpoint",
                        a=known[2],
                        b=path,
                    )
                )

    def _differ(self, path: str, saved: torch.Tensor, live: torch.Tensor) -> None:
        self._problem(
            _(
                "{path} is {saved} in the checkpoint and {live} here",
                path=path,
                saved=_shape(saved),
                live=_shape(live),
            )
        )

    def _module(self, live: torch.nn.Module, saved: Any, path: str) -> None:
        if not isinstance(saved, Mapping):
            self._problem(_("{path} is no model in the checkpoint", path=path))
            return
        mine = live.state_dict()
        pairs = names.matched(list(mine), list(saved))
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
        _keep_metadata(found, mine, saved)
        extra = {name for name in mine if str(name).rpartition(".")[2] == _EXTRA_STATE}
        if not _is_memory_of(live, [v for name, v in mine.items() if name not in extra]):
            # What state_dict() gives is made for the occasion: bytes put there would go nowhere.
            self._act(LoadObject(live, found, path))
            return
        for name in found.keys() - extra if extra else found:
            self._tensor(mine[name], found[name], f"{path}/{name}")
        if extra or _listens(live):
            found.update((name, mine[name]) for name in found if name not in extra)
            self._load_module(live, found, path, whole=False)

    def _load_module(self, live: torch.nn.Module, state: Any, path: str, *, whole: bool) -> None:
        self._derived.append(Derived(live, whole=whole))
        self._act(LoadModule(live, state, path))

    # ------------------------------------------------------------------------------ optimizers

    def _optimizer(self, live: Optimizer, saved: Any, path: str) -> None:
        act, given = None, saved
        if _is_like_torch(live):
            act = LoadOptimizer(live, path)
            self._act(act)
            try:
                given = _through_hooks(live, saved)
            except Exception as error:  # noqa: BLE001 - a user's hook may raise anything
                self._problem(f"{path}: {type(error).__name__}: {error}")
                return
        if not _is_optimizer_state(given):
            if act is None:  # a format of its own
                self._act(LoadObject(live, saved, path))
            else:
                self._problem(_("{path} is no optimizer in the checkpoint", path=path))
            return
        aligned = self._aligned(live, saved, given, path)
        if aligned is None:
            return
        wanted = self._wanted_groups(live, aligned, path)
        if act is None:
            self._act(LoadObject(live, {**given, "param_groups": wanted}, path))
            return
        act.groups = [{k: v for k, v in group.items() if k != "params"} for group in wanted]
        slots = {
            index: (param, group)
            for new, group in zip(aligned, live.param_groups, strict=True)
            for index, param in zip(new["params"], group["params"], strict=True)
        }
        for index, entry in given["state"].items():
            if index in slots and isinstance(entry, Mapping):
                param, group = slots[index]
                act.state[param] = {
                    name: self._placed(name, value, param, group, f"{path}/{index}/{name}")
                    for name, value in entry.items()
                }
            else:
                act.state[index] = entry  # what an optimizer keeps for itself, not for a parameter

    def _aligned(
        self, live: Optimizer, saved: Any, given: Any, path: str
    ) -> list[dict[str, Any]] | None:
        """Return the groups of `given`, each with its slots, in the order of the live optimizer's.

        `given` is what its hooks have made of `saved`: one that has given the slots to other
        parameters has done so by their places.
        """
        groups = given["param_groups"]
        there = names.saved_slots(groups, self._parameters.get(path))
        if self._names is None:
            self._names = names.parameter_names(self._live)
        here = names.live_slots(live, self._names, there)
        if not _is_same_order(saved, given):
            here, there = here.unnamed(), there.unnamed()
        order = names.aligned(here, there)
        if order is None:
            self._problem(
                _(
                    "{path} has other parameter groups ({how})",
                    path=path,
                    how=names.difference(here, there),
                )
            )
            return None
        began = self._then.get(path)
        if not isinstance(began, list) or len(began) != len(groups):
            began = [{} for _group in groups]
        self._began[id(live)] = [_mapping(began[home]) for home, _which in order]
        result = []
        for (home, which), group in zip(order, live.param_groups, strict=True):
            places = groups[home]["params"]
            result.append({**groups[home], "params": [places[k] for k in which]})
            if "param_names" in group:
                result[-1]["param_names"] = group["param_names"]
        return result

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
        """Return the saved settings, except those that the user has changed since."""
        result = []
        record = self._now.record.get(path, [])
        for number, (saved, then, group) in enumerate(
            zip(groups, self._began[id(live)], live.param_groups, strict=True)
        ):
            now = record[number] if number < len(record) else {}
            changed = changed_settings(then, now, live.defaults)
            wanted = dict(saved)
            if "initial_lr" in now and "initial_lr" in then:
                changed.discard("lr")  # the schedule's, not the user's
                if "initial_lr" in changed and "lr" in saved:
                    old, new = then["initial_lr"], now["initial_lr"]
                    known = isinstance(old, int | float) and isinstance(new, int | float)
                    wanted["lr"] = saved["lr"] * (new / old) if known and old else new
            elif "initial_lr" in then and "lr" in now and "lr" in then:
                changed.add("lr")  # what a schedule that is gone has made of it
            for key in changed:
                value = now[key]
                if setting_of(group.get(key)) == value:
                    value = group[key]  # the user's own object
                wanted[key] = float(value) if value in ("inf", "-inf", "nan") else value
                self._decide(path, key, then[key], now[key])
            result.append({k: dressed(v, group.get(k)) for k, v in wanted.items()})
        return result

    def _decide(self, path: str, setting: str, saved: Any, wanted: Any) -> None:
        decision = Decision(path, "lr" if setting == "initial_lr" else setting, saved, wanted)
        if decision not in self.transaction.decisions:
            self.transaction.decisions.append(decision)

    # ------------------------------------------------------------------------------ schedulers

    def _scheduler(self, live: LRScheduler, saved: Any, path: str) -> None:
        record = self._now.record.get(path)
        then = self._then.get(path)
        if not isinstance(saved, Mapping) or not record:
            self._act(LoadScheduler(live, saved, path))
            return
        now = record[0]
        if not (isinstance(then, list) and then and isinstance(then[0], Mapping)):
            # Written before schedules were recorded: only the rates that they start from are known.
            rates = [group.get("initial_lr") for group in self._began.get(id(live.optimizer), [])]
            then = [{key: rates for key in now if key.rpartition(".")[2] == "base_lrs"}]
        changed = changed_schedule(then[0], now, settings_of(saved))
        if not changed:
            self._act(LoadScheduler(live, saved, path))
            return
        groups: list[dict[str, Any]] = []
        state = _with_settings(saved, live.state_dict(), changed)
        if path in self._now.fresh:
            try:
                state, groups = self._now.fresh[path].after(saved) or (state, groups)
            except Exception as error:  # noqa: BLE001 - whatever a schedule says to its settings
                self._problem(
                    _(
                        "{path} cannot go on after {steps} steps with its new settings ({error})",
                        path=path,
                        steps=epoch_of(saved),
                        error=error,
                    )
                )
        self._act(LoadScheduler(live, state, path, groups=groups))
        for key in changed:
            if key.rpartition(".")[2] not in _DERIVED:
                self._decide(path, key, then[0][key], now[key])

    def finish(self) -> None:
        for scheduler, state, path in self._schedulers:  # last: they read their optimizer's groups
            self._scheduler(scheduler, state, path)
        pairs = [(live, staged) for live, staged, _path in self._exchanges.values()]
        # What is undone last is that which modules derive from their tensors.
        acts = self.transaction.acts
        acts[:0] = [*self._derived, Exchange(_apart(pairs, acts))]


# ------------------------------------------------------------------------------- small questions


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _fits(live: Any, saved: Any) -> bool:
    if not isinstance(live, torch.Tensor) or not isinstance(saved, torch.Tensor):
        return True
    return live.shape == saved.shape and live.dtype == saved.dtype


def _keep_metadata(found: Any, mine: Any, saved: Any) -> None:
    """Hang the versions of the modules that were saved on the state that their hooks will see."""
    said, own = getattr(saved, "_metadata", None), getattr(mine, "_metadata", None)
    if isinstance(said, Mapping) and isinstance(own, Mapping):
        pairs = names.matched([f"{n}." for n in own], [f"{n}." for n in said])
        if pairs is not None:
            said = {
                here.removesuffix("."): said[there.removesuffix(".")]
                for here, there in pairs.items()
            }
        found._metadata = OrderedDict(said)


def _listens(module: torch.nn.Module) -> bool:
    """Return True if anything but torch's plain loading happens when the module is loaded."""
    return type(module).load_state_dict is not torch.nn.Module.load_state_dict or any(
        part._load_state_dict_pre_hooks
        or part._load_state_dict_post_hooks
        or type(part)._load_from_state_dict is not torch.nn.Module._load_from_state_dict
        for part in module.modules()
    )


def _converts(module: torch.nn.Module) -> bool:
    """Return True if the module may make something else of a state before it takes it."""
    return type(module).load_state_dict is not torch.nn.Module.load_state_dict or any(
        part._load_state_dict_pre_hooks
        or not type(part)._load_from_state_dict.__module__.startswith("torch.nn.modules.")
        for part in module.modules()
    )


def _is_optimizer_state(value: Any) -> bool:
    """Return True if `value` has the form that `Optimizer.state_dict` gives."""
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, list | tuple) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple)
        for group in groups
    )


def _through_hooks(live: Optimizer, saved: Any) -> Any:
    """Return `saved` as the optimizer's pre-hooks of loading pass it on."""
    hooks = [*live._optimizer_load_state_dict_pre_hooks.values()]
    if not hooks or not _is_optimizer_state(saved):
        return saved
    groups = [{**group, "params": list(group["params"])} for group in saved["param_groups"]]
    saved = {**saved, "state": dict(saved["state"]), "param_groups": groups}
    for hook in hooks:
        given = hook(live, saved)
        saved = saved if given is None else given
    return saved


def _is_same_order(given: Any, saved: Any) -> bool:
    """Return True if a hook has left the slots of an optimizer's state where they were."""
    if given is saved or not _is_optimizer_state(given):
        return given is saved
    groups = [[list(group["params"]) for group in one["param_groups"]] for one in (given, saved)]
    entries = [{key: id(entry) for key, entry in one["state"].items()} for one in (given, saved)]
    return groups[0] == groups[1] and entries[0] == entries[1]


def _with_settings(saved: Any, live: Any, changed: Sequence[str]) -> Any:
    """Return a scheduler's saved state with the live one's settings where they have changed."""
    for setting in changed:
        saved = _with_setting(saved, live, setting.split("."))
    return saved


def _with_setting(saved: Any, live: Any, place: Sequence[str]) -> Any:
    """Return `saved` with what `live` has at `place`, where both have something there."""
    key: Any = int(place[0]) if isinstance(saved, list) else place[0]
    mine, theirs = _lookup(live, key), _lookup(saved, key)
    if mine is _MISSING or theirs is _MISSING or key == LAMBDAS == place[-1]:
        return saved
    result = list(saved) if isinstance(saved, list) else dict(saved)
    result[key] = mine if len(place) == 1 else _with_setting(theirs, mine, place[1:])
    return result


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


def _is_like_torch(optimizer: Optimizer) -> bool:
    """Return True if its state is kept as torch keeps it, so that we can put it there ourselves."""
    kind = type(optimizer)
    return (
        kind.load_state_dict is Optimizer.load_state_dict
        and kind.state_dict is Optimizer.state_dict
    )


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
        elif isinstance(value, np.ndarray):
            found.add(value.ctypes.data)
        elif isinstance(value, Mapping | list | tuple) and id(value) not in visited:
            visited.add(id(value))
            waiting.extend(value.values() if isinstance(value, Mapping) else value)
    return found
