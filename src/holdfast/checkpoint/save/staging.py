"""From the live state to a complete image of the file in a slot: the first stage of a save.

Eagerly, before training goes on; or overlapped: what changes only in an optimizer's step is copied
during the next forward and backward, and a hook before that step waits for what is left. A GPU
copies with an engine of its own; on a CPU, an overlapped copy takes more from training than an
eager one (on two busy cores 0.69 s against 0.15 s for 1.5 GB), so it is made only if asked for.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from holdfast.checkpoint.format import Sealer, design
from holdfast.checkpoint.format import image as images
from holdfast.checkpoint.records import Run, Save
from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.save.copy import Copy, optimizers_of, stable_storages
from holdfast.checkpoint.save.options import Options
from holdfast.checkpoint.save.slots import MEMORY_SLOTS, NoRoom, lack_of_shared_memory
from holdfast.checkpoint.save.source import Source
from holdfast.checkpoint.save.writer import Writer
from holdfast.checkpoint.state import Tree, codec, unwrapped
from holdfast.checkpoint.system import Worker
from holdfast.errors import RunLocked


class Staging:
    """Takes saves in the training thread, and completes them in a thread of its own.

    Optimizers of torch are seen, however they are called; what changes weights between two of
    their steps by other means (an average copied into the model, `.data` written by hand, a
    replayed CUDA graph) is not: a loop that does such a thing must not ask for overlapped copies,
    or wait for `PendingSave.staged` first.
    """

    def __init__(self, source: Source, writer: Writer, options: Options) -> None:
        self._source, self.writer, self._options = source, writer, options
        self._slots, self._ledger = writer.slots, writer.ledger
        self._pid = os.getpid()
        self.in_memory = options.memory_every != 0  # True while snapshots outlive the process
        self._copying: tuple[Save, Copy] | None = None
        self._said_no_room = False
        self.stalled = 0.0  # seconds that training has stood still, ever
        self.stalled_for_memory = 0.0  # of them, for snapshots that are for the memory alone
        self.background_seconds = 0.0  # processor time of the staging thread, ever
        self._threads = min(4, os.cpu_count() or 1)
        # Wrapped ones (Accelerate) step the one inside; where none is known any of them counts.
        own = optimizers_of(source.state)
        self._optimizers = weakref.WeakSet([*own, *map(unwrapped, own)])
        self.stepping = False  # True if one of them has begun a step since this was last unset
        self._hook = register_optimizer_step_pre_hook(_before_step(weakref.ref(self)))
        weakref.finalize(self, self._hook.remove)
        self._stager = Worker()
        self._stager.begin()

    @property
    def memory_step(self) -> int:
        """The step of the newest snapshot that outlives this process; 0 where there is none."""
        return self._slots.memory_step

    @property
    def copying(self) -> bool:
        """True while a snapshot is being taken."""
        return self._copying is not None and not self._copying[0].released.is_set()

    def take(self, save: Save) -> bool:
        """Copy the tree of `save` and see to the rest in the background. Return False, and nothing
        is copied, where older saves that must be kept have every slot.

        Returns when the live state may change, but for what overlaps: `wait` for that before an
        optimizer steps.
        """
        self.wait()
        # A number of steps between snapshots in memory is a promise: training waits for a slot.
        promised = not save.to_disk and self._options.memory_every != "auto"
        try:
            if not self._slots.take(save, patient=save.kept or promised):
                self._ledger.over(save, None)
                save.tree = None
                return False
        except NoRoom as error:
            if not self._said_no_room:
                self._said_no_room = True
                self._ledger.reporter.tell("staging_off", reason=str(error))
            self._take_uncopied(save)
            return True
        self._stalled(save, time.monotonic() - save.asked)
        copy = self._begin(save)
        self._copying = save, copy
        self._stalled(save, time.monotonic() - save.asked - save.stall)
        return True

    def wait(self) -> None:
        """Return when the live state may change: before each optimizer step."""
        if self._copying is None or os.getpid() != self._pid:  # a forked child has no copier
            return
        (save, copy), began = self._copying, time.monotonic()
        copy.wait()
        if self.in_memory:
            # A kill in the next step, N + 1, falls back to the newest complete snapshot. If that of
            # step N were not complete by then, it would be that of N - 1: two steps lost.
            save.released.wait()
        self._copying = None  # last: another thread that asks meanwhile waits as well
        self._stalled(save, time.monotonic() - began)

    def before_step(self, optimizer: Optimizer) -> None:
        """Note that an optimizer, perhaps of another training, is about to change weights."""
        self.wait()
        if not self._optimizers or optimizer in self._optimizers:
            self.stepping = True

    # ----------------------------------------------------------------------------- shared memory

    def open_memory(self, run: Run, tree: Tree) -> None:
        """Move into shared memory, where that is wanted and there is room; else say why not."""
        if not self.in_memory or self._slots.tier is not None:
            return
        reason = lack_of_shared_memory(MEMORY_SLOTS * self._slots.capacity(tree))
        if not reason:
            directory = self._ledger.catalog.directory
            try:
                self._slots.use(shared_memory.MemoryTier(directory, run.run_id, run.generation))
            except (OSError, RunLocked) as error:
                reason = str(error)
        if reason:
            self.in_memory = False
            self._ledger.reporter.tell("memory_off", reason=reason)

    def leave_memory(self, *, abandon: bool = False) -> None:
        """Give up the place in shared memory: another run, or another generation of it, is saved
        from now on. With `abandon`, what is there must not be gone on from."""
        self.wait()
        tier = self._slots.tier
        if tier is not None:
            self._slots.use(None)
            tier.close(abandon=abandon)

    # ----------------------------------------------------------------------------------- the end

    def when_done(self, job: Callable[[], None]) -> None:
        """Have `job` done after all that is under way, without waiting for it."""
        self._stager.submit(partial(self.writer.when_done, job))

    def end_threads(self) -> None:
        """Wait; a save that is asked for from now on is done by the thread that asks."""
        self.leave_memory()
        self.in_memory = False
        self._slots.wait()
        self._stager.finish()
        self.writer.end_threads()

    def close(self) -> None:
        """Wait for what is under way, and give memory and hook back."""
        self.wait()
        self._hook.remove()
        self._slots.close()
        self._stager.stop()
        if self._slots.tier is not None:
            self._slots.tier.close()

    # ---------------------------------------------------------------------------------- one save

    def _begin(self, save: Save) -> Copy:
        """Copy what may change as soon as this returns, and begin with the rest."""
        assert save.tree is not None
        assert save.slot is not None
        overlap = self._options.overlap
        later: set[int] = set()
        if overlap:
            later = stable_storages(self._source.state, cpu=overlap == "always")
        records = self._slots.records(save.tree)
        copy = Copy(save.slot, list(zip(save.tree.storages, records, strict=False)), later)
        try:
            self._slots.begin(save)
            stage = partial(self._stage, save, copy)
            if later:
                # Overlapped: little is copied here, and the staging thread, which copies the rest,
                # would take the interpreter lock from it. That thread comes second.
                copy.run(self._threads)
                self._stager.submit(stage)
            else:
                # Eager: everything is copied here. The staging thread comes first, so that the disk
                # follows the copy.
                self._stager.submit(stage)
                copy.run(self._threads)
        except BaseException:  # an interrupt: what waits for this save must not wait for ever
            copy.give_up()
            self._stager.submit(partial(self._slots.released, save))
            raise
        if copy.finished:
            self._ledger.staged(save)
        if not later:
            copy.wait()  # a GPU waits for its copy; on a CPU it is done
        return copy

    def _stage(self, save: Save, copy: Copy) -> None:
        began = time.thread_time()
        save.stager = threading.get_ident()
        try:
            if save.stager == copy.asked_by:  # there is no staging thread: copy before the rest
                copy.help()
            self._complete(save, copy)
        finally:
            spent = time.thread_time() - began
            save.processors += spent
            self.background_seconds += spent
            self._slots.released(save)

    def _complete(self, save: Save, copy: Copy) -> None:
        """Complete a save: values and manifest first, then what is left of the tensors. The disk
        need not wait for the latter: it follows the copy."""
        handed_on = False
        try:
            try:
                sealer = self._describe(save, copy)
                if save.to_disk:
                    self.writer.write(save)
                    handed_on = True
            finally:
                save.tree = None
                copy.settle()
        except Exception as error:  # noqa: BLE001 - told as a save that failed, never the end
            if not handed_on:  # else the disk comes upon it, and tells it
                self._ledger.failed(save, error)
            return
        self._ledger.staged(save)
        if self._slots.tier is not None:
            sealer.advance(save.size)
            self._slots.remember(save)

    def _describe(self, save: Save, copy: Copy) -> Sealer:
        """Put everything but the tensors into the slot; they may be on their way there."""
        assert save.tree is not None
        assert save.slot is not None
        companions, storages = save.tree.companions(), save.tree.storages
        sizes = [(storage.record, storage.nbytes) for storage in storages]
        sizes += [(name, len(payload)) for name, payload in companions]
        manifest = {**save.manifest, **codec.to_json(save.tree)}
        blueprint = design(sizes, manifest, reserve=self._options.reserve)
        if blueprint.size > save.slot.capacity:
            copy.settle()
            self._slots.grow(save, blueprint.size)
        save.slot.fit(blueprint.size)
        image = save.slot.buffer[: blueprint.size]
        behind = blueprint.records[len(storages) :]
        for record, (_name, payload) in zip(behind, companions, strict=True):
            image[record.offset : record.end] = payload
        save.manifest, save.size, save.ranges = blueprint.manifest, blueprint.size, [(0, image)]
        save.sealer = sealer = Sealer(blueprint, image, copy.await_bytes)
        return sealer

    def _take_uncopied(self, save: Save) -> None:
        """Write from the live tensors: training waits until they are on the disk."""
        assert save.tree is not None
        if not save.to_disk:
            self._ledger.over(save, None)
            return
        self._slots.wait()
        manifest = {**save.manifest, **codec.to_json(save.tree)}
        image = images.build(save.tree.payloads(), manifest, reserve=self._options.reserve)
        save.manifest, save.size, save.ranges = image.manifest, image.size, list(image.pieces)
        self.writer.write(save)
        self._slots.wait()
        save.tree = None
        self.stalled += time.monotonic() - save.asked

    def _stalled(self, save: Save, seconds: float) -> None:
        save.stall += seconds  # never taken back: the disk's thread reads it meanwhile
        self.stalled += seconds
        if not save.to_disk:
            self.stalled_for_memory += seconds


def _before_step(owner: weakref.ref[Staging]) -> Callable[..., None]:
    """Return a hook before every optimizer's step that does not keep a forgotten manager alive."""

    def hook(optimizer: Optimizer, *_arguments: Any) -> None:
        staging = owner()
        if staging is not None:
            staging.before_step(optimizer)

    return hook
