"""The buffers for copies of the state: which save has which, and which one is free.

Back-pressure is decided here: what may be dropped, and what training must wait for.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Sequence

from holdfast.checkpoint.format import Record, plan
from holdfast.checkpoint.records import Save
from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.save.ledger import Ledger
from holdfast.checkpoint.state import Tree
from holdfast.checkpoint.system import PAGE, Helper, Slot, available_memory
from holdfast.errors import SaveFailed
from holdfast.formatting import format_bytes
from holdfast.i18n import _

log = logging.getLogger("holdfast")

MEMORY_SLOTS = 3  # one being written, one complete, one being filled: two would cost a second step
PRIVATE_SLOTS = 2  # one being written; the newest waits in the other, made when it is first needed
_HEADROOM = 256 << 20  # bytes of memory that stay free for other programs


class NoRoom(Exception):
    """There is no memory for a copy of the state."""


class Slots:
    """The slots of one manager, and the saves that are in them. `change` guards all of it.

    A save stands in `staging` until the staging thread is done with it, and meanwhile already in
    `waiting` and `writing`: the disk follows the copy.
    """

    def __init__(self, ledger: Ledger, reserve: int) -> None:
        self._ledger = ledger
        self._values = reserve  # bytes behind the tensors that slots are made for
        self.change = threading.Condition()
        self.staging: list[Save] = []
        self.waiting: list[Save] = []  # for the disk
        self.writing: Save | None = None
        self.newest: Save | None = None  # complete in shared memory
        self.tier: shared_memory.MemoryTier | None = None
        self._slots: list[Slot] = []
        self._outlived: list[Slot] = []  # closed; the next start may still want their snapshots
        self._unsaved: list[Slot] = []  # with a kept save that the disk has not taken
        # True if a waiting save was dropped: the save that gets the next slot is written instead.
        # (A save that got no slot at all is the saver's to ask for again.)
        self._successor_due = False
        self._layout: tuple[list[tuple[str, int]], list[Record]] = ([], [])
        self._making = threading.Lock()
        self._preparing: Helper | None = None
        self._closed = False

    @property
    def idle(self) -> bool:
        """True if nothing is on its way to the disk."""
        with self.change:
            staging = any(save.to_disk for save in self.staging)
            return not staging and not self.waiting and self.writing is None

    @property
    def ready(self) -> bool:
        """True if there are slots, or they are being made."""
        return self._preparing is not None or bool(self._slots)

    @property
    def memory_step(self) -> int:
        """The step of the newest snapshot that outlives this process; 0 where there is none."""
        newest = self.newest
        return newest.step if newest is not None and self.tier is not None else 0

    def wait(self) -> None:
        """Return when no save has anything under way."""
        with self.change:
            self.change.wait_for(
                lambda: not self.staging and not self.waiting and self.writing is None
            )

    # ---------------------------------------------------------------------------------- one save

    def take(self, save: Save, *, patient: bool) -> bool:
        """Give `save` a slot. Return False where all are taken by what must be kept and the caller
        is not `patient`. Raises `NoRoom` where there is no memory for a copy.

        A save that goes to the disk takes the place of those that wait for it. Where one of them
        was dropped for a save that was for the memory alone, this one goes to the disk from now on:
        `save.to_disk` may have changed when this returns True.
        """
        assert save.tree is not None
        if save.to_disk:
            with self.change:
                self._drop_waiting()
        slot = self._free_slot(self.capacity(save.tree), patient=patient)
        if slot is None:
            return False
        if self._successor_due:
            save.to_disk, self._successor_due = True, False
        with self.change:
            self._unsaved = [each for each in self._unsaved if each is not slot]
        records = self.records(save.tree)
        try:
            slot.begin(records[-1].end if records else 0)
        except OSError as error:
            raise NoRoom(str(error)) from error
        save.slot = slot
        return True

    def begin(self, save: Save) -> None:
        """Note that the slot of a save is being filled, until it is `released`."""
        with self.change:
            self.staging.append(save)

    def released(self, save: Save) -> None:
        """Note that the staging thread is done with a save and its slot: the snapshot there is
        complete, or the copy was torn. Only that thread knows: the disk, which follows the copy,
        may have failed long before."""
        with self.change:
            if save in self.staging:  # else an interrupt has come, and it was dropped
                self.staging.remove(save)
            save.released.set()
            self.change.notify_all()

    def remember(self, save: Save) -> None:
        """Make a complete save the newest in memory. Only now, with its checksums: a start after a
        kill believes nothing that it cannot verify, and falls back to the one before until then."""
        assert save.slot is not None
        try:
            save.slot.complete(save.manifest)
        except FileNotFoundError as error:  # it was removed: nothing here outlives a kill now
            with self.change:
                said, self.newest = self.newest is None, None
            if not said:
                log.warning("%s", error)
            return
        except OSError as error:  # what is on its way to the disk goes there all the same
            log.warning("%s: %s", shared_memory.PLACE, error)
            return
        with self.change:
            self.newest = save
            while self._outlived:
                self._outlived.pop().discard()

    def take_newest(self) -> Save | None:
        """Return the newest save in memory to be written; None where the disk has it, or it is on
        its way there, or failed to get there."""
        with self.change:
            newest = self.newest
            if newest is None or newest.to_disk or self.tier is None:
                return None
            newest.to_disk = newest.kept = True
            return newest

    def next(self) -> Save | None:
        """Return the save that the disk takes next; None where it has been dropped."""
        with self.change:
            if not self.waiting:
                return None
            self.writing = self.waiting.pop(0)
            self.change.notify_all()
            return self.writing

    def written(self, save: Save) -> None:
        """Note that the disk is done with a save, for better or worse."""
        with self.change:
            # A kept save has its slot for itself until it is durable: a kill loses none.
            if save.kept and save.slot is not None and not _is_verified(save):
                self._unsaved.append(save.slot)
            self.writing = None
            self.change.notify_all()

    def grow(self, save: Save, size: int) -> None:
        """Move a save whose values have outgrown its slot into a larger one, for an image of `size`
        bytes. Later slots are made as large. Raises `NoRoom`."""
        assert save.slot is not None
        assert save.tree is not None
        records, old = self.records(save.tree), save.slot
        tensors = records[-1].end if records else 0
        self._values = 2 * (size - tensors)
        with self._making:
            new = self._make_slot(self.capacity(save.tree))
            ctypes.memmove(new.address, old.address, tensors)
            with self.change:
                self._slots[self._slots.index(old)] = save.slot = new
        old.close()
        old.discard()

    # --------------------------------------------------------------------------------- all slots

    def records(self, tree: Tree) -> list[Record]:
        """Return where the storages go; the same list while names and sizes stay the same."""
        sizes = [(storage.record, storage.nbytes) for storage in tree.storages]
        if sizes != self._layout[0]:
            self._layout = sizes, plan(sizes)
        return self._layout[1]

    def capacity(self, tree: Tree) -> int:
        """Return the bytes of a slot for images of this tree: tensors, values, and some growth."""
        records = self.records(tree)
        data = records[-1].end if records else 0
        values = max(self._values, 1 << 20) + 2048 * len(tree.leaves)
        return -(-(data + values) // PAGE) * PAGE

    def prepare(self, tree: Tree) -> None:
        """Make the slots for such trees in the background, and touch their pages."""
        if self._preparing is None:
            capacity, records = self.capacity(tree), self.records(tree)

            def prefault() -> None:
                wanted = 1 if self.tier is None else MEMORY_SLOTS
                while not self._closed and len(self._slots) < wanted:
                    try:
                        slot = self._new_slot(capacity)
                    except NoRoom:  # said to the user when a snapshot needs it
                        return
                    if slot is None:
                        return
                    slot.prefault(records[-1].end if records else 0)

            with contextlib.suppress(RuntimeError, MemoryError):  # the first save touches them
                self._preparing = Helper(prefault)

    def use(self, tier: shared_memory.MemoryTier | None) -> None:
        """Make slots in shared memory from now on; None: private ones."""
        self._close_slots()
        self.tier = tier

    def close(self) -> None:
        """Give the memory back when nothing is under way any more."""
        self.wait()
        self._closed = True
        if self._preparing is not None:
            self._preparing.finish()
        self._close_slots()

    def _close_slots(self) -> None:
        """Give the slots back; a snapshot that a crash would fall back to stays where it is."""
        self.wait()
        with self.change:
            last = None
            if self.newest is not None:
                last, self.newest.ranges, self.newest.sealer = self.newest.slot, [], None
            self.newest = None  # with its views of the slot, which would keep the memory
            for slot in self._slots:
                slot.close()
                if slot is last or slot in self._unsaved:
                    self._outlived.append(slot)
                else:
                    slot.discard()
            self._slots.clear()
            self._unsaved.clear()

    def _free_slot(self, capacity: int, *, patient: bool) -> Slot | None:
        """Return a slot that nothing needs, made if there may be more; None where all are taken by
        what must be kept and the caller is not `patient`. Raises `NoRoom` where there is none at
        all, or only the one with the newest snapshot, which nothing would ever free."""
        if any(slot.capacity < capacity for slot in self._slots):
            self._close_slots()  # the state has grown
        crowded: NoRoom | None = None  # why there are fewer slots than there might be
        while True:
            with self.change:
                free = self._idle_slot()
                if free is not None:
                    return free
                one_more = crowded is None and len(self._slots) < self._most()
                if not one_more:
                    if crowded is not None and not (self.staging or self.waiting or self.writing):
                        raise crowded  # nothing is under way that would free one
                    if self._drop_waiting():
                        continue
                    # A copy that ends, or a write that begins, changes the picture in a moment.
                    soon = bool(self.staging) or (bool(self.waiting) and self.writing is None)
                    if not patient and not soon:
                        return None
                    self.change.wait()
            if one_more:
                try:
                    self._new_slot(capacity)
                except NoRoom as error:
                    if not self._slots:
                        raise
                    crowded = error

    def _idle_slot(self) -> Slot | None:
        """Return a slot that no save needs. `change` is held."""
        busy: Sequence[Save | None] = [*self.staging, *self.waiting, self.writing]
        if self.tier is not None:  # a crash in mid-copy falls back to the newest that is complete
            busy = [*busy, self.newest]
        taken = [save.slot for save in busy if save is not None]
        idle = [slot for slot in self._slots if slot not in taken]
        # One with a kept save comes last: a kill may still be made up for.
        return min(idle, key=self._unsaved.__contains__, default=None)

    def _most(self) -> int:
        return MEMORY_SLOTS if self.tier is not None else PRIVATE_SLOTS

    def _new_slot(self, capacity: int) -> Slot | None:
        """Make one more slot; None where there are enough. Raises `NoRoom`."""
        with self._making:
            if len(self._slots) >= self._most():
                return None
            slot = self._make_slot(capacity)
            with self.change:
                self._slots.append(slot)
            return slot

    def _make_slot(self, capacity: int) -> Slot:
        capacity = -(-capacity // PAGE) * PAGE
        room = available_memory() - _HEADROOM
        if room < capacity:
            needed, free = format_bytes(capacity), format_bytes(max(0, room))
            raise NoRoom(
                _(
                    "a copy of the state takes {needed} of memory, and {free} can be taken",
                    needed=needed,
                    free=free,
                )
            )
        try:
            return self.tier.slot(capacity) if self.tier is not None else Slot(capacity)
        except (OSError, MemoryError) as error:
            raise NoRoom(str(error)) from error

    def _drop_waiting(self) -> bool:
        """Drop the saves that wait for the disk and need not be kept: the one that gets a slot next
        takes their place. Return True if there were any. `change` is held."""
        if self.writing is None:
            return False  # the disk is free: what waits is about to be written
        dropped = [save for save in self.waiting if not save.kept]
        for save in dropped:
            self.waiting.remove(save)
            self._ledger.over(save, None)
        self._successor_due = self._successor_due or bool(dropped)
        return bool(dropped)


def lack_of_shared_memory(needed: int) -> str:
    """Return why `needed` bytes of snapshots cannot lie in shared memory; empty where they can."""
    if not shared_memory.usable():
        return _("this platform has no shared memory that outlives a process")
    free = min(shared_memory.free_bytes(), available_memory())
    if free < needed:
        wanted, found = format_bytes(needed), format_bytes(free)
        return _("{needed} are needed and {free} are free there", needed=wanted, free=found)
    return ""


def _is_verified(save: Save) -> bool:
    settled = save.promises.settled
    saved = None if isinstance(settled.exception(), SaveFailed) else settled.result()
    return saved is not None and saved.entry.verified
