"""Real run directories for the tests of the desk: a tiny model, saved by the real engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from holdfast import CheckpointManager
from tests.support import end_epoch

_MAIN = """
import sys
from holdfast.cli.main import main
code = main(sys.argv[1:])
weights = {"--tensors", "--sections"} & set(sys.argv)
assert weights or "torch" not in sys.modules, "the desk reads manifests only"
sys.exit(code)
"""

LOSSES = (4.0, 2.0, 3.0, 2.5)  # the second epoch is the best


class Training:
    """A training of a linear model; `state` is what the trainer would have in its checkpoints."""

    def __init__(
        self, directory: Path, *, keep: int = 0, scored: dict[str, Any] | None = None, **config: Any
    ) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(8, 4)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "history": {"train_loss": [], "val_loss": [], "epochs": []},
        }
        if config:
            self.state["config"] = config
        self.manager = CheckpointManager(directory, self.state, keep_last=keep, **(scored or {}))
        self.resumed = self.manager.resume()

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.manager.close()

    def epoch(self, number: int, val_loss: float | None) -> None:
        """Train for "an epoch" of 100 steps and save."""
        self.model(torch.randn(2, 8)).pow(2).mean().backward()
        self.optimizer.step()
        history, train_loss = self.state["history"], 5.0 / number
        for name, value in (("train_loss", train_loss), ("val_loss", val_loss), ("epochs", number)):
            history[name].append(value)
        metrics = {"train_loss": train_loss}
        if val_loss is not None:
            metrics["val_loss"] = val_loss
        end_epoch(self.manager, number, step=100 * number, metrics=metrics)

    def temp(self, step: int) -> None:
        self.manager.save(step=step, epoch=step // 100 + 1, kind="temp", reason="scheduled")


def make_run(
    directory: Path, losses: Sequence[float | None] = LOSSES, *, keep: int = 0, **config: Any
) -> Path:
    """A finished run with one checkpoint an epoch, at steps 100, 200, ..."""
    with Training(directory, keep=keep, **config) as training:
        for number, loss in enumerate(losses, 1):
            training.epoch(number, loss)
    return directory


def forget_verified(directory: Path) -> None:
    """The history of a run that was never read back."""
    path = directory / "events.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"verified"' not in line), "utf-8")


def flip(path: Path, offset: int = 4200) -> None:
    """Damage one bit of a payload; the manifest stays readable."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def cut(path: Path) -> None:
    """Lose the second half of a file, the manifest with it."""
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size // 2)


def copy_without_links(source: Path, target: Path) -> Path:
    """What a copy to another disk makes of a run: no links, no times, no cache."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    (target / "metadata.json").unlink()
    return target


def names_in(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*.pt")}


def desk(
    *argv: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command of the desk in a process of its own, in a pipe."""
    return subprocess.run(
        [sys.executable, "-c", _MAIN, *map(str, argv)],
        text=True, encoding="utf-8", capture_output=True, timeout=60, cwd=cwd, check=False,
        env={**os.environ, "HOLDFAST_LANG": "en", **(env or {})}, **kwargs,
    )  # fmt: skip


def desk_json(*argv: str | Path) -> Any:
    done = desk(*argv, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
