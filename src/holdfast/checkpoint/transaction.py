"""Loading as a transaction: acts that change live objects and can be taken back.

Staged and live bytes change places, so that what was live is the undo log and no second copy of the
state is needed. A load that fails leaves everything exactly as it was.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from holdfast.errors import StateMismatch
from holdfast.i18n import _

log = logging.getLogger("holdfast")

_MISSING = object()
_EXCHANGE_ELEMENTS = 1 << 20  # bounds the scratch memory of an exchange


@dataclass(slots=True)
class Transaction:
    """Everything that restoring will change, in order: all of it happens, or none."""

    acts: list[Act] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def commit(self) -> None:
        """Do all acts. Raises `StateMismatch` where an object refuses its state; then, and after
        any other exception (Ctrl-C too), what was done has been undone."""
        done: list[Act] = []
        try:
            for act in self.acts:
                done.append(act)
                act.commit()
        except BaseException:  # Ctrl-C too: all of it happens, or none
            interrupts = [_undo(act) for act in reversed(done)]
            for interrupt in filter(None, interrupts):
                raise interrupt  # noqa: B904 - its context is what failed first
            raise


def _undo(act: Act) -> BaseException | None:
    """Undo one act. One that cannot go back must not keep the others from going back; a Ctrl-C
    that comes now is returned, to be raised when everything is back."""
    interrupt: BaseException | None = None
    for _attempt in range(3):
        try:
            act.undo()
        except Exception:  # a stranger's load_state_dict may raise anything; the others go back
            log.exception("undoing a restore")
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            interrupt = error
            continue
        break
    return interrupt


class Act(Protocol):
    """One change of a live object. `undo` must work after a `commit` that failed half-way."""

    def commit(self) -> None: ...

    def undo(self) -> None: ...


class Exchange:
    """Live and staged tensors change bytes; doing it again undoes it, from where it stopped.

    An interrupt may come between any two instructions: `_open` is the part that is being exchanged
    and its live bytes, so that at every moment everything can be put back.
    """

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._parts = [part for live, staged in pairs for part in _parts(live, staged)]
        self._done = 0
        self._open: tuple[torch.Tensor, torch.Tensor] | None = None

    def commit(self) -> None:
        for live, staged in self._parts:
            with torch.no_grad():
                kept = live.clone()
                self._open = (live, kept)
                live.copy_(staged)
                staged.copy_(kept)
            self._done += 1
            self._open = None  # last: between the two, undoing it twice gives the same

    def undo(self) -> None:
        with torch.no_grad():
            if self._open is not None:
                live, kept = self._open
                live.copy_(kept)
            while self._done:
                live, staged = self._parts[self._done - 1]
                live.copy_(staged)
                self._done -= 1


def _parts(live: torch.Tensor, staged: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pieces of bounded size; no element of an expanded tensor twice."""
    live, staged = live.detach(), staged.detach()
    for dim, stride in enumerate(live.stride()):
        if stride == 0 and live.shape[dim] > 1:
            live, staged = live.narrow(dim, 0, 1), staged.narrow(dim, 0, 1)
    if 0 in staged.stride() and not staged.is_contiguous():
        staged = staged.contiguous()
    large = live.numel() > _EXCHANGE_ELEMENTS
    if large and live.is_contiguous() and staged.is_contiguous():
        halves = (torch.split(t.view(-1), _EXCHANGE_ELEMENTS) for t in (live, staged))
        yield from zip(*halves, strict=True)
    else:
        yield live, staged


@dataclass(slots=True)
class Assign:
    """One entry of a live mapping or list is replaced by another value."""

    container: Any
    key: Any
    value: Any
    before: Any = _MISSING

    def commit(self) -> None:
        self.before = self.container[self.key]
        self.container[self.key] = self.value

    def undo(self) -> None:
        if self.before is not _MISSING:
            self.container[self.key] = self.before


@dataclass(slots=True)
class Refill:
    """A live list, set or dictionary gets other content and stays the object that it is: the
    training loop holds it under a name of its own."""

    container: Any
    content: Any
    before: Any = _MISSING

    def commit(self) -> None:
        is_mapping = isinstance(self.container, Mapping)
        self.before = dict(self.container) if is_mapping else list(self.container)
        self._fill(self.content)

    def undo(self) -> None:
        if self.before is not _MISSING:
            self._fill(self.before)

    def _fill(self, content: Any) -> None:
        self.container.clear()
        if isinstance(self.container, MutableSequence):
            self.container.extend(content)
        else:
            self.container.update(content)


@dataclass(slots=True)
class LoadObject:
    """Any object with `load_state_dict`; its own `state_dict`, copied, is the undo log."""

    target: Any
    state: Any
    path: str
    before: Any = _MISSING

    def commit(self) -> None:
        self.before = copy.deepcopy(self.target.state_dict())
        try:
            self.target.load_state_dict(self.state)
        except Exception as error:  # a stranger's object may raise anything
            raise StateMismatch(
                _("{path} refused its state from the checkpoint ({error}); nothing was changed.",
                  path=self.path, error=f"{type(error).__name__}: {error}")
            ) from error  # fmt: skip

    def undo(self) -> None:
        if self.before is not _MISSING:
            self.target.load_state_dict(self.before)


@dataclass(slots=True)
class LoadScheduler(LoadObject):
    """A learning-rate schedule; with `rebased`, over the rates that the user wants now."""

    rebased: bool = False

    def commit(self) -> None:
        LoadObject.commit(self)
        if self.rebased:
            _rebase(self.target)


def _rebase(scheduler: Any) -> None:
    """Give a schedule, and those that it is made of, the base rates of its optimizer."""
    groups = scheduler.optimizer.param_groups
    if hasattr(scheduler, "base_lrs") and all("initial_lr" in group for group in groups):
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [group["lr"] for group in groups]
    for part in getattr(scheduler, "_schedulers", []):
        _rebase(part)


@dataclass(slots=True)
class LoadOptimizer:
    """State and groups of an optimizer, without what `Optimizer.load_state_dict` does to them.

    That casts fp32 moments of bf16 parameters to bf16 and brings back the old learning rate.
    """

    target: Optimizer
    state: dict[Any, Any]  # by parameter
    groups: list[dict[str, Any]]
    before: tuple[dict[Any, Any], list[dict[str, Any]]] | None = None

    def commit(self) -> None:
        groups = [dict(group) for group in self.target.param_groups]
        self.before = dict(self.target.state), groups
        self._set(self.state)
        for live, group in zip(self.target.param_groups, self.groups, strict=True):
            live.update(group)  # in place: others may hold these dictionaries

    def undo(self) -> None:
        if self.before is None:
            return
        state, groups = self.before
        self._set(state)
        for live, group in zip(self.target.param_groups, groups, strict=True):
            live.clear()  # the checkpoint may have brought settings that were not there
            live.update(group)

    def _set(self, state: Mapping[Any, Any]) -> None:
        self.target.state.clear()
        self.target.state.update(state)


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
