"""What a training tells of itself at the end of an epoch: time, losses, a text it writes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from holdfast.i18n import _
from holdfast.training.generate import sample_text

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


def tell_epoch(trainer: Trainer, epoch: int, metrics: dict[str, float], text: str | None) -> None:
    """The block that a person reads at the end of an epoch, with the `text` that the model has
    written (`sample`). The next's time counts from here."""
    seconds = time.monotonic() - trainer.epoch_began
    trainer.epoch_began = time.monotonic()
    say = trainer.console.say
    say()
    total = f"/{trainer.plan.epochs}" if trainer.plan.epochs else ""
    say(_("📊 Epoch {epoch} results", epoch=f"{epoch}{total}"), style="bold", important=True)
    say(_("  ⏱️  Time: {seconds} s ({minutes} min)", seconds=f"{seconds:.1f}",
          minutes=f"{seconds / 60:.1f}"))  # fmt: skip
    say(_("  📉 Training loss: {loss}", loss=f"{metrics['train_loss']:.4f}"), important=True)
    if "val_loss" in metrics:
        say(_("  📊 Validation loss: {loss}", loss=f"{metrics['val_loss']:.4f}"),
            important=True)  # fmt: skip
        say(_("  🔢 Perplexity: {perplexity} · bits per byte: {bits}",
              perplexity=f"{metrics['perplexity']:.2f}",
              bits=f"{metrics['bits_per_byte']:.3f}"))  # fmt: skip
    if text is not None:
        trainer.records.event("sample", trainer.progress.step, epoch=epoch, text=text)
        say(_("  ✍️  Sample: {text}", text=text))


def evaluation_line(step: int, metrics: dict[str, float]) -> str:
    """One line for an evaluation within an epoch."""
    return _("📊 Step {step}: validation loss {loss}, bits per byte {bits}", step=step,
             loss=f"{metrics['val_loss']:.4f}", bits=f"{metrics['bits_per_byte']:.3f}")  # fmt: skip


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
