"""The optimizer of another training script, put to the parameters that it belongs to.

A state of Adam is numbers by index; whose they are follows from the order in which the script had
handed over its parameters. Where that is not certain nothing is taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from holdfast.checkpoint.state import bare
from holdfast.exchange.importing_sources import Source
from holdfast.i18n import _

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SETTINGS = ("betas", "eps", "weight_decay")

Groups = list[list[torch.nn.Parameter]]


class NotTaken(Exception):
    """The reason for which an optimizer begins anew, for the user."""


def highest_rate(optimizer: Mapping[str, Any] | None) -> float | None:
    """Return the learning rate that the schedule of the script began from; None where it says
    none."""
    try:
        group = optimizer["param_groups"][0]  # type: ignore[index]
        return float(group.get("initial_lr", group["lr"]))
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def weight_decay(optimizer: Mapping[str, Any] | None) -> float | None:
    """Return the largest weight decay of its groups, which is that of the matrices."""
    try:
        return max(float(g["weight_decay"]) for g in optimizer["param_groups"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return None


def take_over(source: Source, live: torch.optim.Optimizer) -> int:
    """Put the state of `source.optimizer` into `live`, an AdamW over the same model's parameters.

    Returns how many steps it has made.

    Raises NotTaken, with nothing changed, where it does not fit.
    """
    state, groups = _parts(source.optimizer)
    owners = _owners(source, groups, state)
    placed: dict[torch.nn.Parameter, dict[str, Any]] = {}
    settings: dict[torch.nn.Parameter, Mapping[str, Any]] = {}
    for group, parameters in zip(groups, owners, strict=True):
        for index, parameter in zip(group["params"], parameters, strict=True):
            entry = state[index]
            placed[parameter] = {
                name: value.to(parameter.device, copy=True)
                for name, value in entry.items()
                if name != "step" and isinstance(value, torch.Tensor)
            }
            step = torch.as_tensor(entry["step"], dtype=torch.float32)
            placed[parameter]["step"] = step.to(parameter.device, copy=True)
            settings[parameter] = group
    left_out = [p for group in live.param_groups for p in group["params"] if p not in placed]
    if left_out:
        raise NotTaken(_("{count} parameters of the model are not in it", count=len(left_out)))
    for parameter, entry in placed.items():
        live.state[parameter] = entry
    for group in live.param_groups:
        if group["params"]:
            theirs = settings[group["params"][0]]
            group.update({name: theirs[name] for name in _SETTINGS if name in theirs})
            group["amsgrad"] = bool(theirs.get("amsgrad", False))
    return max(int(entry["step"]) for entry in placed.values())


def _parts(optimizer: Mapping[str, Any] | None) -> tuple[dict[int, Any], list[dict[str, Any]]]:
    if optimizer is None:
        raise NotTaken(_("there is none in the source"))
    try:
        state, groups = dict(optimizer["state"]), [dict(g) for g in optimizer["param_groups"]]
        indices = [index for group in groups for index in group["params"]]
    except (KeyError, TypeError, ValueError) as error:
        raise NotTaken(_("it has no state and param_groups as those of torch have")) from error
    for index in indices:
        entry = state.get(index)
        if not isinstance(entry, Mapping) or not all(
            isinstance(entry.get(name), torch.Tensor) for name in _MOMENTS
        ):
            raise NotTaken(_("it is not an Adam that has moments for every parameter"))
        if not isinstance(entry.get("step"), int | float | torch.Tensor):
            raise NotTaken(_("it does not say how many steps its moments are from"))
    return state, groups


def _owners(source: Source, groups: list[dict[str, Any]], state: dict[int, Any]) -> Groups:
    """Return the parameters of each group, in its order: the first of the usual ways that fits."""
    for owners in _usual_ways(source, groups):
        sizes = [len(group["params"]) for group in groups]
        if [len(parameters) for parameters in owners] != sizes:
            continue
        pairs = [
            (state[index], parameter)
            for group, parameters in zip(groups, owners, strict=True)
            for index, parameter in zip(group["params"], parameters, strict=True)
        ]
        if all(entry[name].shape == p.shape for entry, p in pairs for name in _MOMENTS):
            return owners
    raise NotTaken(
        _(
            "its parameters are grouped in a way that is not known here, or have other "
            "shapes than the model's"
        )
    )


def _usual_ways(source: Source, groups: list[dict[str, Any]]) -> Iterator[Groups]:
    """Yield parameters by their names where they are there; all in one group; matrices and vectors
    apart, as GPT-2's scripts and transformers' Trainer have them."""
    named = dict(source.model.named_parameters(remove_duplicate=False))
    with contextlib.suppress(KeyError, TypeError):
        yield [[named[bare(name)] for name in group["param_names"]] for group in groups]
    order = list(dict.fromkeys(named[name] for name in source.order if name in named))
    order += [p for p in named.values() if not any(p is q for q in order)]
    if len(groups) == 1:
        yield [order]
    if len(groups) == 2:
        matrices, vectors = [p for p in order if p.dim() >= 2], [p for p in order if p.dim() < 2]
        yield [matrices, vectors]
        yield [vectors, matrices]
