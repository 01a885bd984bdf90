"""What the manager's methods answer with."""

from __future__ import annotations

from concurrent.futures import Future
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
    stall: float = 0.0  # seconds that training has stood still for it


@dataclass(eq=False, slots=True)
class PendingSave:
    """A save on its way: two promises that are kept at different times.

    `staged` is done when the live state may change: what is saved is a copy of exactly this step.
    `durable` is done when the copy is on the disk under its names, with a `Saved`; with None where
    a newer save has taken its place; it raises `SaveFailed` where it could not be saved.
    `settled` is done when it has been read back as well and old checkpoints are gone. None of them
    needs to be waited for.
    """

    step: int
    staged: Future[None] = field(default_factory=Future)
    durable: Future[Saved | None] = field(default_factory=Future)
    settled: Future[Saved | None] = field(default_factory=Future)
