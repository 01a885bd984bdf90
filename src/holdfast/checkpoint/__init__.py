"""The engine: saves and restores the complete state of any PyTorch training.

Nothing in here knows that a trainer, a tokenizer or a terminal exists. Names are loaded when first
used: what only reads manifests never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdfast.checkpoint.catalog import Catalog as Catalog
    from holdfast.checkpoint.catalog import Entry as Entry
    from holdfast.checkpoint.guard import SignalGuard as SignalGuard
    from holdfast.checkpoint.manager import CheckpointManager as CheckpointManager
    from holdfast.checkpoint.manager import load as load
    from holdfast.checkpoint.manager import verify as verify
    from holdfast.checkpoint.outcome import PendingSave as PendingSave
    from holdfast.checkpoint.outcome import Resumed as Resumed
    from holdfast.checkpoint.outcome import Saved as Saved
    from holdfast.checkpoint.prove import Proof as Proof
    from holdfast.checkpoint.prove import prove_resume as prove_resume
    from holdfast.checkpoint.risk import RiskAware as RiskAware
    from holdfast.checkpoint.schedule import AnyOf as AnyOf
    from holdfast.checkpoint.schedule import EveryEpoch as EveryEpoch
    from holdfast.checkpoint.schedule import EveryMinutes as EveryMinutes
    from holdfast.checkpoint.schedule import EverySteps as EverySteps
    from holdfast.checkpoint.schedule import OnBest as OnBest

_WHERE = {
    "AnyOf": "schedule",
    "Catalog": "catalog",
    "CheckpointManager": "manager",
    "Entry": "catalog",
    "EveryEpoch": "schedule",
    "EveryMinutes": "schedule",
    "EverySteps": "schedule",
    "OnBest": "schedule",
    "PendingSave": "outcome",
    "Proof": "prove",
    "Resumed": "outcome",
    "RiskAware": "risk",
    "Saved": "outcome",
    "SignalGuard": "guard",
    "load": "manager",
    "prove_resume": "prove",
    "verify": "manager",
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
    "Resumed",
    "RiskAware",
    "Saved",
    "SignalGuard",
    "load",
    "prove_resume",
    "verify",
]


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(importlib.import_module(f"holdfast.checkpoint.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'holdfast.checkpoint' has no attribute {name!r}")
