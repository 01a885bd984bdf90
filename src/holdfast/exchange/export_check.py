"""Is what was written the model that was trained? Asked of real text, and answered in one line.

The logits of the original are taken before anything is written; those of the export come from what
lies on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from holdfast.errors import HoldfastError
from holdfast.i18n import N_, _
from holdfast.training.inference import Loaded
from holdfast.training.session import SAMPLE
from holdfast.training.text import prepare

ROWS, LENGTH = 4, 128  # of the text that is looked at: enough for every layer and every position
_LOGITS = 1 << 26  # values at most: 256 MiB in fp32

Answer = Callable[[torch.Tensor], torch.Tensor]
"""Token ids [rows, length] to logits [rows, length, vocabulary]."""

_TEXTS = {
    "validation": N_("the validation text of the run"),
    "sample": N_("the bundled sample text"),
}


class Deviation(HoldfastError):
    """An export that does not compute the same as the model that was trained."""


@dataclass(frozen=True, slots=True)
class Text:
    """The text that both are asked: token ids [rows, length] int64, and where they come from."""

    ids: torch.Tensor
    source: str  # "validation" or "sample"


@dataclass(frozen=True, slots=True)
class Check:
    """The distance between the logits of an export and the original's, and the allowed one."""

    source: str
    tokens: int
    difference: float  # the largest of all
    allowed: float
    largest: float  # the largest logit of the original
    same_choice: float  # share of the positions whose most likely token is the same

    @property
    def passed(self) -> bool:
        """True if the difference is allowed; NaN is not."""
        return self.difference <= self.allowed

    def line(self) -> str:
        """Return the result for a person."""
        return _(
            "logits over {tokens} tokens of {text}: largest difference {difference} (allowed "
            "{allowed}; the largest logit is {largest}), same most likely token in {share} of the "
            "positions",
            tokens=self.tokens,
            text=_(_TEXTS[self.source]),
            difference=f"{self.difference:.3g}",
            allowed=f"{self.allowed:.3g}",
            largest=f"{self.largest:.3g}",
            share=f"{100 * self.same_choice:.2f} %",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the result; differences in units of logits, `same_choice` from 0 to 1."""
        return {
            "text": self.source,
            "tokens": self.tokens,
            "largest_difference": self.difference,
            "allowed_difference": self.allowed,
            "largest_logit": self.largest,
            "same_choice": self.same_choice,
        }


def text_for(loaded: Loaded, data: prepare.PreparedData | None) -> Text:
    """Return real text for `loaded`: of its run's validation data, else of the bundled sample."""
    vocabulary = int(loaded.model.config.vocab_size)
    tokens, source = data.val.tokens if data is not None else np.empty(0), "validation"
    if len(tokens) < 2:
        encoded = loaded.tokenizer.encode(SAMPLE.read_text("utf-8")[:20_000])
        tokens, source = np.array(encoded or [loaded.tokenizer.eos_id]), "sample"
    length = max(1, min(LENGTH, loaded.context_length, len(tokens)))
    rows = max(1, min(ROWS, len(tokens) // length, _LOGITS // (length * vocabulary)))
    # From all over the text: its beginning alone may be a title page.
    starts = np.linspace(0, len(tokens) - length, rows).astype(int)
    ids = np.stack([np.asarray(tokens[s : s + length], dtype=np.int64) for s in starts])
    return Text(torch.from_numpy(ids), source)


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of a model of transformers, in fp32 on the CPU."""
    output = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    logits: torch.Tensor = output.logits.float().cpu()
    return logits


def compare(text: Text, expected: torch.Tensor, found: torch.Tensor, share: float) -> Check:
    """Compare logits; a difference up to `share` of the largest logit is allowed."""
    if found.shape != expected.shape:
        raise Deviation(
            "The export gives logits of shape {found} instead of {expected}; it was not kept.",
            found=list(found.shape),
            expected=list(expected.shape),
        )
    largest = expected.abs().max().item()
    difference = (found - expected).abs().max().item()
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return Check(text.source, text.ids.numel(), difference, share * largest, largest, same)


def insist(check: Check) -> None:
    """Raise Deviation unless `check` was passed."""
    if check.passed:
        return
    if not math.isfinite(check.largest):
        raise Deviation(
            "The model's own logits are {value}: its weights are ruined. Nothing was exported; "
            "`holdfast list` shows other checkpoints.",
            value=check.largest,
        )
    raise Deviation("The export is not the model, and was not kept: {line}.", line=check.line())
