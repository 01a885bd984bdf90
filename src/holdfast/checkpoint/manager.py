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
import platform
import time
import uuid
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from holdfast import __version__
from holdfast.checkpoint import codec, container, filesystem, guard, recovery
from holdfast.checkpoint.catalog import BEST, LATEST, MAIN, TEMP, Catalog, Contents, Entry, now
from holdfast.checkpoint.catalog import summary as entry_of
from holdfast.checkpoint.lock import FileLock
from holdfast.checkpoint.retention import KeepLast, KeepRollingTemps, Policy, select
from holdfast.checkpoint.schedule import AnyOf, Moment, SavePolicy
from holdfast.checkpoint.state import RandomState, configurations, plan_restore
from holdfast.checkpoint.tree import normalise
from holdfast.errors import CheckpointError, DamagedCheckpoint, ResourceError, SaveFailed
from holdfast.i18n import _

log = logging.getLogger("holdfast")

# Worth one more try with a new file; a failed fsync is never repeated on the same one, because the
# kernel may have dropped the dirty pages and would report success (FAULTS.md, 7).
_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.EBUSY, errno.ETIMEDOUT}

EventHandler = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Resumed:
    """What training goes on from."""

    entry: Entry
    path: Path
    generation: int  # of what is saved from now on
    skipped: list[tuple[str, str]] = field(default_factory=list)  # newer but damaged, and why
    steps_lost: int = 0
    minutes_lost: float = 0.0

    @property
    def step(self) -> int:
        return self.entry.step

    @property
    def epoch(self) -> int | None:
        return self.entry.epoch


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is durable under all of its names."""

    entry: Entry
    path: Path
    seconds: float
    names: dict[str, str]  # name → "file", "link", "reflink" or "copy"
    is_best: bool
    previous_best: float | None


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
        self._configured = configurations(state)
        normalise(self._payload(step=0, epoch=None))  # what cannot be saved is said now
        filesystem.make_directory(self.catalog.directory)
        self._lock = lock or run_lock(directory)
        if lock is None:
            self._lock.acquire()
        self._sweep()

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
                self._report("began", run_id=self.run_id, generation=self.generation)
                return None
            transaction = plan_restore(
                self.state,
                found.payload,
                configured=found.manifest.get("configured"),
                strict=strict,
            )
            with guard.deferred_interrupt():
                transaction.commit()
                if self._random is not None and "rng" in found.payload:
                    self._random.load_state_dict(found.payload["rng"])
            return self._go_on_from(found)

    def _go_on_from(self, found: recovery.Found) -> Resumed:
        """Settle identity and names after the state has been restored."""
        entry, known = found.entry, self.catalog.generation()
        steps, minutes = recovery.lost(self.catalog, entry) if found.here else (0, 0.0)
        self._parent = {
            "id": entry.id,
            "run_id": entry.run_id,
            "generation": entry.generation,
            "step": entry.step,
        }
        before = self.catalog.scan().entries
        self._sequence = max((e.sequence for e in [*before, entry]), default=0)
        if found.newer:
            place = self.catalog.archive(found.newer, f"generation_{known}")
            self._tell("archived", count=len(found.newer), to=str(place))
        branches = found.newer or found.skipped or not found.here
        self.generation = known + 1 if branches else max(known, 1)
        if found.here:
            self.run_id = entry.run_id
        contents = self.catalog.scan()
        self.catalog.assign_roles(contents)
        self.catalog.write_cache(contents)
        self._saved_step, self._saved_at = entry.step, time.monotonic()
        self._restore_threads(found.manifest)
        self._history("resumed", id=entry.id, step=entry.step, run_id=self.run_id,
                      generation=self.generation, steps_lost=steps)  # fmt: skip
        resumed = Resumed(entry, found.path, self.generation, found.skipped, steps, minutes)
        self._tell("resumed", resumed=resumed)
        return resumed

    def _restore_threads(self, manifest: Mapping[str, Any]) -> None:
        """The number of threads changes the bits of CPU sums: it belongs to the state."""
        saved, live = manifest.get("environment", {}).get("threads"), torch.get_num_threads()
        if saved and saved != live:
            torch.set_num_threads(saved)
            self._tell("threads", saved=saved, live=live)

    # -------------------------------------------------------------------------------------- save

    def after_step(self, step: int, *, epoch: int | None = None) -> Saved | None:
        """Save a temporary checkpoint if `save_when` says so; call it after each step."""
        moment = Moment(step, time.monotonic(), self._saved_step, self._saved_at)
        if not self._save_when(moment):
            return None
        return self.save(step=step, epoch=epoch, kind="temp", reason="scheduled")

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

        A failure is retried once with a new file where that may help, reported, and written into
        the history; training goes on with None, or gets `SaveFailed` if `strict`. Ctrl-C during a
        save takes effect when it is done.
        """
        with guard.deferred_interrupt():
            for attempt in (1, 2):
                try:
                    return self._save(step, epoch, dict(metrics or {}), kind, reason)
                except (OSError, ResourceError, DamagedCheckpoint, MemoryError) as error:
                    transient = isinstance(error, DamagedCheckpoint) or (
                        isinstance(error, OSError) and error.errno in _TRANSIENT
                    )
                    if attempt == 1 and transient:
                        continue
                    self._report("failed", step=step, reason=str(error), attempts=attempt)
                    if strict:
                        raise SaveFailed(
                            _("Step {step} could not be saved: {error}", step=step, error=error)
                        ) from error
                    break
        return None

    def _save(
        self, step: int, epoch: int | None, metrics: dict[str, Any], kind: str, reason: str
    ) -> Saved:
        began = time.monotonic()
        filesystem.make_directory(self.catalog.directory)  # it may have been moved away under us
        contents = self.catalog.scan()
        self._sequence += 1
        image = self._image(step, epoch, metrics, kind, reason)
        entry = entry_of(image.manifest, image.size)
        name = _name_of(entry)
        target = self.catalog.directory / name
        guard.check_space(self.catalog.directory, image.size)
        filesystem.make_directory(target.parent)
        self._make_way(target)
        filesystem.write_file(target, image.pieces, image.size)

        entry = replace(entry, names=(name,))
        is_best = _improves(entry, contents.best)
        with self.catalog.lock():
            how = {name: "file", **self.catalog.publish(entry, [LATEST, MAIN])}
            if is_best:
                how |= self.catalog.publish(entry, [BEST])
        del image  # what holds copies of device tensors goes before the file is read back
        self._saved_step, self._saved_at = step, time.monotonic()
        saved = Saved(entry, target, time.monotonic() - began, how, is_best,
                      contents.best.loss if contents.best else None)  # fmt: skip
        self._history("durable", id=entry.id, run_id=self.run_id, generation=self.generation,
                      step=step, epoch=epoch, kind=kind, reason=reason, size=entry.size,
                      names=list(how), seconds=round(saved.seconds, 3))  # fmt: skip
        self._tell("durable", saved=saved)
        self._verify_back(entry, target)
        self._prune()
        return saved

    def _image(
        self, step: int, epoch: int | None, metrics: Mapping[str, Any], kind: str, reason: str
    ) -> container.Image:
        """The whole file in memory, without a copy of what lies in host memory already."""
        tree = normalise(self._payload(step=step, epoch=epoch))
        score = metrics.get(self._metric)
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
            "metrics": {key: _finite(value) for key, value in metrics.items()},
            "score": {
                "name": self._metric,
                "value": None if score is None or not math.isfinite(score) else float(score),
                "lower_is_better": self._lower_is_better,
            },
            "environment": environment(),
            "configured": self._configured,
            **codec.to_json(tree),
        }
        return container.build(tree.payloads(), manifest, reserve=self._reserve)

    def _payload(self, *, step: int, epoch: int | None) -> dict[str, Any]:
        payload = {"epoch": epoch, "global_step": step, **self.state}
        if self._random is not None:
            payload["rng"] = self._random
        return payload

    def _make_way(self, target: Path) -> None:
        """Nothing is ever silently overwritten: what has our name already goes to the archive."""
        if target.exists():
            with self.catalog.lock():
                taken = self.catalog.directory / "archive" / "replaced" / target.name
                filesystem.move(target, taken)
                self.catalog.record("archived", names=[target.name], to="archive/replaced")

    def _verify_back(self, entry: Entry, target: Path) -> None:
        """Read the file back past the page cache; only then may anything old go."""
        try:
            with container.Reader(target) as reader:
                reader.forget_cached()
                reader.verify()
        except DamagedCheckpoint as error:
            with self.catalog.lock():
                self.catalog.quarantine(entry.names, str(error))
                self.catalog.assign_roles(self.catalog.scan())
            raise
        self._report("verified", id=entry.id, step=entry.step)

    def _prune(self) -> None:
        with self.catalog.lock():
            contents = self.catalog.scan()
            mask = select([entry.candidate() for entry in contents.entries], self._keep)
            for entry, keep in zip(contents.entries, mask, strict=True):
                if not keep:
                    self.catalog.delete(entry, "retention")
            kept = [e for e, keep in zip(contents.entries, mask, strict=True) if keep]
            self.catalog.write_cache(Contents(kept, [], []))

    def _sweep(self) -> None:
        """Remove temporary files of dead writers; the lock says that they are dead."""
        for directory in (self.catalog.directory, self.catalog.directory / TEMP):
            for path in filesystem.temporaries(directory):
                filesystem.remove(path)

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
            self._on_event(event, fields)
        else:
            level = logging.WARNING if event in ("failed", "quarantined") else logging.INFO
            log.log(level, "%s %s", event, fields)


def checkpoint_size(state: Mapping[str, Any], *, rng: bool = True, reserve: int) -> int:
    """The exact size in bytes of every checkpoint of `state`, known without writing one.

    `reserve` as the manager will have it; it must be enough for the values, as it is for all files
    of one run to have one size.
    """
    payload = {**state, "rng": RandomState()} if rng else dict(state)
    tree = normalise(payload)
    return container.build(tree.payloads(), codec.to_json(tree), reserve=reserve, hashed=False).size


def run_lock(directory: str | os.PathLike[str]) -> FileLock:
    """The lock of a run directory: whoever trains there holds it."""
    return FileLock(Path(directory) / ".run.lock")


def load(path: str | os.PathLike[str], *, only: str | None = None) -> Any:
    """The state in a checkpoint, verified, nothing unpickled; `only` reads one top-level key.

    Raises `DamagedCheckpoint`, `ForeignCheckpoint`, `OSError`.
    """
    with container.Reader(path) as reader:
        return codec.read(reader, only=only)


def verify(path: str | os.PathLike[str]) -> str | None:
    """Check every byte of a checkpoint: None, or what is wrong with it."""
    try:
        with container.Reader(path) as reader:
            reader.verify()
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def environment() -> dict[str, Any]:
    """What the bits of a training depend on besides its state."""
    return {
        "holdfast": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _name_of(entry: Entry) -> str:
    if entry.kind == "epoch":
        return f"model_epoch_{entry.epoch}.pt"
    if entry.kind == "temp":
        epoch = "" if entry.epoch is None else f"epoch{entry.epoch}_"
        return f"{TEMP}/temp_{epoch}step{entry.step}.pt"
    return f"checkpoint_step_{entry.step}.pt"


def _improves(entry: Entry, best: Entry | None) -> bool:
    if entry.loss is None:
        return False
    return best is None or best.loss is None or entry.loss < best.loss


def _finite(value: Any) -> Any:
    """A metric as JSON can hold it: NaN and the infinities by name."""
    return repr(float(value)) if isinstance(value, float) and not math.isfinite(value) else value
