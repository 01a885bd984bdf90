"""Holdfast: train a model and never lose a step.

`from holdfast import CheckpointManager` is the whole API that a training loop needs. Names are
loaded when first used, so that `import holdfast` and the command line answer without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.version import __version__

if TYPE_CHECKING:
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
    from holdfast.prove import Proof as Proof
    from holdfast.prove import prove_resume as prove_resume

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
    "__version__",
    "load",
    "peek",
    "prove_resume",
    "save",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    from holdfast import checkpoint, prove

    room = prove if name in prove.__all__ else checkpoint
    return getattr(room, "save_file" if name == "save" else name)  # `checkpoint.save` is a room
