"""What a training tells of its steps: in its records, and on the console at an evaluation or at the
end of an epoch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from holdfast.i18n import _
from holdfast.training.inference import sample_text

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


def tell(trainer: Trainer, line: dict[str, Any]) -> None:
    """Write a line of `Trainer.note` into the records, and say it on the console."""
    values = {name: value for name, value in line.items() if name not in ("event", "step")}
    records, event, step = trainer.records, line["event"], line["step"]
    if event == "step":
        status = trainer.console.status
        values["tokens_per_second"] = status.tokens_per_second
        values["durable_step"] = status.durable_step
        values["memory_step"] = status.memory_step or None
        values["gpu_bytes"] = _gpu_bytes(trainer.device)
        records.step(step, **values)
    else:
        records.event(event, step, **values)
    if event == "evaluation":
        _tell_evaluation(trainer, step, values)
    elif event == "epoch":
        records.history(trainer.state["history"])
        _tell_epoch(trainer, values)
    elif event == "sample":
        trainer.console.say(_("  ✍️  Sample: {text}", text=values["text"]))


def _tell_evaluation(trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
    progress, say = trainer.progress, trainer.console.say
    if progress.stopped_early:
        say(_("🛑 No better validation loss in {count} evaluations: stopping early.",
              count=progress.stale), important=True)  # fmt: skip
    if all(line["event"] != "epoch" for line in progress.lines):
        say(_("📊 Step {step}: validation loss {loss}, bits per byte {bits}", step=step,
              loss=f"{metrics['val_loss']:.4f}",
              bits=f"{metrics['bits_per_byte']:.3f}"))  # fmt: skip


def _tell_epoch(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Say the losses of an epoch and the time it took. The next one's time counts from here."""
    seconds = time.monotonic() - trainer.epoch_began
    trainer.epoch_began = time.monotonic()
    say = trainer.console.say
    say()
    total = f"/{trainer.plan.epochs}" if trainer.plan.epochs else ""
    say(
        _("📊 Epoch {epoch} results", epoch=f"{metrics['epoch']}{total}"),
        style="bold",
        important=True,
    )
    say(_("  ⏱️  Time: {seconds} s ({minutes} min)", seconds=f"{seconds:.1f}",
          minutes=f"{seconds / 60:.1f}"))  # fmt: skip
    say(_("  📉 Training loss: {loss}", loss=f"{metrics['train_loss']:.4f}"), important=True)
    if "val_loss" in metrics:
        say(_("  📊 Validation loss: {loss}", loss=f"{metrics['val_loss']:.4f}"),
            important=True)  # fmt: skip
        say(_("  🔢 Perplexity: {perplexity} · bits per byte: {bits}",
              perplexity=f"{metrics['perplexity']:.2f}",
              bits=f"{metrics['bits_per_byte']:.3f}"))  # fmt: skip


def _gpu_bytes(device: torch.device) -> int | None:
    """Bytes of the GPU's memory that this process has taken; None on a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else None


def sample(trainer: Trainer) -> str | None:
    """A short text as the model continues the prompt now, in one line; None where none is wanted.

    It has a generator of its own, so that the run stays the same with and without it.
    """
    training = trainer.config.training
    if not training.sample_tokens:
        return None
    text = sample_text(
        trainer.model, trainer.data.tokenizer, training.sample_prompt, training.sample_tokens,
        context_length=trainer.context_length, seed=training.seed + trainer.progress.step,
        may_end=False, stop=lambda: trainer.guard.requested is not None,
    )  # fmt: skip
    return _one_line(text)


def _one_line(text: str) -> str:
    """A sample in one line, without the broken characters of a model that cannot spell yet."""
    return " ".join(text.replace("\ufffd", "").split())
