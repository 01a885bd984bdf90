"""Read one file without a run directory: a checkpoint of ours, verified, or any other `.pt`.

Others' files are read with `weights_only`: nothing of them is executed.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from holdfast.checkpoint.format import container, image
from holdfast.checkpoint.state import codec, numpy_pickles
from holdfast.checkpoint.state.randomness import RandomState
from holdfast.checkpoint.state.tree import normalise
from holdfast.errors import CheckpointError, DamagedCheckpoint, ForeignCheckpoint

# Where the usual training scripts put the weights: ours and the original guides', the PyTorch
# tutorials', Lightning's, DeepSpeed's.
WEIGHT_KEYS = ("model", "model_state_dict", "state_dict", "module")

# What torch says of a name that it would have to import.
_GLOBAL = re.compile(r"GLOBAL (\S+)")


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


def load_weights(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Return the weights in a checkpoint of ours (verified) or in any other `.pt` (safely read).

    Raises `CheckpointError` with the reason where there are none that can be trusted.
    """
    try:
        state = load(path, only="model")
    except ForeignCheckpoint:
        state = load_foreign(path)
    if isinstance(state, Mapping):
        for key in WEIGHT_KEYS:
            if isinstance(state.get(key), Mapping):
                state = state[key]
                break
    tensors = (
        {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        if isinstance(state, Mapping)
        else {}
    )
    if not tensors:
        raise ForeignCheckpoint("{path} holds no weights that could be found.", path=path)
    return tensors


def load_foreign(source: str | os.PathLike[str]) -> Any:
    """`torch.load` with `weights_only`, its many ways to fail turned into ours.

    Raises `ForeignCheckpoint` that names what a file wanted to call, `DamagedCheckpoint`, `OSError`
    as it comes.
    """
    path = Path(source)
    try:
        if not zipfile.is_zipfile(path):
            raise ForeignCheckpoint(
                "{path} is no PyTorch checkpoint, or a very old or damaged one.", path=path
            )
        with zipfile.ZipFile(path) as archive:
            # torch stores and never compresses: whatever inflates is not its file but a bomb.
            claimed = sum(item.file_size for item in archive.infolist())
        if claimed > path.stat().st_size:
            raise ForeignCheckpoint(
                "{path} claims more bytes than it has; it was not loaded.", path=path
            )
        return numpy_pickles.load(path)
    except pickle.UnpicklingError as error:
        refused = _GLOBAL.search(str(error))
        if refused is None:
            raise _damaged(path, error) from error
        raise ForeignCheckpoint(
            "{path} wants to run code when it is loaded ({name}); it was not. Only files of "
            "tensors and plain values are read: save it again without what needs {name}.",
            path=path,
            name=refused[1],
        ) from error
    except _FAILURES as error:
        raise _damaged(path, error) from error


# What zipfile and torch.load raise over a file that has been changed.
_FAILURES = (
    RuntimeError,
    ValueError,
    LookupError,
    EOFError,
    TypeError,
    AttributeError,
    OverflowError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
)


def _damaged(path: Path, error: Exception) -> DamagedCheckpoint:
    why = str(error).strip().split("\n", maxsplit=1)[0] or type(error).__name__
    return DamagedCheckpoint("{path} is damaged: {why}.", path=path, why=why)
