"""The random streams of this process as an object that can be saved and restored."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_python: random.Random = random.getstate.__self__  # type: ignore[attr-defined]


_LOOKED = 1 << 20  # draws after a seed that are searched: about 10 ms


def seeded_anew(restored: torch.Tensor) -> bool:
    """Return True if torch's stream on the CPU was seeded since it was `restored` (its state).

    Drawing goes forward from `restored` under the same seed. A stream that has another seed, or is
    nearer to its seed now, was seeded. False where more was drawn than is searched.
    """
    before, now = torch.Generator(), torch.Generator()
    before.set_state(restored)
    now.set_state(torch.get_rng_state())
    seed = now.initial_seed()
    if before.initial_seed() != seed:
        return True
    drawn = torch.Generator().manual_seed(seed)
    stream = _draws(drawn, _LOOKED)
    restored_at, now_at = (_find(stream, _draws(each, 8)) for each in (before, now))
    return now_at < restored_at


def _draws(generator: torch.Generator, count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.int32).random_(generator=generator)


def _find(stream: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return where `wanted` begins in `stream`; infinity where it is not."""
    for place in (stream == wanted[0]).nonzero().flatten().tolist():
        if torch.equal(stream[place : place + len(wanted)], wanted):
            return float(place)
    return math.inf


def stream_of(value: Any) -> Any:
    """Wrap a generator of the user's so that it can be saved and restored; None if it is none.

    These are torch.Generator, NumPy's Generator, RandomState and bit generators, random.Random.
    """
    if isinstance(value, torch.Generator):
        return _TorchStream(value)
    if isinstance(value, np.random.Generator | np.random.RandomState | np.random.BitGenerator):
        return _NumpyStream(value)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return _PythonStream(value)
    return None


@dataclass(slots=True)
class _TorchStream:
    generator: torch.Generator

    def state_dict(self) -> dict[str, Any]:
        return {"torch": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["torch"])


@dataclass(slots=True)
class _NumpyStream:
    generator: Any

    def state_dict(self) -> dict[str, Any]:
        if isinstance(self.generator, np.random.RandomState):
            return {"numpy": self.generator.get_state(legacy=False)}
        bits = getattr(self.generator, "bit_generator", self.generator)
        return {"numpy": bits.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = _as_numpy(state["numpy"])
        if isinstance(self.generator, np.random.RandomState):
            self.generator.set_state(saved)
        else:
            getattr(self.generator, "bit_generator", self.generator).state = saved


def _as_numpy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_numpy(item) for key, item in value.items()}
    return value.numpy() if isinstance(value, torch.Tensor) else value


@dataclass(slots=True)
class _PythonStream:
    generator: random.Random

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = self.generator.getstate()
        # As a tensor: as plain values the 625 integers would change the size of the file.
        return {"python": {"version": version, "words": torch.tensor(words), "gauss": gauss}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = state["python"]
        words = tuple(saved["words"].tolist())
        self.generator.setstate((saved["version"], words, saved["gauss"]))


class RandomState:
    """The random streams of this process: Python, NumPy (global), torch on every device."""

    def __init__(self, streams: tuple[Any, ...] | None = None) -> None:
        """`streams` are what `frozen` kept; None for those of the moment of the save."""
        self._streams = streams

    def frozen(self) -> RandomState:
        """Return the streams as they are now; what is drawn afterwards does not change them."""
        return RandomState(_streams())

    def state_dict(self) -> dict[str, Any]:
        python, bits, torch_, cuda, mps = self._streams or _streams()
        state: dict[str, Any] = {
            **_PythonStream(python).state_dict(),
            "numpy": {
                "bit_generator": bits["bit_generator"],
                "key": torch.from_numpy(bits["state"]["key"].astype(np.int64)),
                "pos": int(bits["state"]["pos"]),
                "has_gauss": int(bits["has_gauss"]),
                "gauss": float(bits["gauss"]),
            },
            "torch": torch_,
            "cuda": cuda,
        }
        return state if mps is None else {**state, "mps": mps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        numpy = state["numpy"]
        _PythonStream(_python).load_state_dict(state)
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


def _streams() -> tuple[Any, ...]:
    """Return the streams of Python, NumPy, torch, each GPU and MPS as they are now."""
    python = random.Random(0)  # seeded by the system, it would take half as long again
    python.setstate(random.getstate())
    return (
        python,
        np.random.get_state(legacy=False),
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    )
