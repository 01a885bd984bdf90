"""Walk a nested state, and say by a path where something stands in it: `optimizers/0`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MISSING = object()  # where there is nothing, as None may stand for itself


def items_of(container: Any) -> Iterable[tuple[Any, Any]]:
    """Return what stands in a mapping, list or tuple, with its key or number."""
    return container.items() if isinstance(container, Mapping) else enumerate(container)


def at(container: Any, key: Any) -> Any:
    """Return what stands at `key` in a mapping, list or tuple, or `MISSING`."""
    if isinstance(container, Mapping):
        return container.get(key, MISSING)
    if isinstance(container, list | tuple) and isinstance(key, int) and key < len(container):
        return container[key]
    return MISSING


def join(path: str, key: Any) -> str:
    """Return the path of what stands at `key` in the container at `path`."""
    return f"{path}/{key}" if path else str(key)


def walk(state: Any, path: str = "", *, most: float = math.inf) -> Iterator[tuple[str, Any]]:
    """Yield all that is no container in a state, with its path, from containers of any depth.

    Containers of more than `most` entries are passed over.
    """
    for key, value in items_of(state) if len(state) <= most else ():
        if isinstance(value, Mapping | list | tuple):
            yield from walk(value, join(path, key), most=most)
        else:
            yield join(path, key), value
