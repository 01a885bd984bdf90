"""Holdfast: train a model and never lose a step.

`holdfast.protect` is all that a training loop needs; `CheckpointManager` is what it stands on, for
loops that decide more by themselves. Names are loaded when first used, so that `import holdfast`
and the command line answer without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from holdfast.version import __version__

if TYPE_CHECKING:
    from holdfast.adapters.data import ResumableLoader as ResumableLoader
    from holdfast.checkpoint import AnyOf as AnyOf
    from holdfast.checkpoint import Catalog as Catalog
    from holdfast.checkpoint import CheckpointManager as CheckpointManager
    from holdfast.checkpoint import Entry as Entry
    from holdfast.checkpoint import EveryEpoch as EveryEpoch
    from holdfast.checkpoint import EveryMinutes as EveryMinutes
    from holdfast.checkpoint import EverySteps as EverySteps
    from holdfast.checkpoint import OnBest as OnBest
    from holdfast.checkpoint import PendingSave as PendingSave
    from holdfast.checkpoint import Resumed as Resumed
    from holdfast.checkpoint import RiskAware as RiskAware
    from holdfast.checkpoint import Saved as Saved
    from holdfast.checkpoint import SignalGuard as SignalGuard
    from holdfast.checkpoint import load as load
    from holdfast.checkpoint import peek as peek
    from holdfast.checkpoint import save_file as save
    from holdfast.checkpoint import verify as verify
    from holdfast.protection import Protected as Protected
    from holdfast.protection import protect as protect
    from holdfast.prove import Proof as Proof
    from holdfast.prove import prove_resume as prove_resume

_WHERE = {
    "Proof": "prove",
    "Protected": "protection",
    "ResumableLoader": "adapters.data",
    "protect": "protection",
    "prove_resume": "prove",
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
    "Proof",
    "Protected",
    "ResumableLoader",
    "Resumed",
    "RiskAware",
    "Saved",
    "SignalGuard",
    "__version__",
    "load",
    "peek",
    "protect",
    "prove_resume",
    "save",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    room = importlib.import_module(f"holdfast.{_WHERE.get(name, 'checkpoint')}")
    return getattr(room, "save_file" if name == "save" else name)  # `checkpoint.save` is a room
