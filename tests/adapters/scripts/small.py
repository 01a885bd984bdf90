"""What the small trainings of this room share: data that draw random numbers, a word for each
batch, an end by a signal, and what is compared at the end."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import holdfast


class Data(Dataset[Any]):
    """Points of three classes; every draw of a sample has noise of its own, from all streams."""

    def __init__(self, samples: int = 40, *, noise: bool = True) -> None:
        self.samples, self.noise = samples, noise

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        point = torch.randn(6, generator=torch.Generator().manual_seed(index))
        if self.noise:
            point = point + 0.1 * torch.randn(6) * random.random() * np.random.rand()
        return point, index % 3


def loader(workers: int) -> holdfast.ResumableLoader:
    inner = DataLoader(
        Data(), batch_size=4, shuffle=True, num_workers=workers, worker_init_fn=_end_with_parent
    )
    return holdfast.ResumableLoader(inner, seed=1)


def _end_with_parent(_worker: int) -> None:
    """Have this worker end at once where its process is killed; by itself it waits 5 seconds."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def tell(what: str, *numbers: float | torch.Tensor) -> None:
    """Say a line; a restart says the lines that it comes to again, and they must be the same."""
    print(f"{what}:", *(float(number).hex() for number in numbers), flush=True)


def end_at(place: str, wanted: str) -> None:
    """End this process where `wanted` is "SIGNAL place"."""
    name, _space, where = wanted.partition(" ")
    if where == place:
        os.kill(os.getpid(), getattr(signal, name))


def finish(path: str, **objects: Any) -> None:
    """Write what training has come to, random streams included."""
    states = {n: o.state_dict() if hasattr(o, "state_dict") else o for n, o in objects.items()}
    streams = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()]
    torch.save({**states, "streams": streams}, path)
