"""Loading as a transaction: acts that change live objects and can be taken back.

Staged and live bytes change places, so that what was live is the undo log and no second copy of the
state is needed. A load that fails leaves everything exactly as it was.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from holdfast.checkpoint.state.configured import Decision
from holdfast.checkpoint.state.paths import MISSING
from holdfast.errors import StateMismatch
from holdfast.i18n import _

log = logging.getLogger("holdfast")

EXCHANGE_ELEMENTS = 1 << 20  # bounds the scratch memory of an exchange


@dataclass(slots=True)
class Transaction:
    """The changes of a restore, in order: all of them happen, or none."""

    acts: list[Act] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)  # settings that are the user's now

    def act(self, act: Act) -> None:
        """Plan one more change."""
        self.acts.append(act)

    def problem(self, text: str) -> None:
        """Record a difference: with one of them nothing is restored."""
        self.problems.append(text)

    def differs(self, path: str, saved: torch.Tensor, live: torch.Tensor) -> None:
        """Record that a tensor has another shape or dtype in the checkpoint than here."""
        self.problem(
            _(
                "{path} is {saved} in the checkpoint and {live} here",
                path=path,
                saved=_form(saved),
                live=_form(live),
            )
        )

    def decide(self, decision: Decision) -> None:
        """Record a setting that is the user's now, once."""
        if decision not in self.decisions:
            self.decisions.append(decision)

    def commit(self) -> None:
        """Do all acts; after any exception, Ctrl-C too, what was done has been undone.

        Raises `StateMismatch` where an object refuses its state.
        """
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

    def forget(self) -> None:
        """Undo what hooks have done to their optimizers while it was planned; do none of it."""
        for act in reversed(self.acts):
            if isinstance(act, LoadOptimizer):
                act.undo()


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _undo(act: Act) -> BaseException | None:
    """Undo one act, and log an exception: the other acts must still be undone.

    A Ctrl-C that comes now is returned, to be raised when all acts are undone.
    """
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
    """Exchange the bytes of live and staged tensors; the same exchange back undoes it.

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
    """Yield both in pieces of bounded size; no element of an expanded tensor twice."""
    live, staged = live.detach(), staged.detach()
    for dim, stride in enumerate(live.stride()):
        if stride == 0 and live.shape[dim] > 1:
            live, staged = live.narrow(dim, 0, 1), staged.narrow(dim, 0, 1)
    if 0 in staged.stride() and not staged.is_contiguous():
        staged = staged.contiguous()
    large = live.numel() > EXCHANGE_ELEMENTS
    if large and live.is_contiguous() and staged.is_contiguous():
        halves = (torch.split(t.view(-1), EXCHANGE_ELEMENTS) for t in (live, staged))
        yield from zip(*halves, strict=True)
    else:
        yield live, staged


@dataclass(slots=True)
class Refill:
    """Replace the content of a live list, set or dictionary.

    It stays the object that it is: the training loop holds it under a name of its own.
    """

    container: Any
    content: Any
    before: Any = MISSING

    def commit(self) -> None:
        is_mapping = isinstance(self.container, Mapping)
        self.before = dict(self.container) if is_mapping else list(self.container)
        self._fill(self.content)

    def undo(self) -> None:
        if self.before is not MISSING:
            self._fill(self.before)

    def _fill(self, content: Any) -> None:
        self.container.clear()
        if isinstance(self.container, MutableSequence):
            self.container.extend(content)
        else:
            self.container.update(content)


@contextlib.contextmanager
def _refusals(path: str) -> Iterator[None]:
    """Turn what an object raises over its state into `StateMismatch`."""
    try:
        yield
    except Exception as error:  # a user's object or hook may raise anything
        raise StateMismatch(
            "{path} refused its state from the checkpoint ({error}); nothing was changed.",
            path=path,
            error=f"{type(error).__name__}: {error}",
        ) from error


@dataclass(slots=True)
class LoadObject:
    """Load any object with `load_state_dict`; a copy of its `state_dict` is the undo log."""

    target: Any
    state: Any
    path: str
    before: Any = MISSING

    def commit(self) -> None:
        self.before = copy.deepcopy(self.target.state_dict())
        with _refusals(self.path):
            self.target.load_state_dict(self.state)

    def undo(self) -> None:
        if self.before is not MISSING:
            self.target.load_state_dict(self.before)


@dataclass(slots=True)
class LoadScheduler(LoadObject):
    """Load a learning-rate schedule.

    `groups` are the settings of its optimizer's groups where the user has changed the schedule;
    None where they are as they were saved.
    """

    groups: list[dict[str, Any]] | None = None
    groups_before: list[dict[str, Any]] | None = None

    def commit(self) -> None:
        live = self.target.optimizer.param_groups
        self.groups_before = [dict(group) for group in live]
        LoadObject.commit(self)
        for group, settings in zip(live, self.groups or [], strict=False):
            group.update({key: dressed(value, group.get(key)) for key, value in settings.items()})
        if self.groups is not None and hasattr(self.target, "_last_lr"):
            self.target._last_lr = [group["lr"] for group in live]

    def undo(self) -> None:
        if self.groups_before is not None:
            LoadObject.undo(self)
            _put_back(self.target.optimizer.param_groups, self.groups_before)


def dressed(value: Any, live: Any) -> Any:
    """Give a setting the type of the live one: learning rates may be tensors, or no longer be."""
    if isinstance(live, torch.Tensor):
        return value.to(live.device) if isinstance(value, torch.Tensor) else live.new_tensor(value)
    if isinstance(value, torch.Tensor) and isinstance(live, float) and value.numel() == 1:
        return value.item()
    if isinstance(live, tuple) and isinstance(value, list):
        return tuple(value)
    return value


def _put_back(groups: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> None:
    for live, group in zip(groups, before, strict=True):
        live.clear()  # the checkpoint may have brought settings that were not there
        live.update(group)


class LoadOptimizer:
    """Set state and groups of an optimizer, in the place of `Optimizer.load_state_dict`.

    torch's own casts fp32 moments of bf16 parameters to bf16 and brings back the old learning rate.
    What it calls is called here too: `__setstate__`, and the hooks after it. To be made before
    anything of the optimizer is touched: what it is then is the undo log.
    """

    def __init__(self, target: Optimizer, path: str) -> None:
        self.target, self._path = target, path
        self.state: dict[Any, Any] = {}  # by parameter
        self.groups: list[dict[str, Any]] = []
        self._before = dict(target.state), [dict(group) for group in target.param_groups]
        self._attributes = dict(vars(target))

    def commit(self) -> None:
        optimizer = self.target
        self._set(self.state)
        for live, group in zip(optimizer.param_groups, self.groups, strict=True):
            live.update(group)  # in place: others may hold these dictionaries
        with _refusals(self._path):
            optimizer.__setstate__(
                {"state": optimizer.state, "param_groups": optimizer.param_groups}
            )
            for hook in [*optimizer._optimizer_load_state_dict_post_hooks.values()]:
                hook(optimizer)

    def undo(self) -> None:
        attributes = vars(self.target)
        for name in attributes.keys() - self._attributes.keys():
            del attributes[name]
        attributes.update(self._attributes)
        state, groups = self._before
        self._set(state)
        _put_back(self.target.param_groups, groups)

    def _set(self, state: Mapping[Any, Any]) -> None:
        self.target.state.clear()
        self.target.state.update(state)


class Derived:
    """Keep what a module's own loading may change beside the exchanged tensors, to undo it.

    These are attributes, buffers that are not saved, and extra state. `whole` keeps the parameters
    as well, for a module that puts them in place itself.
    """

    def __init__(self, module: torch.nn.Module, *, whole: bool) -> None:
        self._module, self._whole = module, whole
        self._attributes: list[tuple[torch.nn.Module, dict[str, Any]]] = []
        self._inside: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._bytes: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._extra: list[tuple[torch.nn.Module, Any]] = []

    def commit(self) -> None:
        seen: set[int] = set()  # and, if not `whole`, those that an `Exchange` puts back
        for module in () if self._whole else self._module.modules():
            seen.update(map(id, module._parameters.values()))
            kept = module._buffers.keys() - module._non_persistent_buffers_set
            seen.update(id(module._buffers[name]) for name in kept)
        for module in self._module.modules():
            attributes = dict(vars(module))
            self._attributes.append((module, attributes))
            inside = [attributes[n] for n in ("_parameters", "_buffers", "_modules")]
            self._inside += [(live, dict(live)) for live in inside]
            for value in itertools.chain(attributes.values(), *(d.values() for d in inside)):
                if isinstance(value, torch.Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    self._bytes.append((value, value.detach().clone()))
            if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
                self._extra.append((module, copy.deepcopy(module.get_extra_state())))

    def undo(self) -> None:
        try:
            for module, extra in self._extra:
                module.set_extra_state(extra)
        finally:  # after it: what it makes of the state is known as well
            self._put_back()

    def _put_back(self) -> None:
        for module, attributes in self._attributes:
            now = vars(module)
            for name in now.keys() - attributes.keys():
                del now[name]
            now.update(attributes)
        for live, before in self._inside:
            live.clear()
            live.update(before)
        with torch.no_grad():
            for tensor, kept in self._bytes:
                tensor.copy_(kept)


@dataclass(slots=True)
class LoadModule(LoadObject):
    """Load a module through its own `load_state_dict`, with all its hooks; `Derived` undoes it.

    Where the tensors are in place already, they are given as they stand there.
    """

    def commit(self) -> None:
        with _refusals(self.path):
            self.target.load_state_dict(self.state)

    def undo(self) -> None:
        """Do nothing: `Derived` puts everything back."""
