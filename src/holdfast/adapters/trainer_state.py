"""The state of a `transformers.Trainer` beside optimizer and schedule: what it has counted, and the
weights of a PEFT model that train."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from holdfast.adapters.data import ResumableLoader
from holdfast.errors import StateMismatch
from holdfast.i18n import _

# What `TrainerState` counts. Its other fields are what the arguments say now.
_COUNTED = (
    "epoch",
    "global_step",
    "num_input_tokens_seen",
    "total_flos",
    "best_metric",
    "best_global_step",
)
# What trainers count in attributes of their own; the last two are TRL's.
_SUMS = (
    "_tr_loss",
    "_total_loss_scalar",
    "_globalstep_last_logged",
    "current_flos",
    "_metrics",
    "_total_train_tokens",
)
_PLACE = ("epoch", "ended", "owed", "elapsed", "last")
DUTIES = ("should_log", "should_evaluate", "should_save")

log = logging.getLogger("holdfast")


class Progress:
    """The counters of Trainer, as an object of the state: as they were after the last step.

    A save after an exception must not have half of a step: the next batches, their losses.
    """

    def __init__(self, trainer: Trainer, loader: ResumableLoader) -> None:
        self._trainer, self._loader = trainer, loader
        self._frozen_weights = _fingerprint(trainer.model) if is_peft(trainer.model) else None
        self.epoch = 0
        self.ended = False  # True if the end of the epoch is done, but for its duties
        self.owed: Mapping[str, bool] = {}  # the duties of the step that are still to be done
        self.last: Sequence[Any] = None, None  # gradient norm and learning rate of the step
        self.elapsed = 0.0  # seconds of training, in all processes
        self.before = 0.0  # of them, in those before this one
        self.stopped = False  # True if no step is left to do
        self.epoch_over = False  # True if none is left in the epoch that was restored
        self._logged = 0
        self._values: Mapping[str, Any] = {}
        self.freeze({})

    def freeze(self, owed: Mapping[str, bool]) -> None:
        """Note what the trainer has counted, for the saves that come; `owed` are the duties of this
        step that are still to be done."""
        self.owed = owed
        trainer, state, control = self._trainer, self._trainer.state, self._trainer.control
        self._logged = len(state.log_history)
        self._values = {
            "counts": {name: getattr(state, name) for name in _COUNTED},
            "sums": {n: copy.deepcopy(getattr(trainer, n)) for n in _SUMS if hasattr(trainer, n)},
            "callbacks": [callback.state()["attributes"] for callback in self._callbacks()],
            "data": self._loader.state_dict(),
            **{name: getattr(self, name) for name in _PLACE},
            "training_stopped": control.should_training_stop,
            "epoch_stopped": control.should_epoch_stop,
            "max_steps": state.max_steps,
            "frozen_weights": self._frozen_weights,
        }

    def state_dict(self) -> dict[str, Any]:
        return {**self._values, "log_history": self._trainer.state.log_history[: self._logged]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        if saved["frozen_weights"] != self._frozen_weights:
            raise StateMismatch(
                "The frozen weights are not those that the checkpoint was trained with: load the "
                "same base model."
            )
        self._loader.load_state_dict(saved["data"])
        state = self._trainer.state
        for name in _COUNTED:
            setattr(state, name, saved["counts"][name])
        state.log_history = list(saved["log_history"])
        self._logged = len(state.log_history)
        # Found by its step: the run may have been moved.
        best = Path(self._trainer.args.output_dir, f"checkpoint-{state.best_global_step}")
        state.best_model_checkpoint = str(best) if best.is_dir() else None
        if state.best_global_step and not best.is_dir():
            log.warning(
                _("The best model so far is not loaded at the end: {path} is gone.", path=best)
            )
        for callback, attributes in zip(self._callbacks(), saved["callbacks"], strict=False):
            for name, value in attributes.items():
                setattr(callback, name, value)
        for name in _PLACE:
            setattr(self, name, saved[name])
        self._values, self.before = saved, self.elapsed

    def _callbacks(self) -> list[Any]:
        callbacks = self._trainer.callback_handler.callbacks
        return [each for each in callbacks if isinstance(each, ExportableState)]

    def place(self, epochs: int) -> tuple[int, int]:
        """Return the epoch to go on in, and the batches of it that are done; past all `epochs`
        where nothing is left to do."""
        saved, state, loader = self._values, self._trainer.state, self._loader
        # The end that `max_steps` was is none any more where there are more of them now.
        further = saved["max_steps"] <= state.global_step < state.max_steps
        stopped = saved["training_stopped"] and not further
        self.stopped = stopped or state.global_step >= state.max_steps
        complete = loader.position >= len(loader) or saved["epoch_stopped"]
        if self.ended and (self.stopped or complete):
            return epochs if self.stopped else loader.epoch + 1, 0
        self.epoch_over = self.stopped or complete
        steps = self._trainer.args.gradient_accumulation_steps
        if not self.epoch_over and loader.position % steps:
            raise StateMismatch(
                "Training is to go on after batch {batch} of an epoch, and "
                "gradient_accumulation_steps is {steps} now: use that of the save until the epoch "
                "has ended.",
                batch=loader.position,
                steps=steps,
            )
        return loader.epoch, loader.position

    def begin(self) -> None:
        """Put back what Trainer has set to zero."""
        trainer = self._trainer
        for name, value in self._values["sums"].items():
            live = getattr(trainer, name, None)
            if isinstance(live, torch.Tensor):
                live.copy_(value)
            elif isinstance(live, MutableMapping):
                _refill(live, value)
            else:
                setattr(trainer, name, value)
        trainer._initial_global_step = trainer._initial_num_input_tokens_seen = 0
        trainer.control.should_training_stop = self.stopped


class Trainable(torch.nn.Module):
    """The part of a PEFT model that is saved: weights that train, and buffers. The others are the
    base model's."""

    model: torch.nn.Module

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        vars(self)["model"] = model  # not as a child, which would put a word into every name

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        yield from self.model.named_modules(*args, **kwargs)

    def state_dict(self, *_args: Any, **_words: Any) -> dict[str, Any]:  # type: ignore[override]
        known = [*self.named_parameters(), *self.named_buffers()]
        kept = {name for name, tensor in known if _trains(tensor)}
        return {n: value for n, value in self.model.state_dict().items() if n in kept}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        odd = sorted(state_dict.keys() ^ self.state_dict().keys())
        if odd:
            raise StateMismatch(
                "other weights train here than did when this was saved: {names}",
                names=", ".join(odd[:3]),
            )
        return self.model.load_state_dict(state_dict, strict=False)


def _trains(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad or not isinstance(tensor, torch.nn.Parameter)


def _fingerprint(model: torch.nn.Module) -> str:
    """Return what tells the frozen weights from others: names, shapes, dtypes and a few values."""
    digest = xxhash.xxh3_128()
    for name, weight in model.named_parameters():
        if not _trains(weight):
            few = weight.detach().flatten()[:: max(1, weight.numel() // 8)].cpu()
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(few.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_peft(model: Any) -> bool:
    peft = sys.modules.get("peft")  # else there is no such model
    return peft is not None and isinstance(model, peft.PeftModel)


def _refill(live: MutableMapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Give `live` the content of `saved`; mappings in it stay the objects that they are."""
    for name in live.keys() - saved.keys():
        del live[name]
    for name, value in saved.items():
        if isinstance(live.get(name), MutableMapping):
            _refill(live[name], value)
        else:
            live[name] = value
