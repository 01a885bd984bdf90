"""Somebody else's training loop, killed at any moment; tests/e2e has the same with whole processes.

A small vision model in a duel of two optimizers, with schedules, an EMA and an object of the user's
own: nothing in it knows of holdfast but the four lines that call it.
"""

from __future__ import annotations

import os
import random
import re
import signal
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from holdfast import CheckpointManager, load
from holdfast.checkpoint import EverySteps, manager
from tests.support import assert_same, in_child, python, snapshot

STEPS = 24


class Curriculum:
    """A user's own object: how hard the images are."""

    def __init__(self) -> None:
        self.level = 0.1
        self.seen: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level, self.seen = state["level"], list(state["seen"])

    def step(self) -> None:
        self.level *= 1 + 0.1 * random.random()
        self.seen.append(self.level)


class Duel:
    """A generator and a critic of images, each with its optimizer."""

    def __init__(self) -> None:
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        self.generator = nn.Sequential(
            nn.Linear(4, 2 * 16), nn.Unflatten(1, (2, 4, 4)), nn.BatchNorm2d(2), nn.ReLU(),
            nn.ConvTranspose2d(2, 1, 4, 2, 1),
        )  # fmt: skip
        self.critic = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Dropout(0.3),
            nn.Flatten(), nn.Linear(4 * 16, 1),
        )  # fmt: skip
        self.optimizers = (
            torch.optim.AdamW(self.generator.parameters(), 1e-3),
            torch.optim.RMSprop(self.critic.parameters(), 1e-3),
        )
        self.schedules = [
            torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizers[0], STEPS),
            torch.optim.lr_scheduler.StepLR(self.optimizers[1], 5),
        ]
        self.average = torch.optim.swa_utils.AveragedModel(
            self.generator, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        self.ema = {k: v.clone() for k, v in self.critic.state_dict().items()}
        self.curriculum, self.losses = Curriculum(), []
        self.state = {
            "nets": {"generator": self.generator, "critic": self.critic},
            "optimizers": self.optimizers,
            "schedules": self.schedules,
            "average": self.average,
            "ema": self.ema,
            "curriculum": self.curriculum,
            "losses": self.losses,
        }

    def step(self) -> None:
        size = self.curriculum.level * np.random.rand()
        images = torch.rand(6, 1, 8, 8) * size
        made = self.generator(torch.randn(6, 4))
        judged = self.critic(made.detach()).mean() - self.critic(images).mean()
        self._update(1, judged)
        fooled = -self.critic(made).mean()
        self._update(0, fooled)
        self.average.update_parameters(self.generator)
        for name, value in self.critic.state_dict().items():
            self.ema[name].copy_(value if value.dtype == torch.int64 else value.lerp(
                self.ema[name], 0.9))  # fmt: skip
        self.curriculum.step()
        self.losses.append((judged.item(), fooled.item()))

    def _update(self, which: int, loss: torch.Tensor) -> None:
        self.optimizers[which].zero_grad()
        loss.backward()
        self.optimizers[which].step()
        self.schedules[which].step()

    def train(self, directory: Path, steps: int = STEPS) -> None:
        """The loop of the user: the lines that know of checkpoints are four."""
        when = [EverySteps(2)]
        with CheckpointManager(directory, self.state, keep_last=2, save_when=when) as manager:
            manager.resume()
            while len(self.losses) < steps:
                self.step()
                step = len(self.losses)
                manager.after_step(step)
                if step % 8 == 0:
                    manager.end_epoch(
                        step // 8, step=step, metrics={"val_loss": self.losses[-1][0]}
                    )


@pytest.fixture(scope="module")
def straight() -> Any:
    """The same training in one go, with no checkpoints at all."""
    duel = Duel()
    for _step in range(STEPS):
        duel.step()
    return snapshot(duel.state)


def test_in_one_go_it_is_what_it_is_without_checkpoints(tmp_path: Path, straight: Any) -> None:
    duel = Duel()
    duel.train(tmp_path)
    assert_same(snapshot(duel.state), straight)


def test_killed_at_random_moments_it_comes_to_the_same_bits(tmp_path: Path, straight: Any) -> None:
    """Somewhere in a step, a write, a link, a verification: wherever the clock says."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    kills = 0

    def run() -> None:
        threading.Thread(target=kill, args=(rng.uniform(0.02, 0.3),), daemon=True).start()
        Duel().train(tmp_path)

    def kill(seconds: float) -> None:
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    for _attempt in range(12):
        rng.random()
        status = in_child(run)
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        if status == 0:
            break
    duel = Duel()
    duel.train(tmp_path)
    print("kills", kills)
    assert kills > 0
    assert_same(snapshot(duel.state), straight)
    state = load(tmp_path / "latest.pt")
    assert state["losses"] == straight["losses"]
    assert_same(state, torch.load(tmp_path / "latest.pt", weights_only=True))


def test_the_lines_in_the_docstring_work_as_printed(tmp_path: Path) -> None:
    """A newcomer copies them; and no trainer, tokenizer or terminal comes with them."""
    lines = re.findall(r"^    .*$", str(manager.__doc__), re.MULTILINE)
    assert len(lines) == 6
    code = "\n".join(line[4:] for line in lines)
    code = code.replace('"runs/a"', "sys.argv[1]").replace("...train...", "train()")
    program = f"""
import sys
import torch
from holdfast import CheckpointManager, EverySteps

def run(total):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    ran = []
    def train():
        ran.append(1)
        optimizer.zero_grad()
        model(torch.randn(3, 2)).sum().backward()
        optimizer.step()
{textwrap.indent(code, "    ")}
    return len(ran)

strangers = [name for name in ("training", "manage", "cli") if f"holdfast.{{name}}" in sys.modules]
print(run(3), run(5), strangers, "transformers" in sys.modules)
"""
    assert python(program, tmp_path / "run").split() == ["3", "2", "[]", "False"]
    assert load(tmp_path / "run" / "latest.pt", only="global_step") == 5
