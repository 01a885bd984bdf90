"""Prove that a training goes on bit for bit: straight against killed and resumed.

It drives the engine from outside, as any training loop does.
"""

from __future__ import annotations

from holdfast.prove.resume import (
    NOT_REPEATABLE,
    OUTSIDE,
    Proof,
    explain,
    judge,
    prove_resume,
    revived,
)
from holdfast.prove.states import first_difference

__all__ = [
    "NOT_REPEATABLE",
    "OUTSIDE",
    "Proof",
    "explain",
    "first_difference",
    "judge",
    "prove_resume",
    "revived",
]
