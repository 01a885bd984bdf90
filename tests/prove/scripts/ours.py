"""A training with CheckpointManager."""

import torch
from torch.nn import functional as F

from holdfast import CheckpointManager

torch.manual_seed(1)
torch.set_num_threads(1)
data = torch.randn(64, 8)
goal = data.sum(1, keepdim=True)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
with CheckpointManager("run", {"model": model, "optimizer": optimizer}) as manager:
    resumed = manager.resume()
    for step in range((resumed.step if resumed else 0) + 1, 21):
        batch = torch.randperm(64, generator=torch.Generator().manual_seed(step))[:8]
        loss = F.mse_loss(model(data[batch]), goal[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.6f}", flush=True)
        if step % 4 == 0:
            manager.save(step=step, strict=True)
