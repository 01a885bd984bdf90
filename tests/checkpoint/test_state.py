"""Restoring a state: it fits and all of it is restored to the bit, or nothing has changed."""

from __future__ import annotations

import copy
import enum
import json
import random
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from holdfast import load
from holdfast.checkpoint.state.configured import Configured
from holdfast.checkpoint.state.randomness import RandomState
from holdfast.checkpoint.state.restore import plan_restore
from holdfast.errors import StateMismatch
from tests.support import assert_same, bits, snapshot, write_state

Point = namedtuple("Point", "x y")


def saved(state: Any, tmp_path: Path) -> dict[str, Any]:
    """What a checkpoint of `state` gives back: a true round trip through a file."""
    loaded: dict[str, Any] = load(write_state(tmp_path / "state.pt", state))
    return loaded


def restore(live: dict[str, Any], state: Any, tmp_path: Path, **options: Any) -> None:
    plan_restore(live, saved(state, tmp_path), **options).commit()


def recorded(state: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of what is configured in `state` now."""
    return {"configured": json.loads(json.dumps(Configured(state).record))}


def network(width: int = 4, seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(3, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 1)
    )


def trained(optimizer: type = torch.optim.AdamW, seed: int = 1, **options: Any) -> dict[str, Any]:
    """A model and an optimizer after three steps."""
    model = network(seed=seed)
    options = {"lr": 0.01, **options}
    state = {"model": model, "optimizer": optimizer(model.parameters(), **options)}
    for _step in range(3):
        train(state)
    return state


def train(state: dict[str, Any]) -> None:
    state["optimizer"].zero_grad()
    state["model"](torch.randn(5, 3)).square().mean().backward()
    state["optimizer"].step()
    if "scheduler" in state:
        state["scheduler"].step()


def unchanged(live: dict[str, Any], state: Any, words: list[str], **options: Any) -> None:
    """Restoring is refused with `words`, and the live state has not changed by a bit."""
    before, stream = snapshot(live), torch.get_rng_state()
    kept = {key: id(value) for key, value in live.items()}
    with pytest.raises(StateMismatch) as error:
        plan_restore(live, state, **options).commit()
    for word in words:
        assert word in str(error.value)
    assert_same(snapshot(live), before)
    assert {key: id(value) for key, value in live.items()} == kept
    assert torch.equal(torch.get_rng_state(), stream)


# ----------------------------------------------------------------------------------------- restored


OPTIMIZERS: list[tuple[type, dict[str, Any]]] = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.Adam, {"foreach": True}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {}),
    (torch.optim.Adagrad, {}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.NAdam, {}),
    (torch.optim.RAdam, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.Adamax, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.Rprop, {}),
    (torch.optim.Adafactor, {}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda v: getattr(v, "__name__", ""))
def test_training_goes_on_to_the_bit(kind: type, options: Any, tmp_path: Path) -> None:
    one = trained(kind, **options)
    file = saved({**one, "rng": RandomState()}, tmp_path)
    for _step in range(3):
        train(one)
    other = trained(kind, seed=99, **options)
    plan_restore(other, file).commit()
    torch.set_rng_state(file["rng"]["torch"])
    for _step in range(3):
        train(other)
    assert_same(snapshot(other), snapshot(one))


def test_an_optimizer_with_closures_and_lists_in_its_state(tmp_path: Path) -> None:
    def run(optimizer: torch.optim.LBFGS, weights: torch.Tensor) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (weights - torch.arange(4.0)).pow(4).sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    def make() -> tuple[torch.nn.Parameter, torch.optim.LBFGS]:
        weights = torch.nn.Parameter(torch.ones(4))
        return weights, torch.optim.LBFGS([weights], max_iter=3)

    one, first = make()
    run(first, one)
    file = saved({"w": one, "o": first}, tmp_path)
    run(first, one)
    other, second = make()
    plan_restore({"w": other, "o": second}, file).commit()
    run(second, other)
    assert bits(other) == bits(one)


def test_batch_norm_buffers_are_restored(tmp_path: Path) -> None:
    one, other = trained(), {"model": network(seed=5)}
    restore(other, one, tmp_path)
    assert bits(other["model"][1].running_mean) == bits(one["model"][1].running_mean)
    assert int(other["model"][1].num_batches_tracked) == 3


def test_live_objects_stay_the_objects_they_are(tmp_path: Path) -> None:
    live = trained(seed=7)
    parameters = list(live["model"].parameters())
    pointers = [p.data_ptr() for p in parameters]
    group = live["optimizer"].param_groups[0]
    restore(live, trained(), tmp_path)
    assert [p.data_ptr() for p in live["model"].parameters()] == pointers
    assert live["optimizer"].param_groups[0] is group
    assert group["params"][0] is parameters[0]


class Tied(torch.nn.Module):
    def __init__(self, seed: int = 0, *, tie: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        if tie:
            self.head.weight = self.embed.weight


def test_tied_weights_are_restored_and_stay_tied(tmp_path: Path) -> None:
    one, other = Tied(1), Tied(2)
    restore({"m": other}, {"m": one}, tmp_path)
    assert bits(other.embed.weight) == bits(one.embed.weight)
    assert other.head.weight is other.embed.weight


def test_weights_that_were_tied_when_saved_may_not_be_any_more(tmp_path: Path) -> None:
    one, other = Tied(1), Tied(2, tie=False)
    restore({"m": other}, {"m": one}, tmp_path)
    assert bits(other.embed.weight) == bits(one.embed.weight) == bits(other.head.weight)


def test_weights_that_are_tied_now_and_were_not_are_refused(tmp_path: Path) -> None:
    live, file = {"m": Tied(2)}, saved({"m": Tied(1, tie=False)}, tmp_path)
    unchanged(live, file, ["embed.weight", "head.weight", "two different ones"])


def test_a_model_and_views_of_it_are_restored_together(tmp_path: Path) -> None:
    """What one exchange has moved, another must not find in its own staged bytes."""

    class Keeper:
        """Saves the model's own tensors, and keeps those that it is given."""

        def __init__(self, model: torch.nn.Module) -> None:
            self.model, self.given = model, None

        def state_dict(self) -> dict[str, Any]:
            return {"weights": self.model.state_dict()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.model.load_state_dict(state["weights"])
            self.given = state["weights"]

    def make(seed: int) -> dict[str, Any]:
        model = network(seed=seed)
        return {
            "model": model,
            "view": model[0].weight.data[1:2],
            "keeper": Keeper(model),
            "best": None if seed else {"w": model[0].weight.data},
        }

    one, other = make(0), make(1)
    restore(other, one, tmp_path)
    for name, value in one["model"].state_dict().items():
        assert bits(other["model"].state_dict()[name]) == bits(value), name
        assert bits(other["keeper"].given[name]) == bits(value), name
    assert bits(other["view"]) == bits(one["view"])
    assert bits(other["best"]["w"]) == bits(one["best"]["w"])


def test_fp32_moments_of_bf16_weights_stay_fp32(tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        weights = torch.nn.Parameter(torch.randn(4, dtype=torch.bfloat16))
        optimizer = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
        optimizer.state[weights]["momentum_buffer"] = torch.randn(4)
        return {"w": weights, "o": optimizer}

    one, other = make(1), make(2)
    restore(other, one, tmp_path)
    moment = other["o"].state[other["w"]]["momentum_buffer"]
    assert moment.dtype is torch.float32
    assert bits(moment) == bits(one["o"].state[one["w"]]["momentum_buffer"])
    assert other["w"].dtype is torch.bfloat16


class WithExtra(torch.nn.Module):
    """Keeps something besides tensors, of any kind."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize(
    "extra", [{"n": 3}, 7, None, "text", torch.arange(5), [torch.ones(2)]], ids=str
)
def test_extra_state_of_modules_is_restored(extra: Any, tmp_path: Path) -> None:
    one = torch.nn.Sequential(WithExtra(extra), torch.nn.Linear(2, 2))
    other = torch.nn.Sequential(WithExtra(torch.zeros(9)), torch.nn.Linear(2, 2))
    restore({"m": other}, {"m": one}, tmp_path)
    assert_same(other[0].extra, extra)


def test_extra_state_goes_back_when_the_restore_fails(tmp_path: Path) -> None:
    live = {"m": WithExtra({"n": 1}), "last": Refuses()}
    unchanged(live, saved({"m": WithExtra({"n": 2}), "last": Refuses()}, tmp_path), ["last"])


class Scaled(torch.nn.Module):
    """Its `state_dict` gives tensors that are made for the occasion, not its own memory."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), value))

    def state_dict(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        return {"doubled": self.weight.detach() * 2}

    def load_state_dict(self, state: Any, *_args: Any, **_kwargs: Any) -> Any:
        self.weight.data.copy_(state["doubled"] / 2)


def test_a_module_with_a_state_dict_of_its_own_is_loaded_its_own_way(tmp_path: Path) -> None:
    live = {"m": Scaled(1.0)}
    restore(live, {"m": Scaled(4.0)}, tmp_path)
    assert live["m"].weight.tolist() == [4, 4, 4]


# ------------------------------------------------------------------------ settings that may change


def with_schedule(
    make: Callable[[Any], Any], lr: float = 0.1, seed: int = 1, **options: Any
) -> Any:
    model = network(seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **options)
    return {"model": model, "optimizer": optimizer, "scheduler": make(optimizer)}


def halving(optimizer: Any) -> Any:
    return LambdaLR(optimizer, lambda step: 0.5**step)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "lambda": halving,
    "warm-up": lambda o: LambdaLR(o, lambda step: min(1, step / 10)),
    "step": lambda o: StepLR(o, 2),
    "cosine": lambda o: CosineAnnealingLR(o, 20),
    "one cycle": lambda o: OneCycleLR(o, 0.5, total_steps=20),
    "sequential": lambda o: SequentialLR(o, [halving(o), ExponentialLR(o, 0.9)], [2]),
    "chained": lambda o: ChainedScheduler([halving(o), ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheduled_rate_is_restored_exactly(name: str, tmp_path: Path) -> None:
    began = with_schedule(SCHEDULES[name])
    configured = recorded(began)
    for _step in range(3):
        train(began)
    live = with_schedule(SCHEDULES[name], seed=9)
    restore(live, began, tmp_path, manifest=configured)
    for _step in range(5):
        assert_same(live["optimizer"].state_dict(), began["optimizer"].state_dict())
        assert live["scheduler"].get_last_lr() == began["scheduler"].get_last_lr()
        began["scheduler"].step()
        live["scheduler"].step()


@pytest.mark.parametrize("name", ["lambda", "step", "cosine", "sequential", "chained"])
def test_a_changed_rate_takes_effect_under_a_schedule(name: str, tmp_path: Path) -> None:
    """The rate goes on as if the run had been scheduled from the new rate all along."""
    began = with_schedule(SCHEDULES[name], lr=0.1)
    never = with_schedule(SCHEDULES[name], lr=0.3)
    configured = recorded(began)
    for _step in range(3):
        train(began)
        train(never)
    live = with_schedule(SCHEDULES[name], lr=0.3)
    restore(live, began, tmp_path, manifest=configured)
    for _step in range(4):
        assert live["scheduler"].get_last_lr() == pytest.approx(never["scheduler"].get_last_lr())
        now = live["optimizer"].param_groups[0]["lr"]
        assert now == pytest.approx(never["optimizer"].param_groups[0]["lr"])
        live["scheduler"].step()
        never["scheduler"].step()


def test_a_rate_that_a_plateau_has_lowered_is_restored(tmp_path: Path) -> None:
    def make(optimizer: Any) -> Any:
        return ReduceLROnPlateau(optimizer, patience=0)

    began = with_schedule(make)
    configured = recorded(began)
    for loss in (1.0, 2.0, 3.0):
        began["scheduler"].step(loss)
    live = with_schedule(make)
    restore(live, began, tmp_path, manifest=configured)
    assert live["optimizer"].param_groups[0]["lr"] == began["optimizer"].param_groups[0]["lr"]
    assert live["scheduler"].num_bad_epochs == began["scheduler"].num_bad_epochs


def test_a_changed_rate_takes_effect_without_a_schedule(tmp_path: Path) -> None:
    began = trained(lr=0.01)
    live = trained(lr=0.05)
    restore(live, began, tmp_path, manifest=recorded(began))
    assert live["optimizer"].param_groups[0]["lr"] == 0.05


def test_a_rate_that_the_loop_lowered_by_hand_is_restored(tmp_path: Path) -> None:
    began = trained(lr=0.01)
    configured = recorded(began)
    began["optimizer"].param_groups[0]["lr"] = 0.002
    live = trained(lr=0.01)
    restore(live, began, tmp_path, manifest=configured)
    assert live["optimizer"].param_groups[0]["lr"] == 0.002


def test_other_changed_settings_take_effect(tmp_path: Path) -> None:
    began = trained(weight_decay=0.1, betas=(0.9, 0.99))
    live = trained(weight_decay=0.2, betas=(0.8, 0.99), fused=True)
    restore(live, began, tmp_path, manifest=recorded(began))
    group = live["optimizer"].param_groups[0]
    assert (group["weight_decay"], group["betas"], group["fused"]) == (0.2, (0.8, 0.99), True)
    train(live)


def test_each_group_keeps_its_own_settings(tmp_path: Path) -> None:
    def make(second: float) -> dict[str, Any]:
        model = network()
        groups = [
            {"params": list(model[0].parameters())},
            {"params": list(model[1:].parameters()), "lr": second},
        ]
        return {"model": model, "optimizer": torch.optim.AdamW(groups, lr=0.1)}

    began = make(0.2)
    configured = recorded(began)
    began["optimizer"].param_groups[0]["lr"] = 0.05
    live = make(0.4)
    restore(live, began, tmp_path, manifest=configured)
    assert [group["lr"] for group in live["optimizer"].param_groups] == [0.05, 0.4]


def test_a_scheduler_that_was_added_or_dropped(tmp_path: Path) -> None:
    with_one, without = with_schedule(halving), trained()
    configured = recorded(with_one)
    train(with_one)
    restore(without, with_one, tmp_path, manifest=configured)
    assert without["optimizer"].param_groups[0]["lr"] == 0.01, "the user's, not the schedule's"
    live = with_schedule(halving)
    unchanged(live, saved(trained(), tmp_path), ["scheduler is not in the checkpoint"])
    restore(live, trained(), tmp_path, strict=False)


def test_rates_that_are_tensors(tmp_path: Path) -> None:
    began = trained(lr=torch.tensor(0.01))
    configured = recorded(began)
    began["optimizer"].param_groups[0]["lr"].fill_(0.003)
    live = trained(lr=torch.tensor(0.01))
    restore(live, began, tmp_path, manifest=configured)
    assert live["optimizer"].param_groups[0]["lr"].item() == pytest.approx(0.003)
    changed = trained(lr=torch.tensor(0.5))
    restore(changed, began, tmp_path, manifest=configured)
    assert isinstance(changed["optimizer"].param_groups[0]["lr"], torch.Tensor)
    assert changed["optimizer"].param_groups[0]["lr"].item() == 0.5
    plain = trained(lr=0.01)
    restore(plain, began, tmp_path, manifest=configured)
    assert plain["optimizer"].param_groups[0]["lr"] == pytest.approx(0.003)


@pytest.mark.parametrize("junk", [None, 7, [], {"optimizer": 7}, {"optimizer": [7]},
                                  {"optimizer": []}, {"optimizer": [{"lr": {}, "unsure": [[]]}]},
                                  {"optimizer": [{"initial_lr": "x", "lr": None}]},
                                  {"scheduler": [7]}, {"scheduler": [{"lr_lambdas": 7}]},
                                  {"scheduler": [{"base_lrs": {}, "T_max": []}]}])  # fmt: skip
def test_a_senseless_record_of_the_settings_is_ignored(junk: Any, tmp_path: Path) -> None:
    manifest = {"configured": junk, "parameters": junk}
    live = with_schedule(SCHEDULES["cosine"])
    restore(live, with_schedule(SCHEDULES["cosine"]), tmp_path, manifest=manifest)


def test_a_module_whose_state_has_numbers_for_names(tmp_path: Path) -> None:
    class Counted(torch.nn.Module):
        def state_dict(self, *_arguments: Any, **_options: Any) -> Any:
            return {7: 1, "module.x": 2}

        def load_state_dict(self, state: Any, *_arguments: Any, **_options: Any) -> Any:
            self.loaded = dict(state)

    live = {"m": Counted()}
    restore(live, {"m": Counted()}, tmp_path)
    assert live["m"].loaded == {7: 1, "module.x": 2}
    unchanged({"m": network()}, {"m": {7: torch.ones(1)}}, ["m/0.weight is not in the checkpoint"])


# ------------------------------------------------------------------------------------- plain values


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


def test_plain_values_are_put_back_in_place(tmp_path: Path) -> None:
    """A loop holds its lists and dictionaries under names of its own."""
    live: dict[str, Any] = {
        "step": 0, "best": None, "name": "new", "losses": [], "history": {"a": [], "gone": 1},
        "counts": defaultdict(int), "words": Counter(), "recent": deque(maxlen=3), "seen": set(),
        "point": Point(0, 0), "frozen": frozenset(), "level": Level.LOW, "number": np.float32(0),
        "array": np.zeros(3), "tuple": (), "raw": bytearray(), "only here": 5,
    }  # fmt: skip
    held = dict(live)
    inner = live["history"]["a"]
    state = {
        "step": 7, "best": 0.5, "name": "old", "losses": [1.0, 2.0],
        "history": {"a": [3], "b": [4]}, "counts": defaultdict(int, x=2), "words": Counter("aab"),
        "recent": deque([1, 2, 3]), "seen": {1}, "point": Point(1, 2), "frozen": frozenset({3}),
        "level": Level.HIGH, "number": np.float32(1.5), "array": np.arange(3.0), "tuple": (1, 2),
        "raw": bytearray(b"x"),
    }  # fmt: skip
    restore(live, state, tmp_path)
    for name in ("losses", "history", "counts", "words", "recent", "seen", "array", "raw"):
        assert live[name] is held[name], name
    assert live["history"]["a"] is inner
    assert live["recent"].maxlen == 3
    assert live["counts"]["missing"] == 0
    assert live["array"].tolist() == [0.0, 1.0, 2.0]
    live.pop("array")
    state.pop("array")
    live["counts"].pop("missing")
    assert live == {**state, "only here": 5}
    for name in ("point", "frozen", "level", "number", "tuple"):
        assert type(live[name]) is type(state[name]), name


def test_plain_values_of_another_kind_are_replaced(tmp_path: Path) -> None:
    live: dict[str, Any] = {"a": [1], "b": {"k": 1}, "c": None, "d": np.zeros(2), "e": 3}
    restore(
        live, {"a": 5, "b": [1], "c": {"x": torch.ones(2)}, "d": np.ones(7), "e": "x"}, tmp_path
    )
    assert (live["a"], live["b"], live["e"]) == (5, [1], "x")
    assert live["c"]["x"].tolist() == [1, 1]
    assert live["d"].tolist() == [1] * 7


def test_plain_values_go_back_when_the_restore_fails(tmp_path: Path) -> None:
    history, recent = {"a": [1]}, deque([1, 2], maxlen=2)
    live = {"h": history, "r": recent, "n": 1, "x": np.arange(3), "last": Refuses()}
    state = {"h": {"a": [2, 3], "b": 1}, "r": deque([5]), "n": 2, "x": np.zeros(3, int),
             "last": Refuses()}  # fmt: skip
    unchanged(live, saved(state, tmp_path), ["last"])
    assert history == {"a": [1]}
    assert list(recent) == [1, 2]
    assert live["x"].tolist() == [0, 1, 2]


# ------------------------------------------------------------------------------------------ nesting


def test_objects_at_any_depth_in_any_container(tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Any]:
        gen, disc = trained(seed=seed), trained(torch.optim.SGD, seed=seed + 1)
        return {
            "models": {"g": gen["model"], "d": [disc["model"]]},
            "optimizers": (gen["optimizer"], disc["optimizer"]),
            "ema": {k: v.clone() for k, v in gen["model"].state_dict().items()},
            "mixed": (3 + seed, {"n": seed, "t": torch.full((2,), float(seed))}),
            "counter": Count(seed),
        }

    one, other = make(1), make(5)
    first = other["optimizers"][0]
    tensor = other["ema"]["0.weight"]
    restore(other, one, tmp_path)
    assert_same(snapshot(other), snapshot(one))
    assert other["optimizers"][0] is first
    assert other["ema"]["0.weight"] is tensor
    assert other["counter"].n == 1


def test_optimizers_in_tuples_and_lists_keep_changed_settings(tmp_path: Path) -> None:
    def make(lr: float) -> dict[str, Any]:
        return {"o": (trained(lr=lr)["optimizer"], [trained(lr=lr)["optimizer"]])}

    began, live = make(0.1), make(0.7)
    restore(live, began, tmp_path, manifest=recorded(began))
    assert live["o"][0].param_groups[0]["lr"] == live["o"][1][0].param_groups[0]["lr"] == 0.7


class Count:
    def __init__(self, n: int = 0) -> None:
        self.n = n

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


class Refuses(Count):
    """Fails on what a checkpoint gives, after it has changed; takes its own state back."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        keep = self.n
        self.n = 99
        if getattr(self, "tried", False):
            self.n = state["n"]
            return
        self.tried = True
        assert keep != 99
        raise RuntimeError("not this one")


class Scaler(Count):
    """As torch's GradScaler: refuses an empty state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            raise RuntimeError("The source state dict is empty")
        super().load_state_dict(state)


def test_scalers(tmp_path: Path) -> None:
    live = {"scaler": Scaler(1), "real": torch.amp.GradScaler("cpu")}
    restore(live, {"scaler": Scaler(65536), "real": torch.amp.GradScaler("cpu")}, tmp_path)
    assert live["scaler"].n == 65536
    unchanged(live, {"scaler": {}, "real": live["real"].state_dict()}, ["scaler", "empty"])


# ------------------------------------------------------------------------- nothing fits, or changes


def test_every_difference_of_a_model_is_listed(tmp_path: Path) -> None:
    live = trained()
    other = network(width=6)
    other.more = torch.nn.Linear(1, 1, bias=False)
    del other[1]
    words = [
        "model/1.running_mean is not in the checkpoint",
        "model/0.weight is float32[6, 3] in the checkpoint and float32[4, 3] here",
        "and 1 more",
    ]
    file = saved({"model": other, "optimizer": trained()["optimizer"]}, tmp_path)
    unchanged(live, file, words)


def test_other_dtypes_and_shapes_are_refused(tmp_path: Path) -> None:
    live = {"t": torch.zeros(3), "u": torch.zeros(2, 2), "v": torch.zeros(1)}
    state = {"t": torch.zeros(3, dtype=torch.float64), "u": torch.zeros(4), "v": 1.0}
    words = ["t is float64[3]", "u is float32[4]", "v is no tensor"]
    unchanged(live, saved(state, tmp_path), words)


@pytest.mark.parametrize("strict", [True, False])
def test_what_is_missing(strict: bool, tmp_path: Path) -> None:
    live = {**trained(), "extra": Count(), "ema": {"w": torch.zeros(2)}, "n": 3}
    file = saved(trained(), tmp_path)
    if strict:
        words = ["extra is not in the checkpoint", "ema is not in the checkpoint"]
        unchanged(live, file, words)
    else:
        plan_restore(live, file, strict=False).commit()
    assert live["n"] == 3


def test_what_a_nested_group_has_too_much(tmp_path: Path) -> None:
    live = {"ema": {"a": torch.zeros(2)}, "o": [trained()["optimizer"]]}
    state = {
        "ema": {"a": torch.ones(2), "b": torch.ones(2)},
        "o": [trained()["optimizer"], trained()["optimizer"]],
        "dropped": Count(),
    }
    unchanged(live, saved(state, tmp_path), ["ema/b is only in the checkpoint"])


def test_optimizers_of_another_shape_are_refused(tmp_path: Path) -> None:
    live = trained()
    narrow = {"model": network(), "optimizer": trained()["optimizer"].state_dict()}
    for entry in narrow["optimizer"]["state"].values():
        entry["exp_avg"] = torch.zeros(1)
    unchanged(live, saved(narrow, tmp_path), ["optimizer/0/exp_avg is float32[1]"])
    fewer = torch.optim.AdamW(list(network().parameters())[:2])
    unchanged(live, saved({"model": network(), "optimizer": fewer}, tmp_path),
              ["optimizer has other parameter groups"])  # fmt: skip


@pytest.mark.parametrize("junk", [None, 7, [], {}, {"state": {}}, {"state": 7, "param_groups": []},
                                  {"state": {}, "param_groups": 7},
                                  {"state": {}, "param_groups": [7]},
                                  {"state": {}, "param_groups": [{}]},
                                  {"state": {}, "param_groups": [{"params": 7}]}],
                         ids=str)  # fmt: skip
def test_an_optimizer_state_that_is_none_is_refused(junk: Any) -> None:
    unchanged(trained(), {"model": network().state_dict(), "optimizer": junk}, ["optimizer"])


@pytest.mark.parametrize("junk", [None, 7, [], "text", torch.zeros(1)], ids=str)
def test_a_model_state_that_is_none_is_refused(junk: Any) -> None:
    live = {"model": network(), "inner": {"model": network()}}
    good = network().state_dict()
    unchanged(live, {"model": junk, "inner": {"model": good}}, ["model is no model"])
    unchanged(live, {"model": good, "inner": junk}, ["inner"])


def test_a_failure_of_the_last_object_takes_everything_back(tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Any]:
        state = with_schedule(halving, seed=seed)
        for _step in range(seed):
            train(state)
        return {
            **state, "ema": {"w": torch.full((3,), float(seed))}, "tied": Tied(seed),
            "count": Count(seed), "history": [seed], "extra": WithExtra({"n": seed}),
            "numpy": np.full(3, seed), "last": Refuses(seed),
        }  # fmt: skip

    unchanged(make(2), saved(make(3), tmp_path), ["last refused", "not this one"])


def test_an_interrupt_in_the_middle_takes_everything_back(tmp_path: Path) -> None:
    class Interrupts(Count):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            if state["n"] == 1:
                raise KeyboardInterrupt
            super().load_state_dict(state)

    live = {**trained(seed=3), "last": Interrupts(0)}
    before = snapshot(live)
    with pytest.raises(KeyboardInterrupt):
        restore(live, {**trained(), "last": Interrupts(1)}, tmp_path)
    assert_same(snapshot(live), before)


def test_an_object_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    class OneWay:
        def state_dict(self) -> dict[str, Any]:
            return {"n": 1}

    live = {"x": OneWay()}
    with pytest.raises(StateMismatch, match="no load_state_dict"):
        restore(live, {"x": OneWay()}, tmp_path)
    assert type(live["x"]) is OneWay


def test_expanded_buffers_are_restored(tmp_path: Path) -> None:
    class Positions(torch.nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.register_buffer("ids", torch.full((1, 3), value).expand(4, 3))

    live = {"m": Positions(0.0)}
    restore(live, {"m": Positions(2.0)}, tmp_path)
    assert live["m"].ids.tolist() == [[2.0] * 3] * 4


# --------------------------------------------------------------------------------------- randomness


def draws() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(),
            torch.rand(1).item()]  # fmt: skip


def test_all_random_streams_are_restored(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    draws()  # leaves half a pair of normal numbers in two of the streams
    path = write_state(tmp_path / "a.pt", {"rng": RandomState()})
    wanted = draws()
    draws()
    RandomState().load_state_dict(load(path)["rng"])
    assert draws() == wanted


def test_saving_a_random_stream_does_not_advance_it() -> None:
    before = [random.getstate(), torch.get_rng_state().tolist()]
    copy.deepcopy(RandomState().state_dict())
    assert [random.getstate(), torch.get_rng_state().tolist()] == before


def test_ordered_dictionaries_keep_their_order(tmp_path: Path) -> None:
    live = {"o": OrderedDict(a=1, b=2)}
    restore(live, {"o": OrderedDict(b=1, a=2)}, tmp_path)
    assert list(live["o"].items()) == [("b", 1), ("a", 2)]
