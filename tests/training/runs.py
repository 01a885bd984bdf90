"""Small real trainings for the tests: a few hundred short steps on the sample's first passages."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import load
from holdfast.training import loop, session
from holdfast.training.console import Console
from holdfast.training.models import Shape
from holdfast.training.options.config import Config
from holdfast.training.options.presets import resolve
from holdfast.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data" / "zh_sample.txt"

# Everything that makes resuming hard: dropout, accumulation that does not divide the epoch,
# warm-up, several epochs, a batch that leaves a remainder.
HARD = {
    "model": "tiny",
    "context_length": 16,
    "vocab_size": 300,
    "dropout": 0.1,
    "batch_size": 2,
    "gradient_accumulation": 3,
    "epochs": 2,
    "warmup_ratio": 0.2,
    "learning_rate": 1e-3,
    "val_fraction": 0.1,
    "log_every": 1,
    "sample_tokens": 4,
    "temp_every_minutes": 0,
    "threads": 1,
    "precision": "fp32",
    "memory_every": 0,  # these tests are about the disk
}

# For tests of logic, in the place of "tiny": 0.1 M parameters, a checkpoint of 1.5 MB.
SMALL = Shape("llama", 2, 64, 2, 128, 2048, inner=160, kv_heads=2)


class Killed(BaseException):
    """Stands for a SIGKILL in tests that stay in one process: nothing of ours catches it."""


def write_corpus(directory: Path, passages: int = 6) -> Path:
    """A text of some 900 characters: about 20 steps an epoch with the options of HARD."""
    text = "\n\n".join(SAMPLE.read_text("utf-8").split("\n\n")[:passages])
    path = directory / "corpus.txt"
    path.write_text(text, "utf-8")
    return path


def config_for(directory: Path, data: Path, **options: Any) -> Config:
    flags = {
        **HARD,
        "data_file": str(data),
        "cache_dir": str(data.parent / "cache"),
        "checkpoint_dir": str(directory),
        **options,
    }
    return resolve(flags={k: v if isinstance(v, bool) else str(v) for k, v in flags.items()})


def train(config: Config, *, yes: bool = True) -> str:
    """Run a whole session in this process; returns what was said."""
    said = io.StringIO()
    with Console(stream=said, terminal=False) as console:
        session.run(config, console, log=False, yes=yes, command="holdfast train")
    return said.getvalue()


def kill_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End trainings in this process without a word after `step`."""
    original = loop.after_step

    def after_step(self: Trainer) -> None:
        original(self)
        if self.progress.step == step:
            raise Killed

    monkeypatch.setattr(loop, "after_step", after_step)


def final_state(directory: Path) -> dict[str, Any]:
    """The state in latest.pt, less what may differ between runs: where it lies."""
    state = load(directory / "latest.pt")
    state.pop("config")
    return state


def difference(a: Any, b: Any, path: str = "") -> str | None:  # noqa: PLR0911 - one a type
    """The path of the first thing that is not bit-identical, or None."""
    if type(a) is not type(b):
        return f"{path}: {type(a)} {type(b)}"
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and a.contiguous().view(-1).view(torch.uint8).equal(
            b.contiguous().view(-1).view(torch.uint8)
        )
        return None if same else path
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{path}: keys {list(a)} {list(b)}"
        return next((d for k in a if (d := difference(a[k], b[k], f"{path}/{k}"))), None)
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{path}: lengths {len(a)} {len(b)}"
        pairs = enumerate(zip(a, b, strict=True))
        return next((d for i, (x, y) in pairs if (d := difference(x, y, f"{path}/{i}"))), None)
    same = a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))
    return None if same else f"{path}: {a!r} {b!r}"
