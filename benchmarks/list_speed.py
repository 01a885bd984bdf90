"""How long `holdfast list` takes over 1,000 checkpoints: the whole command in a pipe, its start
included, with and without the cache `metadata.json`.

    python benchmarks/list_speed.py [--checkpoints 1000] [--runs 9]

The checkpoints are real files of the engine, small in their tensors; `--tensors` sets how many each
has, because without the cache the manifests are read, and those grow with the number of tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from holdfast.checkpoint.rundir.catalog import Catalog  # noqa: E402
from holdfast.checkpoint.rundir.entries import METADATA  # noqa: E402

PROMISE = 0.3  # seconds, with the cache: that is what a training leaves behind


def make(directory: Path, count: int, tensors: int) -> None:
    """`count` checkpoints of one run, with the history that a training would have written."""
    import torch

    from holdfast import CheckpointManager

    state = {
        "model": {f"layers.{i}.weight": torch.zeros(2, 2) for i in range(tensors)},
        "config": {"training": {"epochs": 3}},
    }
    with CheckpointManager(directory, state, keep_last=0, reserve=4096) as manager:
        for step in range(1, count + 1):
            manager.save(step=step, epoch=1, kind="step", metrics={"val_loss": 9.0 / step})
        manager.wait()


def seconds(directory: Path, runs: int, *, cached: bool) -> list[float]:
    """The times of `runs` runs, after one that does not count."""
    taken = []
    for _run in range(runs + 1):
        if not cached:
            (directory / METADATA).unlink(missing_ok=True)
        words = [sys.executable, "-m", "holdfast", "list", str(directory)]
        began = time.perf_counter()
        done = subprocess.run(words, capture_output=True, check=True, cwd=ROOT / "src")
        taken.append(time.perf_counter() - began)
        assert done.stdout.count(b"checkpoint_step_") >= 1, done.stdout[:500]
    return taken[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=1000)
    parser.add_argument("--tensors", type=int, default=12)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--keep", type=Path, help="make the checkpoints here, or use what is there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        directory = given.keep or Path(place) / "run"
        if not directory.exists():
            make(directory, given.checkpoints, given.tensors)
        Catalog(directory).write_cache()
        found: dict[str, Any] = {"checkpoints": len(Catalog(directory).scan().entries)}
        for name, cached in (("with metadata.json", True), ("without", False)):
            times = seconds(directory, given.runs, cached=cached)
            found[name] = {
                "median_s": round(statistics.median(times), 3),
                "fastest_s": round(min(times), 3),
                "slowest_s": round(max(times), 3),
            }
        Catalog(directory).write_cache()
        found["promise_s"] = PROMISE
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
