"""The engine: saves and restores the complete state of any PyTorch training.

Nothing in here knows that a trainer, a tokenizer or a terminal exists. Its rooms, from the bottom
up: `policy` and `system`, `format`, `state`, `rundir`, `save`, and the façade, `manager.py` and
`peeking.py`; a room imports from those before it only, and through their faces. Names are loaded
when first used: what only reads manifests never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdfast.checkpoint.manager import CheckpointManager as CheckpointManager
    from holdfast.checkpoint.peeking import peek as peek
    from holdfast.checkpoint.policy import AnyOf as AnyOf
    from holdfast.checkpoint.policy import EveryEpoch as EveryEpoch
    from holdfast.checkpoint.policy import EveryMinutes as EveryMinutes
    from holdfast.checkpoint.policy import EverySteps as EverySteps
    from holdfast.checkpoint.policy import OnBest as OnBest
    from holdfast.checkpoint.policy import RiskAware as RiskAware
    from holdfast.checkpoint.records import PendingSave as PendingSave
    from holdfast.checkpoint.records import Resumed as Resumed
    from holdfast.checkpoint.records import Saved as Saved
    from holdfast.checkpoint.rundir import Catalog as Catalog
    from holdfast.checkpoint.rundir import Entry as Entry
    from holdfast.checkpoint.save import save_file as save_file
    from holdfast.checkpoint.state import checkpoint_size as checkpoint_size
    from holdfast.checkpoint.state import load as load
    from holdfast.checkpoint.state import verify as verify
    from holdfast.checkpoint.system import SignalGuard as SignalGuard

_WHERE = {
    "AnyOf": "policy",
    "Catalog": "rundir",
    "CheckpointManager": "manager",
    "Entry": "rundir",
    "EveryEpoch": "policy",
    "EveryMinutes": "policy",
    "EverySteps": "policy",
    "OnBest": "policy",
    "PendingSave": "records",
    "Resumed": "records",
    "RiskAware": "policy",
    "Saved": "records",
    "SignalGuard": "system",
    "checkpoint_size": "state",
    "load": "state",
    "peek": "peeking",
    "save_file": "save",
    "verify": "state",
}

__all__ = [
    "AnyOf",
    "Catalog",
    "CheckpointManager",
    "Entry",
    "EveryEpoch",
    "EveryMinutes",
    "EverySteps",
    "OnBest",
    "PendingSave",
    "Resumed",
    "RiskAware",
    "Saved",
    "SignalGuard",
    "checkpoint_size",
    "load",
    "peek",
    "save_file",
    "verify",
]


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(importlib.import_module(f"holdfast.checkpoint.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'holdfast.checkpoint' has no attribute {name!r}")
