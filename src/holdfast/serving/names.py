"""Name the checkpoints that can be asked for, and tell those of several runs apart."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint.rundir import Entry
from holdfast.manage.rundir import number


@dataclass(frozen=True, slots=True)
class Card:
    """A name that can be asked for, and the checkpoint it stands for."""

    name: str
    path: Path
    entry: Entry

    def to_json(self, context: int | None = None) -> dict[str, Any]:
        """Return the API's model object, with what a person wants to know of a checkpoint."""
        try:
            created = int(datetime.datetime.fromisoformat(self.entry.created).timestamp())
        except ValueError:
            created = 0
        entry = self.entry
        more = {} if context is None else {"context_length": context}
        return {
            "id": self.name,
            "object": "model",
            "created": created,
            "owned_by": "holdfast",
            "step": entry.step,
            "epoch": entry.epoch,
            "val_loss": number(entry.metrics.get("val_loss")),
            "train_loss": number(entry.metrics.get("train_loss")),
            "checkpoint": entry.id,
            **more,
        }


def labels_of(sources: Sequence[Path]) -> dict[Path, str]:
    """Return a label for each source: its name, and of those with one name as many of the
    directories above as tell them apart."""
    parts = {source: _parts(source) for source in sources}

    def label(mine: tuple[str, ...]) -> str:
        for size in range(1, len(mine)):
            if sum(mine[-size:] == other[-size:] for other in parts.values()) == 1:
                return "/".join(mine[-size:])
        return "/".join(mine)

    return {source: label(mine) for source, mine in parts.items()}


def _parts(source: Path) -> tuple[str, ...]:
    whole = source.resolve() if source.is_dir() else source.absolute().with_suffix("")
    return whole.parts[1:] or (whole.name,)
