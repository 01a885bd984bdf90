"""Holdfast: train a model and never lose a step.

`from holdfast import CheckpointManager` is the whole API that a training loop needs. Names are
loaded when first used, so that `import holdfast` and the command line answer without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from holdfast.checkpoint import CheckpointManager as CheckpointManager
    from holdfast.checkpoint import EveryEpoch as EveryEpoch
    from holdfast.checkpoint import EveryMinutes as EveryMinutes
    from holdfast.checkpoint import EverySteps as EverySteps
    from holdfast.checkpoint import OnBest as OnBest
    from holdfast.checkpoint import RiskAware as RiskAware
    from holdfast.checkpoint import SignalGuard as SignalGuard
    from holdfast.checkpoint import load as load
    from holdfast.checkpoint import prove_resume as prove_resume
    from holdfast.checkpoint import verify as verify

__all__ = [
    "CheckpointManager",
    "EveryEpoch",
    "EveryMinutes",
    "EverySteps",
    "OnBest",
    "RiskAware",
    "SignalGuard",
    "__version__",
    "load",
    "prove_resume",
    "verify",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        from holdfast import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
