"""A loop with Accelerate that is killed and started again is to the bit what it would have been."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch._dynamo  # imported by prepare(): once here and not in every process
from torch.utils.data import DataLoader

import holdfast
from holdfast.errors import ConfigError
from tests.adapters.exactness import SCRIPTS, mutant, same, trained
from tests.adapters.scripts.small import Data, loader
from tests.support import assert_same

LOOP = SCRIPTS / "accelerate_loop.py"
# Steps are made at the batches 2, 5, 8, 9 of an epoch of ten.
ENDS = ["SIGKILL batch 7", "SIGKILL batch 13", "SIGTERM batch 16", "SIGKILL epoch 1"]


def test_killed_it_is_bit_identical_and_what_is_not_registered_is_missed(tmp_path: Path) -> None:
    """In an accumulation, after a save, at an epoch's end."""
    straight = trained(LOOP, tmp_path / "straight")
    same(trained(LOOP, tmp_path / "killed", workers=2, ends=ENDS), straight)
    script = mutant(LOOP, tmp_path, ("accelerator.register_for_checkpointing(average)\n", ""))
    with pytest.raises(AssertionError, match=r"batch \d, .* was .* and is"):
        same(trained(script, tmp_path / "mutant", ends=ENDS[:1]), straight)


@pytest.mark.slow
def test_killed_fifty_times_it_is_bit_identical(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    places = sorted(random.Random(seed).sample(range(5, 195), 50))
    ends = [f"SIGKILL batch {place}" for place in places]
    straight = trained(LOOP, tmp_path / "straight", epochs=20)
    same(trained(LOOP, tmp_path / "killed", epochs=20, workers=seed % 3, ends=ends), straight)


@pytest.fixture
def accelerator() -> Iterator[accelerate.Accelerator]:
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(accelerator: Any, data: Any = None) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3)
    optimizer = torch.optim.Adam(model.parameters())
    return accelerator.prepare(model, optimizer, data if data is not None else loader(0))


def test_parts_are_saved_under_plain_names_and_a_loop_without_accelerate_reads_them(
    tmp_path: Path, accelerator: Any
) -> None:
    model, optimizer, data = prepared(accelerator)
    other = accelerator.prepare(torch.nn.Linear(2, 2))
    run = holdfast.protect(tmp_path, quiet=True, accelerator=accelerator, mine=torch.ones(2))
    run.resume(0)
    loss = model(next(iter(data))[0]).sum() + other(torch.ones(2)).sum()
    accelerator.backward(loss)
    optimizer.step()
    run.step(1)
    run.close()
    saved = holdfast.load(tmp_path / "latest.pt")
    assert {"model", "model_1", "optimizer", "loader", "mine"} <= saved.keys()
    plain = torch.nn.Linear(6, 3)
    plain.load_state_dict(saved["model"])
    assert_same(plain.state_dict(), accelerator.unwrap_model(model).state_dict())
    own = torch.optim.Adam(plain.parameters())
    run = holdfast.protect(tmp_path / "plain", quiet=True, model=plain, optimizer=own)
    assert run.manager.resume(tmp_path / "latest.pt", strict=False) is not None
    run.close()
    assert_same(own.state_dict()["state"], optimizer.optimizer.state_dict()["state"])


def test_a_changed_learning_rate_takes_effect_in_a_prepared_optimizer(
    tmp_path: Path, accelerator: Any
) -> None:
    model, optimizer, data = prepared(accelerator)
    run = holdfast.protect(tmp_path, quiet=True, accelerator=accelerator)
    run.resume(0)
    model(next(iter(data))[0]).sum().backward()
    optimizer.step()
    run.step(1)
    run.close()
    again = accelerate.Accelerator(cpu=True)
    model, optimizer, data = prepared(again)
    optimizer.param_groups[0]["lr"] = 0.5
    run = holdfast.protect(tmp_path, quiet=True, accelerator=again)
    assert run.resume(0) == 1
    assert optimizer.param_groups[0]["lr"] == optimizer.optimizer.param_groups[0]["lr"] == 0.5
    assert data.position == 1
    run.close()


def test_what_cannot_be_exact_is_refused_at_the_call(tmp_path: Path, accelerator: Any) -> None:
    with pytest.raises(ConfigError, match=r"after accelerator\.prepare"):
        holdfast.protect(tmp_path, accelerator=accelerator)
    prepared(accelerator, DataLoader(Data(), batch_size=4))
    with pytest.raises(ConfigError, match=r"ResumableLoader\(loader\)"):
        holdfast.protect(tmp_path, accelerator=accelerator)
