"""A stranger's loop, of which every processor computes the same bits: whole numbers and halves."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast import CheckpointManager, EverySteps


class Exact:
    """Linear in its weights: gradients are whole numbers, and learning rate and momentum powers of
    two, so that no sum is ever rounded, whatever its order. Another seed or a lost bit shows in the
    losses."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        np.random.seed(2)
        random.seed(3)
        self.model = torch.nn.Linear(3, 2)
        self.twin = torch.nn.Linear(3, 2)
        self.twin.weight = self.model.weight  # tied
        with torch.no_grad():
            for number, parameter in enumerate(self.model.parameters()):
                values = torch.arange(parameter.numel()).reshape(parameter.shape)
                parameter.copy_(values - 3 + number)
            self.twin.bias.fill_(0.5)
        parameters = {*self.model.parameters()} | {*self.twin.parameters()}
        self.optimizer = torch.optim.SGD(
            [p for p in self.ordered() if p in parameters], lr=0.125, momentum=0.5
        )
        self.losses: list[float] = []
        self.state: dict[str, Any] = {
            "model": self.model,
            "twin": self.twin,
            "optimizer": self.optimizer,
            "losses": self.losses,
            "counts": {1: "one", (2, 3): [None, True, 2**60, -0.0, float("nan")], "文": b"\0\xff"},
            "table": np.arange(6, dtype=np.int16).reshape(2, 3),
            "large": torch.arange(2048, dtype=torch.int32),
        }

    def ordered(self) -> list[torch.nn.Parameter]:
        return [self.model.weight, self.model.bias, self.twin.bias]

    @property
    def now(self) -> int:
        return len(self.losses)

    def step(self) -> None:
        self.optimizer.zero_grad()
        x = torch.randint(-2, 3, (2, 3)).float()
        y = float(random.randrange(3)) + float(np.random.randint(3))
        loss = (self.model(x) + y * self.twin(x)).sum()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    def manager(self, directory: Path | str, **options: Any) -> CheckpointManager:
        options = {"keep_last": 2, "save_when": [EverySteps(3)], "memory_every": 1, **options}
        return CheckpointManager(directory, self.state, **options)


def say(event: str, fields: dict[str, Any]) -> None:
    print("told", event, {key: value for key, value in fields.items() if key not in _OBJECTS})


_OBJECTS = ("saved", "resumed", "choice", "error")


def train(
    directory: Path | str,
    until: int,
    *,
    source: str | None = None,
    an_epoch: int = 4,
    kill: bool = False,
    at: dict[int, Any] | None = None,
) -> None:
    """Train up to step `until`, in epochs of `an_epoch` steps, and end, or be killed there.

    `at` are things to do after a step.
    """
    exact = Exact()
    with exact.manager(directory, on_event=say) as manager:
        resumed = manager.resume(source)
        if resumed is not None:
            print("resumed", resumed.step, "generation", resumed.generation, resumed.steps_lost)
        while exact.now < until:
            exact.step()
            print("step", exact.now, "loss", exact.losses[-1])
            epoch, rest = divmod(exact.now - 1, an_epoch)
            loss = {"val_loss": abs(6.0 - exact.now), "whole": float(exact.now), "no": float("nan")}
            if rest == an_epoch - 1:
                manager.end_epoch(epoch + 1, step=exact.now, metrics=loss)
            manager.after_step(exact.now, epoch=epoch + 1, metrics=loss if rest == 1 else None)
            if at and exact.now in at:
                at[exact.now](exact, manager)
        print("durable", manager.saved_step, "in memory", manager.memory_step)
        if kill:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
