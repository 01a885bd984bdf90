"""The operating system as the engine uses it: files, direct I/O, threads, locks, signals.

Every call that durability depends on is made here, so that a fault can be put in one place.
Nothing in this room knows what a checkpoint is, and nothing imports torch when it is loaded.
"""

from __future__ import annotations

from holdfast.checkpoint.system import direct, drafts, filesystem, project, signals
from holdfast.checkpoint.system.filesystem import RESERVE, disabled, sync_directory, sync_file
from holdfast.checkpoint.system.follow import LARGEST, ROTTEN, Follower, is_sane, objects, sealed
from holdfast.checkpoint.system.lock import CATALOG_LOCK, LOCKS, RUN_LOCK, FileLock, run_lock
from holdfast.checkpoint.system.pages import PAGE, Buffer
from holdfast.checkpoint.system.signals import SignalGuard
from holdfast.checkpoint.system.slots import Slot, available_memory
from holdfast.checkpoint.system.threads import (
    BEGINS_WITHIN,
    Helper,
    Worker,
    end_workers,
    together,
    yield_the_disk,
)

__all__ = [
    "BEGINS_WITHIN",
    "CATALOG_LOCK",
    "LARGEST",
    "LOCKS",
    "PAGE",
    "RESERVE",
    "ROTTEN",
    "RUN_LOCK",
    "Buffer",
    "FileLock",
    "Follower",
    "Helper",
    "SignalGuard",
    "Slot",
    "Worker",
    "available_memory",
    "direct",
    "disabled",
    "drafts",
    "end_workers",
    "filesystem",
    "is_sane",
    "objects",
    "project",
    "run_lock",
    "sealed",
    "signals",
    "sync_directory",
    "sync_file",
    "together",
    "yield_the_disk",
]
