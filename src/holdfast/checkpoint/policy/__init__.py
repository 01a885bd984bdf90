"""Decide when to save, what to keep and when to raise the alarm.

Pure functions of what they are told: no disk, no clock, no torch enters this room.
"""

from __future__ import annotations

from holdfast.checkpoint.policy import risk
from holdfast.checkpoint.policy.alarm import Watch
from holdfast.checkpoint.policy.keep import (
    Candidate,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepRollingTemps,
    Order,
    Policy,
    select,
    verified_states,
)
from holdfast.checkpoint.policy.risk import RiskAware
from holdfast.checkpoint.policy.when import (
    AnyOf,
    Choice,
    Cost,
    EveryEpoch,
    EveryMinutes,
    EverySteps,
    Measured,
    MemoryPace,
    Moment,
    OnBest,
    SavePolicy,
)

__all__ = [
    "AnyOf",
    "Candidate",
    "Choice",
    "Cost",
    "EveryEpoch",
    "EveryMinutes",
    "EverySteps",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepRollingTemps",
    "Measured",
    "MemoryPace",
    "Moment",
    "OnBest",
    "Order",
    "Policy",
    "RiskAware",
    "SavePolicy",
    "Watch",
    "risk",
    "select",
    "verified_states",
]
