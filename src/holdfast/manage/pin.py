"""`holdfast pin`: a state that retention never takes, until it is let go again.

It stands in the history by the checkpoint's id, so it survives the cache and goes with a copy of
the directory. A training that runs here respects it from its next save on. No torch in this room.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint.rundir import Catalog, Entry
from holdfast.i18n import _
from holdfast.manage.choosing import choose
from holdfast.manage.rundir import look
from holdfast.table import printable


@dataclass(frozen=True, slots=True)
class Pinned:
    """A checkpoint, whether it is pinned now, and whether it was not so before."""

    directory: Path
    entry: Entry
    pinned: bool
    changed: bool

    def to_json(self) -> dict[str, Any]:
        """The documented form."""
        return {
            "directory": str(self.directory),
            "id": self.entry.id,
            "step": self.entry.step,
            "names": list(self.entry.names),
            "pinned": self.pinned,
            "changed": self.changed,
        }

    def line(self) -> str:
        """Write the outcome in one line."""
        what = {"step": self.entry.step, "name": self.entry.names[0]}
        if self.pinned and self.changed:
            text = _("Step {step} ({name}) is pinned: no clean-up takes it.", **what)
        elif self.pinned:
            text = _("Step {step} ({name}) was pinned already.", **what)
        elif self.changed:
            text = _(
                "Step {step} ({name}) is no longer pinned: it goes when its time comes.", **what
            )
        else:
            text = _("Step {step} ({name}) was not pinned.", **what)
        return printable(text)


def pin(directory: str | os.PathLike[str], wanted: str, *, remove: bool = False) -> Pinned:
    """Pin the checkpoint that `wanted`, a step or a file, means; or let it go with `remove`.

    Raises `CheckpointError` where there is none, RunLocked where the catalogue is not given free.
    """
    look(directory, cached=True)  # says what is wrong with it before a lock makes files in it
    catalog = Catalog(directory)
    with catalog.lock():  # no other process cleans up between choosing and recording
        entry = choose(look(directory), wanted).entry
        changed = (entry.id in catalog.history.known.pinned) == remove
        if changed:
            event = "unpinned" if remove else "pinned"
            catalog.record(event, id=entry.id, step=entry.step, names=list(entry.names))
    return Pinned(Path(directory), entry, not remove, changed)
