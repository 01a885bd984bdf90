"""When a snapshot's bytes are copied, and into which memory: what the manager decides about copies.

Eagerly, before training goes on; or overlapped: what changes only in an optimizer's step is copied
during the next forward and backward, and a hook before that step waits for what is left. A GPU
copies with an engine of its own; on a CPU, an overlapped copy takes more from training than an
eager one (on two busy cores 0.69 s against 0.15 s for 1.5 GB), so it is made only if asked for.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from holdfast.checkpoint.records import PendingSave
from holdfast.checkpoint.rundir import Reporter
from holdfast.checkpoint.rundir import shared_memory as memory_tier
from holdfast.checkpoint.save.staging import capacity_for, optimizers_of, stable_storages
from holdfast.checkpoint.save.writer import MEMORY_SLOTS, NoRoom, Snapshot, Writer
from holdfast.checkpoint.state import Tree, unwrapped
from holdfast.checkpoint.system import available_memory
from holdfast.errors import RunLocked
from holdfast.formatting import format_bytes
from holdfast.i18n import _

Overlap = bool | Literal["always"]


class Snapshots:
    """Takes snapshots of a state for one manager, in the training thread.

    `overlap` allows copies that overlap with training. Optimizers of torch are seen, however they
    are called; what changes weights between two of their steps by other means (an average copied
    into the model, `.data` written by hand, a replayed CUDA graph) is not: a loop that does such a
    thing must not ask for it, or wait for `PendingSave.staged` first.
    """

    def __init__(
        self, writer: Writer, reporter: Reporter, state: Any, *, overlap: Overlap, memory: bool
    ) -> None:
        self._writer, self._reporter = writer, reporter
        self._pid = os.getpid()
        self._overlap, self._memory = overlap, memory
        self._copying: Snapshot | None = None
        self._tier: memory_tier.MemoryTier | None = None
        self._said_no_room = False
        self.stalled = 0.0  # seconds that training has stood still, ever
        self.stalled_for_memory = 0.0  # of them, for snapshots that are for the memory alone
        # Wrapped ones (Accelerate) step the one inside; where none is known any of them counts.
        own = optimizers_of(state)
        self._optimizers = weakref.WeakSet([*own, *map(unwrapped, own)])
        self.stepping = False  # whether one of them has begun a step since this was last unset
        self._hook = register_optimizer_step_pre_hook(_before_step(weakref.ref(self)))
        weakref.finalize(self, self._hook.remove)

    @property
    def in_memory(self) -> bool:
        """Whether snapshots outlive the process."""
        return self._memory

    @property
    def copying(self) -> bool:
        """True while a snapshot is being taken."""
        return self._copying is not None and not self._copying.complete.is_set()

    def open(self, directory: Path, run_id: str, generation: int, tree: Tree, reserve: int) -> None:
        """Move into shared memory, where that is wanted and there is room; else say why not."""
        if not self._memory or self._tier is not None:
            return
        needed = MEMORY_SLOTS * capacity_for(tree, self._writer.records(tree), reserve)
        reason = lack_of_shared_memory(needed)
        if not reason:
            try:
                self._tier = memory_tier.MemoryTier(directory, run_id, generation)
            except (OSError, RunLocked) as error:
                reason = str(error)
        if self._tier is None:
            self._memory = False
            self._reporter.tell("memory_off", reason=reason)
            return
        self._writer.open_tier(self._tier)

    def end_memory(self) -> None:
        """Keep nothing in memory any more: the process ends."""
        self.leave_memory()
        self._memory = False

    def leave_memory(self, *, abandon: bool = False) -> None:
        """Another run, or another generation of it, is saved from now on: the next snapshot opens
        a place of its own. With `abandon`, nobody will want what is there."""
        self.wait()
        if self._tier is not None:
            self._writer.open_tier(None)
            self._tier.close(abandon=abandon)
            self._tier = None

    def take(
        self,
        state: Any,
        tree: Tree,
        manifest: dict[str, Any],
        pending: PendingSave,
        *,
        asked: float,
        to_disk: bool,
        kept: bool,
        patient: bool,
        failed: Callable[[Exception], None],
    ) -> bool:
        """Take a snapshot; False where it was dropped because older ones are still on their way.

        Raises `NoRoom` where there is no memory for a copy; that is said once.
        """
        self.wait()
        later = stable_storages(state, cpu=self._overlap == "always") if self._overlap else set()
        try:
            snapshot = self._writer.take(
                tree, manifest, pending, to_disk=to_disk, droppable=not kept, patient=patient,
                later=later, asked=asked, failed=failed,
            )  # fmt: skip
        except NoRoom as error:
            if not self._said_no_room:
                self._said_no_room = True
                self._reporter.tell("staging_off", reason=str(error))
            raise
        if snapshot is None:
            return False
        if not later:
            snapshot.copy.wait()  # a GPU waits for its copy; on a CPU it is done
        self._copying = snapshot
        spent = time.monotonic() - asked
        snapshot.stall = 0.0  # what it has been until now is part of it
        self._stalled(snapshot, spent)
        return True

    def wait(self) -> None:
        """Return when the live state may change: before each optimizer step."""
        if self._copying is None or os.getpid() != self._pid:  # a forked child has no copier
            return
        snapshot, began = self._copying, time.monotonic()
        snapshot.copy.wait()
        if self._memory:
            snapshot.complete.wait()  # or a kill after the step would cost two
        self._copying = None  # last: whoever asks meanwhile, in whatever thread, waits as well
        self._stalled(snapshot, time.monotonic() - began)

    def _stalled(self, snapshot: Snapshot, seconds: float) -> None:
        snapshot.stall += seconds
        self.stalled += seconds
        if not snapshot.to_disk:
            self.stalled_for_memory += seconds

    def before_step(self, optimizer: Optimizer) -> None:
        """An optimizer, perhaps of another training, is about to change weights."""
        self.wait()
        if not self._optimizers or optimizer in self._optimizers:
            self.stepping = True

    def close(self) -> None:
        """Wait for what is under way, and give memory and hook back."""
        self.wait()
        self._hook.remove()
        self._writer.close()
        if self._tier is not None:
            self._tier.close()


def _before_step(owner: weakref.ref[Snapshots]) -> Callable[..., None]:
    """A hook before every optimizer's step that does not keep a forgotten manager alive."""

    def hook(optimizer: Optimizer, *_arguments: Any) -> None:
        snapshots = owner()
        if snapshots is not None:
            snapshots.before_step(optimizer)

    return hook


def lack_of_shared_memory(needed: int) -> str:
    """Why `needed` bytes of snapshots cannot lie in shared memory; empty where they can."""
    if not memory_tier.usable():
        return _("this platform has no shared memory that outlives a process")
    free = min(memory_tier.free_bytes(), available_memory())
    if free < needed:
        return _("{needed} are needed and {free} are free there", needed=format_bytes(needed),
                 free=format_bytes(free))  # fmt: skip
    return ""
