"""Plan what a restore changes in optimizers and schedulers: state of theirs, settings of the user.

A slot of an optimizer finds its parameter by name. A setting that the user has configured
differently from what was configured at the save takes effect (configured.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from holdfast.checkpoint.state import names, paths
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
from holdfast.checkpoint.state.transaction import (
    LoadObject,
    LoadOptimizer,
    LoadScheduler,
    Transaction,
    dressed,
)
from holdfast.i18n import _

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


class Steppers:
    """Plans the optimizers of one restore, and after them the schedulers, which read their groups.

    `live` is the whole state here, `manifest` that of the checkpoint, `configured` what is
    configured here.
    """

    def __init__(
        self,
        transaction: Transaction,
        live: Any,
        manifest: Mapping[str, Any],
        configured: Configured,
    ) -> None:
        self._transaction = transaction
        self._live = live
        self._then, self._now = _mapping(manifest.get("configured")), configured
        self._parameters = _mapping(manifest.get("parameters"))
        self._names: dict[Hashable, list[str]] | None = None
        self._began: dict[int, list[Mapping[str, Any]]] = {}  # by optimizer: what was configured

    def optimizer(self, live: Optimizer, saved: Any, path: str) -> None:
        act, given = None, saved
        if _is_like_torch(live):
            act = LoadOptimizer(live, path)
            self._transaction.act(act)
            try:
                given = _through_hooks(live, saved)
            except Exception as error:  # noqa: BLE001 - a user's hook may raise anything
                self._transaction.problem(f"{path}: {type(error).__name__}: {error}")
                return
        if not _is_optimizer_state(given):
            if act is None:  # a format of its own
                self._transaction.act(LoadObject(live, saved, path))
            else:
                self._transaction.problem(_("{path} is no optimizer in the checkpoint", path=path))
            return
        aligned = self._aligned(live, saved, given, path)
        if aligned is None:
            return
        wanted = self._wanted_groups(live, aligned, path)
        if act is None:
            self._transaction.act(LoadObject(live, {**given, "param_groups": wanted}, path))
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
        parameters goes by their positions.
        """
        groups = given["param_groups"]
        there = names.saved_names(groups, self._parameters.get(path))
        if self._names is None:
            self._names = names.parameter_names(self._live)
        here = names.live_names(live, self._names, there)
        if not _is_same_order(saved, given):
            here, there = names.unnamed(here), names.unnamed(there)
        order = names.aligned(here, there)
        if order is None:
            self._transaction.problem(
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
            slots = groups[home]["params"]
            result.append({**groups[home], "params": [slots[k] for k in which]})
            if "param_names" in group:
                result[-1]["param_names"] = group["param_names"]
        return result

    def _placed(
        self, name: str, value: Any, param: torch.Tensor, group: Mapping[str, Any], path: str
    ) -> Any:
        """Return a state value on its parameter's device, in its own dtype: fp32 stays fp32."""
        if isinstance(value, list | tuple):
            return type(value)([self._placed(name, v, param, group, path) for v in value])
        if isinstance(value, Mapping):
            return {k: self._placed(name, v, param, group, path) for k, v in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        if name in _LIKE_PARAMETER and value.shape != param.shape:
            self._transaction.differs(path, value, param)
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
        setting = "lr" if setting == "initial_lr" else setting
        self._transaction.decide(Decision(path, setting, saved, wanted))

    # ------------------------------------------------------------------------------ schedulers

    def scheduler(self, live: LRScheduler, saved: Any, path: str) -> None:
        record = self._now.record.get(path)
        then = self._then.get(path)
        if not isinstance(saved, Mapping) or not record:
            self._transaction.act(LoadScheduler(live, saved, path))
            return
        now = record[0]
        if not (isinstance(then, list) and then and isinstance(then[0], Mapping)):
            # Written before schedules were recorded: only the rates that they start from are known.
            rates = [group.get("initial_lr") for group in self._began.get(id(live.optimizer), [])]
            then = [{key: rates for key in now if key.rpartition(".")[2] == "base_lrs"}]
        changed = changed_schedule(then[0], now, settings_of(saved))
        if not changed:
            self._transaction.act(LoadScheduler(live, saved, path))
            return
        groups: list[dict[str, Any]] = []
        state = _with_settings(saved, live.state_dict(), changed)
        if path in self._now.fresh:
            try:
                state, groups = self._now.fresh[path].after(saved) or (state, groups)
            except Exception as error:  # noqa: BLE001 - whatever a schedule says to its settings
                self._transaction.problem(
                    _(
                        "{path} cannot go on after {steps} steps with its new settings ({error})",
                        path=path,
                        steps=epoch_of(saved),
                        error=error,
                    )
                )
        self._transaction.act(LoadScheduler(live, state, path, groups=groups))
        for key in changed:
            if key.rpartition(".")[2] not in _DERIVED:
                self._decide(path, key, then[0][key], now[key])


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


def _with_setting(saved: Any, live: Any, keys: Sequence[str]) -> Any:
    """Return `saved` with what `live` has under nested `keys`, where both have something there."""
    key: Any = int(keys[0]) if isinstance(saved, list) else keys[0]
    mine, theirs = paths.at(live, key), paths.at(saved, key)
    if mine is paths.MISSING or theirs is paths.MISSING or key == LAMBDAS == keys[-1]:
        return saved
    result = list(saved) if isinstance(saved, list) else dict(saved)
    result[key] = mine if len(keys) == 1 else _with_setting(theirs, mine, keys[1:])
    return result


def _is_like_torch(optimizer: Optimizer) -> bool:
    """Return True if its state is kept as torch keeps it, so that we can put it there ourselves."""
    kind = type(optimizer)
    return (
        kind.load_state_dict is Optimizer.load_state_dict
        and kind.state_dict is Optimizer.state_dict
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
