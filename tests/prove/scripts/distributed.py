"""A training that saves with torch.distributed.checkpoint, each step into a new directory, with a
marker that is written last."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

BUG = sys.argv[1] if len(sys.argv) > 1 else ""
torch.manual_seed(1)
torch.set_num_threads(1)
out = Path("out")
out.mkdir(exist_ok=True)
data = torch.randn(64, 8)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)


def state(step: int) -> dict:
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "step": torch.tensor(step),
    }


step = 0
whole = sorted(out.glob("*/done"), key=lambda path: int(path.parent.name))
if whole:
    model(data).sum().backward()
    optimizer.step()  # the optimizer's state must be there to be loaded into
    loaded = state(0)
    dcp.load(loaded, checkpoint_id=whole[-1].parent)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    step = int(loaded["step"])
    if BUG != "rng":
        torch.set_rng_state(loaded["rng"])
while step < 16:
    optimizer.zero_grad()
    loss = model(data[torch.randint(0, 64, (8,))]).square().mean()
    loss.backward()
    optimizer.step()
    step += 1
    print(f"step {step}: loss {loss.item():.6f}", flush=True)
    if step % 4 == 0:
        place = out / str(step)
        dcp.save(state(step), checkpoint_id=place)
        for path in [*place.iterdir(), place, out]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        with (place / "done").open("w") as file:
            file.write("1")
