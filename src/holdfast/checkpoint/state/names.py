"""Name parameters: without the words of wrappers, and in the order of an optimizer's groups.

`torch.compile`, DistributedDataParallel, Fabric, FSDP, PEFT and activation checkpointing put a word
of theirs into every name. A checkpoint is written without them, and read with or without.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from holdfast.checkpoint.state.paths import walk
from holdfast.i18n import _

# These words are never a user's. The others may be: they are dropped on the word of the wrapper's
# type, or where the names fit only without them.
_CERTAIN = "_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_CERTAIN_PART = re.compile(rf"(?:(?<=^)|(?<=[./]))(?:{_CERTAIN})\.")
_OTHERS = r"module|base_model\.model|base_layer|original_module"
_ANY_PART = re.compile(rf"(?:(?<=^)|(?<=[./]))(?:{_CERTAIN}|{_OTHERS})\.")
_has_words = re.compile(rf"(?:{_CERTAIN}|{_OTHERS}|base_model)\.").search  # once for many names
_MODULE_PART = re.compile(r"(?:(?<=^)|(?<=[./]))module\.")
_SEARCHED = 1000  # entries of a container that is searched for optimizers and schedulers
_ATOMS = {type(None), bool, int, float, str, torch.Tensor, torch.nn.Parameter}
GroupNames = list[list[str | None]]  # the names of the parameters of each group, None: not known
# The child of a wrapper that is the wrapped module, by the wrapper's class.
_CHILDREN = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "PeftModel": "base_model",
    "BaseTuner": "model",  # of PEFT, as the next two
    "BaseTunerLayer": "base_layer",
    "AuxiliaryTrainingWrapper": "original_module",
}


# ------------------------------------------------------------------------------ without wrappers


def plain_state(module: torch.nn.Module) -> Any:
    """Return `module.state_dict()` under the names that the module has without its wrappers."""
    state = module.state_dict()
    if not isinstance(state, Mapping) or not _has_words("\n".join(map(str, state))):
        return state
    if not all(isinstance(name, str) for name in state):
        return state
    names = plain_names(module, list(state))
    result = OrderedDict((names[name], value) for name, value in state.items())
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, Mapping):
        plain = without_wrappers_of(module)  # a wrapper's version gives way to the inner module's
        versions = {plain(f"{name}.").removesuffix("."): item for name, item in metadata.items()}
        result._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    return result


def plain_names(module: torch.nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Map each of a module's `names` to the one without the words of wrappers inside of it.

    Names that would become one stay as they are.
    """
    if _has_words("\n".join(names)):
        plain = without_wrappers_of(module)
        result = {name: plain(name) for name in names}
        if len(set(result.values())) == len(result):
            return result
    return {name: name for name in names}


def without_wrappers_of(module: torch.nn.Module) -> Callable[[str], str]:
    """Return the function that takes the words of the wrappers inside of `module` out of a name."""
    dropped = {
        _CERTAIN_PART.sub("", f"{prefix}.{child}" if prefix else child)
        for prefix, inner in module.named_modules(remove_duplicate=False)
        for child in (_CHILDREN.get(kind.__name__) for kind in type(inner).__mro__)
        if child is not None
    }

    def plain(name: str) -> str:
        name = _CERTAIN_PART.sub("", name)
        if not dropped:
            return name
        parts = name.split(".")
        kept = [p for i, p in enumerate(parts) if ".".join(parts[: i + 1]) not in dropped]
        return ".".join(kept)

    return plain


def matched_in(
    module: torch.nn.Module, here: Sequence[str], there: Sequence[str]
) -> dict[str, str] | None:
    """Match as `matched`, where `here` are names in `module`, with or without its wrappers."""
    pairs = matched(here, there)
    if pairs is None and all(isinstance(name, str) for name in here):
        plain = plain_names(module, here)
        pairs = matched(list(plain.values()), there)
        if pairs is not None:
            pairs = {name: pairs[plain[name]] for name in here}
    return pairs


def bare(name: str) -> str:
    """Return `name` without any word that wrappers put into names, wherever it stands."""
    return _ANY_PART.sub("", name)


def matched(here: Sequence[str], there: Sequence[str]) -> dict[str, str] | None:
    """Map each name `here` to the one `there` that means the same parameter.

    None where the two sets of names differ by more than the words of wrappers. A reading in which
    two names become one is not believed.
    """

    def certain(name: str) -> str:
        return _CERTAIN_PART.sub("", name)

    def outer(name: str) -> str:
        return _MODULE_PART.sub("", certain(name), count=1)

    def same(name: str) -> str:
        return name

    if not all(isinstance(name, str) for name in (*here, *there)):
        return {name: name for name in here} if set(here) == set(there) else None
    readings: list[tuple[Callable[[str], str], Callable[[str], str]]] = [
        (same, same),
        (certain, certain),
        (outer, certain),
        (certain, outer),
        (bare, bare),
    ]
    for mine, theirs in readings:
        found = {theirs(name): name for name in there}
        wanted = {name: mine(name) for name in here}
        is_injective = len(found) == len(there) and len({*wanted.values()}) == len(here)
        if is_injective and found.keys() == {*wanted.values()}:
            return {name: found[plain] for name, plain in wanted.items()}
    return None


# ------------------------------------------------------------------------ groups of an optimizer


def unwrapped(value: Any) -> Any:
    """Return the torch optimizer or scheduler inside of a wrapper such as Accelerate's.

    A wrapper with state of its own is returned as it is.
    """
    for word, kind in (("optimizer", Optimizer), ("scheduler", LRScheduler)):
        inner = getattr(value, word, None)
        if isinstance(value, LRScheduler) or not isinstance(inner, kind) or inner is value:
            continue
        inner = unwrapped(inner)
        if callable(getattr(value, "state_dict", None)) and _is_same_state(value, inner):
            return inner
    return value


def _is_same_state(outer: Any, inner: Any) -> bool:
    a, b = outer.state_dict(), inner.state_dict()
    if not isinstance(a, Mapping) or a.keys() != b.keys():
        return False
    if isinstance(inner, LRScheduler):
        return all(a[key] is b[key] or a[key] == b[key] for key in a)
    entries = a["state"]
    return entries.keys() == b["state"].keys() and all(
        entry is b["state"][key] or entry == {} for key, entry in entries.items()
    )


def memory_of(tensor: torch.Tensor) -> Hashable:
    """Return what tells `tensor` from every other: where its numbers lie, and how.

    A parameter and its entry in `model.state_dict()`, which people put into a state in place of the
    model, are two objects over one memory. Without memory of its own it is the object itself.
    """
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a wrapper without memory of its own
        address = 0
    return (address, tensor.shape, tensor.stride()) if address else id(tensor)


def tensors_of(state: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter and tensor in a state under each of its names: `model/0.weight`."""
    for path, value in walk(state):
        if isinstance(value, torch.nn.Module):
            tensors = dict(value.named_parameters(remove_duplicate=False))
            plain = plain_names(value, list(tensors))
            yield from ((f"{path}/{plain[name]}", tensor) for name, tensor in tensors.items())
        elif isinstance(value, torch.Tensor):
            yield path, value


def parameter_names(state: Any) -> dict[Hashable, list[str]]:
    """Return all names of every tensor in a state, by its memory."""
    found: dict[Hashable, list[str]] = {}
    for name, tensor in tensors_of(state):
        found.setdefault(memory_of(tensor), []).append(name)
    return found


def steppers_of(state: Any) -> Iterator[tuple[str, Any]]:
    """Yield the optimizers and schedulers in a state with their paths, without their wrappers.

    Called at each save: containers of very many values are not searched.
    """
    for path, value in walk(state, most=_SEARCHED):
        if type(value) not in _ATOMS:
            inner = unwrapped(value)
            if isinstance(inner, Optimizer | LRScheduler):
                yield path, inner


class OptimizerNames:
    """Names the parameters in the groups of each optimizer in a state, for the manifest.

    Kept from save to save while the optimizers hold the same parameters.
    """

    def __init__(self) -> None:
        self._ids: Any = None
        self._names: dict[str, GroupNames] = {}

    def __call__(self, state: Any) -> dict[str, GroupNames]:
        groups = {
            path: [group["params"] for group in value.param_groups]
            for path, value in steppers_of(state)
            if isinstance(value, Optimizer)
        }
        ids = {path: [[id(p) for p in group] for group in rows] for path, rows in groups.items()}
        if ids != self._ids:
            known = parameter_names(state)
            self._names = {
                path: [[known.get(memory_of(p), [None])[0] for p in group] for group in rows]
                for path, rows in groups.items()
            }
            self._ids = ids
        return self._names


def saved_names(groups: Sequence[Mapping[str, Any]], recorded: Any) -> GroupNames:
    """Return the names of the parameters of saved `groups`, as the manifest has `recorded` them."""
    sizes = [len(group["params"]) for group in groups]
    if isinstance(recorded, list) and all(isinstance(group, list) for group in recorded):
        names = [[n if isinstance(n, str) else None for n in group] for group in recorded]
        if _sizes(names) == sizes:
            return names
    return [[None] * size for size in sizes]


def live_names(
    optimizer: Optimizer, known: Mapping[Hashable, Sequence[str]], saved: GroupNames
) -> GroupNames:
    """Return the names of a live optimizer's parameters; `known` is what `parameter_names` gives.

    Tied weights have several names: the one that is in the checkpoint counts.
    """
    there = set(flat(saved))

    def name_of(parameter: torch.Tensor) -> str | None:
        names = known.get(memory_of(parameter), ())
        return next((name for name in names if name in there), next(iter(names), None))

    return [[name_of(p) for p in group["params"]] for group in optimizer.param_groups]


def unnamed(names: GroupNames) -> GroupNames:
    """Return groups of as many parameters without names: only their positions count."""
    return [[None] * len(group) for group in names]


def flat(names: GroupNames) -> list[str]:
    """Return the names that are known."""
    return [name for group in names for name in group if name is not None]


def _sizes(names: GroupNames) -> list[int]:
    return [len(group) for group in names]


def aligned(live: GroupNames, saved: GroupNames) -> list[tuple[int, list[int]]] | None:
    """Find for each live group the saved one, and the positions of its parameters there.

    By name where both have names, else by position. None where that cannot be told.
    """
    if not flat(live) or not flat(saved):
        if _sizes(live) != _sizes(saved):
            return None
        return [(number, list(range(len(group)))) for number, group in enumerate(saved)]
    pairs = matched(flat(live), flat(saved)) or _matched_inside(flat(live), flat(saved))
    if pairs is None or len(live) != len(saved):
        return None
    left = dict(enumerate(saved))
    result: list[tuple[int, list[int]]] = []
    for number, group in enumerate(live):
        wanted = [None if name is None else pairs[name] for name in group]
        homes = [home for home, names in left.items() if Counter(names) == Counter(wanted)]
        if not homes:
            return None
        home = number if number in homes else homes[0]
        names = left.pop(home)
        # Those without a name keep the order among themselves.
        found = {name: iter([k for k, n in enumerate(names) if n == name]) for name in wanted}
        result.append((home, [next(found[name]) for name in wanted]))
    return result


def _matched_inside(here: Sequence[str], there: Sequence[str]) -> dict[str, str] | None:
    """Match as `matched`, where the module stands under another name in the state."""
    inside, theirs = ({name.partition("/")[2]: name for name in names} for names in (here, there))
    pairs = matched(list(inside), list(theirs))
    if pairs is None or (len(inside), len(theirs)) != (len(here), len(there)):
        return None
    return {inside[name]: theirs[other] for name, other in pairs.items()}


def difference(live: GroupNames, saved: GroupNames) -> str:
    """Say how two optimizers' groups differ, as the end of a sentence."""
    counts = [" + ".join(map(str, _sizes(slots))) or "0" for slots in (saved, live)]
    said = [
        _(
            "of {saved} parameters in the checkpoint, of {live} here",
            saved=counts[0],
            live=counts[1],
        )
    ]
    here, there = flat(live), flat(saved)
    if here and there:
        only_there = [name for name in there if name not in here]
        only_here = [name for name in here if name not in there]
        if only_there:
            said.append(_("only there {names}", names=_some(only_there)))
        if only_here:
            said.append(_("only here {names}", names=_some(only_here)))
        if not only_there and not only_here:
            homes = {name: i for i, group in enumerate(saved) for name in group}
            moved = [n for i, group in enumerate(live) for n in group if n and homes[n] != i]
            said.append(_("in another group {names}", names=_some(moved)))
    return ", ".join(said)


def _some(names: Sequence[str]) -> str:
    more = f" … (+{len(names) - 3})" if len(names) > 3 else ""
    return " ".join(names[:3]) + more
