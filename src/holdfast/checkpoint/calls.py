"""Mistakes of a call, answered in words where the call is made, before anything is done."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError
from holdfast.i18n import _

KINDS = ("epoch", "step", "best", "temp")


def checked_directory(directory: Any) -> Path:
    """Return the run directory, `~` expanded. Raises `ConfigError` where `directory` names none."""
    if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
        raise ConfigError(
            "The run directory is a path, such as {example}; this is {value}.",
            example='"runs/a"',
            value=repr(directory),
        )
    return Path(os.fsdecode(directory)).expanduser()


def check_state(state: Any) -> None:
    """Raise `ConfigError` where `state` is no mapping that can be restored in place."""
    if not isinstance(state, MutableMapping):
        raise ConfigError(
            "A state is a dictionary of what is to be saved, such as {example}; this is a {kind}.",
            example='{"model": model, "optimizer": optimizer}',
            kind=type(state).__name__,
        )


def check_policies(save_when: Any) -> None:
    """Raise `ConfigError` where `save_when` is no list of policies."""
    if not isinstance(save_when, Sequence) or isinstance(save_when, str):
        raise ConfigError(
            "save_when is a list of policies, such as {example}; this is {value}.",
            example="[EverySteps(100)]",
            value=repr(save_when),
        )
    for policy in save_when:
        if not callable(policy) or isinstance(policy, type):
            raise ConfigError(
                "save_when has {value}, which is no policy; write {example}.",
                value=repr(policy),
                example="EverySteps(100)",
            )


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise `ConfigError` where `value` is none of `choices`."""
    if not any(value is choice or value == choice for choice in choices):
        words = ", ".join(repr(choice) for choice in choices)
        raise ConfigError(
            "{name}={value}: it is one of {choices}.", name=name, value=repr(value), choices=words
        )


def check_number(name: str, value: Any, least: float, *, whole: bool = False) -> None:
    """Raise `ConfigError` where `value` is no (`whole`) number of at least `least`."""
    known = isinstance(value, int | float) or hasattr(value, "__index__")
    try:
        number = float(value) if known else math.nan
    except (ValueError, RuntimeError):  # a tensor of several numbers
        number = math.nan
    if (whole and not number.is_integer()) or isinstance(value, bool) or not number >= least:
        kind = _("a whole number") if whole else _("a number")
        raise ConfigError(
            "{name}={value}: it is {kind} of at least {least}.",
            name=name,
            value=repr(value),
            kind=kind,
            least=least,
        )


def check_text(name: str, value: Any) -> None:
    """Raise `ConfigError` where `value` is no text."""
    if not isinstance(value, str):
        raise ConfigError("{name}={value}: it is a text.", name=name, value=repr(value))


def check_handler(name: str, value: Any) -> None:
    """Raise `ConfigError` where `value` is neither None nor a function."""
    if value is not None and not callable(value):
        raise ConfigError("{name}={value}: it is a function.", name=name, value=repr(value))


def check_source(source: Any) -> None:
    """Raise `ConfigError` where `source` names nothing to resume from."""
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(
            "resume(source) takes a file, a glob or a directory, such as {example}; this is "
            "{value}.",
            example='"runs/a/best_model.pt"',
            value=repr(source),
        )


def check_positive(name: str, value: Any) -> None:
    """Raise `ConfigError` where `value` is no number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError("{name}={value}: it is a number above 0.", name=name, value=repr(value))


def is_state_once_given(value: Any) -> bool:
    """Return True if `value` looks like the `state_dict()` of an optimizer or a scheduler."""
    forms = ({"state", "param_groups"}, {"last_epoch", "_step_count"})
    return isinstance(value, Mapping) and any(form <= value.keys() for form in forms)


def check_save(step: Any, epoch: Any, kind: str, metrics: Any = None) -> None:
    """Raise `ConfigError` where a save cannot be meant like this."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise ConfigError(
            "metrics are a dictionary, such as {example}; these are {value}.",
            example='{"val_loss": 1.5}',
            value=repr(metrics),
        )
    check_choice("kind", kind, KINDS)
    check_number("step", step, 0, whole=True)
    if epoch is not None:
        check_number("epoch", epoch, 0, whole=True)
    elif kind == "epoch":
        raise ConfigError(
            "A checkpoint of kind 'epoch' needs to know of which: epoch=1 for the first."
        )
