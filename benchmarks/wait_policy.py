"""How OpenMP's threads should wait for each other: python benchmarks/wait_policy.py [ROUNDS]

Trains the same steps of our `tiny` model in processes of their own, once a policy and round,
interleaved, on a quiet machine and beside as many busy neighbours as there are processors. Prints
seconds a step (median, spread of all rounds) and the ratio to the default, paired by round.
The number of threads is the same, so the losses must be the same to the last bit.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

POLICIES: dict[str, dict[str, str]] = {
    "default (spins)": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spins 1,000 times": {"GOMP_SPINCOUNT": "1000"},
    "spins 10,000 times": {"GOMP_SPINCOUNT": "10000"},
}
WORK = """
import time, torch
from holdfast.training.options.config import ModelConfig
from holdfast.training.models import build_model, next_token_loss, parameter_groups, tune_allocator
torch.manual_seed(0)
torch.set_num_threads({threads})
tune_allocator()
model = build_model(ModelConfig(model="tiny"), vocab_size=2048, eos_id=0)
optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3, fused=True)
ids = torch.randint(0, 2048, (8, 129))
def step():
    loss = next_token_loss(model(input_ids=ids[:, :-1]).logits, ids[:, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss
for _warm in range(3):
    step()
times = []
for _step in range({steps}):
    began = time.perf_counter()
    loss = step()
    times.append(time.perf_counter() - began)
print(sorted(times)[len(times) // 2], loss.item().hex())
"""


def measure(policy: dict[str, str], threads: int, steps: int) -> tuple[float, str]:
    """Return the median seconds of a step, and the last loss bit by bit."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", WORK.format(threads=threads, steps=steps)],
        env={**clean, **policy}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds, loss = done.stdout.split()
    return float(seconds), loss


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    threads = os.cpu_count() or 1
    for busy in (False, True):
        neighbours = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"])
            for _each in range(threads if busy else 0)
        ]
        try:
            found: dict[str, list[float]] = {name: [] for name in POLICIES}
            losses = set()
            for _round in range(rounds):
                for name, policy in POLICIES.items():
                    seconds, loss = measure(policy, threads, 10 if busy else 30)
                    found[name].append(seconds)
                    losses.add(loss)
        finally:
            for each in neighbours:
                each.kill()
                each.wait()
        print(f"{threads} threads, {len(neighbours)} busy neighbours, {rounds} rounds; "
              f"losses {'identical' if len(losses) == 1 else f'DIFFER: {losses}'}")  # fmt: skip
        base = found["default (spins)"]
        for name, times in found.items():
            ratios = [a / b for a, b in zip(times, base, strict=True)]
            print(f"  {name:<20} {1000 * statistics.median(times):8.1f} ms a step "
                  f"[{1000 * min(times):.1f} to {1000 * max(times):.1f}], "
                  f"{statistics.median(ratios):.3f} x the default "
                  f"[{min(ratios):.3f} to {max(ratios):.3f}]", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
