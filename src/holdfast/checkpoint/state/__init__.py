"""Turn live PyTorch objects into a plain tree and restore them from one, as a transaction.

This room knows tensors, optimizers, schedulers and random streams. It knows no run directory and
never writes to a disk.
"""

from __future__ import annotations

from holdfast.checkpoint.state import codec, gradients
from holdfast.checkpoint.state.codec import OneByOne
from holdfast.checkpoint.state.configured import Configured
from holdfast.checkpoint.state.files import (
    WEIGHT_KEYS,
    checkpoint_size,
    load,
    load_foreign,
    load_weights,
    verify,
)
from holdfast.checkpoint.state.names import OptimizerNames, bare, unwrapped
from holdfast.checkpoint.state.paths import walk
from holdfast.checkpoint.state.randomness import RandomState, seeded_anew, stream_of
from holdfast.checkpoint.state.restore import plan_restore
from holdfast.checkpoint.state.transaction import LoadObject
from holdfast.checkpoint.state.tree import StorageSlice, Tree, normalise

__all__ = [
    "WEIGHT_KEYS",
    "Configured",
    "LoadObject",
    "OneByOne",
    "OptimizerNames",
    "RandomState",
    "StorageSlice",
    "Tree",
    "bare",
    "checkpoint_size",
    "codec",
    "gradients",
    "load",
    "load_foreign",
    "load_weights",
    "normalise",
    "plan_restore",
    "seeded_anew",
    "stream_of",
    "unwrapped",
    "verify",
    "walk",
]
