"""Write what a command gives: files that a person names, and values as JSON and as dotted names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from holdfast.checkpoint.system import filesystem


def write_output(path: Path, data: bytes) -> None:
    """Write `data` to `path`: as a whole and durably where it is a file, or is none yet.

    A pipe, a device and a link (`/dev/stdout` is one) are written through, never replaced.
    Raises OSError as it comes.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        with path.open("wb") as file:
            file.write(data)
        return
    try:
        filesystem.write_file(path, [(0, data)], len(data), mode=0o644)
    except OSError as error:  # of the file that was named, not of the one that stands in for it
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and sequences as one: {"training.epochs": 3, "betas.0": 0.9}."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple) and any(isinstance(v, list | tuple | dict) for v in value):
        items = enumerate(value)
    else:
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat or ({prefix: value} if prefix else {})


def json_ready(value: Any) -> Any:
    """`value` as strict JSON can hold it.

    Numbers that are not finite become "nan", "inf" or "-inf", as in a manifest; tuples lists; what
    else JSON lacks becomes text.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
