"""`protect`: the whole of a training loop's protection in one object, without a `with` block."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - registered before us: it closes its pools later
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from holdfast import i18n
from holdfast.checkpoint import CheckpointManager, Resumed, RiskAware, Saved
from holdfast.checkpoint.policy import SavePolicy
from holdfast.checkpoint.rundir import words
from holdfast.checkpoint.state import gradients
from holdfast.checkpoint.system import signals
from holdfast.errors import ConfigError, StateMismatch
from holdfast.formatting import format_bytes, format_seconds
from holdfast.i18n import _
from holdfast.protection import accelerated, outside, plain

log = logging.getLogger("holdfast")

# Keys of a checkpoint: the values that the loop rebinds, and the objects of `also`.
_LOOP, _ALSO = "loop", "also"
_MOST_NAMES = 8  # in one line


def protect(
    directory: str | os.PathLike[str],
    *,
    also: Sequence[Any] = (),
    grads: bool = False,
    quiet: bool = False,
    accelerator: Any = None,
    save_when: Sequence[SavePolicy] | None = None,
    keep_last: int = 3,
    metric: str = "val_loss",
    lower_is_better: bool = True,
    memory_every: int | Literal["auto"] = "auto",
    **objects: Any,
) -> Protected:
    """Protect the training of `objects` in `directory`, until the process ends.

        run = holdfast.protect("runs/a", model=model, optimizer=optimizer, scaler=scaler)
        step, best, X, Y = run.resume(step, best, X, Y)     # what the loop rebinds
        while True:
            ...train...
            step += 1
            run.step(step, best, X, Y)

    A checkpoint is a place in the loop: the one after `run.step`, or after `run.end_epoch`. What
    the loop does from there to the next one is done again after a resume, with the same random
    draws. Call `protect` and `resume` once, when everything is made and before the first step.

    Args:
        directory: the run directory; created, and locked until the process ends.
        also: objects of any class that hold what no `state_dict` has: momenta in a dataclass, a
            clock, modules with tensors in plain attributes. All that a checkpoint can hold of them
            is saved, and restored in place.
        grads: whether gradients are saved that an optimizer has used already, for loops that go on
            adding to them. Those that no optimizer has used yet are saved in any case.
        quiet: True to say nothing of saves that succeed. Else each is a line on stderr.
        accelerator: an `Accelerator`, after its `prepare`: what that has prepared and registered is
            saved, under plain names (`model`, `optimizer`, `scheduler`, `loader`, `registered`; the
            second of a kind as `model_1`). Its `save_state` and `load_state` are not needed.
        save_when: policies; `RiskAware()` if not given: as often as costs 1 % of the time.
        keep_last, metric, lower_is_better, memory_every: as for `CheckpointManager`.
        objects: what has a `state_dict`, tensors, and containers of them, each with the name that
            it is to have in the checkpoint. None stands for what there is not.

    Raises: as `CheckpointManager`. ConfigError: a name is taken by the engine.
    """
    i18n.follow_environment()
    for name in (_LOOP, _ALSO, "epoch", "global_step"):
        if name in objects:
            raise ConfigError(
                "{name} is a name of a checkpoint's own: call that object otherwise.", name=name
            )
    if not isinstance(also, list | tuple):
        raise ConfigError("also is a list of objects, such as {example}.", example="also=[momenta]")
    if accelerator is not None:
        objects = {**accelerated.parts_of(accelerator), **objects}
    loop = _Loop()
    state = {**objects, _LOOP: loop}
    if also:
        state[_ALSO] = outside.Objects(also, objects)
    manager = CheckpointManager(
        directory,
        state,
        keep_last=keep_last,
        save_when=[RiskAware()] if save_when is None else save_when,
        metric=metric,
        lower_is_better=lower_is_better,
        memory_every=memory_every,
        grads=grads,
        on_event=None if quiet else tell,
    )
    run = Protected(manager, loop, grads=grads)
    _watch(run)
    return run


class _Loop:
    """The values that the loop rebinds, as a part of the state."""

    def __init__(self) -> None:
        self.values: tuple[Any, ...] = ()
        self._encode, self._decode = plain.Encoder(), plain.Decoder(in_place=False)
        self.epoch = 0  # epochs that were ended

    def state_dict(self) -> dict[str, Any]:
        values = [self._encode(value, f"{_LOOP}/{i}") for i, value in enumerate(self.values)]
        return {"values": values, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        values, given = state["values"], self.values
        if given and len(values) != len(given):
            raise StateMismatch(
                "resume was given {given} values, and {saved} were saved",
                given=len(given),
                saved=len(values),
            )
        self.values = tuple(self._decode(list(values), list(given)))
        self.epoch = state["epoch"]


class Protected:
    """A training that is protected; made by `protect`."""

    def __init__(self, manager: CheckpointManager, loop: _Loop, *, grads: bool) -> None:
        self.manager = manager
        self._grads = grads
        self.resumed: Resumed | None = None  # what training goes on from; None: from the beginning
        self._loop = loop
        self._given = -1  # how many values `resume` was given; -1 before it
        self._step = 0
        self._outside: outside.Watch | None = None
        self._used: gradients.Used | None = None  # a gradient at the first save, an optimizer's
        self._looked = False  # True once that was looked for
        self._thread, self._pid = threading.current_thread(), os.getpid()

    @property
    def epoch(self) -> int:
        """The number of epochs that `end_epoch` has ended, in this run: where to go on."""
        return self._loop.epoch

    def resume(self, *values: Any, source: str | os.PathLike[str] | None = None) -> Any:
        """Restore the newest intact checkpoint here into the objects; return the loop's values.

        Args:
            values: what the loop rebinds, as a new run begins with it; its number of steps first:
                what the next `step` will be given, less one step. Kept by value and type: tensors
                of any shape and device, NumPy arrays, numbers, text, None, and containers, named
                tuples and dataclasses of them.
            source: a file, a glob or a directory to go on from; None for the newest here.

        Returns the values of the checkpoint, or `values` where nothing was saved yet: a tuple, or
        the one value where there is one.

        Raises: as `CheckpointManager.resume`. UnsupportedValue: a value cannot be saved.
        """
        self._loop.values = values
        self._loop.state_dict()  # a value that cannot be saved is said now
        self._given = len(values)
        if values and isinstance(values[0], int):
            self._step = values[0]
        self.resumed = self.manager.resume(source)
        if self.resumed is not None:
            self._step = self.resumed.step
        self._outside = outside.Watch(self.manager.state)
        self.manager.guard()
        values = self._loop.values
        return values[0] if len(values) == 1 else values

    def step(self, step: int, *values: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Say that optimizer step `step` is done: saves by policy, and keeps a snapshot in memory.

        At a signal this step is saved and the process ends with 128 + its number.

        Args:
            step: counts the optimizer's steps over all epochs; greater than the one before.
            values: the others of those that `resume` was given, as they are now.
            metrics: of this step, where there are any; the best is kept.

        Raises ConfigError: the step does not rise, or the values are not as many as before.
        """
        self._check(step, values)
        self._step = step
        self._loop.values = (step, *values)
        self._look_for_used()
        try:
            if self.manager.after_step(step, epoch=self._epoch_now, metrics=metrics) is not None:
                self._look_outside()
        except signals.Stopped as error:
            self.manager.end(error)
            raise

    def end_epoch(self, *values: Any, **metrics: float) -> None:
        """Say that an epoch is over, with what was measured: `run.end_epoch(val_loss=2.1)`.

        The state is saved as it is now, under the epoch's name, and as the best if it is. A resume
        from it goes on with the next epoch: `for epoch in range(run.epoch, epochs)`.

        Args:
            values: as `step` takes them, as the next epoch is to find them; needed where the loop
                has any beside the step.
            metrics: numbers by name.

        Raises ConfigError: as `step`, and before the first step.
        """
        self._check(None, values)
        if values:
            self._loop.values = (self._step, *values)
        self._loop.epoch += 1
        self.manager.end_epoch(self._loop.epoch, step=self._step, metrics=metrics)
        self._look_outside()

    def save(self, **metrics: float) -> Saved | None:
        """Make the state durable now, as that of the step that was told last.

        Returns when it is, with what it is called; None where it failed, which is told.

        Raises ConfigError before the first step, and where an optimizer has begun another one.
        """
        self._look_outside()
        return self.manager.save_told(metrics=metrics)

    def close(self, error: BaseException | None = None) -> None:
        """Save the last step and give the directory back, before the process ends: where several
        trainings follow one another in it. `error` is what has ended this one, if anything."""
        if self in _open:
            _open.remove(self)
        if os.getpid() == self._pid:
            self._look_outside()
            self.manager.end(error)

    def finish(self, error: BaseException | None) -> None:
        """Close, as the process ends, perhaps by `error`. A forked child has nothing to end."""
        if os.getpid() != self._pid:
            return
        if self._thread is not threading.current_thread() and not self._thread.daemon:
            self._thread.join()  # it trains on, though the main thread is done
        self.close(error)

    def _look_outside(self) -> None:
        """Name, once each, the tensors that training changes and no checkpoint has."""
        names = self._outside.look() if self._outside is not None else []
        if names:
            more = _(" … and {count} more", count=len(names) - _MOST_NAMES)
            log.warning(
                _(
                    "{directory}: training changes these tensors, which no state_dict has; a "
                    "resume would not restore them: {names}. Give what holds them to "
                    "protect(also=[...]), or register them as buffers.",
                    directory=self.manager.catalog.directory,
                    names=", ".join(names[:_MOST_NAMES]) + (more if names[_MOST_NAMES:] else ""),
                )
            )

    def _look_for_used(self) -> None:
        """Say once that gradients stay, which an optimizer has used and no checkpoint has."""
        if self._grads or (self._looked and self._used is None):
            return
        if not self._looked:
            self._looked, self._used = True, gradients.first_used(self.manager.state)
            return
        assert self._used is not None
        used, self._used = self._used, None
        if used.stays:
            log.warning(
                _(
                    "{directory}: the gradient of {name} is still there a step after an optimizer "
                    "has used it. Where the loop adds to it, without setting it to zero, use "
                    "protect(..., grads=True): else a resume begins without it.",
                    directory=self.manager.catalog.directory,
                    name=used.name,
                )
            )

    @property
    def _epoch_now(self) -> int | None:
        """The epoch that the loop is in, from 1; None while none was ended: it may count none."""
        return self._loop.epoch + 1 if self._loop.epoch else None

    def _check(self, step: Any, values: Sequence[Any]) -> None:
        if self._given < 0:
            raise ConfigError(
                "Call run.resume(...) before the first run.step(...), with the same values: else a "
                "restart would begin anew."
            )
        if 1 + len(values) != max(1, self._given):
            raise ConfigError(
                "run.resume was given {given} values and now there are {now}: give all that the "
                "loop rebinds, the step first, to both.",
                given=self._given,
                now=1 + len(values),
            )
        if step is not None and not step > self._step:
            raise ConfigError(
                "run.step({step}) comes after step {before}: count the optimizer's steps over all "
                "epochs and restarts, and give the number of those that are done.",
                step=step,
                before=self._step,
            )


_open: list[Protected] = []  # those to end with the process; kept alive by this, until then
_registered = False


def _watch(run: Protected) -> None:
    """Have `run` end with the process: while threads can still be used."""
    global _registered
    _open[:] = [other for other in _open if not other.manager.closed]
    _open.append(run)
    if not _registered:
        _registered = True
        register: Callable[[Callable[[], None]], Any]
        # atexit is late, when thread pools are closed. Python has no public name for this one.
        register = getattr(threading, "_register_atexit", atexit.register)
        try:
            register(_finish)
        except RuntimeError:  # the main thread has ended already, and this one trains on
            atexit.register(_finish)


def _finish() -> None:
    """End every training of this process with it, the last one first; in the main thread."""
    error = None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)
    for run in reversed(_open[:]):
        try:
            run.finish(error)
        except (Exception, SystemExit):  # the others are to be ended all the same
            log.exception("%s", run.manager.catalog.directory)


def tell(event: str, fields: dict[str, Any]) -> None:
    """Say on stderr what the manager has done: a line for each save, and all that went wrong."""
    if event == "durable":
        saved: Saved = fields["saved"]
        line = _(
            "💾 step {step} is durable: {name} ({size}, {seconds})",
            step=saved.entry.step,
            name=next(iter(saved.names)),
            size=format_bytes(saved.entry.size),
            seconds=format_seconds(saved.seconds),
        )
    elif event == "resumed":
        resumed: Resumed = fields["resumed"]
        line = _(
            "▶️  Going on from {name} (step {step}).", name=resumed.path.name, step=resumed.step
        )
    else:
        line = words.sentence(event, fields) or ""
    if line:
        print(line, file=sys.stderr, flush=True)
