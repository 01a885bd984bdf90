"""The part of a manifest that is not the state, as plain values: a checkpoint describes itself."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from typing import Any

import torch

from holdfast.checkpoint.system import project
from holdfast.version import __version__


def environment() -> dict[str, Any]:
    """Return what the bits of a training depend on besides its state; `git` only where known."""
    git = project.state()
    return {
        "holdfast": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **({} if git is None else {"git": git}),
    }


def plain_metrics(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Metrics as JSON can hold them: tensors and NumPy numbers as floats, NaN and the infinities by
    name, whatever else as text."""
    return {str(key): _plain(value) for key, value in (metrics or {}).items()}


def score_of(metrics: Mapping[str, Any], name: str, *, lower_is_better: bool) -> dict[str, Any]:
    """The metric that decides which checkpoint is best; NaN and the infinities are no score."""
    value = metrics.get(name)
    usable = isinstance(value, int | float) and math.isfinite(value)
    return {
        "name": name,
        "value": float(value) if usable and value is not None else None,
        "lower_is_better": lower_is_better,
    }


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # tensors of several elements
        return str(value)
    return number if math.isfinite(number) else repr(number)
