"""Protection for `transformers.Trainer` and its kin: Seq2SeqTrainer, TRL's SFTTrainer.

    trainer = Trainer(model=model, args=args, train_dataset=data)
    protect(trainer, "runs/a")
    trainer.train()                     # begins, or goes on from the newest intact state

A callback alone cannot do this. Trainer decides in which epoch it goes on, and at which batch,
before it calls `on_train_begin`; it sets its sums of the losses to zero after it has loaded; and it
calls `on_step_end` before that step is logged and evaluated. So the trainer gets a class of ours in
front of its own: it restores once the optimizer exists, and knows what a step still has to log,
evaluate and save.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import Trainer
from transformers import trainer as hf_trainer

from holdfast import i18n
from holdfast.adapters.data import ResumableLoader
from holdfast.adapters.trainer_state import DUTIES, Progress, Trainable, is_peft
from holdfast.checkpoint import CheckpointManager, Resumed, RiskAware
from holdfast.checkpoint.policy import SavePolicy
from holdfast.errors import ConfigError
from holdfast.protection import tell

__all__ = ["protect"]

_skip = hf_trainer.skip_first_batches


def _go_on(loader: Any, num_batches: int = 0) -> Any:
    """Skip nothing of a loader that goes on at its place: Trainer would build another from its
    parts."""
    return loader if isinstance(loader, ResumableLoader) else _skip(loader, num_batches)


hf_trainer.skip_first_batches = _go_on


def protect(
    trainer: Trainer,
    directory: str | os.PathLike[str],
    *,
    quiet: bool = False,
    save_when: Sequence[SavePolicy] | None = None,
    **objects: Any,
) -> Trainer:
    """Protect what `trainer.train()` does; returns the same trainer.

    Everything that Trainer counts is saved and restored: weights, optimizer, scheduler, scaler,
    random streams, the place in the data, logs, sums of losses, states of callbacks. Of a PEFT
    model only what trains is saved, and the frozen weights are checked for being the same ones.
    `train()` goes on from the newest intact state in `directory` by itself; at SIGINT, SIGTERM,
    SIGHUP or SIGUSR1 it saves the step and ends the process with 128 + n.

    Where `save_strategy` asks for a checkpoint, Trainer writes its folder `checkpoint-N` with the
    weights alone, for `from_pretrained`, and the state of that step is kept here. As many of both
    are kept as `save_total_limit` says.

    Args:
        trainer: made, and not yet trained.
        directory: the run directory, which may be `args.output_dir`.
        quiet: True to say nothing of saves that succeed. Else each is a line on stderr.
        save_when: policies for saving in between; None: by risk, so that saving costs at most 1 %.
        objects: whatever else must be saved, such as an average of the weights: objects with
            `state_dict` and `load_state_dict`, under names of yours.

    Raises:
        ConfigError: an argument of `trainer` stands against an exact resume.
    """
    i18n.follow_environment()
    _check(trainer, objects)
    trainer.args.save_only_model = True
    policies = [RiskAware()] if save_when is None else save_when
    trainer._holdfast = _Protection(trainer, directory, policies, objects, quiet=quiet)
    kind = type(trainer)
    trainer.__class__ = type(kind.__name__, (_Protected, kind), {"__module__": kind.__module__})
    return trainer


def _check(trainer: Any, objects: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where a resume could not be exact, or would be made by another."""
    if not isinstance(trainer, Trainer) or isinstance(trainer, _Protected):
        raise ConfigError(
            "protect() takes a transformers.Trainer that is not protected yet; this is a {kind}.",
            kind=type(trainer).__name__,
        )
    if not hasattr(Trainer, "_run_epoch"):
        raise ConfigError("transformers is too old to be protected: install 5.23 or newer.")
    args = trainer.args
    if args.enable_jit_checkpoint:
        raise ConfigError(
            "enable_jit_checkpoint=True: leave it out. At SIGTERM, the protected trainer saves the "
            "step that it is at, and ends."
        )
    if args.ignore_data_skip:
        raise ConfigError(
            "ignore_data_skip=True: leave it out. No batch is loaded to be skipped, and none is "
            "trained on twice."
        )
    if args.auto_find_batch_size:
        raise ConfigError(
            "auto_find_batch_size=True: a resume would not find the same batches. Set "
            "per_device_train_batch_size to what fits."
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ConfigError("Trainer with DeepSpeed or FSDP cannot be protected yet.")
    taken = sorted({"model", "optimizer", "scheduler", "scaler", "trainer", "data"} & {*objects})
    if taken:
        raise ConfigError("The name {name} is taken by a part of the trainer.", name=taken[0])


class _Protected(Trainer):  # type: ignore[misc]
    """The class in front of the trainer's own. What is private here is private in Trainer."""

    _holdfast: _Protection
    control: Any

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        if trial is not None:
            raise ConfigError("hyperparameter_search() makes many trainings of one: not protected.")
        self._holdfast.named = resume_from_checkpoint or None
        self._holdfast.ignored = ignore_keys_for_eval
        return super().train(ignore_keys_for_eval=ignore_keys_for_eval)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as self._holdfast.stack:
            return super()._inner_training_loop(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        self.accelerator.prepare = _as_it_is  # the loader of Accelerate has no place to go on from
        try:
            loader = super().get_train_dataloader()
        finally:
            del self.accelerator.prepare
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._holdfast.loader = ResumableLoader(loader, seed=seed)
        return self._holdfast.loader

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        protection = self._holdfast
        super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, None, trial
        )
        # Where training goes on is decided here, and restoring needs the optimizer.
        protection.prepared = super()._prepare_for_training(max_steps, protection.loader, None)
        return protection.open(num_train_epochs)

    def _prepare_for_training(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._holdfast.prepared

    def _run_epoch(self, **words: Any) -> None:
        protection, epoch = self._holdfast, words["epoch"]
        words["start_time"] -= protection.progress.before
        goes_on = epoch == words["epochs_trained"] and words["steps_trained_in_current_epoch"] > 0
        caught_up = self._catch_up(words["trial"], words["start_time"])
        if caught_up and self.control.should_training_stop and not goes_on:
            return  # the end of the epoch before it was all that was left to do
        if not goes_on or not (protection.progress.epoch_over or self.control.should_training_stop):
            words["resume_from_checkpoint"] = "holdfast" if goes_on else None
            super()._run_epoch(**words)
            return
        # Only the end of this epoch is left to do: Trainer's loop would train one step more.
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        self._do_duties(words["trial"], words["start_time"])

    def _catch_up(self, trial: Any, start_time: float) -> bool:
        """Do, once, what was still to be done after the step that was restored. Returns False
        where that is nothing."""
        duties = self._holdfast.begin()
        vars(self.control).update(duties)
        if any(duties.values()):
            self._do_duties(trial, start_time)
        return any(duties.values())

    def _do_duties(self, trial: Any, start_time: float) -> None:
        protection = self._holdfast
        norm, rate = protection.progress.last
        self._maybe_log_save_evaluate(
            self._tr_loss,
            norm,
            self.model_wrapped,
            trial,
            protection.progress.epoch,
            protection.ignored,
            start_time,
            learning_rate=rate,
        )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Do nothing: the streams were restored before the first batch, and that draws none."""

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        if skip_scheduler and self.state.global_step:  # `eval_on_start`, and this is no start
            return {}
        metrics: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        self._holdfast.metrics = metrics
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._holdfast.asked = True

    def _maybe_log_save_evaluate(  # noqa: PLR0917 - Trainer's own
        self,
        tr_loss: Any,
        grad_norm: Any,
        model: Any,
        trial: Any,
        epoch: int,
        ignore_keys_for_eval: Any,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        # A kill or a signal from here on, in a long evaluation, costs no step: that is saved first.
        elapsed = time.time() - start_time
        owed = self._holdfast.step_done(epoch, elapsed, (grad_norm, learning_rate))
        super()._maybe_log_save_evaluate(
            tr_loss,
            grad_norm,
            model,
            trial,
            epoch,
            ignore_keys_for_eval,
            start_time,
            learning_rate=learning_rate,
        )
        if owed:
            self._holdfast.duties_done()

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        start_time -= self._holdfast.progress.before
        self._catch_up(trial, start_time)
        # The best weights may take the place of the last ones now: the last ones are saved first.
        self._holdfast.stack.close()
        return super()._finalize_training(trial, num_train_samples, start_time)


class _Protection:
    """The manager of one trainer, and where that trainer is."""

    stack: contextlib.ExitStack
    manager: CheckpointManager
    loader: ResumableLoader
    progress: Progress
    prepared: Any  # by `_prepare_for_training`
    named: str | Literal[True] | None  # the checkpoint that train() was told to go on from
    ignored: list[str] | None  # what train() was told to leave out of evaluations
    metrics: dict[str, float] | None  # of an evaluation after this step
    asked: bool  # True if Trainer has written its folder after this step

    def __init__(
        self,
        trainer: Trainer,
        directory: str | os.PathLike[str],
        save_when: Sequence[SavePolicy],
        objects: Mapping[str, Any],
        *,
        quiet: bool,
    ) -> None:
        self._trainer, self._directory, self._quiet = trainer, directory, quiet
        self._save_when, self._objects = save_when, objects
        self._told = 0  # the step that was told to the manager last
        self._resumed: Resumed | None = None  # until training has begun

    def open(self, num_train_epochs: int) -> tuple[int, int]:
        """Restore the newest state; returns the epoch to go on in, and how many of its batches are
        trained on already."""
        trainer, args = self._trainer, self._trainer.args
        self.progress = Progress(trainer, self.loader)
        state: dict[str, Any] = {
            "model": Trainable(trainer.model) if is_peft(trainer.model) else trainer.model,
            "optimizer": trainer.optimizer,
            "scheduler": trainer.lr_scheduler,
            "trainer": self.progress,
            **self._objects,
        }
        if getattr(trainer.accelerator, "scaler", None) is not None:
            state["scaler"] = trainer.accelerator.scaler
        metric = args.metric_for_best_model or "loss"
        self.manager = self.stack.enter_context(
            CheckpointManager(
                self._directory,
                state,
                keep_last=args.save_total_limit or 0,
                save_when=self._save_when,
                metric=metric if metric.startswith("eval_") else f"eval_{metric}",
                lower_is_better=not args.greater_is_better,
                memory_every="auto",
                on_event=None if self._quiet else tell,
            )
        )
        self._resumed = self._resume()
        # The step that is told twice is the last of its epoch: the second time, for its end.
        again = any(self.progress.owed.values()) and not self.progress.ended
        self._told = trainer.state.global_step - again
        return (0, 0) if self._resumed is None else self.progress.place(num_train_epochs)

    def _resume(self) -> Resumed | None:
        """Restore what `train(resume_from_checkpoint=...)` means here.

        A folder `checkpoint-N` of Trainer's own has weights alone: where it is named, as scripts do
        that look for the last one, the newest state is meant.
        """
        source = None if self.named is True else self.named
        folder = source is not None and (Path(source) / "trainer_state.json").is_file()
        resumed = self.manager.resume(None if folder else source)
        if resumed is None and folder:
            raise ConfigError(
                "{path} has weights alone, and {directory} has no state to go on from. To begin "
                "with these weights, load them by from_pretrained and call train() without "
                "resume_from_checkpoint.",
                path=source,
                directory=self._directory,
            )
        return resumed

    def begin(self) -> Mapping[str, bool]:
        """Put back, once, what Trainer sets to zero before its first step, and what callbacks have
        drawn from the random streams meanwhile. Returns the duties of the step that was restored.
        """
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            return {}
        self.progress.begin()
        resumed.restore_rng()
        return self.progress.owed

    def step_done(self, epoch: int, elapsed: float, last: tuple[Any, Any]) -> bool:
        """Tell that a step, or the end of an epoch, is done, but for its duties; returns True if it
        has any."""
        step, control = self._trainer.state.global_step, self._trainer.control
        self.progress.ended, self._told = step == self._told, step
        self.progress.epoch, self.progress.elapsed, self.progress.last = epoch, elapsed, last
        self.progress.freeze({name: getattr(control, name) for name in DUTIES})
        self.asked, self.metrics = False, None
        self.manager.after_step(step, epoch=epoch + 1)
        return any(self.progress.owed.values())

    def duties_done(self) -> None:
        """Save what the step comes to with its duties, if Trainer has saved."""
        self.progress.freeze({})
        if self.asked:
            better = self.metrics is not None and self.manager.improves(self.metrics)
            self.manager.save_async(
                step=self._told,
                epoch=self.progress.epoch + 1,
                metrics=self.metrics,
                kind="epoch" if self.progress.ended else "best" if better else "step",
                reason="scheduled",
            )


def _as_it_is(value: Any) -> Any:
    return value
