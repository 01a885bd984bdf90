"""Microseconds a batch that ResumableLoader adds to the DataLoader it wraps.

    python benchmarks/loader_speed.py [--rounds 15]

Epochs of both are read in turn, in one process: batches of 32 small images that lie in memory, so
that hardly anything else takes time. Medians, for 0 and for 2 workers, which are kept.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from holdfast import ResumableLoader

BATCHES, ROWS = 200, 32


def microseconds(loader: Iterable[Any]) -> float:
    """Read an epoch; return its microseconds a batch."""
    began = time.perf_counter()
    for _batch in loader:
        pass
    return (time.perf_counter() - began) / BATCHES * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    images = TensorDataset(torch.randn(BATCHES * ROWS, 3, 32, 32), torch.arange(BATCHES * ROWS))
    for workers in (0, 2):
        loaders = [
            DataLoader(images, ROWS, True, num_workers=workers, persistent_workers=workers > 0)
            for _ in range(2)
        ]
        plain, ours = loaders[0], ResumableLoader(loaders[1])
        microseconds(plain), microseconds(ours)  # workers are started
        pairs = [(microseconds(plain), microseconds(ours)) for _ in range(rounds)]
        alone, wrapped = (statistics.median(each) for each in zip(*pairs, strict=True))
        added = statistics.median(b - a for a, b in pairs)
        print(
            f"{workers} workers: {alone:.0f} alone, {wrapped:.0f} wrapped, {added:+.0f} us a batch"
        )


if __name__ == "__main__":
    main()
