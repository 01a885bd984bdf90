"""Between the training thread and the disk: slots, two background threads, and back-pressure.

A snapshot is copied into a slot, completed (values, manifest) by the staging thread and made
durable by the writing thread. Training goes on meanwhile. What may be dropped and what training
must wait for is decided here; what a checkpoint is called and what becomes of old ones is not.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import InvalidStateError
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from holdfast.checkpoint.format import Blueprint, Record, Sealer, design, plan
from holdfast.checkpoint.records import PendingSave, Saved
from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.save.publisher import Draft, Publisher
from holdfast.checkpoint.save.staging import Copy, capacity_for
from holdfast.checkpoint.state import Tree, codec
from holdfast.checkpoint.system import PAGE, Helper, Slot, Worker, available_memory, yield_the_disk
from holdfast.errors import SaveFailed
from holdfast.formatting import format_bytes
from holdfast.i18n import _

log = logging.getLogger("holdfast")

MEMORY_SLOTS = 3  # one being written, one complete, one being filled: two would cost a second step
PRIVATE_SLOTS = 2  # one being written; the newest waits in the other, made when it is first needed
_HEADROOM = 256 << 20  # bytes of memory that stay free for everybody else


@dataclass(eq=False, slots=True)
class Snapshot:
    """The state of one step in a slot, and what is to become of it."""

    pending: PendingSave
    slot: Slot
    tree: Tree | None  # None once its bytes are in the slot
    manifest: dict[str, Any]
    copy: Copy
    asked: float  # time.monotonic()
    stall: float
    to_disk: bool
    droppable: bool
    failed: Callable[[Exception], None]
    records: list[Record]
    blueprint: Blueprint | None = None
    sealer: Sealer | None = None
    stager: int = 0  # the thread that completes it
    complete: threading.Event = field(default_factory=threading.Event)


class NoRoom(Exception):
    """There is no memory for a copy of the state."""


class _Abandoned(Exception):
    """Nobody waits for this write any more."""


class Writer:
    """Takes snapshots and makes those that are wanted durable, in their order, in the background.

    All public methods but `idle` are called by the training thread.
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        reserve: int,
        on_durable: Callable[[Saved], None],
    ) -> None:
        self._publisher, self._reserve = publisher, reserve
        self._values = reserve  # bytes behind the tensors that slots are made for
        self._on_durable = on_durable
        self._tier: shared_memory.MemoryTier | None = None
        self._slots: list[Slot] = []
        self._change = threading.Condition()
        self._staging: list[Snapshot] = []
        self._queue: list[Snapshot] = []  # complete, waiting for the disk
        self._writing: Snapshot | None = None
        self._newest: Snapshot | None = None  # complete in memory
        self._outlived: list[Slot] = []  # closed; the next start may still want their snapshots
        self._unsaved: list[Slot] = []  # with a kept save that the disk has not taken
        self._dropped = False  # whether a save was dropped whose place the next snapshot takes
        self._layout: tuple[list[tuple[str, int]], list[Record]] = ([], [])
        self._stager = Worker()
        self._disk = Worker(first=yield_the_disk)
        self._copy_threads = min(4, os.cpu_count() or 1)
        self._making = threading.Lock()
        self._preparing: Helper | None = None
        self._closed = self._abandoned = False
        self.background_seconds = 0.0  # processor time of the staging thread, ever

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way to the disk."""
        with self._change:
            staging = any(snapshot.to_disk for snapshot in self._staging)
            return not staging and not self._queue and self._writing is None

    @property
    def ready(self) -> bool:
        """Whether there are slots, or they are being made."""
        return self._preparing is not None or bool(self._slots)

    @property
    def memory_step(self) -> int:
        """The step of the newest snapshot that outlives this process; 0 where there is none."""
        newest = self._newest
        return newest.pending.step if newest is not None and self._tier is not None else 0

    # ----------------------------------------------------------------------------------- snapshots

    def open_tier(self, tier: shared_memory.MemoryTier | None) -> None:
        """Use slots in shared memory from now on; None: private ones."""
        self._close_slots()
        self._tier = tier

    def take(
        self,
        tree: Tree,
        manifest: dict[str, Any],
        pending: PendingSave,
        *,
        to_disk: bool,
        droppable: bool,
        patient: bool,
        later: Collection[int],
        asked: float,
        failed: Callable[[Exception], None],
    ) -> Snapshot | None:
        """Copy `tree` into a slot and see to the rest in the background.

        None, and nothing is copied, where every slot is taken by something that must be kept and
        the caller is not `patient`. `later` as `Copy` has it: until `Snapshot.copy.wait()` those
        storages must not change. `failed` is told, in another thread, why it did not become
        durable. Raises `NoRoom` where there is no memory for a copy.
        """
        records = self.records(tree)
        if to_disk:
            with self._change:
                self._drop_waiting()
        slot = self._free_slot(capacity_for(tree, records, self._values), patient)
        if slot is None:
            return None
        to_disk, self._dropped = to_disk or self._dropped, False
        with self._change:
            self._unsaved = [each for each in self._unsaved if each is not slot]
        slot.begin()
        placed = list(zip(tree.storages, records, strict=False))
        copy = Copy(slot, placed, later)
        snapshot = Snapshot(
            pending, slot, tree, manifest, copy, asked, time.monotonic() - asked,
            to_disk, droppable, failed, records,
        )  # fmt: skip
        try:
            with self._change:
                self._staging.append(snapshot)
            if later:
                # The staging thread would take the interpreter lock from the little that is left.
                copy.run(self._copy_threads)
            self._stager.submit(partial(self._stage, snapshot))  # the disk follows the copy
            copy.run(self._copy_threads)
        except BaseException:  # an interrupt: what waits for this snapshot must not wait for ever
            copy.give_up()
            self._stager.submit(partial(self._drop, snapshot))
            raise
        if copy.finished:
            pending.keep_staged()
        return snapshot

    def write_newest(self) -> PendingSave | None:
        """Make the newest snapshot durable that was for the memory alone; None where the newest
        one is on the disk, or on its way there, or failed to get there."""
        with self._change:
            newest = self._newest
            if newest is None or newest.to_disk or self._tier is None:
                return None
            newest.to_disk, newest.droppable, newest.asked = True, False, time.monotonic()
        self._enqueue(newest)
        return newest.pending

    def abandon(self) -> None:
        """Let go of what is on its way to the disk: the process wants to end now."""
        self._abandoned = True

    def prepare(self, tree: Tree) -> None:
        """Have slots for such trees ready, their pages touched, before the first is needed."""
        if self._preparing is None:
            records = self.records(tree)
            sizes = capacity_for(tree, records, self._values), records[-1].end if records else 0
            with contextlib.suppress(RuntimeError, MemoryError):  # the first save touches them
                self._preparing = Helper(partial(self._prefault, *sizes))

    def _prefault(self, capacity: int, tensors: int) -> None:
        wanted = 1 if self._tier is None else MEMORY_SLOTS
        while not self._closed and len(self._slots) < wanted:
            try:
                slot = self._new_slot(capacity)
            except NoRoom:  # said to the user when a snapshot needs it
                return
            if slot is None:
                return
            slot.prefault(tensors)

    def wait(self) -> None:
        """Return when nothing is under way any more."""
        with self._change:
            self._change.wait_for(
                lambda: not self._staging and not self._queue and self._writing is None
            )

    def begin(self) -> None:
        """Begin the threads."""
        for worker in (self._stager, self._disk):
            worker.begin()

    def when_done(self, job: Callable[[], None]) -> None:
        """Have `job` done after all that is under way, without waiting for it."""
        self._stager.submit(partial(self._disk.submit, job))

    def end_threads(self) -> None:
        """Wait; what is asked for from now on is done by the thread that asks."""
        self.wait()
        for worker in (self._stager, self._disk):
            worker.finish()

    def close(self) -> None:
        """Wait, and give everything back."""
        self.wait()
        self._closed = True
        if self._preparing is not None:
            self._preparing.finish()
        for worker in (self._stager, self._disk):
            worker.stop()
        self._close_slots()

    def _close_slots(self) -> None:
        """Give the slots back; a snapshot that a crash would fall back to stays where it is."""
        self.wait()
        with self._change:
            last = self._newest.slot if self._newest is not None else None
            self._newest = None  # with its views of the slot, which would keep the memory
            for slot in self._slots:
                slot.close()
                if slot is last or slot in self._unsaved:
                    self._outlived.append(slot)
                else:
                    slot.discard()
            self._slots.clear()
            self._unsaved.clear()

    # --------------------------------------------------------------------------------------- slots

    def records(self, tree: Tree) -> list[Record]:
        """Where the storages go; the same list again while names and sizes stay the same."""
        sizes = [(storage.record, storage.nbytes) for storage in tree.storages]
        if sizes != self._layout[0]:
            self._layout = sizes, plan(sizes)
        return self._layout[1]

    def _most(self) -> int:
        return MEMORY_SLOTS if self._tier is not None else PRIVATE_SLOTS

    def _free_slot(self, capacity: int, patient: bool) -> Slot | None:
        """A slot that nothing needs, made if there may be more; None where all are taken by what
        must be kept and the caller is not `patient`. Raises `NoRoom` where there is none at all, or
        only the one with the newest snapshot, which nothing would ever free."""
        if any(slot.capacity < capacity for slot in self._slots):
            self._close_slots()  # the state has grown
        crowded: NoRoom | None = None  # why there are fewer slots than there might be
        while True:
            with self._change:
                under_way = [*self._staging, *self._queue, self._writing]
                # A crash in mid-copy falls back to the newest that is complete in shared memory.
                busy = [*under_way, self._newest if self._tier is not None else None]
                taken = [s.slot for s in busy if s is not None]
                idle = [slot for slot in self._slots if slot not in taken]
                idle.sort(key=self._unsaved.__contains__)  # a kill may still be made up for
                free = idle[0] if idle else None
                full = crowded is not None or len(self._slots) >= self._most()
                if free is None and crowded is not None and not any(under_way):
                    raise crowded  # nothing is under way that would free one
                # What is only on its way to its place is there in a moment.
                moving = bool(self._staging) or (bool(self._queue) and self._writing is None)
                if free is None and full and not self._drop_waiting():
                    if not patient and not moving:
                        return None
                    self._change.wait()
            if free is not None:
                return free
            if not full:
                try:
                    self._new_slot(capacity)
                except NoRoom as error:
                    if not self._slots:
                        raise
                    crowded = error

    def _new_slot(self, capacity: int) -> Slot | None:
        """One more slot; None where there are enough. Raises `NoRoom`."""
        with self._making:
            if len(self._slots) >= self._most():
                return None
            slot = self._make_slot(capacity)
            with self._change:
                self._slots.append(slot)
            return slot

    def _make_slot(self, capacity: int) -> Slot:
        capacity = -(-capacity // PAGE) * PAGE
        room = available_memory() - _HEADROOM
        if room < capacity:
            raise NoRoom(
                _("a copy of the state takes {needed} of memory, and {free} can be taken",
                  needed=format_bytes(capacity), free=format_bytes(max(0, room)))
            )  # fmt: skip
        try:
            return self._tier.slot(capacity) if self._tier is not None else Slot(capacity)
        except (OSError, MemoryError) as error:
            raise NoRoom(str(error)) from error

    def _grow(self, snapshot: Snapshot, blueprint: Blueprint) -> Slot:
        """Move a snapshot whose values have outgrown its slot into a larger one. Later slots are
        made as large. Raises `NoRoom`."""
        snapshot.copy.settle()
        old, tensors = snapshot.slot, snapshot.records[-1].end if snapshot.records else 0
        self._values = 2 * (blueprint.size - tensors)
        with self._making:
            new = self._make_slot(tensors + self._values)
            ctypes.memmove(new.address, old.address, tensors)
            with self._change:
                self._slots[self._slots.index(old)] = snapshot.slot = new
        old.close()
        old.discard()
        return new

    def _drop_waiting(self) -> bool:
        """Forget the saves that wait for the disk and may be dropped: a newer one takes their
        place. Whether there were any. The lock is held."""
        if self._writing is None:
            return False  # the disk is free: what waits is about to be written
        dropped = [snapshot for snapshot in self._queue if snapshot.droppable]
        for snapshot in dropped:
            self._queue.remove(snapshot)
            snapshot.pending.resolve(None)
        self._dropped = self._dropped or bool(dropped)
        return bool(dropped)

    # ---------------------------------------------------------------------------- the two threads

    def _stage(self, snapshot: Snapshot) -> None:
        """Complete a snapshot: values and manifest first, then what is left of the tensors. The
        disk need not wait for the latter: it follows the copy."""
        began = time.thread_time()
        snapshot.stager = threading.get_ident()
        try:
            self._complete(snapshot)
        finally:
            self._staged(snapshot)
            self.background_seconds += time.thread_time() - began

    def _complete(self, snapshot: Snapshot) -> None:
        handed_on = False
        try:
            try:
                blueprint = self._describe(snapshot)
                if snapshot.to_disk:
                    self._enqueue(snapshot)
                    handed_on = True
            finally:
                snapshot.tree = None
                snapshot.copy.settle()
        except Exception as error:  # noqa: BLE001 - told as a save that failed, never the end
            if not handed_on:  # else the disk comes upon it, and tells it
                snapshot.failed(error)
            return
        snapshot.pending.keep_staged()
        if self._tier is not None:
            self._remember(snapshot, blueprint)

    def _drop(self, snapshot: Snapshot) -> None:
        """Forget a snapshot that an interrupt has kept from being staged."""
        if snapshot in self._staging:
            self._staged(snapshot)

    def _enqueue(self, snapshot: Snapshot) -> None:
        with self._change:
            self._queue.append(snapshot)
        self._disk.submit(self._write_next)

    def _describe(self, snapshot: Snapshot) -> Blueprint:
        """Put everything but the tensors into the slot; they may be on their way there."""
        tree, slot = snapshot.tree, snapshot.slot
        assert tree is not None
        companions = tree.companions()
        sizes = [(storage.record, storage.nbytes) for storage in tree.storages]
        sizes += [(name, len(payload)) for name, payload in companions]
        manifest = {**snapshot.manifest, **codec.to_json(tree)}
        blueprint = design(sizes, manifest, reserve=self._reserve)
        if blueprint.size > slot.capacity:
            slot = self._grow(snapshot, blueprint)
        slot.fit(blueprint.size)
        image = slot.buffer[: blueprint.size]
        for record, (_name, payload) in zip(
            blueprint.records[len(tree.storages) :], companions, strict=True
        ):
            image[record.offset : record.end] = payload
        snapshot.blueprint = blueprint
        snapshot.sealer = Sealer(blueprint, image, snapshot.copy.await_bytes)
        return blueprint

    def _remember(self, snapshot: Snapshot, blueprint: Blueprint) -> None:
        """Make a snapshot the newest in memory. Only now, with its checksums: a start after a kill
        believes nothing that it cannot verify, and falls back to the one before it until then."""
        assert snapshot.sealer is not None
        snapshot.sealer.advance(blueprint.size)
        try:
            snapshot.slot.complete(blueprint.manifest)
        except FileNotFoundError as error:  # removed by somebody: nothing here outlives a kill now
            with self._change:
                said, self._newest = self._newest is None, None
            if not said:
                log.warning("%s", error)
            return
        except OSError as error:  # what is on its way to the disk goes there all the same
            log.warning("%s: %s", shared_memory.PLACE, error)
            return
        with self._change:
            self._newest = snapshot
            while self._outlived:
                self._outlived.pop().discard()

    def _write_next(self) -> None:
        with self._change:
            if not self._queue:
                return  # it has been dropped
            snapshot = self._writing = self._queue.pop(0)
            self._change.notify_all()
        try:
            self._write(snapshot)
        except _Abandoned:
            pass  # not told: the process wants to end
        except Exception as error:  # noqa: BLE001 - told as a save that failed, never the end
            snapshot.failed(error)
        finally:
            # Only what was neither saved nor told: an exception here would leave waiters behind.
            snapshot.pending.resolve(SaveFailed(_("The save was given up.")))
            with self._change:
                # A kept save has its slot for itself until it is durable: a kill loses none.
                if not snapshot.droppable and not _is_saved(snapshot.pending):
                    self._unsaved.append(snapshot.slot)
                self._writing = None
                self._change.notify_all()

    def _write(self, snapshot: Snapshot) -> None:
        blueprint, sealer = snapshot.blueprint, snapshot.sealer
        assert blueprint is not None
        assert sealer is not None
        if self._abandoned:
            raise _Abandoned

        def ready(end: int) -> None:
            if self._abandoned:
                raise _Abandoned
            sealer.advance(end)
            # A disk that lies may lose what is announced: by then a kill must leave the snapshot.
            if end >= blueprint.size and snapshot.stager != threading.get_ident():
                snapshot.complete.wait()

        draft = Draft(
            blueprint.manifest,
            blueprint.size,
            [(0, snapshot.slot.buffer[: blueprint.size])],
            ready,
        )

        def announced(saved: Saved) -> None:
            self._on_durable(saved)
            with contextlib.suppress(InvalidStateError):  # a second try, after one that lied
                snapshot.pending.durable.set_result(saved)

        saved = self._publisher.publish(
            draft, asked=snapshot.asked, stall=snapshot.stall, announced=announced
        )
        if self._tier is not None and saved.entry.verified:  # not before may the memory forget it
            self._tier.on_disk(saved.entry.order)
        snapshot.pending.resolve(saved)

    def _staged(self, snapshot: Snapshot) -> None:
        """The staging thread is done with a snapshot and its slot. Nobody else says so: the disk,
        which follows the copy, may have failed long before."""
        with self._change:
            self._staging.remove(snapshot)
            snapshot.complete.set()
            self._change.notify_all()


def _is_saved(pending: PendingSave) -> bool:
    saved = None if pending.settled.exception() else pending.settled.result()
    return saved is not None and saved.entry.verified
