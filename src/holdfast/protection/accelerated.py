"""The parts of a training that Accelerate has prepared, under plain names.

Accelerate itself is not imported: the caller's `Accelerator` has all that is asked for here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.errors import ConfigError


def parts_of(accelerator: Any) -> dict[str, Any]:
    """Return what an `Accelerator` has prepared and registered: `model`, `optimizer`, `scheduler`,
    `loader` and `registered`, the second of a kind as `model_1`; `scaler` and its own counter.

    Raises ConfigError where nothing was prepared yet, or no loader knows its position.
    """
    if not accelerator._models:
        raise ConfigError(
            "The accelerator has prepared no model yet: call protect(..., accelerator=...) after "
            "accelerator.prepare."
        )
    # Accelerate's own loaders read ahead, and skip batches by reading them.
    loaders = [each for each in accelerator._dataloaders if not hasattr(each, "base_dataloader")]
    if accelerator._dataloaders and not loaders:
        raise ConfigError(
            "The loaders that the accelerator has prepared do not know their position in the data. "
            "Prepare holdfast.ResumableLoader(loader) for the training data."
        )
    return {
        **_named("model", accelerator._models),
        **_named("optimizer", accelerator._optimizers),
        **_named("scheduler", accelerator._schedulers),
        **_named("loader", loaders),
        **_named("registered", accelerator._custom_objects),
        "scaler": accelerator.scaler,
        "accelerator": _Counter(accelerator),
    }


def _named(name: str, parts: Sequence[Any]) -> dict[str, Any]:
    return {f"{name}_{i}" if i else name: part for i, part in enumerate(parts)}


class _Counter:
    """The micro-batches that `accumulate` has counted."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, int]:
        return {"step": self._accelerator.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._accelerator.step = state["step"]
