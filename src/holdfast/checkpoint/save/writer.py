"""The saves that are to become durable, one after another, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

from holdfast.checkpoint.records import Save
from holdfast.checkpoint.rundir import Place
from holdfast.checkpoint.save.publisher import Publisher
from holdfast.checkpoint.save.slots import Slots
from holdfast.checkpoint.system import Worker, yield_the_disk
from holdfast.errors import SaveFailed


class _Abandoned(Exception):
    """The process wants to end: no thread waits for this write any more."""


class Writer:
    """Hands saves to the publisher in their order."""

    def __init__(self, slots: Slots, publisher: Publisher, place: Place) -> None:
        self.slots, self.ledger = slots, publisher.ledger
        self._publisher, self._place = publisher, place
        self._abandoned = False
        self._disk = Worker(first=yield_the_disk)
        self._disk.begin()

    def write(self, save: Save) -> None:
        """Have the ranges of `save` written; its tensors may still be on their way there."""
        with self.slots.change:
            self.slots.waiting.append(save)
        self._disk.submit(self._write_next)

    def abandon(self) -> None:
        """Let go of what is on its way to the disk: the process wants to end now."""
        self._abandoned = True

    def when_done(self, job: Callable[[], None]) -> None:
        """Have `job` done after all that is to be written, without waiting for it."""
        self._disk.submit(job)

    def end_threads(self) -> None:
        """Wait; what is to be written from now on is written by the thread that asks."""
        self._disk.finish()

    def close(self) -> None:
        """Let the thread end when everything is written."""
        self._disk.stop()

    def _write_next(self) -> None:
        save = self.slots.next()
        if save is None:
            return
        began = time.thread_time()
        try:
            if self._abandoned:
                raise _Abandoned
            self._place.secure()
            save.ready = partial(self._ready, save, threading.get_ident())
            saved = self._publisher.publish(save)
            if self.slots.tier is not None and saved.entry.verified:
                self.slots.tier.on_disk(saved.entry.order)  # not before may the memory forget it
            save.processors += time.thread_time() - began
            self.ledger.over(save, saved)
        except _Abandoned:
            pass  # not told: the process wants to end
        except Exception as error:  # noqa: BLE001 - told as a save that failed, never the end
            self.ledger.failed(save, error)
        finally:
            # Does nothing where the save was told: an exception must not leave waiters behind.
            self.ledger.over(save, SaveFailed("The save was given up."))
            # Views of the slot would keep its memory.
            save.ranges, save.sealer, save.ready = [], None, None
            self.slots.written(save)

    def _ready(self, save: Save, writing: int, end: int) -> None:
        """Return when the first `end` bytes of the file are final, and before its last ones are
        written, when its snapshot in memory is complete too; `writing` is the thread of the writer,
        which other threads help.

        Else: the file is announced as durable; the process is killed before it has read the file
        back; the disk has lied, and the file is damaged. The next start would then find neither it
        nor its snapshot, and lose the step that was announced.
        """
        if self._abandoned:
            raise _Abandoned
        if save.sealer is not None:
            save.sealer.advance(end)
            # Without a staging thread, staging has called us: it completes the snapshot after this,
            # and to wait for it here would be for ever.
            staging_goes_on = save.stager != writing
            if end >= save.size and staging_goes_on:
                save.released.wait()
