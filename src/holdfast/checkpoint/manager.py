"""CheckpointManager: the façade that puts the engine together for a training loop.

    manager = CheckpointManager("runs/a", {"model": model, "optimizer": optimizer})
    resumed = manager.resume()                      # None where there is nothing to go on from
    for step in range(resumed.step if resumed else 0, total):
        ...train...
        manager.save_async(step=step + 1)           # training goes on while it is written
    manager.close()

Any nested mapping of objects with `state_dict`, tensors and plain values is a state. Every public
method keeps the rules of the house: durable, then announced, then verified, then pruned; loading is
a transaction; saving never kills training, and training never waits for the disk.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from holdfast.checkpoint import codec, filesystem, guard, housekeeping, recovery
from holdfast.checkpoint import image as images
from holdfast.checkpoint.access import checkpoint_size, load, verify
from holdfast.checkpoint.catalog import ARCHIVE, Catalog, Entry, now
from holdfast.checkpoint.describe import environment, plain_metrics, score_of
from holdfast.checkpoint.lock import FileLock
from holdfast.checkpoint.outcome import PendingSave, Resumed, Saved
from holdfast.checkpoint.publisher import Draft, Publisher, is_transient
from holdfast.checkpoint.randomness import RandomState
from holdfast.checkpoint.reporting import EventHandler, Reporter
from holdfast.checkpoint.retention import KeepLast, KeepRollingTemps, Policy
from holdfast.checkpoint.schedule import AnyOf, MemoryPace, Moment, SavePolicy
from holdfast.checkpoint.snapshots import Snapshots
from holdfast.checkpoint.state import configurations, plan_restore
from holdfast.checkpoint.transaction import LoadObject
from holdfast.checkpoint.tree import Tree, normalise
from holdfast.checkpoint.writer import NoRoom, Writer
from holdfast.errors import (
    DamagedCheckpoint,
    HoldfastError,
    SaveFailed,
    StateMismatch,
    UnsupportedValue,
)
from holdfast.i18n import _

__all__ = [
    "CheckpointManager",
    "EventHandler",
    "PendingSave",
    "Resumed",
    "Saved",
    "checkpoint_size",
    "load",
    "run_lock",
    "verify",
]

_MOST_THREADS = 1024  # a manifest may say anything


class CheckpointManager:
    """Saves, keeps, verifies and restores the state of one training in one directory.

    Its methods are for the thread that trains; what they start runs in threads of its own.

    Args:
        directory: the run directory; created, and locked until `close()` or the process ends.
        state: what to save. Objects are asked for their `state_dict` at each save; plain values
            are taken as they stand then, and put back in place by `resume()`.
        keep_last: how many epoch checkpoints and how many step checkpoints stay (0: all).
        save_when: policies for `after_step`.
        metric: the name in `metrics` that decides which checkpoint is best.
        lower_is_better: whether a lower `metric` is better.
        rng: whether the random streams of this process belong to the state.
        reserve: bytes behind the tensors that are claimed for values, so that every file of the
            run has one size; 0 rounds up to whole pages.
        overlap: whether snapshots may be copied while training goes on, up to the next step of an
            optimizer; see `Snapshots` for what a loop must not do then.
        memory_every: keep a snapshot in shared memory every so many steps, where it outlives the
            process; "auto": as often as it costs at most 1 % of the time; 0: never.
            `after_step` takes them.
        io_limit: bytes a second that are written at most, 0 for no limit.
        on_event: called with (event, fields) in the thread that made the manager, at once or when
            it next calls a method of it.
        lock: the lock of `directory` (`run_lock`), where the caller holds it already.

    Raises:
        RunLocked: another process works in `directory`.
        UnsupportedValue: `state` holds something that a checkpoint cannot.
        OSError: `directory` cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        state: MutableMapping[str, Any],
        *,
        keep_last: int = 3,
        save_when: Sequence[SavePolicy] = (),
        metric: str = "val_loss",
        lower_is_better: bool = True,
        rng: bool = True,
        reserve: int = 0,
        overlap: bool = False,
        memory_every: int | Literal["auto"] = 0,
        io_limit: float = 0,
        on_event: EventHandler | None = None,
        lock: FileLock | None = None,
    ) -> None:
        self.catalog = Catalog(directory)
        self.state = state
        self.generation = 1
        self.run_id = uuid.uuid4().hex
        self._sequence = 0
        self._parent: dict[str, Any] | None = None
        self._save_when = AnyOf(save_when)
        self._metric, self._lower_is_better = metric, lower_is_better
        self._random = RandomState() if rng else None
        self._reserve = reserve
        self._saved_step, self._saved_at = 0, time.monotonic()
        self._asked_step, self._asked_at = 0, -math.inf
        self._remembered = 0  # the step of the last snapshot that was for the memory alone
        self._owed = False  # a save was dropped: the next step that finds room takes its place
        self._stepped: tuple[float, float] | None = None  # when, and stalled until then
        self._configured = configurations(state)
        self._settled = False  # whether it is known what the checkpoints here are to this run
        if rng and "rng" in state:
            raise UnsupportedValue(
                _("A state has no key 'rng' of its own: the random streams are saved under that "
                  "name. Call it otherwise, or use rng=False.")
            )  # fmt: skip
        normalise(self._payload(step=0, epoch=None))  # what cannot be saved is said now
        filesystem.make_directory(self.catalog.directory)
        self._lock = lock or run_lock(directory)
        if lock is None:
            self._lock.acquire()
        try:
            housekeeping.sweep(self.catalog)
        except BaseException:  # nobody will have a manager to close
            self._lock.release()
            raise
        self._reporter = Reporter(self.catalog, on_event)
        keep: list[Policy] = [
            KeepLast("epoch", keep_last),
            KeepLast("step", keep_last),
            KeepRollingTemps(2),
        ]
        self._publisher = Publisher(self.catalog, self._reporter, keep, limit=io_limit)
        self._writer = Writer(self._publisher, reserve=reserve, on_durable=self._on_durable)
        self._snapshots = Snapshots(
            self._writer, self._reporter, overlap=overlap, memory=memory_every != 0
        )
        self._pace = MemoryPace(None if memory_every == "auto" else memory_every)

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def saved_step(self) -> int:
        """The step of the newest durable checkpoint of this run; 0 where there is none."""
        return self._saved_step

    @property
    def memory_step(self) -> int:
        """The step of the newest snapshot that outlives this process; 0 where there is none."""
        return self._writer.memory_step

    @property
    def stalled(self) -> float:
        """Seconds that training has stood still for saving, ever."""
        return self._snapshots.stalled

    def wait(self) -> None:
        """Return when every save that was asked for is durable, verified and told."""
        self._snapshots.wait()
        self._writer.wait()
        self._reporter.deliver()

    def close(self) -> None:
        """Wait for what is under way and give memory and run directory back."""
        if self._lock.held:  # a forked child has neither threads nor anything to give back
            self._snapshots.close()
            self._reporter.deliver()
        self._lock.release()

    # ------------------------------------------------------------------------------------ resume

    def resume(
        self, source: str | os.PathLike[str] | None = None, *, strict: bool = True
    ) -> Resumed | None:
        """Restore the newest intact checkpoint, or `source`, into the live state.

        Args:
            source: None for the newest here; a file, a glob or a directory. An older file of this
                directory begins a new generation: what is newer is archived first. A file from
                elsewhere begins a new run whose parent it is.
            strict: whether everything in the live state must be in the checkpoint.

        Returns None where nothing has been saved yet.

        Raises:
            DamagedCheckpoint: `source` is damaged, or everything here is. Nothing is started over.
            StateMismatch: it does not fit; nothing was changed.
        """
        self.wait()
        recovery.rescue(self.catalog, self._reporter)
        with self.catalog.lock():
            found = recovery.find(self.catalog, source, self._reporter.tell)
            if found is None:
                self._settled = True
                self._reporter.report("began", run_id=self.run_id, generation=self.generation)
                return None
            known = self.catalog.generation()
            transaction = plan_restore(
                self.state,
                found.payload,
                configured=found.manifest.get("configured"),
                strict=strict,
            )
            if self._random is not None and "rng" in found.payload:
                transaction.acts.append(LoadObject(self._random, found.payload["rng"], "rng"))
            elif self._random is not None and strict:
                raise StateMismatch(
                    _("{path} has no random streams; nothing was changed. Use strict=False to do "
                      "without them.", path=found.path)
                )  # fmt: skip
            if found.newer:
                label = f"generation_{known}"
                transaction.acts.append(housekeeping.ArchiveNewer(self.catalog, found.newer, label))
            with guard.deferred_interrupt():
                transaction.commit()
                return self._go_on_from(found, known, asked=source is not None)

    def _go_on_from(self, found: recovery.Found, known: int, *, asked: bool) -> Resumed:
        """Settle identity and names after the state has been restored.

        The state is whole now: a full disk costs links and cache here, never the resume.
        """
        entry = found.entry
        steps, minutes = (0, 0.0) if asked else recovery.lost(self.catalog, entry)
        self._parent = {
            "id": entry.id,
            "run_id": entry.run_id,
            "generation": entry.generation,
            "step": entry.step,
        }
        contents = self.catalog.scan()
        past = [*contents.entries, *found.newer, entry]
        self._sequence = max(e.sequence for e in past)
        if found.newer:
            place = self.catalog.directory / ARCHIVE / f"generation_{known}"
            self._reporter.tell("archived", count=len(found.newer), to=str(place))
        branches = found.newer or found.skipped or steps or not found.here
        self.generation = known + 1 if branches else max(known, 1)
        if found.here:
            self.run_id = entry.run_id
        try:
            self.catalog.assign_roles(contents)
        except OSError as error:
            self._reporter.warn(error)
        self.catalog.write_cache()
        self._saved_step, self._saved_at = entry.step, time.monotonic()
        self._asked_step = self._remembered = 0
        self._settled = True
        self._restore_threads(found.manifest)
        self._reporter.record("resumed", id=entry.id, step=entry.step, run_id=self.run_id,
                      generation=self.generation, steps_lost=steps)  # fmt: skip
        resumed = Resumed(entry, found.path, self.generation, found.skipped, steps, minutes)
        self._reporter.tell("resumed", resumed=resumed)
        return resumed

    def _restore_threads(self, manifest: Mapping[str, Any]) -> None:
        """The number of threads changes the bits of CPU sums: it belongs to the state."""
        said, live = manifest.get("environment"), torch.get_num_threads()
        saved = said.get("threads") if isinstance(said, Mapping) else None
        if isinstance(saved, int) and 0 < saved <= _MOST_THREADS and saved != live:
            torch.set_num_threads(saved)
            self._reporter.tell("threads", saved=saved, live=live)

    # -------------------------------------------------------------------------------------- save

    def after_step(self, step: int, *, epoch: int | None = None) -> PendingSave | None:
        """Call it after each step: saves a temporary checkpoint if `save_when` says so, and keeps a
        snapshot in memory as often as `memory_every` says. Tells what has happened meanwhile."""
        self._reporter.deliver()
        self._time_step()
        last = max(self._saved_at, self._asked_at)  # a full disk is not tried at every step
        moment = Moment(step, time.monotonic(), max(self._saved_step, self._asked_step), last)
        if self._save_when(moment) or (self._owed and self._writer.idle):
            return self.save_async(step=step, epoch=epoch, reason="scheduled")
        if self._settled and not self._writer.ready:
            self.prepare()
        since = step - max(self._remembered, self._asked_step)
        if self._snapshots.in_memory and since >= self._pace.interval:
            self._remember(step, epoch)
        return None

    def end_epoch(
        self, epoch: int, *, step: int, metrics: Mapping[str, float] | None = None
    ) -> PendingSave:
        """Save at the end of `epoch` (counted from 1) as `model_epoch_<epoch>.pt`."""
        return self.save_async(step=step, epoch=epoch, metrics=metrics, kind="epoch",
                               reason="epoch")  # fmt: skip

    def save(
        self,
        *,
        step: int,
        epoch: int | None = None,
        metrics: Mapping[str, float] | None = None,
        kind: str = "step",
        reason: str = "requested",
        strict: bool = False,
    ) -> Saved | None:
        """Make the state durable; returns when it is, and verified, with what it is called.

        A failure, whatever it is, is retried once with a new file where that may help, reported,
        and written into the history; training goes on with None, or gets `SaveFailed` if `strict`.
        Ctrl-C during a save takes effect when it is done.

        Where this directory holds a run that was not resumed, the first save moves that to the
        archive: it must neither be overwritten nor win the next recovery.

        Raises:
            SaveFailed: with `strict`, or after `close()`, or in a forked child.
        """
        with guard.deferred_interrupt():
            pending = self._request(step, epoch, metrics, kind, reason, kept=True)
            self.wait()
            failure = pending.settled.exception()  # one that was not found right is not saved
            if failure is not None and strict:
                raise failure
            return pending.durable.result() if failure is None else None

    def save_async(
        self,
        *,
        step: int,
        epoch: int | None = None,
        metrics: Mapping[str, float] | None = None,
        kind: str = "temp",
        reason: str = "requested",
    ) -> PendingSave:
        """Take a snapshot of the state and make it durable while training goes on.

        Returns as soon as the live state may change (with `overlap` even before: then the next
        optimizer's step waits for what is left of the copy). While another save is being written,
        the newest `kind="temp"` waits and takes the place of those before it; the other kinds are
        all written, and training may have to wait for a buffer (`stalled`). What goes wrong is
        told, and is the exception of `PendingSave.durable`.

        Raises:
            SaveFailed: after `close()`, or in a forked child.
        """
        with guard.deferred_interrupt():
            return self._request(step, epoch, metrics, kind, reason, kept=kind != "temp")

    def prepare(self) -> None:
        """Make the buffers for snapshots in the background, so that the first is as fast as the
        others; called by `after_step` after a `resume()`."""
        self._settle()
        tree = normalise(self._payload(step=0, epoch=None))
        self._open_memory(tree)
        self._writer.prepare(tree)

    def _request(
        self,
        step: int,
        epoch: int | None,
        metrics: Mapping[str, float] | None,
        kind: str,
        reason: str,
        *,
        kept: bool,
        to_disk: bool = True,
    ) -> PendingSave:
        if not self._lock.held:
            raise SaveFailed(
                _("This process does not hold {directory}: the manager was closed, or it belongs "
                  "to the parent process.", directory=self.catalog.directory)
            )  # fmt: skip
        asked = time.monotonic()
        pending = PendingSave(int(step))
        if to_disk:
            self._asked_step, self._asked_at = int(step), asked

        def failed(error: Exception) -> None:
            self._on_failure(pending, error)

        try:
            self._snapshots.wait()  # the one before this is complete
            self._settle()
            self._sequence += 1
            where = int(step), None if epoch is None else int(epoch)
            manifest = self._manifest(*where, plain_metrics(metrics), kind, reason)
            tree = normalise(self._payload(step=where[0], epoch=where[1]))
            self._open_memory(tree)
            try:
                taken = self._snapshots.take(
                    self.state, tree, manifest, pending, asked=asked, to_disk=to_disk, kept=kept,
                    patient=kept or not to_disk, failed=failed,
                )  # fmt: skip
            except NoRoom:
                taken = True
                if to_disk:
                    self._save_directly(tree, manifest, pending, asked)
            self._owed = not taken if to_disk else self._owed
            if not taken:
                _resolve(pending, None)
        except Exception as error:  # noqa: BLE001 - whatever it is: saving never kills training
            failed(error)
        return pending

    def _save_directly(
        self, tree: Tree, manifest: dict[str, Any], pending: PendingSave, asked: float
    ) -> None:
        """Save without a copy of the state: training waits until it is on the disk."""
        self._writer.wait()
        image = images.build(
            tree.payloads(), {**manifest, **codec.to_json(tree)}, reserve=self._reserve
        )
        draft = Draft(image.manifest, image.size, image.pieces)
        saved = self._publisher.publish(draft, asked=asked, announced=self._on_durable)
        self._snapshots.stalled += time.monotonic() - asked
        _resolve(pending, saved)

    def _remember(self, step: int, epoch: int | None) -> None:
        """Keep a snapshot in memory only; what it costs decides when the next is due."""
        self._remembered = step
        stalled, background = self.stalled, self._writer.background_seconds
        self._request(step, epoch, None, "temp", "memory", kept=False, to_disk=False)
        spent = self._writer.background_seconds - background  # of the snapshot before this one
        cores = os.cpu_count() or 1
        self._pace.cost(self.stalled - stalled + spent / cores)

    def _time_step(self) -> None:
        now = time.monotonic()
        if self._stepped is not None:
            began, stalled = self._stepped
            self._pace.step(max(0.0, now - began - (self.stalled - stalled)))
        self._stepped = now, self.stalled

    def _open_memory(self, tree: Tree) -> None:
        self._snapshots.open(
            self.catalog.directory, self.run_id, self.generation, tree, self._reserve
        )

    # ----------------------------------------------- told by the background, in threads of its own

    def _on_durable(self, saved: Saved) -> None:
        self._saved_step, self._saved_at = saved.entry.step, time.monotonic()

    def _on_failure(self, pending: PendingSave, error: Exception) -> None:
        why = str(error)
        if not isinstance(error, HoldfastError | OSError):
            why = f"{type(error).__name__}: {error}"
        attempts = 2 if is_transient(error) else 1
        self._reporter.report("failed", step=pending.step, reason=why, attempts=attempts)
        failure = SaveFailed(
            _("Step {step} could not be saved: {error}", step=pending.step, error=why)
        )
        failure.__cause__ = error
        if isinstance(error, DamagedCheckpoint):  # it had been announced
            newest = self.catalog.scan().newest
            self._saved_step = newest.step if newest is not None else 0
        _resolve(pending, failure)

    def _settle(self) -> None:
        """Before the first save: what lies here and was not resumed makes way."""
        if self._settled:
            return
        filesystem.make_directory(self.catalog.directory)
        contents = self.catalog.scan()
        if contents.entries:
            known = self.catalog.generation()
            with self.catalog.lock():
                place = self.catalog.archive(contents.entries, f"generation_{known}")
            self.generation = known + 1
            self._reporter.tell("archived", count=len(contents.entries), to=str(place))
        self._settled = True

    def _manifest(
        self, step: int, epoch: int | None, metrics: Mapping[str, Any], kind: str, reason: str
    ) -> dict[str, Any]:
        """What a checkpoint says of itself, besides its state."""
        return {
            "identity": {
                "id": uuid.uuid4().hex,
                "run_id": self.run_id,
                "generation": self.generation,
                "step": step,
                "sequence": self._sequence,
                "parent": self._parent,
            },
            "kind": kind,
            "reason": reason,
            "epoch": epoch,
            "created": now(),
            "metrics": metrics,
            "score": score_of(metrics, self._metric, lower_is_better=self._lower_is_better),
            "environment": environment(),
            "configured": self._configured,
        }

    def _payload(self, *, step: int, epoch: int | None) -> dict[str, Any]:
        payload = {"epoch": epoch, "global_step": step, **self.state}
        if self._random is not None:
            payload["rng"] = self._random
        return payload

    # ------------------------------------------------------------------------------------ looking

    def list(self) -> Sequence[Entry]:
        """The checkpoints here, newest first."""
        return self.catalog.scan().entries

    def verify(self) -> dict[str, str | None]:
        """Check every byte of every checkpoint: file name → None, or what is wrong with it."""
        contents = self.catalog.scan()
        result: dict[str, str | None] = dict(contents.damaged)
        for entry in contents.entries:
            result[entry.names[0]] = verify(self.catalog.path(entry))
        return result


def run_lock(directory: str | os.PathLike[str]) -> FileLock:
    """The lock of a run directory: whoever trains there holds it."""
    return FileLock(Path(directory) / ".run.lock")


def _resolve(pending: PendingSave, outcome: Saved | SaveFailed | None) -> None:
    """Settle what has not been settled yet of a save that is over."""
    if not pending.staged.done():
        pending.staged.set_result(None)
    for promise in (pending.durable, pending.settled):
        if promise.done():
            continue
        if isinstance(outcome, SaveFailed):
            promise.set_exception(outcome)
        else:
            promise.set_result(outcome)
