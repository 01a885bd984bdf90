"""Gradients in progress are part of a state; those that an optimizer has used are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast import CheckpointManager, load
from holdfast.checkpoint.state import gradients
from holdfast.checkpoint.state.transaction import Transaction
from holdfast.errors import StateMismatch, UnsupportedValue
from tests.support import assert_same, snapshot


class Levels(torch.optim.Optimizer):
    """Steps its second group every third time only, and keeps those gradients meanwhile."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.1})
        self.state["count"] = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.state["count"] += 1
        for every, group in zip((1, 3), self.param_groups, strict=True):
            for parameter in group["params"]:
                if parameter.grad is not None and self.state["count"] % every == 0:
                    parameter.add_(parameter.grad, alpha=-group["lr"])
                    parameter.grad = None


class Training:
    """Four micro-batches a step; its second layer sees every other one only."""

    def __init__(self, *, levels: bool = False, to_none: bool = True) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        groups = [{"params": layer.parameters()} for layer in self.model]
        self.optimizer: torch.optim.Optimizer = (
            Levels(groups) if levels else torch.optim.Adam(groups, lr=0.1, weight_decay=0.1)
        )
        self.levels, self.to_none = levels, to_none
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "done": 0}

    def micro_batch(self) -> None:
        torch.manual_seed(self.state["done"])
        hidden = self.model[0](torch.randn(2, 3))
        if self.state["done"] % 2:
            hidden = self.model[1](hidden)
        hidden.square().mean().backward()
        self.state["done"] += 1
        if self.levels:
            self.optimizer.step()
        elif self.state["done"] % 4 == 0:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=self.to_none)

    def manager(self, directory: Path) -> CheckpointManager:
        return CheckpointManager(directory, self.state)


@pytest.mark.parametrize("options", [{}, {"levels": True}, {"to_none": False}], ids=str)
@pytest.mark.parametrize("stop", range(1, 9))
def test_a_save_after_any_micro_batch_is_gone_on_from_to_the_bit(
    tmp_path: Path, options: dict[str, bool], stop: int
) -> None:
    straight, first, second = (Training(**options) for _each in range(3))
    for _each in range(13):
        straight.micro_batch()
    with first.manager(tmp_path) as manager:
        for _each in range(stop):
            first.micro_batch()
        manager.save(step=stop, strict=True)
    with second.manager(tmp_path) as manager:
        manager.resume()
        for _each in range(13 - stop):
            second.micro_batch()
    assert_same(snapshot(straight.state), snapshot(second.state))


def names_in(directory: Path) -> set[str]:
    return set(load(directory / "latest.pt").get("gradients", {}))


def test_only_what_no_optimizer_has_used_is_saved(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    with CheckpointManager(tmp_path, {"model": model, "optimizer": optimizer}) as manager:
        model(torch.ones(1, 2)).sum().backward()
        manager.save(step=1, strict=True)
        assert names_in(tmp_path) == {"model/weight", "model/bias"}
        optimizer.step()
        manager.save(step=2, strict=True)
        assert names_in(tmp_path) == set(), "used, though not zeroed yet"
        model(torch.ones(1, 2)).sum().backward()
        manager.save(step=3, strict=True)
        assert names_in(tmp_path) == {"model/weight", "model/bias"}, "added to what was used"
        assert torch.equal(load(tmp_path / "latest.pt")["gradients"]["model/weight"],
                           model.weight.grad)  # type: ignore[arg-type] # fmt: skip


def test_zeroed_gradients_take_no_room_and_come_back_as_zeros(tmp_path: Path) -> None:
    def make() -> tuple[nn.Linear, dict[str, Any]]:
        model = nn.Linear(512, 512)
        return model, {"model": model}

    model, state = make()
    with CheckpointManager(tmp_path, state) as manager:
        bare = manager.save(step=1, strict=True)
        model(torch.ones(1, 512)).sum().backward()
        model.zero_grad(set_to_none=False)
        zeroed = manager.save(step=2, strict=True)
    assert bare is not None
    assert zeroed is not None
    assert zeroed.entry.size - bare.entry.size < 20_000
    model, state = make()
    with CheckpointManager(tmp_path, state) as manager:
        manager.resume()
    assert model.weight.grad is not None
    assert model.weight.grad.is_contiguous()
    assert not model.weight.grad.any()


def test_gradients_of_a_way_that_is_given_up_are_gone(tmp_path: Path) -> None:
    training = Training()
    with training.manager(tmp_path) as manager:
        manager.save(step=1, strict=True)
        training.micro_batch()
        manager.resume()
    assert all(parameter.grad is None for parameter in training.model.parameters())


def test_a_restore_that_fails_leaves_gradients_as_they_are() -> None:
    class Refusing:
        def commit(self) -> None:
            raise ValueError

        def undo(self) -> None: ...

    training = Training()
    training.micro_batch()
    before = [parameter.grad for parameter in training.model.parameters()]
    saved = {"model/1.bias": torch.ones(3)}
    with pytest.raises(ValueError):
        Transaction([gradients.plan(training.state, saved), Refusing()]).commit()
    assert all(a is p.grad for a, p in zip(before, training.model.parameters(), strict=True))


def test_what_is_wrapped_now_finds_its_gradients(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = nn.Linear(2, 1)
    with CheckpointManager(tmp_path, {"m": Wrapper(model)}) as manager:
        model(torch.ones(1, 2)).sum().backward()
        manager.save(step=1, strict=True)
    assert names_in(tmp_path) == {"m/weight", "m/bias"}


def test_gradients_that_have_no_place_are_refused(tmp_path: Path) -> None:
    def parameter() -> torch.Tensor:
        return torch.ones(2, requires_grad=True)

    first = {"a": parameter(), "b": parameter()}
    with CheckpointManager(tmp_path, first) as manager:
        (first["a"] * first["b"]).sum().backward()
        manager.save(step=1, strict=True)
    with (
        CheckpointManager(tmp_path, {"a": parameter()}) as manager,
        pytest.raises(StateMismatch, match="gradient of b has no place here"),
    ):
        manager.resume()
    part = {"a": parameter()}
    with CheckpointManager(tmp_path, part) as manager:
        assert manager.resume(strict=False) is not None
    assert_same(part["a"].grad, first["a"].grad)


def test_a_key_of_that_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedValue, match="'gradients'"):
        CheckpointManager(tmp_path, {"gradients": 1})
