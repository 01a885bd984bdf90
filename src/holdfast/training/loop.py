"""The training loop. Read `train` and what it calls, from top to bottom.

A step, then its duties: evaluate, save, tell. Saving happens between two steps only, so that the
gradients of a step are never cut in two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from holdfast.errors import Diverged, Interrupted, SaveFailed
from holdfast.i18n import _
from holdfast.training import ending
from holdfast.training.trainer import Trainer


def train(trainer: Trainer) -> None:
    """Train until the plan is fulfilled; every other end is an exception."""
    trainer.model.train()
    trainer.console.start_bar()
    try:
        while not trainer.finished:
            try:
                go_on(trainer)
            except Diverged as error:
                ending.recover(trainer, error)
        _check_end_is_durable(trainer)
    except (Interrupted, Diverged, SaveFailed):  # what could be saved is saved
        raise
    except Exception:  # of any kind: the newest state that can be trusted is kept first
        ending.keep(trainer)
        raise
    finally:
        trainer.console.stop_bar()


def go_on(trainer: Trainer) -> None:
    """Do one step and then its duties, or only the duties that the last start left owed."""
    progress = trainer.progress
    if not progress.owed:
        if [progress.epoch, progress.position] in progress.left_out:
            ending.leave_out(trainer)
        else:
            trainer.one_step()
    after_step(trainer)
    if trainer.guard.requested is not None:
        ending.stop(trainer, trainer.guard.requested)
    _stop_if_unsafe(trainer)


def after_step(trainer: Trainer) -> None:
    """Do the duties of the last step: evaluate, save, tell; at most one checkpoint.

    First what takes time and changes nothing. A signal that comes meanwhile leaves all duties
    owed, and the next start does them. After that everything is done, whatever comes: half a
    duty would be done twice, or never.
    """
    progress, plan = trainer.progress, trainer.plan
    ends_epoch = plan.epochs is not None and progress.position == plan.steps_per_epoch
    ends_run = plan.epochs is None and progress.step >= plan.total_steps
    metrics: dict[str, float] = {}
    if ends_epoch or ends_run or _every(_evaluation_interval(trainer), progress.step):
        metrics = trainer.evaluate()
    gives_up = bool(metrics) and trainer.stale_after(metrics) >= trainer.patience
    ends_run = ends_run or (gives_up and not ends_epoch)
    text = trainer.sample() if ends_epoch or ends_run else None
    if trainer.guard.requested:
        return
    if ends_epoch:
        _end_epoch(trainer, metrics, text)
    elif ends_run:
        _end_run(trainer, metrics, text)
    else:
        _go_past(trainer, metrics)
    if metrics or ends_epoch or ends_run or not trainer.manager.copying:
        trainer.tell()
    if ends_epoch:
        trainer.console.say(_("💾 Saving the checkpoint..."))


def _end_epoch(trainer: Trainer, metrics: dict[str, float], text: str | None) -> None:
    """Do the history and the checkpoint of an epoch, after its evaluation."""
    progress = trainer.progress
    epoch, mean = progress.epoch, progress.loss_sum / max(1, progress.position)
    metrics = {"train_loss": mean, **metrics}
    with _settling(trainer):
        improved = _judge(trainer, metrics)
        _remember(trainer, epoch, metrics, text)
    kind = "best" if improved else "temp"
    if trainer.config.checkpoint.save_every_epoch:
        kind = "epoch"
    trainer.save(kind, metrics, reason="epoch", epoch=epoch)


def _end_run(trainer: Trainer, metrics: dict[str, float], text: str | None) -> None:
    """Do the history and the last checkpoint of a run that does not end with an epoch's."""
    epoch, metrics = trainer.progress.epoch, {"train_loss": trainer.progress.smoothed, **metrics}
    with _settling(trainer):
        _judge(trainer, metrics)
        _remember(trainer, epoch, metrics, text)
    trainer.save("step", metrics, reason="end", epoch=epoch)


def _go_past(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Do the duties of a step that ends nothing."""
    progress, manager = trainer.progress, trainer.manager
    epoch = progress.epoch
    with _settling(trainer):
        improved = _judge(trainer, metrics)
    if _every(trainer.config.checkpoint.save_every, progress.step):
        trainer.save("step", metrics, reason="save_every", epoch=epoch)
    elif improved:
        trainer.save("best", metrics, reason="best", epoch=epoch)
    elif metrics and manager.saved_step == progress.step:
        # What is durable of this step still owes them: they would be done a second time.
        trainer.save("temp", metrics, reason="scheduled", epoch=epoch)
    # A loss that is high may turn out to be one to go back behind: nothing rolls on meanwhile.
    if not trainer.guard.requested and not trainer.watch.suspects:
        manager.after_step(progress.step, epoch=epoch)


@contextlib.contextmanager
def _settling(trainer: Trainer) -> Iterator[None]:
    """Surround the changes that duties make to the state: no save may have half of them."""
    progress = trainer.progress
    trainer.whole = False
    yield
    if progress.position == trainer.plan.steps_per_epoch:
        progress.begin_epoch()
    progress.owed = False
    trainer.whole = True


def _judge(trainer: Trainer, metrics: dict[str, float]) -> bool:
    """Keep the best loss and count evaluations without a better one.

    Return True if no file has a better one: the save of the best loss may have failed.
    """
    if "val_loss" not in metrics:
        return False
    state, progress = trainer.state, trainer.progress
    state["val_loss"] = metrics["val_loss"]
    progress.stale = trainer.stale_after(metrics)
    if progress.stale == 0:
        state["best_loss"] = metrics["val_loss"]
    if progress.stale >= trainer.patience:
        progress.stopped_early = True
    trainer.note("evaluation", **metrics)
    return trainer.manager.improves(metrics)


def _remember(trainer: Trainer, epoch: int, metrics: dict[str, float], text: str | None) -> None:
    """Add an epoch to the history, and have it told."""
    history = trainer.state["history"]
    history["train_loss"].append(metrics["train_loss"])
    history["val_loss"].append(metrics.get("val_loss"))
    history["epochs"].append(epoch)
    trainer.state["train_loss"] = metrics["train_loss"]
    trainer.note("epoch", epoch=epoch, **metrics)
    if text is not None:
        trainer.note("sample", epoch=epoch, text=text)


def _check_end_is_durable(trainer: Trainer) -> None:
    """Raise SaveFailed if the last step could not be saved: such a training is not finished."""
    manager, step = trainer.manager, trainer.progress.step
    manager.wait()
    if manager.saved_step >= step:
        return
    message = _(
        "Training has reached step {step}, but the last durable step is {durable}. Mend "
        "what kept it from being saved (see above) and run the same command again: it "
        "repeats the steps between.",
        step=step,
        durable=manager.saved_step,
    )
    raise SaveFailed(message)


def _stop_if_unsafe(trainer: Trainer) -> None:
    """With `--on-unsafe stop`, try one more save in an alarm; raise SaveFailed if it fails too."""
    manager, step = trainer.manager, trainer.progress.step
    if trainer.config.checkpoint.on_unsafe != "stop" or not manager.unsafe:
        return
    trainer.save("temp", {}, reason="unsafe")
    manager.wait()
    if manager.saved_step >= step:
        return
    message = _(
        "Stopped at step {step}, because nothing could be saved any more; the last "
        "durable step is {durable}. Mend what keeps it from being saved (see above) and "
        "run the same command again: it repeats the steps between.",
        step=step,
        durable=manager.saved_step,
    )
    raise SaveFailed(message)


def _evaluation_interval(trainer: Trainer) -> int | None:
    """Steps between two evaluations. Runs by steps have no epochs: they do it where they save."""
    training = trainer.config.training
    if training.eval_every is None and trainer.plan.epochs is None:
        return trainer.config.checkpoint.save_every
    return training.eval_every


def _every(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0
