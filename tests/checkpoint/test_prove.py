"""`prove_resume` finds what a loop keeps outside of its state, and names it; right loops pass."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import holdfast
from holdfast.errors import ConfigError, HoldfastError, UnsupportedValue
from holdfast.prove.resume import NOT_REPEATABLE, NOT_RESTORED, OUTSIDE, Proof, prove_resume
from tests.support import Toy

STEPS, MORE = 4, 3


@pytest.fixture(params=["forked", "in this process"])
def runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to interrupt; whether a process is really killed."""
    if request.param != "forked":
        monkeypatch.delattr(os, "fork")
    return request.param == "forked"


def toy() -> tuple[dict[str, Any], Callable[[], None]]:
    made = Toy()
    return made.state, made.step


def test_a_right_loop_is_equal(runs: bool, tmp_path: Path) -> None:
    proof = prove_resume(toy, steps=STEPS, more=MORE, directory=tmp_path)
    assert proof == Proof(True, tensors=proof.tensors, values=proof.values, killed=runs)
    assert proof and proof.difference is None
    assert proof.tensors >= 6 and proof.values >= STEPS + MORE
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_it_is_public() -> None:
    assert holdfast.prove_resume is prove_resume


def test_a_loop_without_a_seed_is_equal_too(runs: bool) -> None:
    """Every run begins with the streams as they are in this process."""

    def make() -> tuple[dict[str, Any], Callable[[], None]]:
        state = {"drawn": torch.zeros(3)}
        return state, lambda: state["drawn"].copy_(
            torch.randn(3) + random.random() + np.random.rand()
        )

    before = torch.get_rng_state()
    assert prove_resume(make, steps=STEPS, more=MORE)
    assert torch.equal(before, torch.get_rng_state()), "the caller's streams stay where they are"


# --------------------------------------------------------------------------- what it has to find


def test_a_counter_outside_the_state_is_found(runs: bool) -> None:
    def make() -> tuple[dict[str, Any], Callable[[], None]]:
        made, counter = Toy(), [0]

        def step() -> None:
            made.step()
            counter[0] += 1
            made.optimizer.param_groups[0]["lr"] = 0.1 / counter[0]

        return made.state, step

    proof = prove_resume(make, steps=STEPS, more=MORE)
    assert not proof
    assert proof.cause == OUTSIDE and proof.first is not None
    assert proof.first.path == "model.weight" and proof.first.index == (0, 0)
    assert proof.first.a != proof.first.b
    assert {"optimizer", "losses"} <= set(proof.also)
    assert str(proof.difference).startswith("model.weight[0, 0]: ")
    assert "not in the state" in str(proof.difference)


def test_a_data_iterator_outside_the_state_is_found(runs: bool) -> None:
    def make() -> tuple[dict[str, Any], Callable[[], None]]:
        data: Iterator[int] = iter(range(100))
        state: dict[str, Any] = {"seen": []}
        return state, lambda: state["seen"].append(next(data))

    proof = prove_resume(make, steps=STEPS, more=MORE)
    assert (proof.equal, proof.cause) == (False, OUTSIDE)
    assert proof.first is not None
    assert (proof.first.path, proof.first.a, proof.first.b) == (f"seen.{STEPS}", "4", "0")


def test_a_generator_outside_the_state_is_found(runs: bool) -> None:
    """A generator of one's own begins anew in a new process; the random streams do not cover it."""

    def make() -> tuple[dict[str, Any], Callable[[], None]]:
        generator = torch.Generator()
        state: dict[str, Any] = {"noise": torch.zeros(2)}
        return state, lambda: state["noise"].copy_(torch.randn(2, generator=generator))

    proof = prove_resume(make, steps=STEPS, more=MORE)
    assert (proof.cause, proof.also) == (OUTSIDE, ())
    assert proof.first is not None and proof.first.path == "noise"


def test_a_stream_that_nobody_saves_is_found(runs: bool) -> None:
    proof = prove_resume(toy, steps=STEPS, more=MORE, rng=False)
    assert not proof and proof.cause == OUTSIDE


def test_what_no_two_runs_have_in_common_is_told_apart(runs: bool) -> None:
    """A generator seeded by the system: the resume is not to blame."""

    def make() -> tuple[dict[str, Any], Callable[[], None]]:
        generator = random.SystemRandom()
        state: dict[str, Any] = {"x": 0.0}

        def step() -> None:
            state["x"] = generator.random()

        return state, step

    proof = prove_resume(make, steps=STEPS, more=MORE)
    assert proof.cause == NOT_REPEATABLE
    assert "seed every generator" in str(proof.difference)


def test_an_object_that_forgets_is_named(runs: bool) -> None:
    class Forgets:
        position = 0

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, int]) -> None: ...

    def make() -> tuple[dict[str, Any], Callable[[], None]]:
        made, loader = Toy(), Forgets()

        def step() -> None:
            made.step()
            loader.position += 1

        return {**made.state, "loader": loader}, step

    proof = prove_resume(make, steps=STEPS, more=MORE)
    assert proof.cause == NOT_RESTORED and proof.first is not None
    assert (proof.first.path, proof.first.a, proof.first.b) == ("loader.position", "4", "0")
    assert "load_state_dict" in str(proof.difference)


def test_a_difference_in_a_random_stream_is_named() -> None:
    def make() -> tuple[dict[str, Any], Callable[[], None]]:
        calls = [0]

        def step() -> None:
            calls[0] += 1
            if calls[0] == 1:  # a new process draws once more
                random.random()

        return {"x": 1}, step

    proof = prove_resume(make, steps=STEPS, more=MORE)
    assert proof.first is not None and proof.first.path.startswith("rng.python.")
    assert proof.cause == OUTSIDE


# ------------------------------------------------------------------------------------ what fails


def test_a_step_that_fails_is_said_with_its_place(tmp_path: Path) -> None:
    def make() -> tuple[dict[str, Any], Callable[[], None]]:
        def step() -> None:
            raise ValueError("no such word")

        return {"x": 1}, step

    with pytest.raises(HoldfastError, match=r"test_prove\.py:\d+: ValueError: no such word"):
        prove_resume(make, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_cannot_be_saved_says_so() -> None:
    with pytest.raises(UnsupportedValue, match=r"x is a builtins\.object"):
        prove_resume(lambda: ({"x": object()}, lambda: None))


def test_a_run_that_ends_itself_is_no_proof() -> None:
    with pytest.raises(HoldfastError, match="ended with status 0"):
        prove_resume(lambda: ({"x": 1}, lambda: os._exit(0)))


@pytest.mark.parametrize(("steps", "more"), [(0, 1), (1, 0)])
def test_there_must_be_steps_on_both_sides(steps: int, more: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        prove_resume(toy, steps=steps, more=more)
