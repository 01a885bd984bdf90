"""CheckpointManager: the façade that puts the engine together for a training loop.

    manager = CheckpointManager("runs/a", {"model": model, "optimizer": optimizer})
    resumed = manager.resume()                      # None where there is nothing to go on from
    for step in range(resumed.step if resumed else 0, total):
        ...train...
        manager.save(step=step + 1)

Any nested mapping of objects with `state_dict`, tensors and plain values is a state. Every public
method keeps the rules of the house: durable, then announced, then verified, then pruned; loading is
a transaction; saving never kills training.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from holdfast.checkpoint import codec, filesystem, guard, housekeeping, recovery
from holdfast.checkpoint import image as images
from holdfast.checkpoint.access import checkpoint_size, load, verify
from holdfast.checkpoint.catalog import (
    ARCHIVE,
    BEST,
    LATEST,
    MAIN,
    Catalog,
    Contents,
    Entry,
    name_of,
    now,
)
from holdfast.checkpoint.catalog import summary as entry_of
from holdfast.checkpoint.describe import environment, plain_metrics, score_of
from holdfast.checkpoint.lock import FileLock
from holdfast.checkpoint.outcome import Resumed, Saved
from holdfast.checkpoint.randomness import RandomState
from holdfast.checkpoint.retention import KeepLast, KeepRollingTemps, Policy
from holdfast.checkpoint.schedule import AnyOf, Moment, SavePolicy
from holdfast.checkpoint.state import configurations, plan_restore
from holdfast.checkpoint.transaction import LoadObject
from holdfast.checkpoint.tree import normalise
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
    "Resumed",
    "Saved",
    "checkpoint_size",
    "load",
    "run_lock",
    "verify",
]

log = logging.getLogger("holdfast")

# Worth one more try with a new file; a failed fsync is never repeated on the same one, because the
# kernel may have dropped the dirty pages and would report success (FAULTS.md, 7).
_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.EBUSY, errno.ETIMEDOUT}

_MOST_THREADS = 1024  # a manifest may say anything

EventHandler = Callable[[str, dict[str, Any]], None]


class CheckpointManager:
    """Saves, keeps, verifies and restores the state of one training in one directory.

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
        on_event: called with (event, fields) as things happen, in the saving thread.
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
        on_event: EventHandler | None = None,
        lock: FileLock | None = None,
    ) -> None:
        self.catalog = Catalog(directory)
        self.state = state
        self.generation = 1
        self.run_id = uuid.uuid4().hex
        self._sequence = 0
        self._parent: dict[str, Any] | None = None
        self._keep: list[Policy] = [
            KeepLast("epoch", keep_last), KeepLast("step", keep_last), KeepRollingTemps(2)
        ]  # fmt: skip
        self._save_when = AnyOf(save_when)
        self._metric, self._lower_is_better = metric, lower_is_better
        self._random = RandomState() if rng else None
        self._reserve = reserve
        self._on_event = on_event
        self._saved_step, self._saved_at = 0, time.monotonic()
        self._failed_at = -math.inf
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

    def close(self) -> None:
        """Give the run directory back."""
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
        with self.catalog.lock():
            found = recovery.find(self.catalog, source, self._tell)
            if found is None:
                self._settled = True
                self._report("began", run_id=self.run_id, generation=self.generation)
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
            self._tell("archived", count=len(found.newer), to=str(place))
        branches = found.newer or found.skipped or steps or not found.here
        self.generation = known + 1 if branches else max(known, 1)
        if found.here:
            self.run_id = entry.run_id
        try:
            self.catalog.assign_roles(contents)
        except OSError as error:
            log.warning("%s: %s", self.catalog.directory, error)
        self.catalog.write_cache()
        self._saved_step, self._saved_at = entry.step, time.monotonic()
        self._settled = True
        self._restore_threads(found.manifest)
        self._history("resumed", id=entry.id, step=entry.step, run_id=self.run_id,
                      generation=self.generation, steps_lost=steps)  # fmt: skip
        resumed = Resumed(entry, found.path, self.generation, found.skipped, steps, minutes)
        self._tell("resumed", resumed=resumed)
        return resumed

    def _restore_threads(self, manifest: Mapping[str, Any]) -> None:
        """The number of threads changes the bits of CPU sums: it belongs to the state."""
        said, live = manifest.get("environment"), torch.get_num_threads()
        saved = said.get("threads") if isinstance(said, Mapping) else None
        if isinstance(saved, int) and 0 < saved <= _MOST_THREADS and saved != live:
            torch.set_num_threads(saved)
            self._tell("threads", saved=saved, live=live)

    # -------------------------------------------------------------------------------------- save

    def after_step(self, step: int, *, epoch: int | None = None) -> Saved | None:
        """Save a temporary checkpoint if `save_when` says so; call it after each step."""
        last = max(self._saved_at, self._failed_at)  # a full disk is not tried at every step
        moment = Moment(step, time.monotonic(), self._saved_step, last)
        if not self._save_when(moment):
            return None
        saved = self.save(step=step, epoch=epoch, kind="temp", reason="scheduled")
        if saved is None:
            self._failed_at = time.monotonic()
        return saved

    def end_epoch(
        self, epoch: int, *, step: int, metrics: Mapping[str, float] | None = None
    ) -> Saved | None:
        """Save at the end of `epoch` (counted from 1) as `model_epoch_<epoch>.pt`."""
        return self.save(step=step, epoch=epoch, metrics=metrics, kind="epoch", reason="epoch")

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
        """Make the state durable; returns when it is, with what it is called.

        A failure, whatever it is, is retried once with a new file where that may help, reported,
        and written into the history; training goes on with None, or gets `SaveFailed` if `strict`.
        Ctrl-C during a save takes effect when it is done.

        Where this directory holds a run that was not resumed, the first save moves that to the
        archive: it must neither be overwritten nor win the next recovery.

        Raises:
            SaveFailed: with `strict`, or after `close()`, or in a forked child.
        """
        if not self._lock.held:
            raise SaveFailed(
                _("This process does not hold {directory}: the manager was closed, or it belongs "
                  "to the parent process.", directory=self.catalog.directory)
            )  # fmt: skip
        moment = int(step), None if epoch is None else int(epoch)
        with guard.deferred_interrupt():
            for attempt in (1, 2):
                try:
                    return self._save(*moment, plain_metrics(metrics), kind, reason)
                except Exception as error:  # whatever it is: saving must never kill training
                    transient = isinstance(error, DamagedCheckpoint) or (
                        isinstance(error, OSError) and error.errno in _TRANSIENT
                    )
                    if attempt == 1 and transient:
                        continue
                    why = str(error)
                    if not isinstance(error, HoldfastError | OSError):
                        why = f"{type(error).__name__}: {error}"
                    self._report("failed", step=moment[0], reason=why, attempts=attempt)
                    if strict:
                        raise SaveFailed(
                            _("Step {step} could not be saved: {error}", step=step, error=why)
                        ) from error
                    break
        return None

    def _save(
        self, step: int, epoch: int | None, metrics: dict[str, Any], kind: str, reason: str
    ) -> Saved:
        began = time.monotonic()
        filesystem.make_directory(self.catalog.directory)  # it may have been moved away under us
        contents = self._settle()
        self._sequence += 1
        image = self._image(step, epoch, metrics, kind, reason)
        entry = entry_of(image.manifest, image.size)
        name = name_of(entry)
        target = self.catalog.directory / name
        guard.check_space(self.catalog.directory, image.size)
        filesystem.make_directory(target.parent)
        kept = housekeeping.keep_old(self.catalog, target)
        try:
            filesystem.write_file(target, image.pieces, image.size)
        except BaseException:  # an interrupt, too
            if kept is not None and filesystem.same_data(kept, target):
                filesystem.remove(kept)  # what it is a second name of is where it was
            raise

        entry = replace(entry, names=(name,))
        is_best = _improves(entry, contents.best)
        with self.catalog.lock():
            self.catalog.clear_roles(contents)
            how = {name: "file", **self.catalog.publish(entry, [LATEST, MAIN])}
            if is_best:
                how |= self.catalog.publish(entry, [BEST])
        del image  # what holds copies of device tensors goes before the file is read back
        saved = Saved(entry, target, time.monotonic() - began, how, is_best,
                      contents.best.loss if contents.best else None)  # fmt: skip
        self._history("durable", id=entry.id, run_id=self.run_id, generation=self.generation,
                      step=step, epoch=epoch, kind=kind, reason=reason, size=entry.size,
                      names=list(how), seconds=round(saved.seconds, 3))  # fmt: skip
        self._tell("durable", saved=saved)
        try:
            housekeeping.verify_back(self.catalog, entry, target, kept)
        except DamagedCheckpoint as error:
            self._tell("quarantined", names=list(how), reason=str(error), step=step)
            raise
        self._report("verified", id=entry.id, step=step)
        self._saved_step, self._saved_at = step, time.monotonic()
        try:
            if kept is not None:
                housekeeping.settle_old(self.catalog, entry, contents, kept)
            housekeeping.prune(self.catalog, self._keep)
        except (OSError, HoldfastError) as error:  # what cannot go now goes after the next save
            log.warning("%s: %s", self.catalog.directory, error)
        return saved

    def _settle(self) -> Contents:
        """What lies here, all of it of this run."""
        contents = self.catalog.scan()
        if not self._settled and contents.entries:
            known = self.catalog.generation()
            with self.catalog.lock():
                place = self.catalog.archive(contents.entries, f"generation_{known}")
            self.generation = known + 1
            self._tell("archived", count=len(contents.entries), to=str(place))
            contents = self.catalog.scan()
        self._settled = True
        return contents

    def _image(
        self, step: int, epoch: int | None, metrics: Mapping[str, Any], kind: str, reason: str
    ) -> images.Image:
        """The whole file in memory, without a copy of what lies in host memory already."""
        tree = normalise(self._payload(step=step, epoch=epoch))
        manifest = {
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
            **codec.to_json(tree),
        }
        return images.build(tree.payloads(), manifest, reserve=self._reserve)

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

    # ------------------------------------------------------------------------------------ telling

    def _report(self, event: str, **fields: Any) -> None:
        self._history(event, **fields)
        self._tell(event, **fields)

    def _history(self, event: str, **fields: Any) -> None:
        try:
            self.catalog.record(event, **fields)
        except OSError as error:  # a full disk: the checkpoint counts, its line in the log does not
            log.warning("events.jsonl: %s", error)

    def _tell(self, event: str, **fields: Any) -> None:
        if self._on_event is not None:
            try:
                self._on_event(event, fields)
            except Exception:  # a closed terminal must not end a training, nor undo a save
                log.exception("on_event(%r)", event)
        else:
            level = logging.WARNING if event in ("failed", "quarantined") else logging.INFO
            log.log(level, "%s %s", event, fields)


def run_lock(directory: str | os.PathLike[str]) -> FileLock:
    """The lock of a run directory: whoever trains there holds it."""
    return FileLock(Path(directory) / ".run.lock")


def _improves(entry: Entry, best: Entry | None) -> bool:
    if entry.loss is None:
        return False
    return best is None or best.loss is None or entry.loss < best.loss
