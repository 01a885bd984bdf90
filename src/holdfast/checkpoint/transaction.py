"""Loading as a transaction: acts that change live objects and can be taken back.

Staged and live bytes change places, so that what was live is the undo log and no second copy of the
state is needed. A load that fails leaves everything exactly as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

_MISSING = object()
_EXCHANGE_ELEMENTS = 1 << 20  # bounds the scratch memory of an exchange


@dataclass(slots=True)
class Transaction:
    """Everything that restoring will change, in order: all of it happens, or none."""

    acts: list[Act] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def commit(self) -> None:
        done: list[Act] = []
        try:
            for act in self.acts:
                done.append(act)
                act.commit()
        except BaseException:
            for act in reversed(done):
                act.undo()
            raise


class Act(Protocol):
    """One change of a live object. `undo` must work after a `commit` that failed half-way."""

    def commit(self) -> None: ...

    def undo(self) -> None: ...


@dataclass(slots=True)
class Exchange:
    """Live and staged tensors change bytes; doing it again undoes it, from where it stopped."""

    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    done: int = 0

    def commit(self) -> None:
        for live, staged in self.pairs[self.done :]:
            _swap(live, staged)
            self.done += 1

    def undo(self) -> None:
        while self.done:
            self.done -= 1
            _swap(*self.pairs[self.done])


@dataclass(slots=True)
class Assign:
    """One entry of a live container is replaced by a plain value."""

    container: Any
    key: Any
    value: Any
    before: Any = _MISSING

    def commit(self) -> None:
        if not isinstance(self.container, MutableMapping) or self.key in self.container:
            self.before = self.container[self.key]
        self.container[self.key] = self.value

    def undo(self) -> None:
        if self.before is _MISSING:
            self.container.pop(self.key, None)
        else:
            self.container[self.key] = self.before


@dataclass(slots=True)
class LoadObject:
    """Any object with `load_state_dict`; its own `state_dict`, copied, is the undo log."""

    target: Any
    state: Any
    before: Any = _MISSING

    def commit(self) -> None:
        self.before = copy.deepcopy(self.target.state_dict())
        self.target.load_state_dict(self.state)

    def undo(self) -> None:
        if self.before is not _MISSING:
            self.target.load_state_dict(self.before)


@dataclass(slots=True)
class LoadScheduler(LoadObject):
    """A learning-rate schedule; its base rates are the optimizer's, as the user now wants them."""

    def commit(self) -> None:
        LoadObject.commit(self)
        groups = self.target.optimizer.param_groups
        if hasattr(self.target, "base_lrs") and all("initial_lr" in g for g in groups):
            self.target.base_lrs = [group["initial_lr"] for group in groups]
            self.target._last_lr = [group["lr"] for group in groups]


@dataclass(slots=True)
class LoadOptimizer:
    """State and groups of an optimizer, without what `Optimizer.load_state_dict` does to them.

    That casts fp32 moments of bf16 parameters to bf16 and brings back the old learning rate.
    """

    target: Optimizer
    state: dict[torch.Tensor, dict[str, Any]]
    groups: list[dict[str, Any]]
    before: tuple[dict[Any, Any], list[dict[str, Any]]] | None = None

    def commit(self) -> None:
        groups = [dict(group) for group in self.target.param_groups]
        self.before = dict(self.target.state), groups
        self._set(self.state, self.groups)

    def undo(self) -> None:
        if self.before is not None:
            self._set(*self.before)

    def _set(self, state: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> None:
        self.target.state.clear()
        self.target.state.update(state)
        for live, group in zip(self.target.param_groups, groups, strict=True):
            live.update(group)  # in place: schedulers hold these dictionaries


def _swap(live: torch.Tensor, staged: torch.Tensor) -> None:
    with torch.no_grad():
        live = live.detach()
        parts = [(live, staged)]
        if live.is_contiguous() and staged.is_contiguous() and live.numel() > _EXCHANGE_ELEMENTS:
            halves = (torch.split(t.view(-1), _EXCHANGE_ELEMENTS) for t in (live, staged))
            parts = list(zip(*halves, strict=True))
        for a, b in parts:
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)


@dataclass(slots=True)
class ExtraState:
    """What modules keep through `get_extra_state`, as an object that LoadObject can handle."""

    module: torch.nn.Module
    names: list[str]

    def _owners(self) -> Iterator[tuple[str, torch.nn.Module]]:
        for name in self.names:
            yield name, self.module.get_submodule(name.rpartition(".")[0])

    def state_dict(self) -> dict[str, Any]:
        return {name: owner.get_extra_state() for name, owner in self._owners()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, owner in self._owners():
            owner.set_extra_state(state[name])
