"""A loop with Accelerate, as its guides have it: OUT WORKERS EPOCHS END."""

from __future__ import annotations

import sys
import warnings

import accelerate
import torch
from torch.nn.functional import cross_entropy

import holdfast
from tests.adapters.scripts.small import end_at, finish, loader, tell

out, workers, epochs, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
warnings.simplefilter("ignore")


class Average:
    """Something that Accelerate saves because it was registered."""

    value = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
accelerate.utils.set_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
average = Average()
accelerator.register_for_checkpointing(average)
data = loader(workers)
model, optimizer, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)
run = holdfast.protect(f"{out}/run", save_when=[holdfast.EverySteps(1)], accelerator=accelerator)
step = run.resume(0)
for epoch in range(data.epoch, epochs):
    for points, classes in data:
        index = data.position
        with accelerator.accumulate(model):
            loss = cross_entropy(model(points + 0.1 * torch.randn_like(points)), classes)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        average.value = 0.9 * average.value + 0.1 * float(loss)
        place = f"batch {10 * epoch + index - 1}"
        tell(f"{place}, {index} of epoch {epoch}", points.sum(), loss, average.value)
        end_at(place, end)
        if accelerator.sync_gradients:
            step += 1
            run.step(step)
    end_at(f"epoch {epoch}", end)
finish(
    f"{out}/end.pt",
    model=accelerator.unwrap_model(model),
    optimizer=optimizer,
    scheduler=scheduler,
    average=average,
    step=step,
)
