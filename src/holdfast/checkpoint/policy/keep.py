"""WHAT to keep: pure policies over a list of records; no disk, no clock.

A policy answers with a mask: one boolean a record, True for "keep". Policies are joined by `any`.
`select` adds the floor that no option breaks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Order = tuple[int, int]  # generation, and the number of the save in it: newer is greater


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint as retention sees it."""

    id: str
    order: Order
    kind: str  # "epoch", "step" or "temp"
    loss: float | None = None
    verified: bool = False
    pinned: bool = False
    epoch: int | None = None
    step: int = 0  # a label: it may go back from one save to the next


class Policy(Protocol):
    def __call__(self, candidates: Sequence[Candidate]) -> list[bool]: ...


@dataclass(frozen=True, slots=True)
class KeepLast:
    """The newest `count` of `kind`; 0 keeps all of them."""

    kind: str
    count: int

    def __call__(self, candidates: Sequence[Candidate]) -> list[bool]:
        mine = sorted((c.order for c in candidates if c.kind == self.kind), reverse=True)
        chosen = set(mine if self.count == 0 else mine[: self.count])
        return [c.kind == self.kind and c.order in chosen for c in candidates]


@dataclass(frozen=True, slots=True)
class KeepBest:
    """The `count` with the lowest finite loss; the earlier one where two are equal."""

    count: int = 1

    def __call__(self, candidates: Sequence[Candidate]) -> list[bool]:
        ranked = sorted(
            (c for c in candidates if c.loss is not None and math.isfinite(c.loss)),
            key=lambda c: (c.loss, c.order),
        )
        chosen = {c.id for c in ranked[: self.count]}
        return [c.id in chosen for c in candidates]


@dataclass(frozen=True, slots=True)
class KeepEvery:
    """Keep those whose number, the one in their name, is a multiple of `interval`: the epoch of
    epoch checkpoints, the step of step checkpoints. Other kinds have no such number."""

    interval: int

    def __call__(self, candidates: Sequence[Candidate]) -> list[bool]:
        numbers = [{"epoch": c.epoch, "step": c.step}.get(c.kind) for c in candidates]
        return [number is not None and number % self.interval == 0 for number in numbers]


@dataclass(frozen=True, slots=True)
class KeepRollingTemps:
    """The newest `count` temporary checkpoints that no kept kind has overtaken."""

    count: int = 2

    def __call__(self, candidates: Sequence[Candidate]) -> list[bool]:
        lasting = max(
            (c.order for c in candidates if c.kind != "temp" and c.verified), default=(0, 0)
        )
        rolling = sorted(
            (c.order for c in candidates if c.kind == "temp" and c.order > lasting), reverse=True
        )
        return [c.kind == "temp" and c.order in rolling[: self.count] for c in candidates]


def select(candidates: Sequence[Candidate], policies: Sequence[Policy]) -> list[bool]:
    """Return which candidates stay: the floor, and what any policy keeps.

    The floor: the newest, the best, the pinned, and the two newest verified states, of two distinct
    steps. Nothing goes at all before there are two, nor anything newer than the newest verified.
    """
    verified = verified_states(candidates)[:2]
    if len(verified) < 2:
        return [True] * len(candidates)
    masks = [policy(candidates) for policy in (*policies, KeepBest(1))]
    return [
        candidate.pinned
        or candidate.order in verified
        or candidate.order > verified[0]
        or any(mask[i] for mask in masks)
        for i, candidate in enumerate(candidates)
    ]


def verified_states(candidates: Sequence[Candidate]) -> list[Order]:
    """Return the verified states, newest first.

    One step that was saved twice in a row is one state, its later save; the same step of a later
    epoch, in a loop that counts anew, is another.
    """
    states: list[Order] = []
    label: tuple[int, int] | None = None
    for c in sorted((c for c in candidates if c.verified), key=lambda c: c.order, reverse=True):
        if label != (c.order[0], c.step):
            states.append(c.order)
        label = (c.order[0], c.step)
    return states
