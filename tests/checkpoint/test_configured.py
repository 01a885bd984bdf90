"""Which settings a resume takes from the user and which from the checkpoint: one rule for all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from holdfast import CheckpointManager
from holdfast.errors import StateMismatch

Make = Callable[[Any, int], Any]


def transformers_schedule(name: str) -> Make:
    def make(optimizer: Any, total: int) -> Any:
        from transformers import get_scheduler

        return get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=total)

    return make


def warm_then(then: Make) -> Make:
    def make(optimizer: Any, total: int) -> Any:
        parts = [lrs.LinearLR(optimizer, 0.1, total_iters=2), then(optimizer, total - 2)]
        return lrs.SequentialLR(optimizer, parts, [2])

    return make


class Linear:
    """A callable object, whose attributes torch saves with the schedule."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __call__(self, step: int) -> float:
        return max(0.0, 1 - step / self.total)


class Stranger(lrs.LRScheduler):
    def __init__(self, optimizer: Any, horizon: int) -> None:
        self.horizon = horizon
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [base / (1 + self.last_epoch / self.horizon) for base in self.base_lrs]


def cosine(optimizer: Any, total: int) -> Any:
    return lrs.CosineAnnealingLR(optimizer, total, eta_min=0.01)


# Schedules that are made for a length, or by another setting that a user may raise.
SCHEDULES: dict[str, Make] = {
    "lambda": lambda o, n: lrs.LambdaLR(o, lambda step: 1 - step / n),
    "callable object": lambda o, n: lrs.LambdaLR(o, Linear(n)),
    "multiplicative": lambda o, n: lrs.MultiplicativeLR(o, lambda _step: 1 - 1 / n),
    "step": lambda o, n: lrs.StepLR(o, n // 5),
    "multi-step": lambda o, n: lrs.MultiStepLR(o, [n // 5, n // 2, n - 1]),
    "constant": lambda o, n: lrs.ConstantLR(o, 0.5, n // 2),
    "linear": lambda o, n: lrs.LinearLR(o, 1.0, 0.1, n),
    "exponential": lambda o, n: lrs.ExponentialLR(o, 0.1 ** (1 / n)),
    "polynomial": lambda o, n: lrs.PolynomialLR(o, n, 2.0),
    "cosine": cosine,
    "restarts": lambda o, n: lrs.CosineAnnealingWarmRestarts(o, n // 5, 2),
    "cyclic": lambda o, n: lrs.CyclicLR(o, 0.01, 0.1, n // 5, cycle_momentum=True),
    "one cycle": lambda o, n: lrs.OneCycleLR(o, 0.3, total_steps=n + 1),
    "three phases": lambda o, n: lrs.OneCycleLR(o, 0.3, total_steps=n + 1, three_phase=True),
    "averaging": lambda o, n: SWALR(o, 0.02, anneal_epochs=n),
    "sequential": warm_then(cosine),
    "sequence in a sequence": lambda o, n: lrs.SequentialLR(
        o, [warm_then(cosine)(o, n), lrs.ExponentialLR(o, 0.9)], [n - 5]
    ),
    "chained": lambda o, n: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, 0.5, 3), lrs.ExponentialLR(o, 0.1 ** (1 / n))]
    ),
    "chained sequence": lambda o, n: lrs.ChainedScheduler(
        [warm_then(cosine)(o, n), lrs.ConstantLR(o, 0.5, 3)]
    ),
    "stranger": Stranger,
    "of transformers, linear": transformers_schedule("linear"),
    "of transformers, cosine": transformers_schedule("cosine"),
    "of transformers, polynomial": transformers_schedule("polynomial"),
    "of transformers, restarts": transformers_schedule("cosine_with_restarts"),
}  # fmt: skip

FUNCTIONS = {"lambda", *(name for name in SCHEDULES if "transformers" in name)}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Training:
    """A loop over one schedule; `rates` are the settings of each of its steps."""

    def __init__(self, make: Make, total: int, **options: Any) -> None:
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        options = {"lr": 0.1, "momentum": 0.9, **options}
        self.optimizer = torch.optim.SGD(model.parameters(), **options)
        self.state = {"model": model, "optimizer": self.optimizer,
                      "scheduler": make(self.optimizer, total)}  # fmt: skip
        self.rates: dict[int, tuple[Any, ...]] = {}
        self.told: list[str] = []

    def manager(self, run: Path) -> CheckpointManager:
        def on_event(event: str, fields: dict[str, Any]) -> None:
            if event == "configured":
                self.told += fields["changes"]

        return CheckpointManager(run, self.state, on_event=on_event)

    def go(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            group = self.optimizer.param_groups[0]
            self.rates[step] = (float(group["lr"]), group["momentum"])
            self.optimizer.zero_grad()
            self.state["model"](torch.ones(1, 2)).sum().backward()
            self.optimizer.step()
            self.state["scheduler"].step()

    def begin(self, run: Path, until: int, *, late: bool = False) -> None:
        """Train and save; `late`: the manager is made after some steps."""
        first = until // 2 if late else 0
        self.go(0, first)
        with self.manager(run) as manager:
            if not late:
                manager.resume()
            self.go(first, until)
            manager.save(step=until, strict=True)

    def resume(self, run: Path) -> int:
        with self.manager(run) as manager:
            resumed = manager.resume()
        assert resumed is not None
        return resumed.step


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_is_as_it_was_goes_on_to_the_bit(
    name: str, late: bool, tmp_path: Path
) -> None:
    make = SCHEDULES[name]
    never = Training(make, 20)
    never.go(0, 18)
    first, second = Training(make, 20), Training(make, 20)
    first.begin(tmp_path, 7, late=late)
    second.go(second.resume(tmp_path), 18)
    assert first.rates | second.rates == never.rates
    assert second.told == []


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "multiplicative"])
def test_a_schedule_that_is_made_longer_takes_effect(name: str, late: bool, tmp_path: Path) -> None:
    make = SCHEDULES[name]
    longer = Training(make, 40)
    longer.go(0, 38)
    Training(make, 20).begin(tmp_path, 7, late=late)
    second = Training(make, 40)
    second.go(second.resume(tmp_path), 38)
    wanted = {step: rates for step, rates in longer.rates.items() if step >= 7}
    if late and name in FUNCTIONS:  # what they were before is not known: they act from here on
        del second.rates[7], wanted[7]
    else:
        assert second.told
    for step, rates in wanted.items():
        assert second.rates[step] == pytest.approx(rates), step


def test_a_schedule_that_is_too_short_now_is_refused_in_words(tmp_path: Path) -> None:
    Training(SCHEDULES["one cycle"], 20).begin(tmp_path, 15)
    second = Training(SCHEDULES["one cycle"], 10)
    before = second.optimizer.state_dict()
    with pytest.raises(StateMismatch, match="scheduler cannot go on after 15 steps"):
        second.resume(tmp_path)
    assert second.optimizer.state_dict() == before


def test_a_schedule_that_has_begun_before_the_resume_takes_its_new_settings(
    tmp_path: Path,
) -> None:
    """Both are late here: from the new settings on it goes on where the saved one was."""
    Training(SCHEDULES["callable object"], 20).begin(tmp_path, 6, late=True)
    second = Training(SCHEDULES["callable object"], 40)
    second.go(0, 3)
    second.go(second.resume(tmp_path), 10)
    assert second.rates[7][0] == pytest.approx(0.1 * (1 - 7 / 40))


def test_restarts_that_are_stepped_in_fractions(tmp_path: Path) -> None:
    def train(length: int, begin: int) -> tuple[Training, list[float]]:
        training = Training(lambda o, n: lrs.CosineAnnealingWarmRestarts(o, n, 2), length)
        begin = training.resume(tmp_path) if begin else begin
        rates = []
        for step in range(begin, begin + 7):
            rates.append(training.optimizer.param_groups[0]["lr"])
            training.state["scheduler"].step((step + 1) / 4)
        return training, rates

    first, _rates = train(3, 0)
    with first.manager(tmp_path) as manager:
        manager.save(step=7, strict=True)
    _second, rates = train(5, 7)
    fresh = Training(lambda o, n: lrs.CosineAnnealingWarmRestarts(o, n, 2), 5)
    fresh.state["scheduler"].step(7 / 4)
    assert rates[0] == pytest.approx(fresh.optimizer.param_groups[0]["lr"])


def plateau(optimizer: Any, patience: int) -> Any:
    return lrs.ReduceLROnPlateau(optimizer, patience=patience)


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
def test_a_plateau_keeps_what_it_has_lowered_and_takes_a_new_patience(
    late: bool, tmp_path: Path
) -> None:
    first = Training(plateau, 0)
    manager = None if late else first.manager(tmp_path)
    for loss in (1.0, 2.0, 3.0):
        first.state["scheduler"].step(loss)
    with manager or first.manager(tmp_path) as manager:
        manager.save(step=3, strict=True)
    second = Training(plateau, 4)
    second.resume(tmp_path)
    assert second.optimizer.param_groups[0]["lr"] == first.optimizer.param_groups[0]["lr"] < 0.01
    assert second.state["scheduler"].patience == 4
    assert second.state["scheduler"].best == 1.0
    assert second.told == ["scheduler: patience 0 → 4"]


# -------------------------------------------------------------------------------------- optimizers


class Plain:
    """An optimizer alone; its loop lowers the rate by hand."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        options = {"lr": 0.1, **options}
        groups = [
            {"params": list(self.model[0].parameters())},
            {"params": list(self.model[1].parameters()), "lr": options["lr"] / 2},
        ]
        self.optimizer = torch.optim.SGD(groups, **options)
        self.told: list[str] = []

    @property
    def rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            group["lr"] /= 2

    def manager(self, run: Path) -> CheckpointManager:
        state = {"model": self.model, "optimizer": self.optimizer}

        def on_event(event: str, fields: dict[str, Any]) -> None:
            if event == "configured":
                self.told += fields["changes"]

        return CheckpointManager(run, state, on_event=on_event)


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
def test_a_rate_that_the_loop_has_lowered_by_hand_stays_lowered(late: bool, tmp_path: Path) -> None:
    first = Plain()
    manager = None if late else first.manager(tmp_path)
    first.train()
    with manager or first.manager(tmp_path) as manager:
        first.train()
        manager.save(step=2, strict=True)
    second = Plain()
    with second.manager(tmp_path) as manager:
        manager.resume()
    assert second.rates == first.rates == [0.025, 0.0125]
    assert second.told == []


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
def test_a_rate_that_the_user_has_changed_takes_effect_and_is_told(
    late: bool, tmp_path: Path
) -> None:
    first = Plain()
    manager = None if late else first.manager(tmp_path)
    first.train()
    with manager or first.manager(tmp_path) as manager:
        manager.save(step=1, strict=True)
    second = Plain(lr=0.4, weight_decay=0.01)
    with second.manager(tmp_path) as manager:
        manager.resume()
        manager.save(step=2, strict=True)
    assert second.rates[0] == 0.4
    assert second.optimizer.param_groups[0]["weight_decay"] == 0.01
    assert "optimizer: lr 0.1 → 0.4" in second.told
    assert "optimizer: weight_decay 0 → 0.01" in second.told
    third = Plain(lr=0.4, weight_decay=0.01)
    with third.manager(tmp_path) as manager:
        manager.resume()
    assert third.told == [], "it is the saved one now"


def test_a_rate_set_between_the_manager_and_the_resume_is_the_users(tmp_path: Path) -> None:
    with Plain().manager(tmp_path) as manager:
        manager.save(step=1, strict=True)
    second = Plain()
    with second.manager(tmp_path) as manager:
        second.optimizer.param_groups[0]["lr"] = 0.7
        manager.resume()
    assert second.rates == [0.7, 0.05]


def test_going_back_brings_back_the_rate_of_then(tmp_path: Path) -> None:
    """In one process, over a change that the user has made, too."""
    with Plain().manager(tmp_path) as manager:
        manager.save(step=1, strict=True)
    training = Plain(lr=0.4)
    with training.manager(tmp_path) as manager:
        manager.resume()
        training.train()
        manager.save(step=2, strict=True)
        training.train()
        manager.save(step=3, strict=True)
        training.train()
        manager.go_back(4, "diverged")
        assert training.rates == [0.1, 0.05]
        manager.go_back(3, "diverged")
        assert training.rates == [0.2, 0.1]
        manager.go_back(2, "diverged")
        assert training.rates == [0.4, 0.2], "what the user wants, over what was saved before"


def test_a_group_that_was_added_in_training_is_as_it_was_saved(tmp_path: Path) -> None:
    def with_another(lr: float) -> Plain:
        training, extra = Plain(), torch.nn.Linear(1, 1)
        training.model.append(extra)
        if lr != 0.3:
            training.optimizer.add_param_group({"params": [*extra.parameters()], "lr": lr})
        return training

    first = with_another(0.3)
    with first.manager(tmp_path) as manager:
        manager.save(step=1, strict=True)
        new = [*first.model[2].parameters()]
        first.optimizer.add_param_group({"params": new, "lr": 0.3})
        first.train()
        manager.save(step=2, strict=True)
    second = with_another(0.9)
    with second.manager(tmp_path) as manager:
        manager.resume()
    assert second.rates == first.rates == [0.05, 0.025, 0.15]


# ---------------------------------------------------------------------------------------- wrappers


class Accelerated(torch.optim.Optimizer):
    """An optimizer in another one, as Accelerate wraps them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def defaults(self) -> Any:
        return self.optimizer.defaults

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.optimizer.load_state_dict(state)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class Shared:
    """An object over an optimizer's own attributes, as Fabric wraps them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.__dict__ = {k: v for k, v in vars(optimizer).items() if k not in ("step",)}
        self.optimizer = optimizer

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.optimizer.load_state_dict(state)

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


class Scheduled:
    """A scheduler in an object, as Accelerate wraps them."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def state_dict(self) -> Any:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.scheduler.load_state_dict(state)

    def step(self) -> None:
        self.scheduler.step()


@pytest.mark.parametrize("wrap", [Accelerated, Shared])
def test_what_is_configured_inside_of_wrappers_takes_effect(wrap: Any, tmp_path: Path) -> None:
    def make(total: int, lr: float) -> Training:
        training = Training(cosine, total, lr=lr)
        training.state["optimizer"] = wrap(training.optimizer)
        training.state["scheduler"] = Scheduled(training.state["scheduler"])
        return training

    longer = Training(cosine, 40, lr=0.4)
    longer.go(0, 30)
    make(20, 0.1).begin(tmp_path, 5)
    second = make(40, 0.4)
    second.go(second.resume(tmp_path), 30)
    for step in range(5, 30):
        assert second.rates[step] == pytest.approx(longer.rates[step])
    assert second.told == ["optimizer: lr 0.1 → 0.4", "scheduler: T_max 20 → 40"]


class Lookahead:
    """A wrapper with state of its own is no mere wrapper."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.slow = optimizer, 0

    def state_dict(self) -> Any:
        return {**self.optimizer.state_dict(), "slow": self.slow}

    def load_state_dict(self, state: Any) -> None:
        self.slow = state["slow"]
        self.optimizer.load_state_dict(state)


def test_a_wrapper_with_state_of_its_own_gets_it_back(tmp_path: Path) -> None:
    for slow in (7, 0):
        training = Plain()
        outer = Lookahead(training.optimizer)
        outer.slow = slow
        with CheckpointManager(tmp_path, {"m": training.model, "o": outer}) as manager:
            if slow:
                manager.save(step=1, strict=True)
            else:
                manager.resume()
    assert outer.slow == 7


class OwnFormat(torch.optim.SGD):
    """An optimizer that loads itself."""

    def load_state_dict(self, state_dict: Any) -> None:
        self.loaded = True
        super().load_state_dict(state_dict)


def test_the_rule_holds_for_optimizers_that_load_themselves(tmp_path: Path) -> None:
    for lr in (0.1, 0.4):
        model = torch.nn.Linear(1, 1)
        optimizer = OwnFormat(model.parameters(), lr=lr, momentum=0.9)
        with CheckpointManager(tmp_path, {"m": model, "o": optimizer}) as manager:
            if lr == 0.1:
                manager.save(step=1, strict=True)
            else:
                manager.resume()
    assert optimizer.loaded
    assert optimizer.param_groups[0]["lr"] == 0.4
