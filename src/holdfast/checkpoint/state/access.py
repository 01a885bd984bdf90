"""One file or one state without a run directory: read it, verify it, know its size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from holdfast.checkpoint.format import container, image
from holdfast.checkpoint.state import codec
from holdfast.checkpoint.state.randomness import RandomState
from holdfast.checkpoint.state.tree import normalise
from holdfast.errors import CheckpointError


def load(path: str | os.PathLike[str], *, only: str | None = None) -> Any:
    """Return the state in a checkpoint, verified and never unpickled; `only` reads one key of it.

    Raises `DamagedCheckpoint`, `ForeignCheckpoint`, `OSError`.
    """
    with container.Reader(path) as reader:
        return codec.read(reader, only=only)


def verify(path: str | os.PathLike[str]) -> str | None:
    """Check every byte of a checkpoint; return what is wrong with it, or None."""
    try:
        with container.Reader(path) as reader:
            reader.verify()
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def checkpoint_size(state: Mapping[str, Any], *, rng: bool = True, reserve: int) -> int:
    """Return the exact size in bytes of every checkpoint of `state`, without writing one.

    `reserve` is that of the manager. It must be enough for the values: then all files of one run
    have one size.
    """
    payload = {**state, "rng": RandomState()} if rng else dict(state)
    tree = normalise(payload)
    sizes = [(storage.record, storage.nbytes) for storage in tree.storages]
    sizes += [(name, len(payload)) for name, payload in tree.companions()]
    return image.design(sizes, codec.to_json(tree), reserve=reserve).size
