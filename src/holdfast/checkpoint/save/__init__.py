"""Take one `Save` on its way: `saver.request(save)`, `staging.take(save)`, `writer.write(save)`,
`publisher.publish(save)`. Each stage fills in its own fields and reads the earlier ones.

What has become of a save climbs back up through the `Ledger` below all of them, which keeps its
promises; save/ledger.py has the table.
"""

from __future__ import annotations

from holdfast.checkpoint.save.ledger import Ledger
from holdfast.checkpoint.save.manifest import environment
from holdfast.checkpoint.save.options import Options, Overlap
from holdfast.checkpoint.save.publisher import Publisher
from holdfast.checkpoint.save.rescue import rescue
from holdfast.checkpoint.save.saver import Saver
from holdfast.checkpoint.save.single import save_file
from holdfast.checkpoint.save.slots import MEMORY_SLOTS, Slots, lack_of_shared_memory
from holdfast.checkpoint.save.source import Source
from holdfast.checkpoint.save.staging import Staging
from holdfast.checkpoint.save.writer import Writer

__all__ = [
    "MEMORY_SLOTS",
    "Ledger",
    "Options",
    "Overlap",
    "Publisher",
    "Saver",
    "Slots",
    "Source",
    "Staging",
    "Writer",
    "environment",
    "lack_of_shared_memory",
    "rescue",
    "save_file",
]
