"""Describe a run directory in values: the names in it, `Entry` and `Contents`. No disk here."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from holdfast.checkpoint.policy import Candidate, KeepBest, Order
from holdfast.checkpoint.rundir.history import Known, Rollback, is_later
from holdfast.errors import ForeignCheckpoint

LATEST, MAIN, BEST = "latest.pt", "model.pt", "best_model.pt"
ROLES = (BEST, LATEST, MAIN)  # names that move from checkpoint to checkpoint
TEMP, QUARANTINE, ARCHIVE, REPLACED = "temp", "quarantine", "archive", "replaced"
PACKING = ".packing"  # holds the links that `holdfast pack` reads from
EVENTS, METADATA = "events.jsonl", "metadata.json"
# Errors of code that takes in what a stranger may have written.
NONSENSE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint under all of its names; `names` are relative, its own name first."""

    id: str
    run_id: str
    generation: int
    step: int
    sequence: int
    kind: str  # "epoch", "step", "best" or "temp"
    reason: str
    epoch: int | None
    created: str  # ISO 8601 with the zone
    size: int
    loss: float | None  # decides which is best; lower is better
    metrics: dict[str, Any] = field(default_factory=dict)
    parent: dict[str, Any] | None = None
    names: tuple[str, ...] = ()
    verified: bool = False
    pinned: bool = False  # by the user: retention never takes it

    @property
    def order(self) -> Order:
        """Place among the checkpoints: newer is greater.

        The last save of a generation is its newest, whatever its step: many loops count their steps
        anew in each epoch. Clocks and mtimes decide nothing.
        """
        return (self.generation, self.sequence)

    def precedes(self, event: Mapping[str, Any]) -> bool:
        """Return True if `event`, one of `Known.announced`, tells of a later save than this one."""
        return is_later(event, self.order, self.step)

    def candidate(self) -> Candidate:
        marks = self.verified, self.pinned
        return Candidate(
            self.id, self.order, self.kind, self.loss, *marks, epoch=self.epoch, step=self.step
        )


@dataclass(frozen=True, slots=True)
class Contents:
    """Result of one scan; `entries` newest first."""

    entries: list[Entry] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)  # name and reason
    foreign: list[str] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # may be intact: never touched
    temporaries: list[str] = field(default_factory=list)  # of writers
    known: Known = field(default_factory=Known)  # from the history; later reads update it

    @property
    def newest(self) -> Entry | None:
        return self.entries[0] if self.entries else None

    def of(self, run_id: str) -> Contents:
        """Return the same, with the checkpoints of one run alone."""
        return replace(self, entries=[entry for entry in self.entries if entry.run_id == run_id])

    def without(self, names: Collection[str]) -> Contents:
        """Return the same, where the files called `names` have been moved away."""
        entries = [
            replace(entry, names=tuple(name for name in entry.names if name not in names))
            for entry in self.entries
        ]
        return replace(
            self,
            entries=[entry for entry in entries if entry.names],
            damaged=[each for each in self.damaged if each[0] not in names],
        )

    @property
    def generation(self) -> int:
        """Highest generation that was ever begun here; 0 where there is no run yet."""
        return max([self.known.generation, *(entry.generation for entry in self.entries)])

    def abandoned(self, back: Rollback) -> list[Entry]:
        """Return what `back` leaves behind: what is newer than its state, or of another run."""
        return [
            entry
            for entry in self.entries
            if entry.generation < back.generation
            and (entry.order > back.order or back.run_id not in (None, entry.run_id))
        ]

    @property
    def best(self) -> Entry | None:
        mask = KeepBest(1)([entry.candidate() for entry in self.entries])
        return next((e for e, chosen in zip(self.entries, mask, strict=True) if chosen), None)


def archive_of(entry: Entry, generation: int) -> str:
    """Return the folder for `entry` when it is archived at the end of `generation`, relative to the
    run directory. Each run has its own, so that files of two runs are never mixed up."""
    return f"{ARCHIVE}/{entry.run_id[:8]}/generation_{generation}"


def name_of(entry: Entry) -> str:
    """Return the name that a checkpoint is written under, relative to the run directory."""
    if entry.kind == "epoch":
        return f"model_epoch_{entry.epoch}.pt"
    if entry.kind == "temp":
        epoch = "" if entry.epoch is None else f"epoch{entry.epoch}_"
        return f"{TEMP}/temp_{epoch}step{entry.step}.pt"
    return f"checkpoint_step_{entry.step}.pt"


def summary(manifest: Mapping[str, Any], size: int) -> Entry:
    """Return the entry that a manifest describes. Raises `ForeignCheckpoint` if it says too
    little."""
    try:
        identity, score = manifest["identity"], manifest.get("score") or {}
        value = score.get("value")
        loss = None if value is None else (value if score["lower_is_better"] else -value)
        entry = Entry(
            id=identity["id"],
            run_id=identity["run_id"],
            generation=identity["generation"],
            step=identity["step"],
            sequence=identity["sequence"],
            parent=identity["parent"],
            kind=manifest["kind"],
            reason=manifest["reason"],
            epoch=manifest["epoch"],
            created=manifest["created"],
            metrics=manifest["metrics"],
            size=size,
            loss=loss,
        )
        return sane(entry)
    except NONSENSE as error:
        raise ForeignCheckpoint(
            "The manifest describes no checkpoint ({error}).", error=error
        ) from error


def sane(entry: Entry) -> Entry:
    """Return `entry` if its fields have their declared types: the file may come from a stranger."""
    texts = (entry.kind, entry.reason, entry.created)
    numbers = [entry.generation, entry.step, entry.sequence, entry.size]
    numbers += [] if entry.epoch is None else [entry.epoch]
    mappings = (entry.metrics, entry.parent or {})
    plain = (bool, int, float, str, type(None))
    sane = (
        all(isinstance(text, str) for text in texts)
        and entry.id.isalnum()  # becomes part of a file name
        and entry.run_id.isalnum()
        and all(isinstance(number, int) for number in numbers)
        and (entry.loss is None or math.isfinite(entry.loss))
        and all(isinstance(item, plain) for m in mappings for item in m.values())
    )
    if not sane:
        raise TypeError(entry.id)
    return entry


def telling(name: str) -> tuple[bool, str]:
    return name in ROLES, name
