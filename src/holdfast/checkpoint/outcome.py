"""What the manager's methods answer with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from holdfast.checkpoint.catalog import Entry


@dataclass(frozen=True, slots=True)
class Resumed:
    """What training goes on from."""

    entry: Entry
    path: Path
    generation: int  # of what is saved from now on
    skipped: list[tuple[str, str]] = field(default_factory=list)  # damaged, set aside, and why
    steps_lost: int = 0
    minutes_lost: float = 0.0

    @property
    def step(self) -> int:
        return self.entry.step

    @property
    def epoch(self) -> int | None:
        return self.entry.epoch


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is durable under all of its names."""

    entry: Entry
    path: Path
    seconds: float
    names: dict[str, str]  # name → "file", "link", "reflink" or "copy"
    is_best: bool
    previous_best: float | None
