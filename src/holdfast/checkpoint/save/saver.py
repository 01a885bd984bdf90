"""What a save is, from the moment it is asked for: its state, its manifest, and who sees to it.

The manager answers to the training loop and restores; here a request becomes a snapshot and a
checkpoint, or a failure that is told. Snapshots and writer do the work in the background.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import time
import uuid
from collections.abc import Mapping, MutableMapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from holdfast.checkpoint import calls
from holdfast.checkpoint.format import image as images
from holdfast.checkpoint.policy import Cost, MemoryPace, Watch
from holdfast.checkpoint.records import PendingSave, Saved
from holdfast.checkpoint.rundir import Catalog, Contents, Entry, Place, Reporter, now, tidy
from holdfast.checkpoint.save.manifest import environment, plain_metrics, score_of
from holdfast.checkpoint.save.publisher import Draft, Publisher, is_transient
from holdfast.checkpoint.save.snapshots import Overlap, Snapshots
from holdfast.checkpoint.save.writer import NoRoom, Writer
from holdfast.checkpoint.state import (
    Configured,
    RandomState,
    SlotNames,
    Tree,
    codec,
    gradients,
    normalise,
)
from holdfast.checkpoint.system import BEGINS_WITHIN, Helper, project
from holdfast.errors import (
    DamagedCheckpoint,
    DirectoryLost,
    HoldfastError,
    ResourceError,
    SaveFailed,
    UnsupportedValue,
)
from holdfast.i18n import _

log = logging.getLogger("holdfast")

RETRY = "retry"  # the reason of a save that takes the place of one that has failed
Wish = tuple[str, int | None, Mapping[str, float] | None]  # kind, epoch and metrics of a save
_LOOK_EVERY = 5.0  # seconds between two looks at whether the run directory is still there


@dataclass(slots=True)
class Run:
    """Which run is being saved: what stands in the identity of every checkpoint."""

    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    generation: int = 1
    sequence: int = 0  # of the newest snapshot
    parent: dict[str, Any] | None = None
    settled: bool = False  # whether it is known what the checkpoints here are to this run


@dataclass(slots=True)
class Told:
    """A step that the training loop has said to be done."""

    step: int
    epoch: int | None
    random: RandomState | None  # the streams right after it, where they were kept
    save: PendingSave | None = None
    wish: Wish = ("temp", None, None)  # what `save` was asked for as

    @property
    def failed(self) -> bool:
        """True if the save is over and the disk does not have it."""
        save = self.save
        return save is not None and save.settled.done() and not self.durable

    @property
    def durable(self) -> bool:
        """True if it is on the disk and was not found damaged there."""
        save = self.save
        if save is None or not save.settled.done() or save.settled.exception() is not None:
            return False
        return save.settled.result() is not None


class Saver:
    """Takes the saves of one manager. The arguments are those of `CheckpointManager`."""

    def __init__(
        self,
        catalog: Catalog,
        state: MutableMapping[str, Any],
        *,
        metric: str,
        lower_is_better: bool,
        rng: bool,
        reserve: int,
        max_unsafe: float,
    ) -> None:
        """Raises `UnsupportedValue` where `state` holds something that a checkpoint cannot."""
        self.run = Run()
        self.random = RandomState() if rng else None
        self.streams: RandomState | None = None  # saved in place of those of this moment
        self.step, self.at = 0, time.monotonic()  # of the newest durable checkpoint
        self.asked_step, self.asked_at = 0, -math.inf
        self.seen = 0  # the step that training has told last
        self.counted = 0  # the step that was last saved, or asked for, since steps began to count
        self.told: Told | None = None  # the newest one since the start or the last resume
        self._epoch: int | None = None  # in which was last saved, or the first one that was seen
        self._best: float | None = None  # score, lower is better, of all that is durable
        self._hoped: dict[PendingSave, float] = {}  # scores of what is on its way
        self._kept_failed = False  # since a kept save has failed there was none
        self.remembered = 0  # the step of the last snapshot that was for the memory alone
        self.owed = False  # a save was dropped: the next step that finds room takes its place
        self.watch = Watch(max_unsafe, self.at)
        self._catalog, self._state = catalog, state
        self._metric, self._lower_is_better = metric, lower_is_better
        self._reserve = reserve
        self.configured = Configured(state)
        self._slot_names = SlotNames()
        project.state()  # git is asked here, where no training step waits for it
        self._stepped: tuple[float, float] | None = None  # when, and stalled until then
        self._looked = self.at
        self._looking: Helper | None = None  # the look that was begun last
        # Seconds of processors and of training, spent on snapshots when the last one was asked for.
        self._background = self._stalled = 0.0
        self.usual = 0.0  # seconds that the last save took from the wish until it was durable
        self.cost: Cost | None = None  # of what has become durable
        if rng and "rng" in state:
            raise UnsupportedValue(
                _("A state has no key 'rng' of its own: the random streams are saved under that "
                  "name. Call it otherwise, or use rng=False.")
            )  # fmt: skip
        if gradients.KEY in state:
            raise UnsupportedValue(
                _("A state has no key 'gradients' of its own: gradients in progress are saved "
                  "under that name. Call it otherwise.")
            )  # fmt: skip
        self._said: set[str] = set()  # keys of the state and metrics of which a warning was given
        self._once_given = {k: v for k, v in state.items() if calls.is_state_once_given(v)}
        normalise(self._payload(step=0, epoch=None))  # what cannot be saved is said now

    def start(
        self,
        reporter: Reporter,
        publisher: Publisher,
        place: Place,
        *,
        overlap: Overlap,
        memory_every: int | Literal["auto"],
    ) -> None:
        """From here on there is somebody to tell and a directory to write to."""
        self._reporter, self._publisher, self._place = reporter, publisher, place
        self.writer = Writer(publisher, reserve=self._reserve, on_durable=self._on_durable)
        self.snapshots = Snapshots(
            self.writer, reporter, self._state, overlap=overlap, memory=memory_every != 0
        )
        self._pace = MemoryPace(None if memory_every == "auto" else memory_every)
        self.writer.begin()

    def close(self) -> None:
        """Wait for what is under way, and give memory and threads back."""
        if hasattr(self, "snapshots"):  # else an interrupt has come before there was anything
            self.snapshots.close()

    def configured_now(self) -> Configured:
        """What the user has configured; until the first save or resume it may still be changed."""
        if not self.run.settled:
            self.configured = Configured(self._state)
        self.configured.look(self._state)
        return self.configured

    def prepare(self) -> None:
        """Make the buffers for snapshots, in the background."""
        self.settle()
        tree = normalise(self._payload(step=0, epoch=None))
        self._open_memory(tree)
        self.writer.prepare(tree)

    def resumed(self, entry: Entry, best: float | None, *, abandon: bool = False) -> None:
        """The state is that of `entry` now, of the run as `run` says; `best` is the lowest loss
        there is. `abandon`: what this process has kept in memory until now is not to be gone on
        from."""
        step, self._epoch, self._best = entry.step, entry.epoch, best
        self._hoped.clear()
        self._kept_failed = False
        self.snapshots.leave_memory(abandon=abandon)
        self.step, self.at = step, time.monotonic()
        self.seen = self.counted = step
        self.watch.saved(self.at)
        self.asked_step = self.remembered = 0
        self.told = None
        self.run.settled = True

    def done(self, step: int, epoch: int | None, *, keep_streams: bool = False) -> Told:
        """Note that the loop has done `step`: the live state is that of it."""
        self.sees(step)
        random = self.random.frozen() if self.random is not None and keep_streams else None
        self.told = Told(step, epoch, random)
        self.snapshots.stepping = False
        return self.told

    def has(self, step: int) -> bool:
        """Return True if the state of `step`, the one that training is at, is durable."""
        if self.told is None:
            return step == self.step  # it was restored
        return self.told.step == step and self.told.durable

    def end_threads(self) -> None:
        """The process ends: what is asked for from now on is done by the thread that asks."""
        self.wait()
        self.snapshots.end_memory()
        self.writer.end_threads()

    def request(
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
        """Save the state as it is now: `kept` ones are never dropped, and what is not `to_disk` is
        for the memory alone. Whatever goes wrong is told, and is the outcome."""
        asked = time.monotonic()
        pending = PendingSave(int(step))
        told = self.told
        if told is None or told.step != step or self.snapshots.stepping:
            told = self.done(int(step), epoch)
        if to_disk or told.save is None:
            told.save, told.wish = pending, (kind, epoch, dict(metrics) if metrics else None)
        if to_disk:
            self.asked_step = self.counted = int(step)
            self.asked_at = asked
            self._epoch = self._epoch if epoch is None else int(epoch)
            loss = self._loss(metrics)
            if loss is not None:
                self._hoped[pending] = loss
            self.watch.asked(asked)
        pending.settled.add_done_callback(partial(self._on_settled, pending, kind))

        def failed(error: Exception) -> None:
            self._on_failure(pending, error, again=reason == RETRY)

        try:
            self.snapshots.wait()  # the one before this is complete
            self.settle()
            self.run.sequence += 1
            where = int(step), None if epoch is None else int(epoch)
            manifest = self._manifest(*where, plain_metrics(metrics), kind, reason)
            self._compare_own(*where)
            self._look_for_stale()
            self._look_for_metric(metrics, kind)
            tree = normalise(self._payload(step=where[0], epoch=where[1]))
            self._open_memory(tree)
            try:
                taken = self.snapshots.take(
                    self._state, tree, manifest, pending, asked=asked, to_disk=to_disk, kept=kept,
                    patient=kept or (not to_disk and self._pace.promised), failed=failed,
                )  # fmt: skip
            except NoRoom:
                taken = True
                if to_disk:
                    self._save_directly(tree, manifest, pending, asked)
                else:
                    pending.resolve(None)
            self.owed = not taken if to_disk else self.owed
            if not taken:
                pending.resolve(None)
        except Exception as error:  # noqa: BLE001 - whatever it is: saving never kills training
            failed(error)
        except BaseException as error:  # an interrupt is the caller's
            pending.resolve(SaveFailed(f"{type(error).__name__}: {error}"))
            raise
        return pending

    def _save_directly(
        self, tree: Tree, manifest: dict[str, Any], pending: PendingSave, asked: float
    ) -> None:
        """Save without a copy of the state: training waits until it is on the disk."""
        self.writer.wait()
        image = images.build(
            tree.payloads(), {**manifest, **codec.to_json(tree)}, reserve=self._reserve
        )
        draft = Draft(image.manifest, image.size, image.pieces)
        saved = self._publisher.publish(draft, asked=asked, announced=self._on_durable)
        self.snapshots.stalled += time.monotonic() - asked
        pending.resolve(saved)

    def stepped(self) -> None:
        """A step has been done: how long it took decides how often memory is worth its cost."""
        now, stalled = time.monotonic(), self.snapshots.stalled
        if self._stepped is not None:
            began, before = self._stepped
            self._pace.step(max(0.0, now - began - (stalled - before)))
        self._stepped = now, stalled

    def sees(self, step: int) -> None:
        """Training is at `step`. Where that is less than before, its loop counts anew: say so, and
        measure intervals from the new beginning."""
        if step < self.seen:
            advice = _("Step {step} comes after step {before}. What is saved last counts as the "
                       "newest; count optimizer steps over all epochs, so that a step names one "
                       "state.", step=step, before=self.seen)  # fmt: skip
            self._reporter.tell("step_back", step=step, before=self.seen, reason=advice)
            self.counted = self.remembered = 0
        self.seen = step

    def improves(self, metrics: Mapping[str, float] | None) -> bool:
        """Whether `metrics` are better than all that is durable or on its way there. A save that
        failed does not count: else the next that is better than any file would be passed over."""
        loss, hoped = self._loss(metrics), list(self._hoped.values())
        best = [*hoped, self._best] if self._best is not None else hoped
        return loss is not None and all(loss < each for each in best)

    def again(
        self, step: int, epoch: int | None, metrics: Mapping[str, float] | None = None
    ) -> Wish:
        """Choose what to save in place of a save that has failed, now that training is at `step`.

        Of the very step that failed, what was asked for. A later one is not that epoch's end, nor
        has it those metrics; it is kept where a kept one is missing, and the best if its own
        `metrics` say so.
        """
        told = self.told
        if told is not None and told.step == step and told.failed and not self.snapshots.stepping:
            return told.wish
        if self.improves(metrics):
            return "best", epoch, metrics
        return "step" if self._kept_failed else "temp", epoch, metrics

    def _loss(self, metrics: Mapping[str, float] | None) -> float | None:
        lower = self._lower_is_better
        score = score_of(plain_metrics(metrics), self._metric, lower_is_better=lower)
        value: float | None = score["value"]
        return value if value is None or lower else -value

    def epoch_of_last_save(self, now: int | None) -> int | None:
        """In which epoch was last saved; the present one where nothing was."""
        if self._epoch is None:
            self._epoch = now
        return self._epoch

    def look(self) -> None:
        """Now and then: whether the run directory is still there, in a thread of its own, because
        a network's disk may not answer; and whether training has been unsafe for too long, which
        is told, and again after a while."""
        now = time.monotonic()
        looking = self._looking is not None and self._looking.busy
        if now - self._looked >= _LOOK_EVERY and not looking:
            self._looked = now
            with contextlib.suppress(RuntimeError, MemoryError):  # then at the next time
                self._looking = Helper(self._look)
        due, first = self.watch.escalate(now)
        if due:
            minutes, reason = round(self.watch.unsafe(now) / 60, 1), self.watch.reason
            fields = {"minutes": minutes, "step": self.step, "reason": reason}
            if first:
                self._reporter.record("unsafe", **fields)
            self._reporter.tell("unsafe", **fields, first=first)

    def _look(self) -> None:
        try:
            self._place.secure()
        except (OSError, HoldfastError):
            if not self.watch.failures:
                self.watch.lost()  # the save that is due now says why

    def wait(self) -> None:
        """Return when nothing is under way any more."""
        self.snapshots.wait()
        self.writer.wait()
        if self._looking is not None:
            self._looking.finish(BEGINS_WITHIN)

    def remember(self, step: int, epoch: int | None) -> None:
        """Keep a snapshot in memory, if that is wanted and one is due."""
        since = step - max(self.remembered, self.counted)
        if not self.snapshots.in_memory or since < self._pace.interval:
            return
        self.remembered = step
        self.request(step, epoch, None, "temp", "memory", kept=False, to_disk=False)
        # What came before is counted here as well: the optimizer's step has waited for it since.
        spent, stalled = self.writer.background_seconds, self.snapshots.stalled_for_memory
        background, self._background = spent - self._background, spent
        stall, self._stalled = stalled - self._stalled, stalled
        self._pace.cost(stall + background / (os.cpu_count() or 1))

    @property
    def rest(self) -> float:
        """Seconds until what is on its way to the disk is durable, as far as can be foreseen."""
        if self.writer.idle:
            return 0.0
        return max(0.0, self.usual - (time.monotonic() - self.asked_at))

    def _open_memory(self, tree: Tree) -> None:
        self.snapshots.open(
            self._catalog.directory, self.run.run_id, self.run.generation, tree, self._reserve
        )

    # ----------------------------------------------- told by the background, in threads of its own

    def _on_durable(self, saved: Saved) -> None:
        self.step, self.at = saved.entry.step, time.monotonic()
        self.usual = saved.seconds
        # One slow save must not put the next one off for long.
        before = saved.stall if self.cost is None else self.cost.training
        self.cost = Cost((before + saved.stall) / 2, saved.seconds, saved.entry.size)

    def _on_settled(self, pending: PendingSave, kind: str, promise: Future[Saved | None]) -> None:
        """Told when a save is over: one that is verified ends what was wrong before it."""
        saved = None if promise.exception() else promise.result()
        if saved is not None:
            self._best = saved.entry.loss if saved.is_best else saved.previous_best
        self._hoped.pop(pending, None)  # last: in between its score would be nowhere
        if kind != "temp":
            self._kept_failed = saved is None
        if saved is None:
            return
        step = saved.entry.step
        failures, seconds = self.watch.saved(time.monotonic(), wanted=self.asked_step != step)
        if failures:
            self._reporter.report(
                "recovered", step=step, failures=failures, minutes=round(seconds / 60, 1)
            )

    def _on_failure(self, pending: PendingSave, error: Exception, *, again: bool) -> None:
        """`again`: it was a retry, whose failure is no news while its cause stays the same."""
        why = str(error)
        if not isinstance(error, HoldfastError | OSError):
            why = f"{type(error).__name__}: {error}"
        attempts = 2 if is_transient(error) else 1
        news = self.watch.failed(_cause(error), why, time.monotonic())
        if isinstance(error, DamagedCheckpoint | DirectoryLost):  # announced, and is not there
            newest = self._catalog.scan().of(self.run.run_id).newest
            self.step = newest.step if newest is not None else 0
        if news or not again:
            fields = {"step": pending.step, "reason": why, "attempts": attempts}
            self._reporter.record("failed", **fields, repeated=not news)
            self._reporter.tell("failed", **fields, repeated=not news, durable=self.step or None)
        failure = SaveFailed(
            _("Step {step} could not be saved: {error}", step=pending.step, error=why)
        )
        failure.__cause__ = error
        pending.resolve(failure)

    def settle(self, contents: Contents | None = None) -> None:
        """Begin a new run, unless one was resumed; `contents` as a scan has just found it.

        The run is newer than what lies here, which goes to the archive when the first save is
        verified: until then there is nothing else to go on from.
        """
        run = self.run
        if run.settled:
            return
        if contents is None:
            contents = self._catalog.scan()
            tidy.sweep(self._catalog, contents)
        if contents.entries or contents.unreadable:
            run.generation = contents.generation + 1
        run.settled = True
        # What is kept in memory from now on is found by this line after a kill.
        self._reporter.record("began", run_id=run.run_id, generation=run.generation)

    def _manifest(
        self, step: int, epoch: int | None, metrics: Mapping[str, Any], kind: str, reason: str
    ) -> dict[str, Any]:
        """What a checkpoint says of itself, besides its state."""
        return {
            "identity": {
                "id": uuid.uuid4().hex,
                "run_id": self.run.run_id,
                "generation": self.run.generation,
                "step": step,
                "sequence": self.run.sequence,
                "parent": self.run.parent,
            },
            "kind": kind,
            "reason": reason,
            "epoch": epoch,
            "created": now(),
            "metrics": metrics,
            "score": score_of(metrics, self._metric, lower_is_better=self._lower_is_better),
            "environment": environment(),
            "configured": self.configured.look(self._state),
            "parameters": self._slot_names(self._state),
        }

    def _compare_own(self, step: int, epoch: int | None) -> None:
        """Say once where the state's own `global_step` or `epoch`, which the file will have, is not
        the one that was given to the save: a loop may count in a variable of another name."""
        for key, given in (("global_step", step), ("epoch", epoch)):
            own = self._state.get(key)
            if given is None or type(own) is not int or own == given or key in self._said:
                continue
            self._said.add(key)
            log.warning(
                _("The state's own {key} is {own}, and the save was given {given}. The file has "
                  "the state's: if your loop counts in another variable, take {key} out of the "
                  "state.", key=key, own=own, given=given)
            )  # fmt: skip

    def _look_for_stale(self) -> None:
        """Say once where a `state_dict()` was called when the state was made, and never since."""
        for key, value in self._once_given.items():
            if self._state.get(key) is value and key not in self._said:
                self._said.add(key)
                log.warning(
                    _("{key} in the state is what state_dict() gave when the state was made: it "
                      "does not follow the training. Put the object itself there.", key=key)
                )  # fmt: skip

    def _look_for_metric(self, metrics: Mapping[str, float] | None, kind: str) -> None:
        """Say once that the metric which is to decide what is best is not among those given."""
        if kind == "temp" or not metrics or self._metric in self._said:
            return
        value = plain_metrics(metrics).get(self._metric)
        if isinstance(value, str) and not isinstance(metrics[self._metric], float):
            self._said.add(self._metric)
            log.warning(
                _("{metric}, which decides what is best, is no number: {value}.",
                  metric=self._metric, value=value)
            )  # fmt: skip
        if self._metric in metrics:
            return
        self._said.add(self._metric)
        log.warning(
            _("The metrics of this save are {names}; {metric}, which decides what is best, is not "
              "among them (metric=...).", names=", ".join(map(str, metrics)), metric=self._metric)
        )  # fmt: skip

    def _payload(self, *, step: int, epoch: int | None) -> dict[str, Any]:
        payload = {"epoch": epoch, "global_step": step, **self._state}
        if self.random is not None:
            payload["rng"] = self.streams or self.random
        left = gradients.in_progress(self._state)
        if left:
            payload[gradients.KEY] = left
        return payload


def _cause(error: Exception) -> str:
    """What kind of failure it is; figures in its words may change from one to the next."""
    if isinstance(error, OSError) and error.errno is not None:
        return errno.errorcode.get(error.errno, str(error.errno))
    return "ENOSPC" if isinstance(error, ResourceError) else type(error).__name__
