"""A loop in the shape of nanoGPT's, protected with four lines: those that name `holdfast` or `run`.

    python examples/nanogpt_loop.py out [TEXT]

Kill it however you like (Ctrl-C, kill, kill -9) and start it again: it goes on with the step after
the last one, and ends with the very weights of a run that was never disturbed. The next batch is
fetched while the device still computes (`X, Y`): a local that no `state_dict` has. Saving model and
optimizer alone is not exact here for that reason.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import holdfast

out_dir, text = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else __file__)
device = "cuda" if torch.cuda.is_available() else "cpu"
block_size, batch_size, max_iters, warmup_iters = 32, 8, 40, 10
eval_interval, eval_iters, accumulation, dropout, learning_rate = 10, 4, 2, 0.1, 3e-3
torch.manual_seed(1337)

data = torch.tensor(list(text.read_bytes()))
split = {"train": data[: len(data) * 9 // 10], "val": data[len(data) * 9 // 10 :]}


def get_batch(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    part = split[name]
    starts = torch.randint(len(part) - block_size, (batch_size,)).tolist()
    x = torch.stack([part[i : i + block_size] for i in starts])
    y = torch.stack([part[i + 1 : i + 1 + block_size] for i in starts])
    return x.to(device), y.to(device)


class Model(nn.Module):
    """Bytes in, logits of the next byte out; one block of attention is enough to show the loop."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(block_size, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.token(x) + self.place(torch.arange(x.shape[1], device=x.device))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.head(self.block(hidden, mask, is_causal=True))


def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def estimate_loss() -> float:
    model.eval()
    loss = sum(loss_of(*get_batch("val")).item() for _ in range(eval_iters)) / eval_iters
    model.train()
    return loss


def lr_at(step: int) -> float:
    if step < warmup_iters:
        return learning_rate * (step + 1) / warmup_iters
    return learning_rate * 0.5 * (1 + math.cos(math.pi * step / max_iters))


model = Model().to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
scaler = torch.amp.GradScaler(device, enabled=device == "cuda")

iter_num, best_val_loss = 0, math.inf
X, Y = get_batch("train")
run = holdfast.protect(out_dir, model=model, optimizer=optimizer, scaler=scaler)
iter_num, best_val_loss, X, Y = run.resume(iter_num, best_val_loss, X, Y)
while iter_num < max_iters:
    for group in optimizer.param_groups:
        group["lr"] = lr_at(iter_num)
    if iter_num % eval_interval == 0:
        val_loss = estimate_loss()
        best_val_loss = min(best_val_loss, val_loss)
        print(f"step {iter_num}: validation {val_loss!r}, best {best_val_loss!r}", flush=True)
    for _micro_step in range(accumulation):
        loss = loss_of(X, Y) / accumulation
        X, Y = get_batch("train")  # prefetched: it belongs to the next step
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    iter_num += 1
    print(f"{iter_num} {loss.item()!r}", flush=True)
    run.step(iter_num, best_val_loss, X, Y)
