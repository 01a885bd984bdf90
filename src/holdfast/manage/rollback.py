"""`holdfast rollback`: what going back to an earlier state means, and doing it.

What is newer goes to the archive, the snapshot that a killed training has left in memory as well,
and the next start goes on from the chosen state in a new generation
(checkpoint/rundir/rollback.py). No torch in this room, unless there is such a snapshot.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint.rundir import (
    ARCHIVE,
    LATEST,
    Catalog,
    Entry,
    Reporter,
    archive_of,
    rollback,
    shared_memory,
)
from holdfast.checkpoint.system import signals
from holdfast.errors import CheckpointError, DamagedCheckpoint
from holdfast.formatting import format_bytes, format_loss
from holdfast.i18n import _
from holdfast.manage.choosing import choose, entry_at
from holdfast.manage.rundir import RunDirectory, kind_in_words, look, number, set_aside
from holdfast.table import Column, Screen, printable, render


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan to go back in one run directory."""

    directory: Path
    chosen: Entry
    source: str | None  # where it lies in the archive
    newer: list[Entry]  # what goes to the archive
    in_memory: int | None  # the step of a newer snapshot that a killed training has left in memory
    generation: int  # the one that the next start begins, or goes on in
    interrupted: bool  # an earlier going back to the same state is to be finished
    other_run: str | None  # the run that is here, where the chosen state is of another one

    @property
    def changes(self) -> bool:
        """True if there is anything to go back behind."""
        return bool(self.newer or self.source or self.interrupted) or self.in_memory is not None

    @property
    def place(self) -> str:
        """The place of the newer ones, relative to the run directory."""
        newest = self.newer[0] if self.newer else self.chosen
        return archive_of(newest, self.generation - 1)

    def to_json(self, *, done: bool) -> dict[str, Any]:
        """The documented form; `done` says whether it has happened."""
        return {
            "directory": str(self.directory),
            "done": done,
            "id": self.chosen.id,
            "step": self.chosen.step,
            "file": self.chosen.names[0],
            "generation": self.generation,
            "to": self.place,
            "archived": [
                {"id": entry.id, "step": entry.step, "names": list(entry.names), "size": entry.size}
                for entry in self.newer
            ],
            "archived_from_memory": self.in_memory,
            "other_run": self.other_run,
        }

    def lines(self, screen: Screen) -> list[str]:
        """Write what becomes the newest, and what goes to the archive for it."""
        name, step = self.chosen.names[0], self.chosen.step
        if not self.changes:
            text = _(
                "Step {step} ({name}) is the newest already: there is nothing to go back behind.",
                step=step,
                name=name,
            )
            return [printable(text)]
        loss = number(self.chosen.metrics.get("val_loss"))
        told = "" if loss is None else _(", val loss {loss}", loss=format_loss(loss))
        text = _(
            "Back to step {step} ({name}{loss}); generation {generation} begins.",
            step=step,
            name=name,
            loss=told,
            generation=self.generation,
        )
        lines = [printable(text)]
        if self.other_run is not None:
            text = _(
                "⚠️  It is a state of another run ({its}) than the one here ({here}), all of "
                "which makes way for it.",
                its=self.chosen.run_id[:8],
                here=self.other_run[:8],
            )
            lines.append(printable(text))
        if self.newer:
            title = _("These go to {place}/; nothing is removed:", place=self.place)
            lines += [title, "", *self._table(screen)]
        if self.in_memory is not None:
            lines.append(
                _(
                    "A killed training has left step {step} in memory: it goes to {place}/, too.",
                    step=self.in_memory,
                    place=self.place,
                )
            )
        return lines

    def _table(self, screen: Screen) -> list[str]:
        columns = [
            Column(_("file")),
            Column(_("kind"), hide=3),
            Column(_("step"), right=True),
            Column(_("val loss"), right=True, hide=2),
            Column(_("size"), right=True, hide=1),
        ]
        rows = [
            [
                entry.names[0],
                kind_in_words(entry.kind),
                str(entry.step),
                format_loss(number(entry.metrics.get("val_loss"))),
                format_bytes(entry.size),
            ]
            for entry in self.newer
        ]
        return [*render(columns, rows, screen), ""]


def plan(directory: str | os.PathLike[str], wanted: str) -> Plan:
    """Plan to go back to `wanted`, a step or a file, in `directory` as it is now.

    Raises `CheckpointError` where there is no such checkpoint, or something here cannot be read
    now and may be newer.
    """
    run = look(directory)
    if run.contents.unreadable:
        name, reason = run.contents.unreadable[0]
        raise CheckpointError("{name} cannot be read now: {reason}", name=name, reason=reason)
    choice = choose(run, wanted)
    entry, back = choice.entry, run.catalog.history.known.pending
    here = _run_of(run)
    other_run = here if here != entry.run_id else None
    newer = [e for e in run.entries if e.order > entry.order or e.run_id != entry.run_id]
    step = _step_in_memory(run.catalog, entry, run.contents.newest)
    again = back is not None and back.id == entry.id
    to_do = bool(newer or choice.source) or step is not None
    known = run.contents.generation
    generation = known + 1 if to_do and not again else max(known, 1)
    half_done = again and LATEST not in entry.names
    return Plan(run.directory, entry, choice.source, newer, step, generation, half_done, other_run)


def execute(shown: Plan) -> Plan:
    """Go back as `shown` says, after every byte of the chosen state has been checked.

    The caller holds `run_lock`. Ctrl-C takes effect when it is complete. Raises
    `DamagedCheckpoint` where the state is damaged: nothing has changed then. OSError as it comes:
    asking once more, or the next start of the training, finishes what was begun.
    """
    catalog = Catalog(shown.directory)
    if shown.source is None:
        rollback.intact(catalog, shown.chosen)
    else:
        error = rollback.damage_of(shown.directory / shown.source)
        if error is not None:
            raise DamagedCheckpoint(str(error), why=error.why)
    with signals.deferred_interrupt():
        if _left(catalog):
            from holdfast.checkpoint.save import rescue  # which needs torch

            rescue(catalog, Reporter(catalog))
        rollback.roll_back(catalog, shown.chosen, shown.source)
    return shown


def undo(done: Plan) -> Path | None:
    """The file that brings back what was the newest before; None where there was nothing newer."""
    newest = done.newer[0] if done.newer else None
    if newest is None:
        return None
    first = done.directory / done.place / newest.names[0]
    for path in (first, *set_aside(done.directory, ARCHIVE)):
        entry = entry_at(path)
        if entry is not None and entry.id == newest.id:
            return path
    return None


def _run_of(run: RunDirectory) -> str | None:
    """The run that lies here: that of the newest, or the one that was begun last."""
    known = run.catalog.history.known.run
    newest = run.contents.newest
    return newest.run_id if newest is not None else known[0] if known is not None else None


def _left(catalog: Catalog) -> list[shared_memory.Left]:
    """Return what a killed training of this run has left in memory, newest first."""
    run = catalog.history.known.run
    return [] if run is None else shared_memory.left_by(catalog.directory, *run)


def _step_in_memory(catalog: Catalog, chosen: Entry, newest: Entry | None) -> int | None:
    """The step of the snapshot that the next start would go on from instead of `chosen`."""
    least = max(chosen.order, newest.order if newest is not None else (0, 0))
    left = _left(catalog)
    return left[0].step if left and left[0].order > least else None
