"""Advice on a difference: what the saved state lacks, and what the moment tells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from holdfast.i18n import _
from holdfast.prove.moments import BOUNDARY, POWER, SAVING, Moment
from holdfast.prove.results import Found, Result, Said

NOT_REPEATABLE, FAILED, ANEW, DIFFERENT = "not repeatable", "failed", "began anew", "different"
_MT19937 = 5056  # bytes of torch's random state on a CPU
_RANDOM = ("rng", "random", "generator", "seed")
_OPTIMIZER = ("optim", "exp_avg", "momentum")
_SCHEDULE = ("sched", "last_epoch", "_last_lr")


def advice(
    cause: str,
    moment: Moment | None,
    straight: Result,
    found: Sequence[Found],
    said: Said | None,
) -> list[str]:
    """Return what to do, the most likely first."""
    if cause == NOT_REPEATABLE:
        return [
            _(
                "Two runs that nothing interrupted differ already. Seed every generator (torch, "
                "NumPy, random, the loader's workers), keep times and unordered sets out of the "
                "training, and ask for torch.use_deterministic_algorithms(True)."
            )
        ]
    assert moment is not None
    told = list(_of_moment(cause, moment))
    if cause == DIFFERENT:
        told += _of_state(straight, found)
        told += _of_differences(found, said)
    return told[:4]


def _of_moment(cause: str, moment: Moment) -> Iterator[str]:
    torn = moment.kind in (SAVING, POWER)
    if torn:
        yield _(
            "A file that was not whole was taken or was in the way. Write to a temporary name in "
            "the same directory, fsync the file, os.replace it, fsync the directory, and only then "
            "move a pointer or remove the one before. holdfast.save(obj, path) does the first four."
        )
    if cause == ANEW:
        yield _(
            "Where the newest checkpoint cannot be read, take the one before it; never begin anew "
            "in silence."
        )
    if moment.kind == BOUNDARY:
        yield _(
            "It is about the end of an epoch: what is saved there must say that the next epoch "
            "begins, and its end (validation, schedule) must run once."
        )
    if cause == FAILED and not torn:
        yield _(
            "The second start must work as the first did. If a script needs an option to resume, "
            "name it with --resume-with 'OPTIONS'."
        )


def _of_state(straight: Result, found: Sequence[Found]) -> Iterator[str]:
    """Say what is missing in the files that hold states."""
    leaves = [leaf for tree in straight.trees.values() for leaf in _leaves(tree)]
    weights = [t for (path, t) in leaves if _is_weight(path, t)]
    if weights and all(tensor.element_size() < 4 for tensor in weights):
        kind = str(weights[0].dtype).removeprefix("torch.")
        yield _("The saved weights are {dtype}: save them as they are trained.", dtype=kind)
    if weights and not any(_names(path, _OPTIMIZER) for path, _value in leaves):
        yield _("No optimizer state is in what it saves: save optimizer.state_dict().")
    if not any(_names(path, _RANDOM) or _is_stream(value) for path, value in leaves):
        yield _(
            "No random state is in what it saves: save and restore that of torch, CUDA, NumPy and "
            "random, and of the sampler."
        )
    lr = any(each.difference.path.endswith(("lr", "last_epoch")) for each in found)
    if lr and not any(_names(path, _SCHEDULE) for path, _value in leaves):
        yield _("No schedule is in what it saves: save scheduler.state_dict().")


def _of_differences(found: Sequence[Found], said: Said | None) -> Iterator[str]:
    lr = any(each.difference.path.endswith((".lr", "_last_lr", "last_epoch")) for each in found)
    if lr or (said is not None and said.name.endswith(("lr", "learning_rate"))):
        yield _("The learning rate differs: restore the scheduler after the optimizer.")
    if said is not None and said.first:
        yield _(
            "The first step after resuming differs already: look at the weights, at the random "
            "state and at which batch comes next (a batch too few, or one twice)."
        )
    elif said is not None:
        yield _(
            "The first steps after resuming are equal and later ones are not: look at the "
            "optimizer's moments (are they those of the right parameters?), the schedule and "
            "random numbers."
        )
    elif found and all(_names(each.difference.path, _RANDOM) for each in found):
        yield _(
            "Only random states differ: restore them last, after everything that draws, such as "
            "iter(loader)."
        )
    yield _("holdfast.protect saves and restores all of this in any loop.")


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}".lower())
    elif isinstance(tree, list | tuple) and len(tree) < 100:
        for value in tree:
            yield from _leaves(value, path)
    else:
        yield path, tree


def _names(path: str, words: Sequence[str]) -> bool:
    return any(word in path.lower() for word in words)


def _is_weight(path: str, value: Any) -> bool:
    is_floating = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0
    return is_floating and not _names(path, _OPTIMIZER)


def _is_stream(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.numel() == _MT19937
    )
