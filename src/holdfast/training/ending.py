"""Ends that were not planned: a signal, an error, a loss that cannot be learned from.

Whatever the end, the newest state that can be trusted is durable afterwards, and the last line says
how to go on. A loss gone wrong need not be an end: training goes back and leaves that data out.
"""

from __future__ import annotations

import math
import time

from holdfast.errors import Diverged, Interrupted
from holdfast.i18n import _
from holdfast.training.health import Place
from holdfast.training.trainer import Trainer

MOST_ROLLBACKS = 3  # to one and the same checkpoint


def stop(trainer: Trainer, number: int) -> None:
    """After signal `number`, between two steps: make this step durable and leave.

    With `--grace` no more is begun than there is time for. Raises Interrupted.
    """
    manager, step = trainer.manager, trainer.progress.step
    grace = trainer.config.checkpoint.grace
    gone = time.monotonic() - trainer.guard.requested_at
    manager.save_last(
        step=step,
        epoch=trainer.progress.epoch,
        reason="signal",
        within=grace - gone if grace else math.inf,
    )
    trainer.tell()
    raise Interrupted(
        "Stopped at step {step}; step {durable} is durable. The same command goes on from there.",
        number,
        step=step,
        durable=manager.saved_step,
    )


def keep(trainer: Trainer) -> None:
    """After an error: make durable what can be trusted, and say how to go on. Raises nothing: the
    error itself is what ends the training.

    Between two steps that is the live state; within one, or where that cannot be saved any more (a
    GPU that has failed), the newest snapshot in memory.
    """
    manager, step, problem = trainer.manager, trainer.progress.step, ""
    try:
        manager.wait()
        if trainer.whole and manager.saved_step < step:
            manager.save_last(step=step, epoch=trainer.progress.epoch, reason="error")
        if manager.saved_step < step:
            manager.save_snapshot()
        if manager.saved_step == step:
            trainer.tell()
    except Exception as error:  # noqa: BLE001 - the one that ends the training is to be seen
        problem = str(error) or type(error).__name__
    durable = manager.saved_step
    if problem:
        trainer.console.warn(
            _("After the error the state could not be saved any more: {error}", error=problem)
        )
    if durable:
        text = _(
            "An error has ended training after step {step}; step {durable} is durable. The same "
            "command goes on from there.",
            step=step,
            durable=durable,
        )
        trainer.console.warn(text)
    else:
        trainer.console.warn(
            _("An error has ended training after step {step}; nothing is durable.", step=step)
        )


def recover(trainer: Trainer, error: Diverged) -> None:
    """After a step whose loss cannot be used, and which has not changed the weights: go back to the
    newest checkpoint before it and leave its data out, or stop, as `--on-nan` says.

    Raises Diverged where it says stop, where there is nothing to go back to, and where going back
    has not helped `MOST_ROLLBACKS` times in a row.
    """
    places = list(trainer.watch.suspects)
    first = trainer.progress.step + 2 - len(places)  # of the steps that are not to be trusted
    manager, step = trainer.manager, trainer.progress.step + 1
    manager.save_snapshot()  # what is in memory is from before `first`, and nearer
    if trainer.config.training.on_nan == "stop":
        message = _(
            "{problem} Training has stopped there; step {durable} is durable. Lower "
            "--learning-rate or look at the data; with --on-nan rollback training leaves this "
            "step's data out and goes on.",
            problem=error,
            durable=manager.saved_step,
        )
        raise Diverged(message) from error
    resumed = manager.go_back(first, str(error))
    if resumed is None:
        message = _(
            "{problem} There is no checkpoint from before it to go back to. Lower "
            "--learning-rate or look at the data.",
            problem=error,
        )
        raise Diverged(message) from error
    _settle(trainer, places)
    if trainer.setbacks.to[resumed.step] > MOST_ROLLBACKS:
        message = _(
            "{problem} Going back to step {back} has been tried {count} times and has not "
            "helped. Lower --learning-rate or look at the data.",
            problem=error,
            back=resumed.step,
            count=MOST_ROLLBACKS,
        )
        raise Diverged(message) from error
    trainer.records.event("diverged", step, back_to=resumed.step)
    text = _(
        "{problem} Going back to step {back}; steps whose data is left out: {count}.",
        problem=error,
        back=resumed.step,
        count=len(places),
    )
    trainer.console.warn(text)


def _settle(trainer: Trainer, places: list[Place]) -> None:
    """After a roll-back: fit the restored state, and have the data of `places` left out."""
    for note in trainer.settle(trainer.state["data"]):
        trainer.console.warn(note)
    progress, setbacks = trainer.progress, trainer.setbacks
    setbacks.to[progress.step] += 1
    setbacks.places += [list(place) for place in places]
    here = [progress.epoch, progress.position]
    ahead = [place for place in setbacks.places if place >= here]
    progress.left_out += [place for place in ahead if place not in progress.left_out]
    trainer.watch.suspects.clear()
    trainer.untold = trainer.records.missing(progress.step, progress.lines)
    trainer.whole = True


def leave_out(trainer: Trainer) -> None:
    """A step without an update, in place of one whose data made the loss unusable: all that counts
    steps goes on as if there had been one, with the mean loss of the epoch."""
    progress = trainer.progress
    trainer.tell()
    trainer.whole = False
    progress.left_out.remove([progress.epoch, progress.position])
    progress.loss_sum += progress.loss_sum / max(1, progress.position)
    trainer.scheduler.step()
    progress.count_step()
    trainer.note("left_out")
    trainer.whole = True
