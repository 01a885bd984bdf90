"""Hooks of loading run at a resume, and a load that fails leaves nothing of them behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast import CheckpointManager
from holdfast.errors import StateMismatch
from tests.support import assert_same


class Table(nn.Module):
    """Keeps something that is made of its weights, in one of the ways that torch offers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("table", torch.empty(4), persistent=False)
        self.listed: list[float] = []
        self.refresh()

    def refresh(self) -> None:
        self.table.copy_(self.weight.detach().exp())
        self.listed = self.weight.tolist()

    def check(self) -> None:
        assert torch.equal(self.table, self.weight.detach().exp())
        assert self.listed == self.weight.tolist()


class PostHook(Table):
    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(lambda module, _keys: module.refresh())


class Override(Table):
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.refresh()


class WholeOverride(Table):
    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        result = super().load_state_dict(*args, **options)
        self.refresh()
        return result


class Extra(Table):
    def get_extra_state(self) -> Any:
        return {"listed": list(self.listed)}

    def set_extra_state(self, state: Any) -> None:
        self.listed = list(state["listed"])
        self.table = self.weight.detach().exp()


class Replaced(Table):
    """Makes a new tensor where the others write into theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(lambda module, _keys: module.refresh())

    def refresh(self) -> None:
        self.table = self.weight.detach().exp()
        self.listed = self.weight.tolist()


class Renames(PostHook):
    """Loads files of an older version, in which the weight had another name and form."""

    old = False

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(self._rename)
        self.register_state_dict_post_hook(self._as_old)

    @staticmethod
    def _rename(module: Any, state: Any, prefix: str, *_rest: Any) -> None:
        if f"{prefix}gain" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}gain").reshape(4)

    @staticmethod
    def _as_old(module: Any, state: Any, prefix: str, _metadata: Any) -> None:
        if module.old:
            state[f"{prefix}gain"] = state.pop(f"{prefix}weight").reshape(2, 2)


class Refuses:
    """Takes its own state and no other."""

    n = 0

    def state_dict(self) -> dict[str, int]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["n"] != self.n:
            raise ValueError("not mine")


MODULES = [PostHook, Override, WholeOverride, Extra, Replaced, Renames]


def wrapped(inner: nn.Module, wrap: bool) -> Any:
    if isinstance(inner, WholeOverride):  # torch calls it where it is the whole model
        return inner
    model = nn.Sequential(nn.BatchNorm1d(4), inner)
    return torch.compile(model, backend="eager") if wrap else model


@pytest.mark.parametrize("wrap", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("kind", MODULES)
def test_what_a_module_derives_fits_the_restored_weights(
    kind: Any, wrap: bool, tmp_path: Path
) -> None:
    first, second = kind(), kind()
    with CheckpointManager(tmp_path, {"model": wrapped(first, wrap)}) as manager:
        manager.save(step=1, strict=True)
    with CheckpointManager(tmp_path, {"model": wrapped(second, wrap)}) as manager:
        manager.resume()
    assert torch.equal(first.weight, second.weight)
    second.check()


@pytest.mark.parametrize("kind", MODULES)
def test_a_load_that_fails_leaves_nothing_of_hooks_behind(kind: Any, tmp_path: Path) -> None:
    """What fails comes after all hooks have run."""
    other = Refuses()
    other.n = 1
    with CheckpointManager(tmp_path, {"model": kind(), "z": other}) as manager:
        manager.save(step=1, strict=True)
    model = kind()
    before, table = model.weight.clone(), model.table
    with (
        CheckpointManager(tmp_path, {"model": model, "z": Refuses()}) as manager,
        pytest.raises(StateMismatch, match="not mine"),
    ):
        manager.resume()
    assert torch.equal(model.weight, before)
    assert model.table is table
    model.check()


def test_a_state_that_a_modules_hooks_convert_is_loaded(tmp_path: Path) -> None:
    first, second = Renames(), Renames()
    first.old = True
    with CheckpointManager(tmp_path, {"model": nn.Sequential(first)}) as manager:
        manager.save(step=1, strict=True)
    with CheckpointManager(tmp_path, {"model": nn.Sequential(second)}) as manager:
        manager.resume()
    assert torch.equal(first.weight, second.weight)
    second.check()


class Spoils(nn.Module):
    """Its hook changes its weight and its attributes, and fails then."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.register_load_state_dict_post_hook(self._spoil)

    @staticmethod
    def _spoil(module: Any, _keys: Any) -> None:
        module.weight.data.mul_(2)
        module.spoiled = True
        raise RuntimeError("spoiled")


def test_a_hook_that_fails_undoes_everything(tmp_path: Path) -> None:
    def build() -> dict[str, Any]:
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": Spoils()})
        optimizer = torch.optim.AdamW(model.parameters())
        model["a"](torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return {"optimizer": optimizer, "model": model}

    with CheckpointManager(tmp_path, build()) as manager:
        manager.save(step=1, strict=True)
    live = build()
    before = {k: v.clone() for k, v in live["model"].state_dict().items()}
    moments = {k: dict(v) for k, v in live["optimizer"].state_dict()["state"].items()}
    with (
        CheckpointManager(tmp_path, live) as manager,
        pytest.raises(StateMismatch, match=r"model refused its state .*spoiled"),
    ):
        manager.resume()
    assert_same(dict(live["model"].state_dict()), before)
    assert_same(live["optimizer"].state_dict()["state"], moments)
    assert not hasattr(live["model"]["b"], "spoiled")


def test_a_large_model_with_hooks_is_not_copied(tmp_path: Path) -> None:
    """The tensors that are exchanged are their own undo log, with hooks too."""

    class Watches(PostHook):
        def __init__(self) -> None:
            super().__init__()
            self.large = nn.Linear(64, 64)

    model = Watches()
    address = model.large.weight.data_ptr()
    with CheckpointManager(tmp_path, {"model": model}) as manager:
        manager.save(step=1, strict=True)
        copied: list[Any] = []
        clone = torch.Tensor.clone
        torch.Tensor.clone = lambda t, *a, **o: copied.append(t.shape) or clone(t, *a, **o)  # type: ignore[method-assign, assignment, func-returns-value]
        try:
            manager.resume()
        finally:
            torch.Tensor.clone = clone  # type: ignore[method-assign]
    assert model.large.weight.data_ptr() == address
    assert copied.count(torch.Size([64, 64])) == 1, "the scratch memory of the exchange"


# -------------------------------------------------------------------------------------- optimizers


class Derives(torch.optim.AdamW):
    """An optimizer that makes something of its groups when it is loaded."""

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.rates = [group["lr"] for group in self.param_groups]


def optimized(kind: Any = torch.optim.AdamW, lr: float = 0.1) -> dict[str, Any]:
    model = nn.Linear(2, 2)
    optimizer = kind(model.named_parameters(), lr=lr)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def test_the_hooks_of_an_optimizer_see_what_torch_shows_them(tmp_path: Path) -> None:
    first, second = optimized(), optimized()
    seen: list[Any] = []
    optimizer = second["optimizer"]
    optimizer.register_load_state_dict_pre_hook(lambda _o, state: seen.append(state))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    with CheckpointManager(tmp_path, first) as manager:
        first["optimizer"].param_groups[0]["lr"] = 0.025
        manager.save(step=1, strict=True)
    with CheckpointManager(tmp_path, second) as manager:
        manager.resume()
    assert_same(seen[0], first["optimizer"].state_dict())
    assert seen[1] == 0.025


def test_setstate_of_an_optimizer_is_called(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, optimized()) as manager:
        manager.save(step=1, strict=True)
    live = optimized(Derives)
    with CheckpointManager(tmp_path, live) as manager:
        manager.resume()
    assert live["optimizer"].rates == [0.1]


def test_a_hook_that_maps_the_slots_itself_is_believed(tmp_path: Path) -> None:
    """As torch's documentation advises, in place or as a new dictionary."""

    def in_place(_optimizer: Any, state: Any) -> None:
        state["state"][0], state["state"][1] = state["state"][1], state["state"][0]

    def anew(_optimizer: Any, state: Any) -> Any:
        entries = state["state"]
        return {**state, "state": {0: entries[1], 1: entries[0]}}

    def square() -> dict[str, Any]:
        model = nn.ParameterList([torch.ones(2), torch.full((2,), 2.0)])
        optimizer = torch.optim.AdamW(model.parameters())
        (model[0] + 3 * model[1]).sum().backward()
        optimizer.step()
        return {"model": model, "optimizer": optimizer}

    first = square()
    with CheckpointManager(tmp_path, first) as manager:
        manager.save(step=1, strict=True)
    for hook in (in_place, anew):
        live = square()
        live["optimizer"].register_load_state_dict_pre_hook(hook)
        with CheckpointManager(tmp_path, live) as manager:
            manager.resume()
        mine, theirs = ([s["optimizer"].state[p] for p in s["model"]] for s in (live, first))
        assert_same(mine, theirs[::-1])


@pytest.mark.parametrize("when", ["pre", "post"])
def test_a_hook_of_an_optimizer_that_fails_undoes_everything(when: str, tmp_path: Path) -> None:
    def spoil(optimizer: Any, *_state: Any) -> None:
        optimizer.param_groups[0]["lr"] = 9.0
        optimizer.spoiled = True
        optimizer.state.clear()
        raise RuntimeError("spoiled")

    with CheckpointManager(tmp_path, optimized(lr=0.3)) as manager:
        manager.save(step=1, strict=True)
    live = optimized(lr=0.1)
    optimizer = live["optimizer"]
    getattr(optimizer, f"register_load_state_dict_{when}_hook")(spoil)
    weights = {k: v.clone() for k, v in live["model"].state_dict().items()}
    before = optimizer.state_dict()
    with (
        CheckpointManager(tmp_path, live) as manager,
        pytest.raises(StateMismatch, match="spoiled"),
    ):
        manager.resume()
    assert_same(optimizer.state_dict(), before)
    assert_same(dict(live["model"].state_dict()), weights)
    assert not hasattr(optimizer, "spoiled")


class Narrow(Table):
    """Its own `state_dict` takes no arguments; torch's would."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(lambda module, _keys: module.refresh())

    def state_dict(self) -> Any:  # type: ignore[override]
        return super().state_dict()


def test_a_module_with_a_state_dict_of_its_own(tmp_path: Path) -> None:
    first, second = Narrow(), Narrow()
    with CheckpointManager(tmp_path, {"model": first}) as manager:
        manager.save(step=1, strict=True)
    with CheckpointManager(tmp_path, {"model": second}) as manager:
        manager.resume()
    assert torch.equal(first.weight, second.weight)
    second.check()
