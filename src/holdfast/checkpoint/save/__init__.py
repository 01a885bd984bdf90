"""Take one save on its way: copied out of live tensors, written, published, verified.

Nothing above this room is called except the promises *staged*, *durable* and *failed*.
"""

from __future__ import annotations

from holdfast.checkpoint.save.manifest import environment
from holdfast.checkpoint.save.publisher import Publisher
from holdfast.checkpoint.save.rescue import rescue
from holdfast.checkpoint.save.saver import RETRY, Saver, Told
from holdfast.checkpoint.save.snapshots import Overlap, lack_of_shared_memory
from holdfast.checkpoint.save.writer import MEMORY_SLOTS

__all__ = [
    "MEMORY_SLOTS",
    "RETRY",
    "Overlap",
    "Publisher",
    "Saver",
    "Told",
    "environment",
    "lack_of_shared_memory",
    "rescue",
]
