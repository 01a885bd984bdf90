"""A small continuum-memory model in the spirit of HOPE (nested learning), protected to the bit.

    python examples/hope/train.py examples/hope/config.json

Each level of memory learns at a pace of its own: every 1, 4, 16 and 64 steps. In between it
gathers: gradients in an accumulator of the optimizer, corrections in one beside its fast weights.
Most of the state is in no `model.state_dict()`: losing it raises no error and gives another model.
Kill it however you like and start it again: it ends with the very state of a run that was never
disturbed. `"resume_from"` in the configuration goes on from a file, a glob or a directory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import holdfast

DECAY = 0.95  # of fast weights, at each of their updates


@dataclass
class Memory:
    """The fast weights of a level: plain tensors that no `state_dict` has, as in published code."""

    weights: torch.Tensor
    gathered: torch.Tensor  # corrections since the last update
    clock: int = 0


class Level(nn.Module):
    """One level: slow weights, and fast ones that learn by themselves what comes after a key."""

    def __init__(self, width: int, period: int) -> None:
        super().__init__()
        self.period = period
        self.key = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.memory = Memory(torch.zeros(width, width), torch.zeros(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = functional.normalize(self.key(x), dim=-1)
        read = key @ self.memory.weights
        if self.training:
            with torch.no_grad():
                wrong = (x[:, 1:] - read[:, :-1]).flatten(0, 1)
                self.memory.gathered += key[:, :-1].flatten(0, 1).T @ wrong / len(wrong)
        return x + self.down(functional.gelu(self.up(x + read)))

    def end_step(self) -> None:
        """Correct the fast weights, if it is their turn."""
        memory = self.memory
        memory.clock += 1
        if memory.clock % self.period == 0:
            memory.weights.mul_(DECAY).add_(memory.gathered, alpha=1 / self.period)
            memory.gathered.zero_()


class Hope(nn.Module):
    """Bytes in, logits of the next byte out: attention, then the levels from fast to slow."""

    def __init__(self, width: int, heads: int, context: int, periods: Sequence[int]) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(context, width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.levels = nn.ModuleList(Level(width, period) for period in periods)
        self.head = nn.Linear(width, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.token(x) + self.place(torch.arange(x.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        mixed, _weights = self.attention(hidden, hidden, hidden, attn_mask=mask, is_causal=True)
        hidden = self.norm(hidden + mixed)
        for level in self.levels:
            hidden = level(hidden)
        return self.head(hidden)


class Continuum(torch.optim.Optimizer):
    """Adam that updates each group every `period` steps with the mean gradient since then."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "period": 1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                own = self.state[weight]
                if not own:
                    own["clock"] = 0
                    for name in ("gathered", "mean", "square"):
                        own[name] = torch.zeros_like(weight)
                own["clock"] += 1
                own["gathered"] += weight.grad
                if own["clock"] % group["period"]:
                    continue
                grad = own["gathered"] / group["period"]
                own["mean"].lerp_(grad, 0.1)
                own["square"].lerp_(grad.square(), 0.01)
                weight.addcdiv_(own["mean"], own["square"].sqrt() + 1e-8, value=-group["lr"])
                own["gathered"].zero_()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the batch of a step: a function of seed and step, so that it needs no state."""
    dice = torch.Generator().manual_seed(training["seed"] * 1_000_003 + step)
    size, context = training["batch_size"], shape["context"]
    starts = torch.randint(len(data) - context - 1, (size,), generator=dice).tolist()
    rows = torch.stack([data[start : start + context + 1] for start in starts])
    return rows[:, :-1], rows[:, 1:]


config = json.loads(Path(sys.argv[1]).read_text("utf-8"))
shape, training = config["model"], config["training"]
data = torch.tensor(list(Path(training["data_file"] or __file__).read_bytes()))
torch.manual_seed(training["seed"])
model = Hope(**shape)
slow = {id(weight) for level in model.levels for weight in level.parameters()}
optimizer = Continuum(
    [
        {"params": [weight for weight in model.parameters() if id(weight) not in slow]},
        *({"params": list(level.parameters()), "period": level.period} for level in model.levels),
    ],
    lr=training["learning_rate"],
)

run = holdfast.protect(
    training["checkpoint_dir"],
    model=model,
    optimizer=optimizer,
    also=[level.memory for level in model.levels],
)
step = run.resume(0, source=training["resume_from"])
while step < training["num_steps"]:
    x, y = batch(step)
    loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for level in model.levels:
        level.end_step()
    step += 1
    print(f"{step} {loss.item()!r}", flush=True)
    run.step(step)
    if step % training["save_every"] == 0:
        run.manager.save_async(step=step, kind="step")  # kept, beside those by risk
