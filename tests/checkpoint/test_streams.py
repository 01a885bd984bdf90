"""Generators of the user's and NumPy's arrays as state: they come back as what they were."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdfast import CheckpointManager, load
from holdfast.checkpoint.state.tree import normalise
from holdfast.errors import StateMismatch, UnsupportedValue


class Loaded(random.Random):
    """A generator of a class of the user's."""


MAKE: dict[str, Callable[[int], Any]] = {
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "default_rng": np.random.default_rng,
    "mt19937": lambda seed: np.random.Generator(np.random.MT19937(seed)),
    "philox": lambda seed: np.random.Generator(np.random.Philox(seed)),
    "sfc64": lambda seed: np.random.Generator(np.random.SFC64(seed)),
    "bit generator": np.random.PCG64DXSM,
    "RandomState": np.random.RandomState,
    "random.Random": random.Random,
    "subclass": Loaded,
}


def draw(generator: Any) -> list[float]:
    """Some numbers, of kinds that keep a part for the next call as well."""
    if isinstance(generator, torch.Generator):
        return torch.randn(3, generator=generator).tolist()
    if isinstance(generator, random.Random):
        return [generator.gauss(0, 1), generator.random()]
    if isinstance(generator, np.random.BitGenerator):
        return [int(n) for n in generator.random_raw(3)]
    if isinstance(generator, np.random.RandomState):
        return [float(generator.standard_normal()), float(generator.rand())]
    return [float(generator.integers(9, dtype=np.uint32)), *generator.random(2).tolist()]


@pytest.mark.parametrize("name", MAKE)
def test_a_generator_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    first, second = MAKE[name](1), MAKE[name](2)
    draw(first)
    with CheckpointManager(tmp_path, {"data": {"order": [first]}}) as manager:
        manager.save(step=1, strict=True)
    wanted = [draw(first) for _time in range(4)]
    torch.load(tmp_path / "latest.pt", weights_only=True)
    with CheckpointManager(tmp_path, {"data": {"order": [second]}}) as manager:
        manager.resume()
    assert [draw(second) for _time in range(4)] == wanted


def test_the_order_of_a_loader_is_found_again_in_mid_epoch(tmp_path: Path) -> None:
    def loader() -> tuple[torch.Generator, Any]:
        generator = torch.Generator().manual_seed(3)
        return generator, torch.utils.data.DataLoader(range(9), shuffle=True, generator=generator)

    generator, batches = loader()
    list(batches)
    with CheckpointManager(tmp_path, {"order": generator}) as manager:
        manager.save(step=1, strict=True)
    wanted = [batch.item() for batch in batches]
    generator, batches = loader()
    with CheckpointManager(tmp_path, {"order": generator}) as manager:
        manager.resume()
    assert [batch.item() for batch in batches] == wanted


def test_a_generator_of_another_kind_is_refused_and_stays_what_it_was(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, {"g": np.random.default_rng(1)}) as manager:
        manager.save(step=1, strict=True)
    for make in (MAKE["mt19937"], MAKE["torch"], MAKE["random.Random"], MAKE["RandomState"]):
        live, twin = make(5), make(5)
        with CheckpointManager(tmp_path, {"g": live}) as manager, pytest.raises(StateMismatch):
            manager.resume()
        assert draw(live) == draw(twin)


def test_a_generator_without_a_state_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedValue, match=r"g is a random\.SystemRandom"):
        CheckpointManager(tmp_path, {"g": random.SystemRandom()})


# ------------------------------------------------------------------------------------------ arrays


class Memory:
    """An object with arrays of NumPy in its state."""

    def __init__(self) -> None:
        self.seen: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def test_arrays_come_back_as_arrays_where_nothing_stands_yet(tmp_path: Path) -> None:
    shared = np.arange(4.0)
    memory = Memory()
    memory.seen = np.arange(3)
    state = {
        "replay": deque([(shared, 1), (np.ones(2, np.float32), shared)], maxlen=9),
        "mean": np.zeros((2, 3), np.float16), "flags": {"done": np.array([True])},
        "scalar": np.array(5, np.int16), "columns": np.asfortranarray(np.ones((2, 3))),
        "memory": memory, "tensor": [torch.ones(2)], "empty": np.zeros((0, 3)),
    }  # fmt: skip
    with CheckpointManager(tmp_path, state) as manager:
        manager.save(step=1, strict=True)
    live: dict[str, Any] = {
        "replay": deque(maxlen=9), "mean": None, "flags": {}, "scalar": None, "columns": None,
        "memory": Memory(), "tensor": [torch.zeros(2)], "empty": None,
    }  # fmt: skip
    with CheckpointManager(tmp_path, live) as manager:
        manager.resume()
    (first, _one), (second, third) = live["replay"]
    arrays = [first, second, third, live["mean"], live["flags"]["done"], live["scalar"],
              live["columns"], live["memory"].seen, live["empty"]]  # fmt: skip
    wanted = [shared, np.ones(2, np.float32), shared, state["mean"], np.array([True]),
              state["scalar"], state["columns"], memory.seen, state["empty"]]  # fmt: skip
    for array, other in zip(arrays, wanted, strict=True):
        assert isinstance(array, np.ndarray)
        assert array.dtype == other.dtype
        assert array.shape == other.shape
        assert np.array_equal(array, other)
        assert array.flags.writeable
    assert isinstance(live["tensor"][0], torch.Tensor)
    loaded = load(tmp_path / "latest.pt")
    assert isinstance(loaded["mean"], torch.Tensor), "load() gives what torch.load gives"


def test_an_array_and_a_tensor_may_take_each_others_place(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, {"a": np.ones(2), "t": torch.ones(2)}) as manager:
        manager.save(step=1, strict=True)
    live = {"a": torch.zeros(2, dtype=torch.float64), "t": np.zeros(2, np.float32)}
    with CheckpointManager(tmp_path, live) as manager:
        manager.resume()
    assert isinstance(live["a"], torch.Tensor)
    assert isinstance(live["t"], np.ndarray)
    assert live["a"].tolist() == live["t"].tolist() == [1, 1]


def test_an_array_that_is_handed_out_does_not_change_with_another(tmp_path: Path) -> None:
    """One array under two names: into one it is exchanged, the other gets bytes of its own."""
    array = np.arange(3.0)
    with CheckpointManager(tmp_path, {"a": array, "b": array, "c": [array]}) as manager:
        manager.save(step=1, strict=True)
    live: dict[str, Any] = {"a": np.zeros(3), "b": None, "c": [None]}
    with CheckpointManager(tmp_path, live) as manager:
        manager.resume()
    assert live["a"].tolist() == live["b"].tolist() == live["c"][0].tolist() == [0, 1, 2]


def test_arrays_are_not_copied_before_the_snapshot_copies_them() -> None:
    array = np.ones((100, 10))
    strange = [array, array[:, ::2], array[::-1], array.T, array[3:5]]
    tree = normalise({"arrays": strange})
    assert tree.leaves[0].tensor.data_ptr() == array.ctypes.data
    for leaf, value in zip(tree.leaves, strange, strict=True):
        assert np.array_equal(leaf.tensor.numpy(), value)


def test_arrays_that_torch_cannot_share_are_saved(tmp_path: Path) -> None:
    array = np.arange(4, dtype=np.int32)
    frozen = array.copy()
    frozen.flags.writeable = False
    bytes_of = array.view(np.uint8)
    state = {"a": array, "b": bytes_of, "c": frozen, "d": np.broadcast_to(np.float32(2), (3,))}
    wanted = copy.deepcopy(state)
    with CheckpointManager(tmp_path, state) as manager:
        manager.save(step=1, strict=True)
    live: dict[str, Any] = dict.fromkeys("abcd")
    with CheckpointManager(tmp_path, live) as manager:
        manager.resume()
    for key, value in wanted.items():
        assert np.array_equal(live[key], value), key
