"""List the tensors of a checkpoint from its manifest alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from holdfast.checkpoint.format import ARCHIVE, plain_state
from holdfast.errors import ForeignCheckpoint


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor. `nbytes` is 0 where an earlier one has the same storage."""

    section: str  # the key at the top of the state
    name: str  # the keys below it, with slashes
    dtype: str
    shape: tuple[int, ...]
    index: int  # in the manifest's list
    storage: int
    place: tuple[Any, ...]  # the same for two names of one tensor
    nbytes: int
    same_as: str | None = None  # the name of the earlier tensor at the same place

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def dotted(self) -> str:
        return self.name.replace("/", ".")

    def to_json(self) -> dict[str, Any]:
        """The documented form."""
        return {
            "section": self.section,
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "bytes": self.nbytes,
            "same_as": self.same_as,
        }


def tensors_of(manifest: Mapping[str, Any], path: Path) -> list[Tensor]:
    """Return the tensors in the order of the state.

    Raises ForeignCheckpoint where the manifest makes no sense.
    """
    state = plain_state(manifest, path)
    try:
        sizes = {record["name"]: record["size"] for record in manifest["records"]}
        numbers = {id(entry): i for i, entry in enumerate(manifest["tensors"])}
        found: list[Tensor] = []
        first: dict[tuple[Any, ...], str] = {}
        storages: set[int] = set()
        for keys, entry in _leaves(state, numbers, ()):
            section, name = keys[0], "/".join(keys[1:]) or keys[0]
            dtype, storage, shape = str(entry["dtype"]), entry["storage"], tuple(entry["shape"])
            if not all(type(n) is int and n >= 0 for n in (storage, entry["offset"], *shape)):
                raise ValueError(entry)
            strides = [s for n, s in zip(shape, entry["stride"], strict=True) if n > 1]
            place = (storage, entry["offset"], shape, tuple(strides), dtype)
            size = int(sizes[f"{ARCHIVE}/data/{storage}"])
            nbytes = 0 if storage in storages else size
            storages.add(storage)
            found.append(
                Tensor(
                    section,
                    name,
                    dtype,
                    shape,
                    numbers[id(entry)],
                    storage,
                    place,
                    nbytes,
                    first.get(place),
                )
            )
            first.setdefault(place, name)
    except (KeyError, TypeError, ValueError) as error:
        raise ForeignCheckpoint(
            "The manifest's index of tensors makes no sense ({error}).", error=error
        ) from error
    return found


def _leaves(
    value: Any, numbers: Mapping[int, int], keys: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield every tensor below `value`, with the keys that lead to it."""
    if id(value) in numbers:
        yield keys, value
    elif isinstance(value, Mapping | list | tuple):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in pairs:
            yield from _leaves(item, numbers, (*keys, str(key)))
