"""Keep the directory of one run: history, catalogue, recovery, roll-back, ownership, memory tier.

No torch is imported when this room is loaded, so that `holdfast list` answers at once. What is in
flight belongs to `save`.
"""

from __future__ import annotations

from holdfast.checkpoint.rundir import (
    ownership,
    recovery,
    rollback,
    shared_memory,
    space,
    tidy,
    words,
)
from holdfast.checkpoint.rundir.catalog import Catalog, in_words
from holdfast.checkpoint.rundir.entries import (
    ARCHIVE,
    BEST,
    EVENTS,
    LATEST,
    MAIN,
    METADATA,
    PACKING,
    QUARANTINE,
    ROLES,
    TEMP,
    Contents,
    Entry,
    archive_of,
    name_of,
    summary,
)
from holdfast.checkpoint.rundir.history import now
from holdfast.checkpoint.rundir.place import Place, check_rights
from holdfast.checkpoint.rundir.recovery import cannot_read
from holdfast.checkpoint.rundir.reporter import EventHandler, Reporter
from holdfast.checkpoint.rundir.words import sentence

__all__ = [
    "ARCHIVE",
    "BEST",
    "EVENTS",
    "LATEST",
    "MAIN",
    "METADATA",
    "PACKING",
    "QUARANTINE",
    "ROLES",
    "TEMP",
    "Catalog",
    "Contents",
    "Entry",
    "EventHandler",
    "Place",
    "Reporter",
    "archive_of",
    "cannot_read",
    "check_rights",
    "in_words",
    "name_of",
    "now",
    "ownership",
    "recovery",
    "rollback",
    "sentence",
    "shared_memory",
    "space",
    "summary",
    "tidy",
    "words",
]
