"""A stranger's training loop: a small vision model in a GAN-like duel, with nothing of our trainer.

The loop is written as a user would write it, over `from holdfast import CheckpointManager` alone,
and runs in a process of its own that is killed for real.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from holdfast import load
from tests.training.runs import difference

STEPS = 40

LOOP = '''
import random, sys
import numpy as np
import torch
from torch import nn
from holdfast import CheckpointManager

directory, steps = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
random.seed(7); np.random.seed(7); torch.manual_seed(7)

class Schedule:
    """A user's own object with state: how noisy the images are."""
    def __init__(self): self.noise = 1.0
    def state_dict(self): return {"noise": self.noise}
    def load_state_dict(self, state): self.noise = state["noise"]

maker = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Unflatten(1, (4, 4, 4)),
                      nn.ConvTranspose2d(4, 1, 4, 2, 1), nn.BatchNorm2d(1), nn.Tanh())
judge = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2),
                      nn.Dropout(0.3), nn.Flatten(), nn.Linear(8 * 16, 1))
optimizers = [torch.optim.Adam(maker.parameters(), 2e-4, betas=(0.5, 0.9)),
              torch.optim.SGD(judge.parameters(), 0.02, momentum=0.9, nesterov=True)]
decay = torch.optim.lr_scheduler.StepLR(optimizers[1], 7, 0.7)
ema = {name: value.clone() for name, value in maker.state_dict().items()}
schedule = Schedule()
state = {"nets": {"maker": maker, "judge": judge}, "optimizers": optimizers, "decay": decay,
         "ema": ema, "schedule": schedule, "losses": [], "note": "三步"}

manager = CheckpointManager(directory, state, keep_last=2, metric="judge")
resumed = manager.resume()
loss_of = nn.functional.binary_cross_entropy_with_logits
for step in range(resumed.step if resumed else 0, steps):
    real = torch.randn(6, 1, 8, 8).sin() * random.random() + np.random.rand()
    real = real + schedule.noise * torch.randn(6, 1, 8, 8)
    fake = maker(torch.randn(6, 8))
    optimizers[1].zero_grad()
    judged = loss_of(judge(real), torch.ones(6, 1))
    judged = judged + loss_of(judge(fake.detach()), torch.zeros(6, 1))
    judged.backward()
    optimizers[1].step()
    decay.step()
    optimizers[0].zero_grad()
    made = loss_of(judge(fake), torch.ones(6, 1))
    made.backward()
    optimizers[0].step()
    for name, value in maker.state_dict().items():
        if value.is_floating_point(): ema[name].lerp_(value, 0.05)
        else: ema[name].copy_(value)
    schedule.noise *= 0.97
    state["losses"].append((judged.item(), made.item()))
    if (step + 1) % 3 == 0 or step + 1 == steps:
        saved = manager.save(step=step + 1, metrics={"judge": judged.item()})
        print("durable", saved.entry.step, flush=True)
assert "holdfast.training" not in sys.modules and "transformers" not in sys.modules
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stranger") / "loop.py"
    path.write_text(textwrap.dedent(LOOP), "utf-8")
    return path


@pytest.fixture(scope="module")
def straight(script: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("straight")
    done = subprocess.run(
        [sys.executable, script, directory, str(STEPS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(load(directory / "latest.pt"))


def test_killed_twice_and_resumed_it_is_bit_identical(
    tmp_path: Path, script: Path, straight: dict[str, Any]
) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    announced = random.Random(seed).sample(range(3, STEPS - 6, 3), 2)
    for step in sorted(announced):
        process = subprocess.Popen(
            [sys.executable, script, tmp_path, str(STEPS)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line == f"durable {step}\n":
                os.kill(process.pid, signal.SIGKILL)
                break
        assert process.wait(60) == -signal.SIGKILL
        process.stdout.close()
        assert load(tmp_path / "latest.pt", only="global_step") >= step
    done = subprocess.run(
        [sys.executable, script, tmp_path, str(STEPS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert difference(straight, dict(load(tmp_path / "latest.pt"))) is None


def test_everything_of_the_state_is_in_the_file(straight: dict[str, Any]) -> None:
    assert len(straight["losses"]) == STEPS
    assert straight["note"] == "三步"
    assert straight["schedule"]["noise"] == pytest.approx(0.97**STEPS)
    assert straight["nets"]["judge"]["1.num_batches_tracked"] == 3 * STEPS
    assert straight["decay"]["last_epoch"] == STEPS
