"""Decide when to save, what to keep and when to raise the alarm.

Pure functions of what they are told: no disk, no clock, no torch enters this room.
"""

from __future__ import annotations

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
from holdfast.checkpoint.policy.when import (
    MOST_OFTEN,
    RAREST,
    TIME_BUDGET,
    WRITE_TIME,
    WRITES,
    AnyOf,
    Choice,
    Cost,
    EveryEpoch,
    EveryMinutes,
    EverySteps,
    MemoryPace,
    Moment,
    OnBest,
    RiskAware,
    SavePolicy,
)

__all__ = [
    "MOST_OFTEN",
    "RAREST",
    "TIME_BUDGET",
    "WRITES",
    "WRITE_TIME",
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
    "MemoryPace",
    "Moment",
    "OnBest",
    "Order",
    "Policy",
    "RiskAware",
    "SavePolicy",
    "Watch",
    "select",
    "verified_states",
]
