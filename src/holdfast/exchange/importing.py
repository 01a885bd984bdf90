"""`holdfast import`: a run directory of a model from elsewhere, from which training goes on.

What the trainer needs in a checkpoint is made here as the trainer makes it itself, so that its
first resume is one like any other.
"""

from __future__ import annotations

import random
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR

from holdfast.checkpoint import CheckpointManager, checkpoint_size
from holdfast.errors import ConfigError, StateMismatch
from holdfast.exchange import export_check as checking
from holdfast.exchange import importing_optimizer as optimizers
from holdfast.exchange.importing_sources import Source, read_source
from holdfast.exchange.target import check_room, check_target, interruptible, making
from holdfast.formatting import format_seconds
from holdfast.i18n import _
from holdfast.training import models
from holdfast.training.inference import load_for_inference
from holdfast.training.options.config import OPTIONS, Config
from holdfast.training.options.config_files import from_mapping, save_config
from holdfast.training.plan import Progress as Place
from holdfast.training.text.tokenizer import TextTokenizer

_SAME = 1e-5  # of the largest logit: the same weights, and sums in perhaps another order


@dataclass(frozen=True, slots=True)
class Imported:
    """A run directory that was made of a model from elsewhere."""

    source: Path
    run: Path
    form: str
    architecture: str
    parameters: int
    context_length: int
    step: int
    optimizer: str  # "" where it was taken over, else why not
    check: checking.Check
    seconds: float
    notes: list[str]

    def lines(self) -> list[str]:
        """Return the lines that a person is told."""
        again = f"holdfast train --checkpoint-dir {shlex.quote(str(self.run))} --resume"
        taken = _("Optimizer: taken over; training goes on at step {step}.", step=self.step)
        anew = _(
            "Optimizer: begun anew, since {reason}. The steps are counted from 0, so that the "
            "learning rate warms up.",
            reason=self.optimizer,
        )
        return [
            _(
                "✓ {source} → {run} ({form}): {architecture}, {parameters} parameters, context "
                "{context} tokens, in {time}",
                source=self.source,
                run=self.run,
                form=self.form,
                architecture=self.architecture,
                parameters=f"{self.parameters:,}",
                context=self.context_length,
                time=format_seconds(self.seconds),
            ),
            "  " + _("Read back and checked: {line}.", line=self.check.line()),
            "  " + (anew if self.optimizer else taken),
            *("  " + note for note in self.notes),
            "  " + _("Go on: {command} --data-file TEXT", command=again),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the form of `holdfast import --json`; `optimizer` is null where it was taken
        over."""
        return {
            "source": str(self.source),
            "run": str(self.run),
            "form": self.form,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "context_length": self.context_length,
            "step": self.step,
            "optimizer_begun_anew_because": self.optimizer or None,
            "check": self.check.to_json(),
            "seconds": round(self.seconds, 3),
            "notes": self.notes,
        }


def import_model(
    source: str,
    out: str,
    *,
    tokenizer: str | None = None,
    model_config: str | None = None,
    context_length: int | None = None,
    progress: Callable[[str], object] = str,
) -> Imported:
    """Make the run directory `out` of a Hugging Face directory or of any `.pt`.

    Raises ConfigError for what is missing or wrong in the question, CheckpointError for what cannot
    be read or does not fit; there is no run directory then.
    """
    path, run = Path(source), Path(out)
    check_target(run)
    began = time.monotonic()
    with interruptible(_("Stopped; nothing was imported.")):
        progress(_("loading"))
        found = read_source(path, model_config, tokenizer)
        words = _tokenizer_of(found, path)
        made = _Run(found, words, _configure(found, context_length, run))
        check_room(run, 2 * checkpoint_size(made.state, reserve=0))
        progress(_("writing"))
        with making(run, folder=True) as draft:
            reason = made.save(draft)
            progress(_("reading back"))
            check = _check(draft, found)
        return Imported(
            path,
            run,
            found.form,
            type(found.model).__name__,
            sum(p.numel() for p in found.model.parameters()),
            made.context,
            made.place.step,
            reason,
            check,
            time.monotonic() - began,
            found.notes,
        )


def _tokenizer_of(found: Source, path: Path) -> TextTokenizer:
    if found.tokenizer is None:
        raise ConfigError(
            "There is no tokenizer in {path}, and the model knows only the tokens of its own: "
            "--tokenizer DIR",
            path=path,
        )
    rows = int(found.model.config.vocab_size)
    if found.tokenizer.vocab_size > rows:
        raise StateMismatch(
            "The tokenizer has {tokens} tokens, and the model knows {rows}: it is another model's.",
            tokens=f"{found.tokenizer.vocab_size:,}",
            rows=f"{rows:,}",
        )
    return found.tokenizer


def _configure(found: Source, context_length: int | None, run: Path) -> Config:
    """Return the options that this model was trained with as far as they are known, else our
    own."""
    values = {name: option.default for name, option in OPTIONS.items()}
    values["model"] = found.model.config.model_type  # a name to show: the checkpoint has the shape
    values["context_length"] = context_length
    values["checkpoint_dir"] = str(run)
    rate = optimizers.highest_rate(found.optimizer)
    if rate is not None and 0 < rate <= 1:
        values["learning_rate"] = rate
    decay = optimizers.weight_decay(found.optimizer)
    if decay is not None and 0 <= decay <= 10:
        values["weight_decay"] = decay
    return from_mapping({name: value for name, value in values.items() if value is not None})


def _unknown_yet(step: int) -> float:
    """Raise: the schedule depends on the data, which the first training brings."""
    raise NotImplementedError(step)


class _Run:
    """The state of a run that has not begun here: as Trainer makes it, before its first step."""

    def __init__(self, found: Source, tokenizer: TextTokenizer, config: Config) -> None:
        self._found, self._tokenizer, self._config = found, tokenizer, config
        training, model = config.training, found.model
        model.config.use_cache = False
        self.context = models.context_of(model, config.model.context_length)
        self.place = Place()
        self._optimizer = torch.optim.AdamW(
            models.parameter_groups(model, training.weight_decay),
            lr=training.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self._scheduler = LambdaLR(self._optimizer, lambda _step: 1.0)
        self._scheduler.lr_lambdas = [_unknown_yet]  # so that no training seems to change it
        self.state: dict[str, Any] = {
            "model": model,
            "model_config": models.plain_config(model),
            "optimizer": self._optimizer,
            "scheduler": self._scheduler,
            "scaler": None,
            "data": {
                "content_hash": "",  # of no data yet
                "split": [config.data.val_fraction, config.data.text_field],
                "seed": training.seed,
                "samples_per_step": training.batch_size * training.gradient_accumulation,
            },
            "progress": self.place,
            "best_loss": None,
            "train_loss": None,
            "val_loss": None,
            "history": {"train_loss": [], "val_loss": [], "epochs": []},
            "tokenizer": tokenizer.to_state(),
            "config": config.to_state(),
        }

    def save(self, directory: Path) -> str:
        """Write the first checkpoint of the run; returns why the optimizer begins anew, or ""."""
        seed = self._config.training.seed
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        save_config(self._config, directory / "config.json")
        self._tokenizer.save(directory / "tokenizer")
        # The manager notes the settings that our trainer would begin with. What the optimizer
        # brings along instead is saved beside them, so that the first resume keeps it.
        with CheckpointManager(directory, self.state) as manager:
            manager.resume()  # from nothing: the run begins here
            reason = self._take_optimizer()
            manager.save(step=self.place.step, epoch=self.place.epoch, kind="step", reason="import")
        return reason

    def _take_optimizer(self) -> str:
        try:
            done = optimizers.take_over(self._found, self._optimizer)
        except optimizers.NotTaken as error:
            return str(error)
        step = self.place.step = self._found.step or done
        state = self._scheduler.state_dict()
        self._scheduler.load_state_dict({**state, "last_epoch": step, "_step_count": step + 1})
        return ""


def _check(directory: Path, found: Source) -> checking.Check:
    """Check that the checkpoint, read as serving reads it, computes what the source computes."""
    loaded = load_for_inference(directory, device="cpu")
    text = checking.text_for(loaded, None)
    expected = checking.logits_of(found.model.eval(), text.ids)
    check = checking.compare(text, expected, checking.logits_of(loaded.model, text.ids), _SAME)
    checking.insist(check)
    return check
