"""Tell what the user has configured apart from what training has made of it.

One rule for optimizers and schedulers: a setting that the user has configured differently from
what was configured at the save takes effect; everything else is as it was saved. What is configured
is known when an optimizer or a scheduler is made; a manager may be made later than that.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LRScheduler

from holdfast.checkpoint.state.names import steppers_of
from holdfast.checkpoint.state.paths import MISSING
from holdfast.i18n import _

UNSURE = "unsure"  # in a record: the settings of a group that training may have changed
LAMBDAS = "lr_lambdas"

# What schedulers keep of the steps that they have made.
_PROGRESS = {
    "last_epoch",
    "_step_count",
    "_last_lr",
    "best",
    "num_bad_epochs",
    "cooldown_counter",
    "T_cur",
    "T_i",
    "_get_lr_called_within_step",
    "_is_initial",
    "verbose",
}
_PARTS = "_schedulers"
_PROBES = [0, *(1 << n for n in range(20))]  # steps at which functions of the step are compared

Record = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Decision:
    """One setting that a resume has taken from the user and not from the checkpoint."""

    path: str
    setting: str
    saved: Any
    wanted: Any

    def __str__(self) -> str:
        where = f"{self.path}: {self.setting.replace(f'{_PARTS}.', '')}"
        if self.setting.endswith(LAMBDAS):  # functions: there is nothing to show of them
            return f"{where} (" + _("another function of the step") + ")"
        return f"{where} {_shown(self.saved)} → {_shown(self.wanted)}"


def _shown(value: Any) -> Any:
    """Return a setting as a person reads it: of MultiStepLR's counted milestones, the keys."""
    if isinstance(value, list) and all(isinstance(v, list) and v[1:] == [1] for v in value):
        return [key for key, _count in value]
    return value


class Configured:
    """The settings of all optimizers and schedulers in a state as the user has configured them."""

    def __init__(self, state: Any) -> None:
        self.record: Record = {}
        self.fresh: dict[str, Shadow] = {}  # schedulers as they were before their first step
        self._known: dict[str, Any] = {}
        self.look(state)

    def look(self, state: Any) -> Record:
        """Record what is new in `state`, and return the record of all that is there."""
        here = dict(steppers_of(state))
        trained = {
            id(value.optimizer)
            for value in here.values()
            if isinstance(value, LRScheduler) and epoch_of(value) > 0
        }
        for path, value in here.items():
            if self._known.get(path) is not value:
                self.record.pop(path, None)
                self.fresh.pop(path, None)
            if isinstance(value, Optimizer):
                late = id(value) in trained or _has_stepped(value)
                groups = self.record.setdefault(path, [])
                for group in value.param_groups[len(groups) :]:
                    groups.append(_settings_of_group(value, group, late))
            elif path not in self.record:
                if late := epoch_of(value) > 0:
                    self.fresh.pop(path, None)
                else:
                    with contextlib.suppress(Exception):  # a user's function may refuse a copy
                        self.fresh[path] = Shadow(value)
                self.record[path] = [settings_of(value, late=late)]
        self.record = {path: [*self.record[path]] for path in here}  # not what a save still holds
        self._known = here
        return self.record


# -------------------------------------------------------------------------------------- optimizers


def _has_stepped(optimizer: Optimizer) -> bool:
    return (
        bool(optimizer.state)
        or getattr(optimizer, "_opt_called", False)
        or any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
    )


def _settings_of_group(
    optimizer: Optimizer, group: Mapping[str, Any], late: bool
) -> dict[str, Any]:
    """Return the plain settings of a parameter group, as JSON holds them.

    Where training has begun and a setting is not the optimizer's default, training may have changed
    it, or it was the group's own from the beginning: then the default is recorded as unsure.
    """
    result: dict[str, Any] = {}
    unsure: list[str] = []
    for key, value in group.items():
        setting, default = setting_of(value), setting_of(optimizer.defaults.get(key, MISSING))
        if key in ("params", "param_names") or setting is MISSING:
            continue
        if late and default is not MISSING and setting != default:
            setting = default
            unsure.append(key)
        result[key] = setting
    return {**result, UNSURE: unsure} if unsure else result


def changed_settings(
    then: Mapping[str, Any], now: Mapping[str, Any], live: Mapping[str, Any]
) -> set[str]:
    """Return the settings of one group that the user has changed between two records of it.

    `live` are the defaults of the live optimizer: a group that follows them follows their change
    too, even where it is not sure what was configured for it before.
    """
    unsure_then, unsure_now = (set(_texts(record.get(UNSURE))) for record in (then, now))
    changed = {k for k, value in now.items() if k in then and k != UNSURE and then[k] != value}
    sure = {key for key in changed if key not in unsure_then | unsure_now}
    follows = {
        key
        for key in (changed & unsure_then) - sure
        if key in unsure_now or now[key] == setting_of(live.get(key))
    }
    return sure | follows


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


# -------------------------------------------------------------------------------------- schedulers


def epoch_of(scheduler: Any) -> int:
    """Return how many steps a scheduler, or its state, has made; a chain counts in its parts."""
    known = scheduler if isinstance(scheduler, Mapping) else vars(scheduler)
    epoch = known.get("last_epoch")
    if isinstance(epoch, int | float):
        return int(epoch)
    parts = known.get(_PARTS)
    return epoch_of(parts[0]) if isinstance(parts, list) and parts else 0


def settings_of(scheduler: Any, *, late: bool = False, prefix: str = "") -> dict[str, Any]:
    """Return the settings of a scheduler or of its state, as JSON holds them.

    Those of its parts are named `_schedulers.0.T_max`, those of functions that are objects
    `lr_lambdas.0.total`.

    Of a strange kind that has begun only what its constructor names is taken for a setting.
    """
    known = scheduler if isinstance(scheduler, Mapping) else vars(scheduler)
    named = set(known)
    if late and not type(scheduler).__module__.startswith("torch."):
        named = set(inspect.signature(type(scheduler).__init__).parameters)
    result: dict[str, Any] = {}
    for key, value in known.items():
        if key in (_PARTS, LAMBDAS) and isinstance(value, list | tuple):
            for number, part in enumerate(value):
                if isinstance(part, Mapping) or hasattr(part, "__dict__"):
                    result |= settings_of(part, late=late, prefix=f"{prefix}{key}.{number}.")
            if key == LAMBDAS and not isinstance(scheduler, Mapping):
                result[prefix + key] = [None if late else _probed(part) for part in value]
        elif key in named and key not in _PROGRESS:
            setting = setting_of(value)
            if setting is not MISSING:
                result[prefix + key] = setting
    return result


def _probed(function: Callable[[int], Any]) -> str | None:
    """Return a digest of what a function of the step gives at some steps.

    Functions whose digests differ are different. None if it gives a number at none of the steps.
    """
    values: list[str] = []
    for step in _PROBES:
        try:
            values.append(f"{float(function(step)):.6g}")
        except Exception:  # noqa: BLE001 - a user's function, at a step that it may not know
            values.append("")
    if not any(values):
        return None
    return hashlib.blake2b(" ".join(values).encode(), digest_size=8).hexdigest()


def changed_schedule(
    then: Mapping[str, Any], now: Mapping[str, Any], saved: Mapping[str, Any]
) -> list[str]:
    """Return the settings of a scheduler that the user has changed.

    What training itself has moved since (`saved` is not what was configured) is no setting.
    """
    moved = {key for key, value in saved.items() if key in then and then[key] != value}
    return [
        key
        for key, value in now.items()
        if key in then
        and key not in moved
        and then[key] != value
        and not (key.endswith(LAMBDAS) and (_is_unknown(then[key]) or _is_unknown(value)))
    ]


def _is_unknown(probes: Any) -> bool:
    return not isinstance(probes, list) or None in probes


class Shadow:
    """A copy of a scheduler before its first step, over settings of its own.

    What a changed schedule would have done is found by doing it, without touching the live one.
    """

    def __init__(self, scheduler: Any) -> None:
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in scheduler.optimizer.param_groups
        ]
        self._optimizer = SimpleNamespace(
            param_groups=copy.deepcopy(groups), step=None, defaults={}
        )
        self._scheduler = copy.deepcopy(scheduler, {id(scheduler.optimizer): self._optimizer})

    def after(self, saved: Mapping[str, Any]) -> tuple[Any, list[dict[str, Any]]] | None:
        """Return the scheduler's state and the groups' settings after the steps that `saved` made.

        None for a kind that cannot be stepped without being told more. Raises what `step` raises.
        """
        optimizer, scheduler = copy.deepcopy((self._optimizer, self._scheduler))
        if any(_needs_arguments(part) for part in _parts(scheduler)):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the order of calls, which is as it must be here
            for _step in range(epoch_of(saved) - epoch_of(scheduler)):
                scheduler.step()
            part = saved.get("T_cur", 0)
            if isinstance(scheduler, CosineAnnealingWarmRestarts) and part % 1:
                scheduler.step(epoch_of(saved) + part % 1)
        changed = [
            {
                k: v
                for k, v in group.items()
                if k == "lr" or setting_of(v) != setting_of(before.get(k))
            }
            for group, before in zip(
                optimizer.param_groups, self._optimizer.param_groups, strict=True
            )
        ]
        return copy.deepcopy(scheduler.state_dict()), changed


def _parts(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for part in getattr(scheduler, _PARTS, []):
        yield from _parts(part)


def _needs_arguments(scheduler: Any) -> bool:
    parameters = list(inspect.signature(type(scheduler).step).parameters.values())[1:]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is p.empty and p.kind not in kinds for p in parameters)


# ------------------------------------------------------------------------------------- plain values


def setting_of(value: Any) -> Any:
    """Return `value` as JSON gives it back, or `MISSING` where it is no plain setting."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()  # learning rates may be tensors: 0.01 in fp32 is the user's 0.01
        value = float(f"{value:.7g}") if isinstance(value, float) else value
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        value = [[key, item] for key, item in value.items()]
    if isinstance(value, tuple | list):
        items = [setting_of(item) for item in value]
        return MISSING if any(item is MISSING for item in items) else items
    if hasattr(value, "dtype") and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return setting_of(value.item())  # a NumPy number
    return value if isinstance(value, bool | int | float | str | None) else MISSING
