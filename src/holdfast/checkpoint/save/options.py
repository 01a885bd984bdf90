"""The settings of saving that the user has chosen, and several stages read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from holdfast.checkpoint.policy import Policy, SavePolicy

Overlap = bool | Literal["always"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of `CheckpointManager`, checked."""

    save_when: Sequence[SavePolicy] = ()
    keep: Sequence[Policy] = ()  # without any, nothing is removed
    make_room: bool = False  # on a full disk, what the floor does not need goes even then
    metric: str = "val_loss"
    lower_is_better: bool = True
    rng: bool = True
    grads: bool = False
    reserve: int = 0
    overlap: Overlap = False
    memory_every: int | Literal["auto"] = 0
    io_limit: float = 0
    max_unsafe: float = 0
