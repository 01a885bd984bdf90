"""Decide what is saved and when, and ask for it: the first stop of every save.

The manager answers to the training loop and restores. Here a request becomes a `Save` with a tree
and a manifest, which staging, writer and publisher take on from there.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.checkpoint.policy import AnyOf, MemoryPace, Moment, RiskAware
from holdfast.checkpoint.records import PendingSave, Run, Save
from holdfast.checkpoint.rundir import Contents, Entry, Place, tidy
from holdfast.checkpoint.save.ledger import RETRY
from holdfast.checkpoint.save.options import Options
from holdfast.checkpoint.save.source import Source
from holdfast.checkpoint.save.staging import Staging
from holdfast.checkpoint.system import BEGINS_WITHIN, Helper, signals
from holdfast.errors import HoldfastError, SaveFailed
from holdfast.i18n import _

LOOK_EVERY = 5.0  # seconds between two looks at whether the run directory is still there
_TOLD_AGAIN = 2.0  # an interval is news when it has changed by more than this factor


@dataclass(slots=True)
class Told:
    """A step that the training loop has said to be done."""

    step: int
    epoch: int | None
    kept: dict[str, Any]  # what moves on between steps, as it was right after this one
    save: Save | None = None

    @property
    def failed(self) -> bool:
        """True if the save is over and the disk does not have it."""
        return self.save is not None and self.save.promises.settled.done() and not self.durable

    @property
    def durable(self) -> bool:
        """True if it is on the disk and was not found damaged there."""
        if self.save is None:
            return False
        settled = self.save.promises.settled
        return settled.done() and settled.exception() is None and settled.result() is not None


class Saver:
    """Takes the saves of one manager."""

    def __init__(self, source: Source, staging: Staging, place: Place, options: Options) -> None:
        self.run = Run()
        self._source, self._staging, self._place = source, staging, place
        self._writer = staging.writer
        self._slots, self._ledger = self._writer.slots, self._writer.ledger
        self._when = AnyOf(options.save_when)
        self._by_cost = [each for each in options.save_when if isinstance(each, RiskAware)]
        self._interval = 0.0  # the last one that was told
        every = options.memory_every
        self._pace = MemoryPace(None if every == "auto" else every)
        self.told: Told | None = None  # the newest one since the start or the last resume
        self.seen = 0  # the step that training has told last
        self._asked_step, self._asked_at = 0, -math.inf
        self._counted = 0  # the step that was last saved, or asked for, since steps began to count
        self._epoch: int | None = None  # in which was last saved, or the first one that was seen
        self._remembered = 0  # the step of the last snapshot that was for the memory alone
        # A save for the disk found no slot: the first step at which the disk is idle is saved.
        self._turned_away = False
        self._stepped: tuple[float, float] | None = None  # when, and stalled until then
        # Seconds of processors and of training, spent on snapshots when the last one was asked for.
        self._background = self._stalled = 0.0
        self._looked = time.monotonic()
        self._looking: Helper | None = None  # the look that was begun last

    # ------------------------------------------------------------------------------- the chain

    def request(self, save: Save) -> PendingSave:
        """Save the state as it is now. Whatever goes wrong is told, and is the outcome.

        Ctrl-C takes effect when the state has been copied.
        """
        with signals.deferred_interrupt():
            self._note(save)
            try:
                self._staging.wait()  # the one before this is complete
                self.settle()
                self.run.sequence += 1
                save.manifest = self._source.manifest(save, self.run)
                self._source.look(save)
                save.tree = self._source.tree(save.step, save.epoch)
                self._staging.open_memory(self.run, save.tree)
                taken = self._staging.take(save)
                if save.to_disk:  # as asked for, or in place of a save that was dropped
                    self._turned_away = not taken
            except Exception as error:  # noqa: BLE001 - whatever it is: saving never kills training
                self._ledger.failed(save, error)
            except BaseException as error:  # an interrupt is the caller's
                self._ledger.over(save, SaveFailed(f"{type(error).__name__}: {error}"))
                raise
        return save.promises

    def _note(self, save: Save) -> None:
        save.asked = time.monotonic()
        told = self.told
        if told is None or told.step != save.step or self._staging.stepping:
            told = self.done(save.step, save.epoch)
        if save.to_disk or told.save is None:
            told.save = save
        if save.to_disk:
            self._asked_step = self._counted = save.step
            self._asked_at = save.asked
            self._epoch = self._epoch if save.epoch is None else save.epoch
            self._ledger.asked(save, self._source.score(save.metrics))

    def settle(self, contents: Contents | None = None) -> None:
        """Begin a new run, unless one was resumed; `contents` as a scan has just found it.

        The run is newer than what lies here, which goes to the archive when the first save is
        verified: until then there is nothing else to go on from.
        """
        run, catalog = self.run, self._ledger.catalog
        if run.settled:
            return
        if contents is None:
            contents = catalog.scan()
            tidy.sweep(catalog, contents)
        if contents.entries or contents.unreadable:
            run.generation = contents.generation + 1
        run.settled = True
        # What is kept in memory from now on is found by this line after a kill.
        self._ledger.reporter.record("began", run_id=run.run_id, generation=run.generation)

    # ------------------------------------------------------------------------------ the training

    def resumed(self, entry: Entry, best: float | None, *, abandon: bool = False) -> None:
        """Note that the state is that of `entry` now, and `best` the lowest loss of its run. With
        `abandon`, what this process has kept in memory until now must not be gone on from."""
        self._staging.leave_memory(abandon=abandon)
        self._ledger.resumed(entry.step, best)
        self._epoch = entry.epoch
        self.seen = self._counted = entry.step
        self._asked_step = self._remembered = 0
        self.told = None
        self.run.settled = True

    def done(self, step: int, epoch: int | None, *, keep_streams: bool = False) -> Told:
        """Note that the loop has done `step`: the live state is that of it.

        With `keep_streams`, what moves on before the next step is kept for a save after an error.
        """
        if step < self.seen:  # the loop counts anew: intervals are measured from here
            advice = _(
                "Step {step} comes after step {before}. What is saved last counts as the "
                "newest; count optimizer steps over all epochs, so that a step names one state.",
                step=step,
                before=self.seen,
            )
            self._ledger.reporter.tell("step_back", step=step, before=self.seen, reason=advice)
            self._counted = self._remembered = 0
        self.seen = step
        self.told = Told(step, epoch, self._source.keep() if keep_streams else {})
        self._staging.stepping = False
        return self.told

    def has(self, step: int) -> bool:
        """Return True if the state of `step`, the one that training is at, is durable."""
        if self.told is None:
            return step == self._ledger.step  # it was restored
        return self.told.step == step and self.told.durable

    def improves(self, metrics: Mapping[str, float] | None) -> bool:
        """Return True if `metrics` are better than all that is durable or on its way there."""
        return self._ledger.improves(self._source.score(metrics))

    def after_step(self, save: Save) -> PendingSave | None:
        """Ask for `save` if it is due after its step; else keep a snapshot in memory if that is."""
        ledger, slots = self._ledger, self._slots
        self._time_step()
        self._tell_interval()
        self._epoch = save.epoch if self._epoch is None else self._epoch
        improved = self.improves(save.metrics)
        moment = Moment(
            save.step,
            time.monotonic(),
            self._counted,
            max(ledger.at, self._asked_at),  # a full disk is not tried at every step
            save.epoch,
            self._epoch,
            improved,
            ledger.cost,
        )
        self._look()
        due = self._when(moment) or (self._turned_away and slots.idle)
        if ledger.watch.failures:  # a full disk is not tried at every step, but soon again
            if slots.idle and ledger.watch.retry_due(moment.now):
                save.reason = RETRY
                self._make_up(save)
                return self.request(save)
        elif due:
            save.reason, save.kept = "scheduled", improved
            save.kind = "best" if improved else "temp"
            return self.request(save)
        if self.run.settled and not self._slots.ready:
            self.prepare()
        self._remember(save)
        return None

    def _make_up(self, save: Save) -> None:
        """Let `save` take the place of one that has failed, now that training is at its step.

        Of the very step that failed, it is what was asked for. A later one is not that epoch's end,
        nor has it those metrics; it is kept where a kept one is missing, and the best if its own
        metrics say so.
        """
        told = self.told
        at_it = told is not None and told.step == save.step and not self._staging.stepping
        if told is not None and told.save is not None and at_it and told.failed:
            wish = told.save
            save.kind, save.epoch, save.metrics = wish.kind, wish.epoch, wish.metrics
        elif self.improves(save.metrics):
            save.kind = "best"
        else:
            save.kind = "step" if self._ledger.kept_failed else "temp"
        save.kept = save.kept or save.kind != "temp"

    def _remember(self, save: Save) -> None:
        """Keep a snapshot in memory, if that is wanted and one is due."""
        staging, since = self._staging, save.step - max(self._remembered, self._counted)
        if not staging.in_memory or since < self._pace.interval:
            return
        self._remembered = save.step
        self.request(Save(save.step, save.epoch, reason="memory", to_disk=False))
        # What came before is counted here as well: the optimizer's step has waited for it since.
        background = staging.background_seconds - self._background
        stall = staging.stalled_for_memory - self._stalled
        self._background, self._stalled = staging.background_seconds, staging.stalled_for_memory
        self._pace.cost(stall + background / (os.cpu_count() or 1))

    def prepare(self) -> None:
        """Make the buffers for snapshots, in the background."""
        self.settle()
        tree = self._source.tree()
        self._staging.open_memory(self.run, tree)
        self._slots.prepare(tree)

    def _time_step(self) -> None:
        """Measure the step: how long it took decides how often memory is worth its cost."""
        now, stalled = time.monotonic(), self._staging.stalled
        if self._stepped is not None:
            began, before = self._stepped
            self._pace.step(max(0.0, now - began - (stalled - before)))
        self._stepped = now, stalled

    def _tell_interval(self) -> None:
        """Tell the interval that `RiskAware` chooses, once and when it changes by much."""
        cost = self._ledger.cost
        if cost is None or not self._by_cost:
            return
        choice = self._by_cost[0].choose(cost)
        low, high = sorted((choice.interval, self._interval))
        if high > _TOLD_AGAIN * low:
            self._interval = choice.interval
            self._ledger.reporter.tell("interval", choice=choice)

    def _look(self) -> None:
        """Look now and then whether the run directory is still there, in a thread, because a
        network's disk may not answer; tell it where training has been unsafe for too long."""
        now, ledger = time.monotonic(), self._ledger
        looking = self._looking is not None and self._looking.busy
        if now - self._looked >= LOOK_EVERY and not looking:
            self._looked = now
            with contextlib.suppress(RuntimeError, MemoryError):  # then at the next time
                self._looking = Helper(self._secure)
        due, first = ledger.watch.escalate(now)
        if due:
            minutes, reason = round(ledger.watch.unsafe(now) / 60, 1), ledger.watch.reason
            fields = {"minutes": minutes, "step": ledger.step, "reason": reason}
            if first:
                ledger.reporter.record("unsafe", **fields)
            ledger.reporter.tell("unsafe", **fields, first=first)

    def _secure(self) -> None:
        try:
            self._place.secure()
        except (OSError, HoldfastError):
            if not self._ledger.watch.failures:
                self._ledger.watch.lost()  # the save that is due now says why

    # --------------------------------------------------------------------------------- the ends

    def save_told(self, kind: str, reason: str, metrics: Mapping[str, float] | None = None) -> None:
        """Save the live state as that of the step that was told last, and wait for it."""
        told = self.told
        assert told is not None
        save = Save(told.step, told.epoch, metrics, kind, reason, kept=True)
        if told.failed and told.save is not None:
            wish = told.save
            save.epoch, save.metrics = wish.epoch, metrics or wish.metrics
            save.kind = kind if wish.kind == "temp" else wish.kind
        self._source.kept = told.kept
        try:
            with signals.deferred_interrupt():
                self.request(save)
                self.wait()
        finally:
            self._source.kept = {}

    def save_newest(self) -> PendingSave | None:
        """Make the newest snapshot in memory durable; None where there is nothing to gain."""
        self.wait()
        newest = self._slots.take_newest()
        if newest is None:
            return None
        newest.asked = time.monotonic()
        self._writer.write(newest)
        self.wait()
        return newest.promises

    def save_last(self, save: Save, within: float) -> None:
        """Save before an end; return when what can be durable is, in about `within` seconds."""
        if self._asked_step == save.step:  # what is being written already may be this very step
            self.wait()
        if self.has(save.step):
            return
        usual = self._ledger.usual
        rest = max(0.0, usual - (time.monotonic() - self._asked_at))
        with signals.deferred_interrupt():
            if self._slots.idle or rest + usual <= within:
                self._make_up(save)
                self.request(save)
            elif self._staging.in_memory:
                self.request(Save(save.step, save.epoch, reason="memory", to_disk=False))
            self.wait()

    def wait(self) -> None:
        """Return when nothing is under way any more."""
        self._staging.wait()
        self._slots.wait()
        if self._looking is not None:
            self._looking.finish(BEGINS_WITHIN)

    def abandon(self) -> None:
        """Write nothing more: the process is about to end."""
        self.told = None
        self._writer.abandon()

    def end_threads(self) -> None:
        """Wait: the process ends. A save that is asked for from now on is done by its caller."""
        self.wait()
        self._staging.end_threads()
