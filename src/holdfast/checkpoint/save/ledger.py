"""Account of the saves: their promises, the newest durable step, the best, the failures.

A save that is meant for the disk ends in `over`, once; one for the memory alone does so only where
it was not taken or failed. The promises are those of `PendingSave`; what stages tell:

    told        by the thread            true by then                                 promises kept
    asked       of training              nothing yet: a durable state is wanted
    staged      of training, or staging  the live state may change                    staged
    durable     of the disk              on the disk, named and announced             durable
    over        of the disk, or training read back, or could not be read; or dropped  all
    failed      any of the three         the cause is told; `over` with `SaveFailed`  all

Where there are no other threads, as after `end_threads`, that of training does it all.
Two more things climb back up outside of it: `Save.ready`, by which the disk waits for the copy, and
`Save.released`, by which it and training wait for the snapshot in memory.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
from concurrent.futures import Future, InvalidStateError
from typing import Any

from holdfast.checkpoint.policy import Cost, Watch
from holdfast.checkpoint.records import Save, Saved
from holdfast.checkpoint.rundir import Catalog, Reporter
from holdfast.errors import (
    DamagedCheckpoint,
    DirectoryLost,
    HoldfastError,
    ResourceError,
    SaveFailed,
)

RETRY = "retry"  # the reason of a save that takes the place of one that has failed

# Worth one more try with a new file; a failed fsync is never repeated on the same one, because the
# kernel may have dropped the dirty pages and would report success (FAULTS.md, 7).
_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.EBUSY, errno.ETIMEDOUT}


class Ledger:
    """Keeps the promises of saves. Called by the training thread and by those in the background."""

    def __init__(self, catalog: Catalog, reporter: Reporter, max_unsafe: float = 0.0) -> None:
        self.catalog, self.reporter = catalog, reporter
        self.step, self.at = 0, time.monotonic()  # of the newest durable checkpoint
        self.usual = 0.0  # seconds that the last save took until it was durable
        self.cost: Cost | None = None  # of a save
        self.kept_failed = False  # no kept save has succeeded since one failed
        self.watch = Watch(max_unsafe, self.at)
        self._best: float | None = None  # score, lower is better, of all that is durable
        self._hoped: dict[Save, float] = {}  # scores of what is on its way
        self._asked_at = -math.inf  # when a save for the disk was last asked for

    def resumed(self, step: int, best: float | None) -> None:
        """Note that training goes on from `step`; `best` is the lowest score of the run."""
        self._hoped.clear()
        self._best, self.kept_failed, self._asked_at = best, False, -math.inf
        self.step, self.at = step, time.monotonic()
        self.watch.saved(self.at)

    def asked(self, save: Save, score: float | None) -> None:
        """Note a save that is to become durable."""
        self._asked_at = save.asked
        if score is not None:
            self._hoped[save] = score
        self.watch.asked(save.asked)

    def improves(self, score: float | None) -> bool:
        """Return True if `score` is below all that is durable or on its way there. A save that
        failed does not count: else the next that is better than any file would be passed over."""
        hoped = list(self._hoped.values())
        best = [*hoped, self._best] if self._best is not None else hoped
        return score is not None and all(score < each for each in best)

    def staged(self, save: Save) -> None:
        """Keep the first promise: the live state may change."""
        _fulfil(save.promises.staged, None)

    def durable(self, save: Save, saved: Saved) -> None:
        """Keep the second promise: the save is on the disk under its names."""
        self.step, self.at = saved.entry.step, time.monotonic()
        self.usual = saved.seconds
        # On a second try, after a disk that lied, it has been kept already.
        _fulfil(save.promises.durable, saved)

    def over(self, save: Save, outcome: Saved | SaveFailed | None) -> None:
        """Keep what is left of the promises: saved, failed, or None: dropped for a newer one."""
        promises = save.promises
        if promises.settled.done():
            return
        saved = outcome if isinstance(outcome, Saved) else None
        if saved is not None:
            self._best = saved.entry.loss if saved.is_best else saved.previous_best
        self._hoped.pop(save, None)  # after the best: in between its score would be nowhere
        if save.kind != "temp":
            self.kept_failed = saved is None
        if saved is not None:
            self._succeeded(save, saved)
        _fulfil(promises.staged, None)
        _fulfil(promises.durable, outcome)
        _fulfil(promises.settled, outcome)

    def failed(self, save: Save, error: Exception) -> None:
        """Tell that a save has failed. A retry that fails for the same cause again is no news."""
        why = str(error)
        if not isinstance(error, HoldfastError | OSError):
            why = f"{type(error).__name__}: {error}"
        attempts = 2 if is_transient(error) else 1
        news = self.watch.failed(_cause(error), why, time.monotonic())
        if isinstance(error, DamagedCheckpoint | DirectoryLost):  # announced, and is not there
            run_id = save.manifest["identity"]["run_id"]
            newest = None
            with contextlib.suppress(OSError):  # else nothing is known to be durable
                newest = self.catalog.scan().of(run_id).newest
            self.step = newest.step if newest is not None else 0
        if news or save.reason != RETRY:
            fields = {"step": save.step, "reason": why, "attempts": attempts}
            self.reporter.record("failed", **fields, repeated=not news)
            self.reporter.tell("failed", **fields, repeated=not news, durable=self.step or None)
        failure = SaveFailed("Step {step} could not be saved: {error}", step=save.step, error=why)
        failure.__cause__ = error
        self.over(save, failure)

    def _succeeded(self, save: Save, saved: Saved) -> None:
        lost = save.stall + save.processors / (os.cpu_count() or 1)
        # Half of it is the cost before: one slow save must not put the next one off for long.
        before = lost if self.cost is None else self.cost.training
        self.cost = Cost((before + lost) / 2, saved.seconds, saved.entry.size)
        # By the time, not the step: it may be a later one that took the place of what was asked.
        newer = self._asked_at > save.asked
        failures, seconds = self.watch.saved(time.monotonic(), wanted=newer)
        if failures:
            minutes = round(seconds / 60, 1)
            self.reporter.report("recovered", step=save.step, failures=failures, minutes=minutes)


def is_transient(error: Exception) -> bool:
    """Return True if a new file may succeed where this one has failed: then it is tried, once."""
    if isinstance(error, OSError):
        return error.errno in _TRANSIENT
    return isinstance(error, DamagedCheckpoint)


def _fulfil(promise: Future[Any], outcome: Saved | SaveFailed | None) -> None:
    """Keep a promise that two threads may come to keep: the first of them does."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(outcome, SaveFailed):
            promise.set_exception(outcome)
        else:
            promise.set_result(outcome)


def _cause(error: Exception) -> str:
    """Return the kind of a failure; figures in its words may change from one to the next."""
    if isinstance(error, OSError) and error.errno is not None:
        return errno.errorcode.get(error.errno, str(error.errno))
    return "ENOSPC" if isinstance(error, ResourceError) else type(error).__name__
