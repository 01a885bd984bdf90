"""A loop with Fabric, as its guides have it: OUT WORKERS EPOCHS END."""

from __future__ import annotations

import logging
import sys
import warnings

import lightning
import torch
from torch.nn.functional import cross_entropy

import holdfast
from tests.adapters.scripts.small import end_at, finish, loader, tell

out, workers, epochs, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
warnings.simplefilter("ignore")
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)

fabric = lightning.Fabric(accelerator="cpu", devices=1)
fabric.seed_everything(1)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
model, optimizer = fabric.setup(model, optimizer)
resumable = loader(workers)
data = fabric.setup_dataloaders(resumable)
run = holdfast.protect(
    f"{out}/run",
    save_when=[holdfast.EverySteps(1)],
    model=model,
    optimizer=optimizer,
    scheduler=scheduler,
    loader=resumable,
)
step = run.resume(0)
for epoch in range(resumable.epoch, epochs):
    for points, classes in data:
        index = resumable.position
        loss = cross_entropy(model(points + 0.1 * torch.randn_like(points)), classes)
        fabric.backward(loss / 3)
        place = f"batch {10 * epoch + index - 1}"
        tell(f"{place}, {index} of epoch {epoch}", points.sum(), loss)
        end_at(place, end)
        if index % 3 == 0 or index == len(resumable):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
            run.step(step)
    end_at(f"epoch {epoch}", end)
finish(f"{out}/end.pt", model=model, optimizer=optimizer, scheduler=scheduler, step=step)
