"""Gradients in progress: those that a backward has left and no optimizer has used yet.

They exist between two micro-batches, and in levels that step every few steps and keep their `.grad`
meanwhile. What an optimizer has used is not saved, though `.grad` still holds it: the loop is about
to zero it, and it would make every checkpoint a third larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from holdfast.checkpoint.state import names
from holdfast.checkpoint.state.paths import walk
from holdfast.errors import StateMismatch

KEY = "gradients"  # in a checkpoint; absent where there are none
_USED = "_holdfast_used"  # on a gradient: its version when an optimizer used it
_BEFORE = "_holdfast_before"  # on a parameter: its version before the step


def _uses_all(optimizer: Optimizer) -> bool:
    """Return True if a step uses the gradient of every parameter.

    Optimizers that are not torch's may leave some levels out and keep their gradients; torch's
    fused ones do not move versions.
    """
    return type(optimizer).__module__.startswith("torch.optim.")


def _parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _before_step(optimizer: Optimizer, *_arguments: Any) -> None:
    if not _uses_all(optimizer):
        for parameter in _parameters(optimizer):
            setattr(parameter, _BEFORE, parameter._version)


def _after_step(optimizer: Optimizer, *_arguments: Any) -> None:
    everything = _uses_all(optimizer)
    for parameter in _parameters(optimizer):
        gradient = parameter.grad
        if gradient is None:
            continue
        if everything or getattr(parameter, _BEFORE, None) != parameter._version:
            setattr(gradient, _USED, gradient._version)


# From the import on: a gradient that was used before a manager was made would count as in progress.
register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)


def in_progress(state: Any, *, used: bool = False) -> dict[str, torch.Tensor]:
    """Return the gradients that belong to `state`, by the names of their parameters; with `used`,
    those as well that an optimizer has used."""
    found = {
        name: tensor.grad
        for name, tensor in _leaves(state).items()
        if tensor.grad is not None and (used or not _is_used(tensor.grad))
    }
    dense = [gradient for gradient in found.values() if gradient.layout is torch.strided]
    if dense and not torch.nn.utils.get_total_norm(dense, math.inf).any():
        # Zeroed, not removed: they are still there after a resume, and take no room in the file.
        for name, gradient in found.items():
            if gradient.layout is torch.strided:
                found[name] = gradient.new_zeros(()).expand(gradient.shape)
    return found


def _is_used(gradient: torch.Tensor) -> bool:
    return getattr(gradient, _USED, None) == gradient._version


@dataclass(frozen=True, slots=True)
class Used:
    """A gradient that an optimizer has used, and that is still there."""

    name: str
    parameter: torch.Tensor
    gradient: torch.Tensor

    @property
    def stays(self) -> bool:
        """True if the parameter still has the same tensor as its gradient."""
        return self.parameter.grad is self.gradient


def first_used(state: Any) -> Used | None:
    """Return the first gradient in a state that an optimizer has used; None if there is none."""
    for name, tensor in _leaves(state).items():
        if tensor.grad is not None and _is_used(tensor.grad):
            return Used(name, tensor, tensor.grad)
    return None


@dataclass(slots=True)
class SetGradients:
    """Give the parameters the gradients that they had at the save, and no others."""

    wanted: list[tuple[torch.Tensor, torch.Tensor | None]]
    _before: list[tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=list)

    def commit(self) -> None:
        for parameter, gradient in self.wanted:
            self._before.append((parameter, parameter.grad))
            parameter.grad = gradient

    def undo(self) -> None:
        for parameter, gradient in reversed(self._before):
            parameter.grad = gradient


def plan(state: Any, saved: Any, *, strict: bool = True) -> SetGradients:
    """Plan the return of `saved` gradients (None: there were none).

    Raises StateMismatch, with `strict`, where one of them has no place here.
    """
    left = dict(saved) if isinstance(saved, Mapping) else {}
    wanted: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for name, tensor in _leaves(state).items():
        gradient = left.get(name)
        if isinstance(gradient, torch.Tensor) and gradient.shape == tensor.shape:
            del left[name]
            gradient = torch.empty_like(tensor, dtype=gradient.dtype).copy_(gradient)
            wanted.append((tensor, gradient.detach()))
        elif tensor.grad is not None:
            wanted.append((tensor, None))
    if left and strict:
        raise StateMismatch(
            "The checkpoint was saved between two micro-batches, and its gradient of {name} "
            "has no place here; nothing was changed.",
            name=min(left),
        )
    return SetGradients(wanted)


def _leaves(state: Any) -> dict[str, torch.Tensor]:
    """Find the tensors in which a backward may leave a gradient, each once.

    They are named as their module's parameters, by their path in the state, or by their number in
    an optimizer.
    """
    candidates = list(names.tensors_of(state))
    for path, value in walk(state):
        if isinstance(value, Optimizer):
            candidates += [(f"{path}/{n}", p) for n, p in enumerate(_parameters(value))]
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in candidates:
        if tensor.requires_grad and tensor.is_leaf and id(tensor) not in seen:
            seen.add(id(tensor))
            plain = names.bare(name)
            found[name if plain in found else plain] = tensor
    return found
