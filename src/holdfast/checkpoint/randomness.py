"""The random streams of this process as an object that can be saved and restored."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


class RandomState:
    """The random streams of this process: Python, NumPy (global), torch on every device."""

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        bits = np.random.get_state(legacy=False)
        assert isinstance(bits, dict)
        state: dict[str, Any] = {
            # As tensors, because 625 integers as plain values change the size of the file.
            "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
            "numpy": {
                "bit_generator": bits["bit_generator"],
                "key": torch.from_numpy(bits["state"]["key"].astype(np.int64)),
                "pos": int(bits["state"]["pos"]),
                "has_gauss": int(bits["has_gauss"]),
                "gauss": float(bits["gauss"]),
            },
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        if torch.backends.mps.is_available():
            state["mps"] = torch.mps.get_rng_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        python, numpy = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
        key = numpy["key"].numpy().astype(np.uint32)
        np.random.set_state(
            {
                "bit_generator": numpy["bit_generator"],
                "state": {"key": key, "pos": numpy["pos"]},
                "has_gauss": numpy["has_gauss"],
                "gauss": numpy["gauss"],
            }
        )
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available():
            for device, stream in enumerate(state["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(stream, device)
        if "mps" in state and torch.backends.mps.is_available():
            torch.mps.set_rng_state(state["mps"])
