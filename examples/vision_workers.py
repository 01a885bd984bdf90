"""Images with random augmentation in workers, protected with three lines: kill it, start it again.

    python examples/vision_workers.py OUT [WORKERS]

It ends with the very weights of a run that was never disturbed, with whatever number of workers
each start has. `ResumableLoader` is what makes that so: workers prefetch, and each has random
streams of its own, so that a plain `DataLoader` knows neither what was consumed nor what was drawn.
"""

from __future__ import annotations

import random
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, default_collate

import holdfast

out_dir, workers = sys.argv[1], int(sys.argv[2] if len(sys.argv) > 2 else 2)
epochs, batch_size, size = 2, 8, 16


class Shapes(Dataset[tuple[torch.Tensor, int]]):
    """Disks and squares in noise, each a function of its number; augmented in training."""

    def __init__(self, numbers: range, *, augment: bool) -> None:
        self.numbers, self.augment = numbers, augment

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        number = self.numbers[index]
        label, own = number % 2, torch.Generator().manual_seed(number)
        row, column, radius = (torch.rand(3, generator=own) * 4 + 4).tolist()
        y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        down, right = (y - row).abs(), (x - column).abs()
        far = torch.maximum(down, right) if label else (down**2 + right**2).sqrt()
        image = (far < radius) + 0.3 * torch.randn(3, size, size, generator=own)
        return (augmented(image) if self.augment else image), label


def augmented(image: torch.Tensor) -> torch.Tensor:
    if random.random() < 0.5:
        image = image.flip(2)
    image = image.roll(tuple(np.random.randint(-2, 3, 2).tolist()), (1, 2))
    return image + 0.1 * torch.randn_like(image)


def mixed(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Collate with mixup (Zhang et al. 2018): of each two images, and of their labels."""
    images, labels = default_collate(samples)
    share, other = float(np.random.beta(0.4, 0.4)), torch.randperm(len(images))
    targets = functional.one_hot(labels, 2).float()
    return images.lerp(images[other], share), targets.lerp(targets[other], share)


@torch.no_grad()
def evaluate() -> float:
    model.eval()
    loss = sum(functional.cross_entropy(model(x), y).item() for x, y in validation)
    model.train()
    return loss / len(validation)


torch.manual_seed(0)
loader = holdfast.ResumableLoader(
    DataLoader(
        Shapes(range(100), augment=True),
        batch_size,
        shuffle=True,
        num_workers=workers,
        collate_fn=mixed,
    ),
    seed=0,
)
validation = [*DataLoader(Shapes(range(1000, 1032), augment=False), batch_size)]
model = nn.Sequential(
    *(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2)),
    *(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    nn.Linear(16, 2),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

run = holdfast.protect(out_dir, model=model, optimizer=optimizer, loader=loader)
step = run.resume(0)
for epoch in range(loader.epoch, epochs):
    for images, targets in loader:
        loss = functional.cross_entropy(model(images), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        print(f"{step} {loss.item()!r}", flush=True)
        run.step(step)
    val_loss = evaluate()
    print(f"epoch {epoch}: {val_loss!r}", flush=True)
    run.end_epoch(val_loss=val_loss)
