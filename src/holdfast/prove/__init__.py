"""Prove that a training goes on bit for bit: straight against killed and resumed.

`prove_resume` drives the engine from outside, as any training loop does; `prove_script` starts any
command and looks at its files and its output.
"""

from __future__ import annotations

from holdfast.prove.places import workshop
from holdfast.prove.resume import (
    NOT_REPEATABLE,
    OUTSIDE,
    Proof,
    explain,
    judge,
    prove_resume,
    revived,
)
from holdfast.prove.script import Order, ScriptProof, Step, prove_script
from holdfast.prove.states import first_difference

__all__ = [
    "NOT_REPEATABLE",
    "OUTSIDE",
    "Order",
    "Proof",
    "ScriptProof",
    "Step",
    "explain",
    "first_difference",
    "judge",
    "prove_resume",
    "prove_script",
    "revived",
    "workshop",
]
