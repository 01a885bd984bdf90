"""A model in training: one step, one evaluation, and the state that a checkpoint holds of it.

Everything the loop needs to go on bit-exactly lies in `Trainer.state`, the mapping that the
checkpoint manager saves and restores. Saving happens between two steps only, so that the gradients
of a step are never cut in two.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from holdfast.checkpoint import CheckpointManager
from holdfast.checkpoint.system import SignalGuard
from holdfast.errors import Diverged
from holdfast.i18n import _
from holdfast.training import telling
from holdfast.training.console import Console
from holdfast.training.health import LossWatch, Setbacks
from holdfast.training.inference import sample_text
from holdfast.training.models import next_token_loss, parameter_groups, plain_config
from holdfast.training.options.config import Config
from holdfast.training.plan import Plan, Progress, learning_rate_factor
from holdfast.training.records import Records
from holdfast.training.text.batches import (
    EVALUATION_ROWS,
    IGNORED,
    Batches,
    bits_per_byte,
    validation_batches,
)
from holdfast.training.text.prepare import PreparedData

SMOOTHING = 0.95  # of the running loss that the bar shows


class Trainer:
    """Trains `model` on `data` as `config` says.

    Call `bind` with a checkpoint manager made over `state`, then `loop.train`.
    """

    def __init__(
        self,
        config: Config,
        model: Any,
        data: PreparedData,
        *,
        device: torch.device,
        precision: torch.dtype,
        context_length: int,
        guard: SignalGuard,
        console: Console,
    ) -> None:
        self.config, self.model, self.data = config, model, data
        self.device, self.precision = device, precision
        self.context_length = context_length
        self.guard, self.console = guard, console
        training = config.training
        self.batches = Batches(
            data.train,
            context_length=context_length,
            batch_size=training.batch_size,
            seed=training.seed,
        )
        self.plan = Plan.of(config, self.batches)
        self.progress = Progress()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, training.weight_decay),
            lr=training.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self._warmup = 0
        self.scheduler = LambdaLR(self.optimizer, self._factor)
        self._settle_schedule()
        # fp16 would need a loss scaler here; bf16 and fp32 have the range to do without.
        self.state: dict[str, Any] = {
            "model": model,
            "model_config": plain_config(model),
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": None,
            "data": self._data_identity(),
            "progress": self.progress,
            "best_loss": None,
            "train_loss": None,
            "val_loss": None,
            "history": {"train_loss": [], "val_loss": [], "epochs": []},
            "tokenizer": data.tokenizer.to_state(),
            "config": config.to_state(),
        }
        self._forward = torch.compile(model) if config.model.compile else model
        self.step_seconds = math.nan
        self.epoch_began = time.monotonic()  # when the work of this epoch began in this process
        self.whole = True  # between two steps: the live state is that of one step
        self.untold: list[dict[str, Any]] = []  # of `progress.lines`, those still to be written
        self.watch = LossWatch()
        self.setbacks = Setbacks()

    def bind(self, manager: CheckpointManager, records: Records) -> None:
        """Say where to save and what to write, after `resume()` of the manager."""
        self.manager, self.records = manager, records
        self.untold = records.missing(self.progress.step, self.progress.lines)

    @property
    def finished(self) -> bool:
        """True if there is nothing left to do."""
        progress = self.progress
        if progress.owed:
            return False
        if progress.stopped_early:
            return True
        if self.plan.epochs is None:
            return progress.step >= self.plan.total_steps
        return progress.epoch > self.plan.epochs

    def one_step(self) -> None:
        """One optimizer update: `accumulation` micro-batches, clipped, scheduled.

        Raises Diverged, with the weights as they were, where the loss or the gradient is not to be
        learned from.
        """
        progress, began = self.progress, time.perf_counter()
        self.whole = False
        accumulation = self.plan.accumulation
        losses = []
        for micro in range(accumulation):
            inputs, targets = self.batches.batch(
                progress.epoch, progress.position * accumulation + micro
            )
            loss = self.loss(inputs, targets)
            (loss / accumulation).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            progress.tokens += inputs.numel()
        mean, norm = torch.stack(losses).mean(), self._clip()
        self.tell()  # here the wait costs nothing: the optimizer would wait for the snapshot
        if norm is not None:  # looked at before the step: it would ruin the weights
            self._check(mean.item(), norm.item())
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.count_step()
        self._account(mean.item(), time.perf_counter() - began)
        self.whole = True

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss in nats a token of one batch, int64 [rows, length] each."""
        inputs = inputs.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        wide = self.precision is torch.float32
        with torch.autocast(self.device.type, self.precision, enabled=not wide):
            logits = self._forward(input_ids=inputs).logits
            return next_token_loss(logits, targets)

    def note(self, event: str, **values: Any) -> None:
        """Have `tell` write a line about the last step. It is part of the state, so that a kill
        before it is written does not lose it: `values` must be the same after every resume."""
        line = {"event": event, "step": self.progress.step, **values}
        self.progress.lines.append(line)
        self.untold.append(line)

    def tell(self) -> None:
        """Write and show what the last step has come to.

        Wait first for the snapshot of it that is being taken: a kill must not leave less than what
        was shown.
        """
        if not hasattr(self, "manager"):  # a dry run
            return
        self.manager.wait_for_copy()
        status = self.console.status
        status.memory_step, status.failing = self.manager.memory_step, self.manager.failing
        while self.untold:
            self._write(self.untold[0])
            del self.untold[0]
        if status.step:  # a step has been done in this process
            self.console.progress()

    def _write(self, line: dict[str, Any]) -> None:
        """Write a line of `note` into the records, and say it on the console."""
        values = {name: value for name, value in line.items() if name not in ("event", "step")}
        console, event, step = self.console, line["event"], line["step"]
        if event == "epoch":  # before its line, which tells a start after a kill that it is written
            self.records.history(self.state["history"])
        if event == "step":
            status = console.status
            values["tokens_per_second"] = status.tokens_per_second
            values["durable_step"] = status.durable_step
            values["memory_step"] = status.memory_step or None
            cuda = self.device.type == "cuda"
            values["gpu_bytes"] = torch.cuda.memory_reserved(self.device) if cuda else None
            self.records.step(step, **values)
        else:
            self.records.event(event, step, **values)
        if event == "evaluation":
            telling.tell_evaluation(console, step, values, self.progress)
        elif event == "epoch":
            seconds = time.monotonic() - self.epoch_began
            self.epoch_began = time.monotonic()
            telling.tell_epoch(console, values, self.plan.epochs, seconds)
        elif event == "sample":
            console.say(_("  ✍️  Sample: {text}", text=values["text"]))

    # ---------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, *, limit: int | None = None) -> dict[str, float]:
        """Mean validation loss in nats a token, perplexity, bits per byte; {} where there is none.

        Also {} if a signal comes meanwhile: half an evaluation is none. `limit` batches are enough
        to time it.
        """
        stream = self.data.val
        if len(stream) == 0:
            return {}
        rows = max(EVALUATION_ROWS, self.config.training.batch_size)
        nats, count = 0.0, 0
        self.model.eval()
        try:
            batches = validation_batches(stream, self.context_length, rows)
            for inputs, targets in itertools.islice(batches, limit):
                if self.guard.requested:
                    return {}
                counted = int((targets != IGNORED).sum())
                nats += self.loss(inputs, targets).item() * counted
                count += counted
        finally:
            self.model.train()
        loss = nats / count
        perplexity = math.inf if loss >= 700 else math.exp(loss)  # NaN stays NaN
        per_byte = bits_per_byte(nats, stream.text_bytes)
        return {"val_loss": loss, "perplexity": perplexity, "bits_per_byte": per_byte}

    def save(
        self, kind: str, metrics: dict[str, float], *, reason: str, epoch: int | None = None
    ) -> None:
        """Ask for a checkpoint of the last step, in `epoch` (None: the one of the next step)."""
        self.manager.save_async(
            step=self.progress.step,
            epoch=epoch or self.progress.epoch,
            kind=kind,
            metrics=metrics,
            reason=reason,
        )

    def sample(self) -> str | None:
        """Return a text as the model continues the prompt now, in one line; None if none is wanted.

        It has a generator of its own, so that the run stays the same with and without it.
        """
        training = self.config.training
        if not training.sample_tokens:
            return None
        text = sample_text(
            self.model,
            self.data.tokenizer,
            training.sample_prompt,
            training.sample_tokens,
            context_length=self.context_length,
            seed=training.seed + self.progress.step,
            may_end=False,
            stop=lambda: self.guard.requested is not None,
        )
        # A model that cannot spell yet leaves broken characters.
        return " ".join(text.replace("\ufffd", "").split())

    # ------------------------------------------------------------------------------------- details

    def _clip(self) -> torch.Tensor | None:
        """Clip the gradient. Return its norm before that if it is watched."""
        limit, watched = self.config.training.grad_clip, self.config.training.on_nan != "ignore"
        parameters = list(self.model.parameters())
        if limit:
            norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        elif watched:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return norm if watched else None

    def _check(self, loss: float, norm: float) -> None:
        progress = self.progress
        problem = self.watch.problem(loss, norm, (progress.epoch, progress.position))
        if problem:
            self.optimizer.zero_grad(set_to_none=True)
            raise Diverged("Step {step}: {problem}.", step=progress.step + 1, problem=problem)

    def _account(self, loss: float, seconds: float) -> None:
        progress, status = self.progress, self.console.status
        progress.loss_sum += loss
        first = math.isnan(progress.smoothed)
        progress.smoothed = (
            loss if first else SMOOTHING * progress.smoothed + (1 - SMOOTHING) * loss
        )
        if math.isnan(self.step_seconds):
            self.step_seconds = seconds
        self.step_seconds += 0.1 * (seconds - self.step_seconds)
        tokens = self.plan.accumulation * self.config.training.batch_size * self.context_length
        rate = self.optimizer.param_groups[0]["lr"]
        status.epoch, status.epochs = progress.epoch, self.plan.epochs
        status.step, status.total_steps = progress.step, self.plan.total_steps
        status.loss, status.smoothed, status.learning_rate = loss, progress.smoothed, rate
        status.tokens_per_second = tokens / self.step_seconds
        status.eta = self.step_seconds * (self.plan.total_steps - progress.step)
        self.console.stepped()
        if progress.step % self.config.training.log_every == 0:
            self.note(
                "step",
                epoch=progress.epoch,
                loss=loss,
                smoothed_loss=progress.smoothed,
                learning_rate=rate,
            )
        if not math.isfinite(loss):
            self.console.warn(
                _("The loss of step {step} is {loss}.", step=progress.step, loss=loss)
            )

    def stale_after(self, metrics: dict[str, float]) -> int:
        """Evaluations since the best one, with these counted; NaN is never better."""
        loss, best = metrics.get("val_loss"), self.state["best_loss"]
        if loss is None:
            return self.progress.stale
        better = math.isfinite(loss) and (best is None or loss < best)
        return 0 if better else self.progress.stale + 1

    @property
    def patience(self) -> float:
        """Evaluations without a better one after which training stops."""
        patience = self.config.training.patience
        return math.inf if patience is None else patience

    # ------------------------------------------------------------------------------- after a resume

    def settle(self, saved_data: dict[str, Any]) -> list[str]:
        """Fit the restored state to this configuration; returns what changed, for the user.

        The position is kept in samples: with another batch size it is the first step that leaves
        no sample out. With other data, or another order, the epoch begins anew.
        """
        notes: list[str] = []
        progress, now = self.progress, self._data_identity()
        same = all(saved_data.get(key) == now[key] for key in ("content_hash", "split", "seed"))
        if not same and progress.position:
            notes.append(
                _(
                    "Other data, or another order of it: epoch {epoch} begins anew.",
                    epoch=progress.epoch,
                )
            )
            progress.position, progress.loss_sum = 0, 0.0
            progress.left_out.clear()
        rows = saved_data["samples_per_step"]
        if same and rows != now["samples_per_step"] and progress.position:
            samples = progress.position * rows
            before, mean = progress.position, progress.loss_sum / progress.position
            progress.position = min(samples // now["samples_per_step"], self.plan.steps_per_epoch)
            progress.loss_sum = mean * progress.position
            progress.left_out.clear()  # positions that mean other data now
            again = samples - progress.position * now["samples_per_step"]
            notes.append(
                _(
                    "Other batch size: step {before} of the epoch becomes step {after}; {again} "
                    "samples are seen again.",
                    before=before,
                    after=progress.position,
                    again=again,
                )
            )
        self.state["data"] = now
        self.state["config"] = self.config.to_state()
        self.plan = Plan.of(self.config, self.batches, done=progress)
        if self.plan.epochs is not None:
            # Early stopping is decided anew: the user may have given it more patience.
            progress.stopped_early = progress.stale >= self.patience
        progress.owed = progress.owed or progress.position == self.plan.steps_per_epoch
        self._settle_schedule()
        return notes

    def _settle_schedule(self) -> None:
        """The learning rate is a function of the step: of the plan as it is now."""
        self._warmup = int(self.config.training.warmup_ratio * self.plan.total_steps)
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * self._factor(self.progress.step)

    def _factor(self, step: int) -> float:
        if not hasattr(self, "plan"):
            return 1.0
        training = self.config.training
        return learning_rate_factor(training.schedule, self._warmup, self.plan.total_steps)(step)

    def _data_identity(self) -> dict[str, Any]:
        """Return what gives the position in the data its meaning."""
        data = self.config.data
        return {
            "content_hash": self.data.content_hash,
            "split": [data.val_fraction, data.text_field],
            "seed": self.config.training.seed,
            "samples_per_step": self.config.training.batch_size * self.plan.accumulation,
        }
