"""A training in NumPy that resumes exactly, and ways to get it wrong: quick, because no torch is
loaded. `python arrays.py [BUG]`: 24 steps, a checkpoint every 4 steps, the last 2 are kept."""

import os
import sys
from pathlib import Path

import numpy as np

BUG = sys.argv[1] if len(sys.argv) > 1 else ""
OUT = Path("out")
OUT.mkdir(exist_ok=True)


def write(path: Path, **arrays) -> None:
    temporary = path.with_name("writing")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        if BUG != "unsynced":
            os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def numbered() -> list[Path]:
    return sorted(OUT.glob("step_*.npz"), key=lambda path: int(path.stem[5:]), reverse=True)


rng = np.random.default_rng(os.getpid() if BUG == "unseeded" else 1)
weights, momentum, step = rng.normal(size=64), np.zeros(64), 0
for path in numbered():
    try:
        with np.load(path) as found:
            weights, momentum, step = found["weights"], found["momentum"], int(found["step"])
            state = rng.bit_generator.state
            state["state"] = {name: int(str(found[f"rng_{name}"])) for name in ("state", "inc")}
            if BUG != "rng":
                rng.bit_generator.state = state
        break
    except Exception:
        if BUG == "anew":
            break
        if BUG == "unsynced":
            raise

while step < 24:
    inputs = rng.normal(size=64)
    error = float(inputs @ weights - inputs.sum())
    momentum = 0.9 * momentum + error * inputs
    weights = weights - 0.001 * momentum
    step += 1
    print(f"step {step}: loss {error**2:.9f}", flush=True)
    if step % 4 == 0:
        inner = rng.bit_generator.state["state"]
        name = OUT / f"step_{step}.npz"
        arrays = {"weights": weights, "momentum": momentum, "step": step}
        arrays |= {f"rng_{key}": str(value) for key, value in inner.items()}
        if BUG == "anew":
            np.savez(name, **arrays)
        else:
            write(name, **arrays)
        for old in numbered()[2:]:
            old.unlink()
