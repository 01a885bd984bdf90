"""A training with plain torch.save that resumes exactly, and ten ways to get it wrong.

`python plain.py [BUG]`: 3 epochs of 8 steps, a checkpoint every 4 steps, the last 3 are kept.
"""

import os
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

BUG = sys.argv[1] if len(sys.argv) > 1 else ""
OUT = Path("out")
EPOCHS, STEPS, EVERY = 3, 8, 4


def write(path: Path, data: dict) -> None:
    if BUG in ("torn", "anew"):
        torch.save(data, path)
        return
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(data, file)
        if BUG != "latest":
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def point(name: str) -> None:
    with (OUT / "latest.tmp").open("w") as file:
        file.write(name)
        file.flush()
        os.fsync(file.fileno())
    (OUT / "latest.tmp").replace(OUT / "latest")
    sync(OUT)


def newest() -> dict | None:
    if not (OUT / "latest").exists():
        return None
    name = (OUT / "latest").read_text()
    numbered = sorted(OUT.glob("step_*.pt"), key=lambda p: int(p.stem[5:]), reverse=True)
    if BUG == "latest":
        numbered = [OUT / name]
    for path in numbered:
        try:
            return torch.load(path)
        except Exception:
            if BUG in ("torn", "latest"):
                raise
            if BUG == "anew":
                return None
    return None


torch.manual_seed(1)
torch.set_num_threads(1)
data = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
goal = data.sum(1, keepdim=True)
model = torch.nn.Sequential(
    torch.nn.Linear(8, 8),
    torch.nn.ReLU(),
    torch.nn.Dropout(0.2),
    torch.nn.Linear(8, 8),
    torch.nn.Linear(8, 1),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * STEPS)
step = epoch = position = 0
OUT.mkdir(exist_ok=True)

saved = newest()
if saved is not None:
    model.load_state_dict({k: v.float() for k, v in saved["model"].items()})
    optimizer.load_state_dict(saved["optimizer"])
    if BUG != "scheduler":
        scheduler.load_state_dict(saved["scheduler"])
    step, epoch, position = saved["step"], saved["epoch"], saved["position"]
    if position == STEPS:
        epoch, position = epoch + 1 + (BUG == "epoch"), 0
    if BUG == "sampler" and position:
        position += 1
    if BUG == "tokens":
        position = 0
    if BUG == "moments":
        a, b = (optimizer.state[model[at].weight] for at in (0, 3))
        a["exp_avg"], b["exp_avg"] = b["exp_avg"], a["exp_avg"]
    if BUG != "rng":
        torch.set_rng_state(saved["rng"])

while epoch < EPOCHS:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(epoch)).split(8)
    while position < STEPS:
        batch = order[position]
        model.train()
        loss = F.mse_loss(model(data[batch]), goal[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        step, position = step + 1, position + 1
        print(f"epoch {epoch} step {step}: loss {loss.item():.6f}", flush=True)
        if step % EVERY == 0:
            weights = model.state_dict()
            if BUG == "half":
                weights = {k: v.half() for k, v in weights.items()}
            name = f"step_{step}.pt"
            write(OUT / name, {
                "model": weights, "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(), "rng": torch.get_rng_state(),
                "step": step, "epoch": epoch, "position": position,
            })  # fmt: skip
            point(name)
            for old in sorted(OUT.glob("step_*.pt"), key=lambda p: int(p.stem[5:]))[:-3]:
                old.unlink()
    model.eval()
    with torch.no_grad():
        print(f"epoch {epoch}: val loss {F.mse_loss(model(data), goal).item():.6f}", flush=True)
    epoch, position = epoch + 1, 0
