"""What the manager's methods answer with."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.checkpoint.rundir import Contents, Entry
from holdfast.errors import SaveFailed


@dataclass(frozen=True, slots=True)
class Resumed:
    """What training goes on from."""

    entry: Entry
    path: Path
    generation: int  # of what is saved from now on
    skipped: list[tuple[str, str]] = field(default_factory=list)  # damaged, set aside, and why
    steps_lost: int = 0
    minutes_lost: float = 0.0
    contents: Contents = field(default_factory=Contents, repr=False)  # here, now

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

    def resolve(self, outcome: Saved | SaveFailed | None) -> None:
        """Keep the promises of a save that is over, as far as they have not been kept."""
        self.keep_staged()
        for promise in (self.durable, self.settled):
            with contextlib.suppress(InvalidStateError):
                if isinstance(outcome, SaveFailed):
                    promise.set_exception(outcome)
                else:
                    promise.set_result(outcome)

    def keep_staged(self) -> None:
        """Keep a promise that two threads may come to keep."""
        with contextlib.suppress(InvalidStateError):
            self.staged.set_result(None)
