"""CheckpointManager: the façade that puts the engine together for a training loop.

    state = {"model": model, "optimizer": optimizer}
    with CheckpointManager("runs/a", state, save_when=[EverySteps(500)]) as manager:
        resumed = manager.resume()                  # None where there is nothing to go on from
        for step in range(resumed.step if resumed else 0, total):
            ...train...
            manager.after_step(step + 1)            # training goes on while it is written

Any nested mapping of objects with `state_dict`, tensors and plain values is a state. Every public
method keeps the rules of the house: durable, then announced, then verified, then pruned; loading is
a transaction; saving never kills training, and training never waits for the disk.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch

from holdfast.checkpoint import calls, ranks
from holdfast.checkpoint.policy import KeepLast, KeepRollingTemps, SavePolicy
from holdfast.checkpoint.records import PendingSave, Resumed, Save, Saved
from holdfast.checkpoint.rundir import (
    Catalog,
    Contents,
    Entry,
    EventHandler,
    Place,
    Reporter,
    archive_of,
    check_rights,
    ownership,
    recovery,
    rollback,
)
from holdfast.checkpoint.save import (
    Ledger,
    Options,
    Overlap,
    Publisher,
    Saver,
    Slots,
    Source,
    Staging,
    Writer,
    rescue,
)
from holdfast.checkpoint.state import (
    LoadObject,
    checkpoint_size,
    gradients,
    load,
    plan_restore,
    seeded_anew,
    verify,
)
from holdfast.checkpoint.system import filesystem, run_lock, signals
from holdfast.errors import ConfigError, DamagedCheckpoint, SaveFailed, StateMismatch
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

log = logging.getLogger("holdfast")

_MOST_THREADS = 1024  # a manifest may say anything
_IDLE, _IDLE_STEPS = 30.0, 10  # seconds, and usual steps, without a step: the loop may be over


class CheckpointManager:
    """Saves, keeps, verifies and restores the state of one training in one directory.

    Its methods are for the thread that trains; what they start runs in threads of its own.

    In a `with` block the ends of a training are taken care of, where the loop calls `after_step`. A
    clean end saves the last step. At SIGINT, SIGTERM, SIGHUP or SIGUSR1 the step is finished and
    saved, and the process ends with 128 + the signal's number (a second Ctrl-C ends it at once). At
    an exception the newest step is saved that is whole: the live state if no optimizer in it has
    begun another step, else the newest snapshot in memory. Random streams are saved as they were
    after that step, and so is what has a `state_at_step()`, as `ResumableLoader` has; what else a
    broken step has changed (running statistics of a batch norm) is saved as it is.

    Where a manager of the same thread works in `directory` already (a notebook cell that is run
    again) the new one takes over, and the old one refuses to save.

    Args:
        directory: the run directory; created, and locked until `close()`, or until the manager is
            garbage, or the process ends.
        state: what to save. Objects are asked for their `state_dict` at each save; plain values
            are taken as they stand then, and put back in place by `resume()`.
        keep_last: how many epoch checkpoints and how many step checkpoints stay (0: all).
        save_when: policies for `after_step`.
        metric: the name in `metrics` that decides which checkpoint is best.
        lower_is_better: whether a lower `metric` is better.
        rng: whether the random streams of this process belong to the state.
        grads: whether gradients are saved that an optimizer has used already. Those in progress, of
            micro-batches and of levels that step every few steps, are saved in any case.
        reserve: bytes behind the tensors that are claimed for values, so that every file of the
            run has one size; 0 rounds up to whole pages.
        overlap: True if snapshots may be copied while training goes on, up to the next step of an
            optimizer; see `Staging` for what a loop must not do then. It is done for what lies
            on a GPU; "always": on a CPU too, which pays where processors are idle.
        memory_every: keep a snapshot in shared memory every so many steps, where it outlives the
            process; "auto": for the first steps each, then as often as it costs at most 1 % of
            the time; 0: never. `after_step` takes them.
        io_limit: bytes a second that are written at most, 0 for no limit.
        max_unsafe: minutes after which a durable state that is wanted and cannot be made is told
            as "unsafe", by `after_step`; 0: never.
        on_event: called with (event, fields) in the thread that made the manager, at once or when
            it next calls a method of it.
        catalog: that of `directory`, where the caller holds its `run_lock` already.

    Raises:
        RunLocked: another process or thread works in `directory`.
        ConfigError: this process is one rank of several.
        ResourceError: `directory` belongs to another user.
        ConfigError: an argument is none that can be meant.
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
        grads: bool = False,
        reserve: int = 0,
        overlap: Overlap = False,
        memory_every: int | Literal["auto"] = 0,
        io_limit: float = 0,
        max_unsafe: float = 0,
        on_event: EventHandler | None = None,
        catalog: Catalog | None = None,
    ) -> None:
        directory = calls.checked_directory(directory)
        calls.check_state(state)
        calls.check_policies(save_when)
        calls.check_choice("overlap", overlap, (False, True, "always"))
        if isinstance(memory_every, str):
            calls.check_choice("memory_every", memory_every, ("auto", 0, 1))
        else:
            calls.check_number("memory_every", memory_every, 0, whole=True)
        calls.check_number("keep_last", keep_last, 0, whole=True)
        for name, value in (
            ("reserve", reserve),
            ("io_limit", io_limit),
            ("max_unsafe", max_unsafe),
        ):
            calls.check_number(name, value, 0)
        calls.check_text("metric", metric)
        calls.check_handler("on_event", on_event)
        ranks.refuse()
        self.catalog = catalog or Catalog(directory)
        self.state = state
        self._pid = os.getpid()
        self._guard: signals.SignalGuard | None = None
        self._held: list[Callable[[], None]] = []  # what gives everything back, the last first
        self._restored: torch.Tensor | None = None  # torch's stream, until the first step
        self._open = self._superseded = False
        self._pace = 0.0, 0.0, 0  # when the first and the last step were told, and how many
        options = Options(
            save_when=save_when,
            keep=(KeepLast("epoch", keep_last), KeepLast("step", keep_last), KeepRollingTemps(2)),
            metric=metric,
            lower_is_better=lower_is_better,
            rng=rng,
            grads=grads,
            reserve=reserve,
            overlap=overlap,
            memory_every=memory_every,
            io_limit=io_limit,
            max_unsafe=max_unsafe,
        )
        self._source = Source(state, options)
        check_rights(self.catalog.directory)
        filesystem.make_directory(self.catalog.directory)
        self._lock = self.catalog.run_lock
        before = catalog is None and ownership.take_over(self.catalog.directory)
        tenure = ownership.Tenure(self.catalog.directory, self)
        self._held.append(tenure.end)
        try:
            tenure.begin()
            if catalog is None:
                self._held.append(self._lock.release)
                self._lock.acquire()
            self._reporter = Reporter(self.catalog, on_event)
            self._place = Place(self.catalog, self._lock, self._reporter)
            self._held.append(self._place.close)
            self._ledger = Ledger(self.catalog, self._reporter, max_unsafe)
            slots = Slots(self._ledger, reserve)
            writer = Writer(slots, Publisher(self._ledger, options), self._place)
            self._held.append(writer.close)
            self._staging = Staging(self._source, writer, options)
            self._held.append(self._staging.close)
            self._saver = Saver(self._source, self._staging, self._place, options)
            self._open = True
        except BaseException:  # an interrupt, too: the caller gets no manager to close
            ownership.give_back(self._held)
            raise
        if before:
            log.warning(
                _(
                    "{directory}: an earlier manager of this process has been closed; this one "
                    "goes on in its place.",
                    directory=self.catalog.directory,
                )
            )

    def __enter__(self) -> CheckpointManager:
        self.guard()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(error)

    def guard(self) -> None:
        """Take care of signals, as a `with` block does, until `end()`; from the next `after_step`
        on, since before it nothing reads the flag."""
        self._guard = signals.SignalGuard(self._stop_if_idle)

    def end(self, error: BaseException | None = None) -> None:
        """End as a `with` block does, which `error` has ended: save what is whole, and `close()`.

        Raises `SystemExit` with 128 + n where signal n has come after the last step of a clean end.
        """
        guard, self._guard = self._guard, None
        try:
            if error is not None:
                self._end_with(error, at_once=guard is not None and guard.requested is not None)
            self.close(save=error is None)
        finally:
            if guard is not None:
                guard.__exit__()
        if error is None and guard is not None and guard.requested is not None:
            raise signals.stopped(guard.requested)  # it came after the last step

    def __del__(self) -> None:
        """Give everything back in the background: this may run in any thread, at any moment."""
        if getattr(self, "_open", False) and os.getpid() == self._pid and not sys.is_finalizing():
            self._staging.when_done(partial(ownership.give_back, self._held))

    @property
    def saved_step(self) -> int:
        """The step of the newest durable checkpoint of this run; 0 where there is none."""
        return self._ledger.step

    @property
    def memory_step(self) -> int:
        """The step of the newest snapshot that outlives this process; 0 where there is none."""
        return self._staging.memory_step

    @property
    def copying(self) -> bool:
        """True while a snapshot is being taken."""
        return self._staging.copying

    @property
    def failing(self) -> bool:
        """True if a save has failed since the newest durable state."""
        return self._ledger.watch.failures > 0

    @property
    def unsafe(self) -> bool:
        """True if "unsafe" was told, and nothing has become durable since."""
        return self._ledger.watch.alarmed

    @property
    def stalled(self) -> float:
        """Seconds that training has stood still for saving, ever."""
        return self._staging.stalled

    @property
    def closed(self) -> bool:
        """True after `close()`, or once a newer manager has taken over."""
        return not self._open

    @property
    def run_id(self) -> str:
        """The run that is being saved, for all of its generations."""
        return self._saver.run.run_id

    @property
    def generation(self) -> int:
        """Counts how often this run went on from something else than its newest state."""
        return self._saver.run.generation

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Return True if `metrics` are better than all that is durable or on its way there."""
        return self._saver.improves(metrics)

    def wait_for_copy(self) -> None:
        """Return when the snapshot that is being taken is whole: with `memory_every`, a kill leaves
        it from now on."""
        if os.getpid() == self._pid:
            self._staging.wait()

    def wait(self) -> None:
        """Return when every save that was asked for is durable, verified and told."""
        if os.getpid() == self._pid:  # a forked child has no threads to wait for
            self._saver.wait()
            self._reporter.deliver()

    def close(self, *, save: bool = True) -> None:
        """Wait for what is under way and give memory and run directory back.

        Args:
            save: whether to save the newest step that `after_step`, `save` or `save_async` was told
                first, where the disk has none of it. Not where an optimizer in the state has begun
                another step since, of which nothing says the number: that is logged.

        A failure is told as that of any other save; `saved_step` says what is durable.
        """
        if os.getpid() != self._pid:  # a forked child has nothing else to give back
            self._place.close()
            return
        if save and self._lock.held:
            self._end()
        self.wait()
        with signals.deferred_interrupt():
            ownership.give_back(self._held)
            self._lock.release()
            self._open = False

    def give_way(self) -> None:
        """Close, since another manager of this process is about to work in the directory. What is
        in memory becomes durable; the live objects may be the other's already."""
        if self._lock.held:
            self.save_snapshot()
        self._superseded = True
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.__exit__()  # no loop reads its flag any more: Ctrl-C would be lost
        self.close(save=False)

    def end_threads(self) -> None:
        """Finish what is under way; from now on the caller waits for the disk, as the process ends
        and its threads will be stopped."""
        if self._open:
            self._saver.end_threads()

    # ---------------------------------------------------------------------------------------- ends

    def _end(self) -> None:
        """Save the last step of a training that is over, where the disk has none of it."""
        self.wait()
        told = self._saver.told
        if self._staging.stepping:
            log.warning(
                _(
                    "{directory}: training has gone on after step {step} and has not said how far: "
                    "that is not saved. Call after_step(step) after every step.",
                    directory=self.catalog.directory,
                    step=told.step if told else 0,
                )
            )
            if told is not None and not told.durable:
                self.save_snapshot()
        elif told is not None and not told.durable:
            self._saver.save_told("step", "end")

    def _end_with(self, error: BaseException, *, at_once: bool) -> None:
        """Make durable what is whole after an exception; `at_once` an interrupt waits for nothing.

        Never raises an error of its own: the exception that ends the training is to be seen.
        """
        told = self._saver.told
        if told is None or not self._lock.held:
            return
        if isinstance(error, signals.Stopped):
            self._end()
            return
        if at_once and isinstance(error, KeyboardInterrupt):
            self.abandon()
            return
        try:
            self.wait()
            whole = not self._staging.stepping
            if not told.durable and whole and told.step != self.memory_step:
                self._saver.save_told("temp", "error")
            if not told.durable:  # nor may it be possible, on a GPU that has failed
                self.save_snapshot()
        except Exception:  # whatever a broken training still raises
            log.exception("%s", self.catalog.directory)
        log.warning(
            _(
                "{directory}: an exception has ended training after step {step}; step {durable} is "
                "durable.",
                directory=self.catalog.directory,
                step=told.step,
                durable=self.saved_step,
            )
        )

    def _stop_if_idle(self, number: int) -> None:
        """End the process at signal `number` where training tells no steps any more: the flag would
        not be read before the end of whatever goes on."""
        began, last, steps = self._pace
        usual = (last - began) / max(1, steps)
        if steps and time.monotonic() - last > max(_IDLE, _IDLE_STEPS * usual):
            raise signals.stopped(number)

    def _stop_if_asked(self, step: int, epoch: int | None) -> None:
        """Save this step and end the process if a signal has come in a `with` block."""
        if self._guard is None:
            return
        self._guard.activate()
        if self._guard.requested is None:
            return
        self.save_last(step=step, epoch=epoch, reason="signal")
        if not self._saver.has(step):
            self.save_snapshot()
        log.warning(
            _(
                "Stopped at step {step}; step {durable} is durable. The same command goes on from "
                "there.",
                step=step,
                durable=self.saved_step,
            )
        )
        raise signals.stopped(self._guard.requested)

    # ------------------------------------------------------------------------------------ resume

    def resume(
        self,
        source: str | os.PathLike[str] | recovery.Found | None = None,
        *,
        strict: bool = True,
        branch: bool = False,
    ) -> Resumed | None:
        """Restore the newest intact checkpoint, or `source`, into the live state.

        Settings of optimizers and schedulers that you have configured differently from what was
        configured at the save take effect, and are told; all else is as it was saved.

        Args:
            source: None for the newest here; a file, a glob or a directory; or what `recovery.find`
                has read already, and nothing is looked for again. An older file of this
                directory begins a new generation: what is newer is archived first. A file from
                elsewhere begins a new run whose parent it is: what is here is archived when the
                first state of that one is verified.
            strict: whether everything in the live state must be in the checkpoint.
            branch: begin a new generation even from the newest, since what came after it is not to
                be gone on from: snapshots in memory of this process are given up.

        Returns None where nothing has been saved yet.

        Raises:
            DamagedCheckpoint: `source` is damaged, or everything here is. Nothing is started over.
            StateMismatch: it does not fit; nothing was changed.
            SaveFailed: after `close()`, or in a forked child.
        """
        if source is not None and not isinstance(source, recovery.Found):
            calls.check_source(source)
        self._own()
        self.wait()
        if isinstance(source, recovery.Found):
            found: recovery.Found | None = source
        else:
            # An older state that is asked for by name must not go to make room for what is left.
            contents = rescue(self.catalog, self._reporter, make_room=source is None)
            choice = recovery.choose(self.catalog.directory, contents, source)
            found = recovery.find(self.catalog, choice, self._reporter.tell)
            if found is None:
                self.begin(contents)
        if found is None:
            return None
        with self.catalog.lock():
            random = self._source.random
            if random is not None and "rng" not in found.payload and strict:
                raise StateMismatch(
                    "{path} has no random streams; nothing was changed. Use strict=False to do "
                    "without them.",
                    path=found.path,
                )
            transaction = plan_restore(
                self.state,
                found.payload,
                manifest=found.manifest,
                configured=self._source.configured_now(settled=self._saver.run.settled),
                strict=strict,
            )
            if random is not None and "rng" in found.payload:
                transaction.acts.append(LoadObject(random, found.payload["rng"], "rng"))
            try:
                left = found.payload.get(gradients.KEY)
                transaction.acts.append(gradients.plan(self.state, left, strict=strict))
            except BaseException:  # too little memory, an interrupt
                transaction.forget()
                raise
            # The generation that ends here, if one does. Read before the commit: going back writes
            # the next one into the history, and `contents` counts that from then on.
            last = found.contents.generation
            if found.newer:
                transaction.acts.append(rollback.GoBack(self.catalog, found, last + 1))
            with signals.deferred_interrupt():
                transaction.commit()
                if random is not None and "rng" in found.payload:
                    self._restored = torch.get_rng_state()
                if transaction.decisions:
                    changes = [str(decision) for decision in transaction.decisions]
                    self._reporter.tell("configured", changes=changes)
                return self._go_on_from(found, last, branch=branch)

    def begin(self, contents: Contents | None = None) -> None:
        """Begin a new run; `contents` as a scan has just found it. What lies here goes to the
        archive when the first save of the new run is verified."""
        self._saver.settle(contents)
        self._reporter.tell("began", run_id=self.run_id, generation=self.generation)

    def _go_on_from(self, found: recovery.Found, last: int, *, branch: bool) -> Resumed:
        """Settle identity and names after the state has been restored; `last` is the highest
        generation that was begun before.

        The state is whole now: a full disk costs links and cache here, never the resume.
        """
        entry, contents, run = found.entry, found.contents, self._saver.run
        steps, minutes = (0, 0.0) if found.choice.named else recovery.lost(contents.known, entry)
        run.parent = {
            "id": entry.id,
            "run_id": entry.run_id,
            "generation": entry.generation,
            "step": entry.step,
        }
        past = [*contents.entries, *found.newer, entry]
        # It never comes again, whatever is gone: the newest of a generation is known by it.
        run.sequence = max(run.sequence, contents.known.sequence, *(e.sequence for e in past))
        if found.newer:
            place = self.catalog.directory / archive_of(entry, last)
            self._reporter.tell("archived", count=len(found.newer), to=str(place))
        branches = (
            branch or found.newer or found.skipped or found.choice.unread or steps or not found.here
        )
        run.generation = last + 1 if branches else max(last, 1)
        if found.here:
            run.run_id = entry.run_id
        try:
            contents = self.catalog.assign_roles(contents)
        except OSError as error:
            self._reporter.warn(error)
        self.catalog.write_cache(contents)
        best = contents.of(self.run_id).best
        self._saver.resumed(entry, best.loss if best is not None else None, abandon=branch)
        self._restore_threads(found.manifest)
        self._reporter.record(
            "resumed",
            id=entry.id,
            step=entry.step,
            run_id=self.run_id,
            generation=self.generation,
            steps_lost=steps,
            minutes_lost=round(minutes, 2),
        )
        resumed = Resumed(
            entry,
            found.path,
            self.generation,
            found.skipped,
            steps,
            minutes,
            contents,
            found.payload.get("rng") if self._source.random is not None else None,
        )
        self._reporter.tell("resumed", resumed=resumed)
        return resumed

    def go_back(self, before: int, reason: str) -> Resumed | None:
        """Restore the newest intact checkpoint of this run from before step `before`, in a new
        generation, since training has gone wrong there. `reason` goes into the history.

        Returns None, and nothing has changed, where there is none. Raises as `resume` does.
        """
        self.wait()
        last, earlier = max(before, self._saver.seen), False
        for entry in self.list():
            earlier = earlier or entry.step > last  # saved before the steps were counted anew
            last = entry.step
            if entry.run_id != self.run_id or (entry.step >= before and not earlier):
                continue
            try:
                resumed = self.resume(self.catalog.path(entry), branch=True)
            except DamagedCheckpoint:  # set aside now: the one before it has to do
                continue
            self._reporter.record("diverged", step=before, reason=reason, back_to=entry.step)
            return resumed
        return None

    def _restore_threads(self, manifest: Mapping[str, Any]) -> None:
        """Use as many threads as the save did: their number changes the bits of CPU sums."""
        said, live = manifest.get("environment"), torch.get_num_threads()
        saved = said.get("threads") if isinstance(said, Mapping) else None
        if isinstance(saved, int) and 0 < saved <= _MOST_THREADS and saved != live:
            torch.set_num_threads(saved)
            self._reporter.tell("threads", saved=saved, live=live)

    # -------------------------------------------------------------------------------------- save

    def after_step(
        self,
        step: int,
        *,
        epoch: int | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> PendingSave | None:
        """Call it after each step: saves if `save_when` says so, and keeps a snapshot in memory as
        often as `memory_every` says. Tells what has happened meanwhile.

        Where `metrics` are the best there have been the checkpoint is one to keep, else a temporary
        one that may be dropped for a newer one.

        In a `with` block this is where a signal ends the process, the step saved.

        Raises:
            SaveFailed: after `close()`, or in a forked child.
        """
        saver = self._own()
        self._check_save(step, epoch, "temp", metrics)
        self._reporter.deliver()
        began, _last, steps = self._pace
        now = time.monotonic()
        self._pace = (began, now, steps + 1) if steps else (now, now, 1)
        save = Save(step, epoch, metrics)
        saver.done(save.step, epoch, keep_streams=self._guard is not None)
        self._stop_if_asked(save.step, epoch)
        return saver.after_step(save)

    def end_epoch(
        self, epoch: int, *, step: int, metrics: Mapping[str, float] | None = None
    ) -> PendingSave:
        """Save at the end of `epoch`, as the loop counts it, as `model_epoch_<epoch>.pt`."""
        if self._guard is not None:
            self._own().done(step, epoch, keep_streams=True)  # what ends now ends after the epoch
        return self.save_async(
            step=step, epoch=epoch, metrics=metrics, kind="epoch", reason="epoch"
        )

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
            ConfigError: step, epoch or kind are none that can be meant.
        """
        calls.check_text("reason", reason)
        self._check_save(step, epoch, kind, metrics)
        with signals.deferred_interrupt():
            pending = self._own().request(Save(step, epoch, metrics, kind, reason, kept=True))
            self.wait()
            # Not that of `durable`, which stays kept where the file was found damaged afterwards.
            failure = pending.settled.exception()
            if failure is not None and strict:
                raise failure
            return pending.durable.result() if failure is None else None

    def save_told(self, *, metrics: Mapping[str, float] | None = None) -> Saved | None:
        """Make the step durable that `after_step` was told last, as it was then: where signals are
        guarded, with its random streams, whatever has been drawn since. Returns as `save` does.

        Raises:
            ConfigError: no step was told, or an optimizer has begun another one since.
            SaveFailed: after `close()`, or in a forked child.
        """
        saver = self._own()
        told = saver.told
        if told is None or self._staging.stepping:
            raise ConfigError(
                "There is no whole step to save: save right after a step was told, before an "
                "optimizer begins the next one."
            )
        calls.check_save(told.step, told.epoch, "step", metrics)
        saver.save_told("step", "requested", metrics)
        self._reporter.deliver()
        assert told.save is not None
        pending = told.save.promises
        return None if pending.settled.exception() else pending.durable.result()

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
        calls.check_text("reason", reason)
        self._check_save(step, epoch, kind, metrics)
        return self._own().request(Save(step, epoch, metrics, kind, reason, kept=kind != "temp"))

    def save_snapshot(self) -> Saved | None:
        """Make the newest snapshot in memory durable, where the disk has none of that step: for an
        end at which the live state can no longer be trusted. None where there is nothing to gain,
        or it failed, which is told.

        Raises:
            SaveFailed: after `close()`, or in a forked child.
        """
        with signals.deferred_interrupt():
            pending = self._own().save_newest()
            if pending is None or pending.settled.exception() is not None:
                return None
            self._reporter.deliver()
            return pending.durable.result()

    def save_last(
        self, *, step: int, epoch: int | None = None, reason: str, within: float = math.inf
    ) -> None:
        """Save before an end; returns when what can be durable is, in about `within` seconds.

        Where another save is on its way, and by the time that the last one took there would be
        none left for this step as well, that one is waited for and this step is kept in shared
        memory alone.

        Raises:
            SaveFailed: after `close()`, or in a forked child.
        """
        saver = self._own()
        self._check_save(step, epoch, "temp")
        saver.save_last(Save(step, epoch, reason=reason, kept=True), within)
        self._reporter.deliver()

    def abandon(self) -> None:
        """Write nothing more: the process is about to end, with whatever is durable now."""
        self._saver.abandon()

    def prepare(self) -> None:
        """Make the buffers for snapshots in the background, so that the first is as fast as the
        others; called by `after_step` after a `resume()`."""
        self._own().prepare()

    def _check_save(
        self, step: Any, epoch: Any, kind: str, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Raise `ConfigError` where a save cannot be meant like this. At the first after a resume,
        tell if the loop has seeded what was restored."""
        calls.check_save(step, epoch, kind, metrics)
        restored, self._restored = self._restored, None
        if restored is not None and seeded_anew(restored):
            self._reporter.tell("reseeded")

    def _own(self) -> Saver:
        """The saver, where this process may save. Raises `SaveFailed`."""
        ranks.refuse()
        if sys.is_finalizing():  # most of Python is gone already
            raise SaveFailed(
                "Python is ending: nothing can be saved any more. Save before the end, or in a "
                "function given to atexit.register."
            )
        if self._superseded:
            raise SaveFailed(
                "A newer manager of this process works in {directory}: use that one.",
                directory=self.catalog.directory,
            )
        if not self._lock.held:
            raise SaveFailed(
                "This process does not hold {directory}: the manager was closed, or it belongs "
                "to the parent process.",
                directory=self.catalog.directory,
            )
        return self._saver

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
