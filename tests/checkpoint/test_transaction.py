"""Acts that can be taken back: after a failure, at whatever moment, everything is as it was."""

from __future__ import annotations

import copy
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from holdfast.checkpoint.state import transaction
from holdfast.checkpoint.state.transaction import (
    Exchange,
    LoadObject,
    LoadOptimizer,
    Refill,
    Transaction,
)
from holdfast.errors import StateMismatch
from tests.support import assert_same, bits


class Boom:
    """An act that fails."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def commit(self) -> None:
        raise self._error

    def undo(self) -> None:
        pass


class Fragile:
    """An object whose `load_state_dict` does half of its work and then fails, always."""

    def __init__(self) -> None:
        self.value = 1

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]
        raise KeyError("the other half")


def test_all_acts_happen() -> None:
    a, d = torch.zeros(3), {"k": 1}
    Transaction([Exchange([(a, torch.ones(3))]), Refill(d, {"k": 2})]).commit()
    assert (a.tolist(), d) == ([1, 1, 1], {"k": 2})


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit()])
def test_or_none(error: BaseException) -> None:
    a, d, numbers = torch.zeros(3), {"k": 1}, [1, 2]
    acts = [Exchange([(a, torch.ones(3))]), Refill(d, {"k": 2}), Refill(numbers, [3])]
    with pytest.raises(type(error)):
        Transaction([*acts, Boom(error)]).commit()
    assert (a.tolist(), d, numbers) == ([0, 0, 0], {"k": 1}, [1, 2])


def test_an_object_that_cannot_go_back_does_not_keep_the_others() -> None:
    a, fragile = torch.zeros(3), Fragile()
    acts = [Exchange([(a, torch.ones(3))]), LoadObject(fragile, {"value": 2}, "custom")]
    with pytest.raises(StateMismatch, match=r"custom refused .*KeyError.*nothing was changed"):
        Transaction(acts).commit()
    assert a.tolist() == [0, 0, 0]
    assert fragile.value == 1


def test_an_interrupt_while_undoing_is_raised_when_everything_is_back() -> None:
    class Interrupted(Boom):
        times = 0

        def undo(self) -> None:
            self.times += 1
            raise KeyboardInterrupt

    a, last = torch.zeros(3), Interrupted(RuntimeError("first"))
    with pytest.raises(KeyboardInterrupt) as error:
        Transaction([Exchange([(a, torch.ones(3))]), last]).commit()
    assert a.tolist() == [0, 0, 0]
    assert isinstance(error.value.__context__, RuntimeError)
    assert last.times == 3


# ---------------------------------------------------------------------------------------- exchange


def layouts() -> dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    def pair(shape: Any, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        count = int(torch.tensor(shape).prod())
        return (
            torch.arange(count).to(dtype).view(shape),
            -torch.arange(count).to(dtype).view(shape),
        )

    def transposed() -> tuple[torch.Tensor, torch.Tensor]:
        live, staged = pair((4, 5))
        return live.t(), staged.t().contiguous()

    def staged_transposed() -> tuple[torch.Tensor, torch.Tensor]:
        live, staged = pair((4, 5))
        return live.t().contiguous(), staged.t()

    def expanded() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([1.0]).expand(3, 4), torch.tensor([2.0]).expand(3, 4)

    def live_expanded() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([1.0]).expand(3, 4), torch.full((3, 4), 2.0)

    def staged_expanded() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(3, 4), torch.tensor([2.0]).expand(3, 4)

    return {
        "flat": lambda: pair((7,)),
        "scalar": lambda: (torch.tensor(1.0), torch.tensor(2.0)),
        "matrix": lambda: pair((3, 4)),
        "large": lambda: pair((2_500_001,)),
        "integers": lambda: pair((5,), torch.int64),
        "bfloat16": lambda: pair((5,), torch.bfloat16),
        "booleans": lambda: (torch.tensor([True, False]), torch.tensor([False, True])),
        "channels last": lambda: (
            pair((2, 3, 4, 5))[0].to(memory_format=torch.channels_last),
            pair((2, 3, 4, 5))[1],
        ),
        "every other": lambda: (pair((10,))[0][::2], pair((5,))[1]),
        "transposed": transposed,
        "staged transposed": staged_transposed,
        "expanded": expanded,
        "live expanded": live_expanded,
        "staged expanded": staged_expanded,
    }


@pytest.mark.parametrize("name", layouts())
def test_an_exchange_is_exact_and_undone_exactly(name: str) -> None:
    live, staged = layouts()[name]()
    before, wanted = bits(live), bits(staged)
    act = Exchange([(live, staged)])
    act.commit()
    assert bits(live) == wanted
    act.undo()
    assert bits(live) == before


def test_parameters_are_changed_in_place() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    alias = parameter.data
    Exchange([(parameter, torch.ones(3))]).commit()
    assert alias.tolist() == [1, 1, 1]
    assert parameter.requires_grad


def test_an_interrupt_between_any_two_lines_is_undone() -> None:
    """Ctrl-C may come anywhere: here it comes after every single line of an exchange in turn."""

    def run(stop_at: int) -> bool:
        live = [torch.full((2,), float(i)) for i in range(3)]
        act = Exchange([(tensor, torch.full((2,), -9.0)) for tensor in live])
        lines = 0

        def trace(frame: FrameType, event: str, _arg: Any) -> Any:
            nonlocal lines
            if frame.f_code is not Exchange.commit.__code__:
                return None
            if event == "line":
                lines += 1
                if lines == stop_at:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            Transaction([act]).commit()
        except KeyboardInterrupt:
            sys.settrace(before)
            assert [t.tolist() for t in live] == [[i, i] for i in range(3)], stop_at
            return False
        finally:
            sys.settrace(before)
            torch.set_grad_enabled(True)  # a trace can also stop between no_grad() and its end
        assert [t.tolist() for t in live] == [[-9, -9]] * 3
        return True

    stopped = 1
    while not run(stopped):
        stopped += 1
    assert stopped > 15, "every line of three exchanges"


def test_large_tensors_are_exchanged_with_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transaction, "EXCHANGE_ELEMENTS", 100)
    live, staged = torch.arange(1000), -torch.arange(1000)
    copies: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **kwargs or {})
            if func is torch.ops.aten.clone.default:
                copies.append(result.numel())
            return result

    with Watch():
        Exchange([(live, staged)]).commit()
    assert max(copies) == 100
    assert live.tolist() == (-torch.arange(1000)).tolist()
    assert staged.tolist() == list(range(1000))


# -------------------------------------------------------------------------------------- containers


@pytest.mark.parametrize(
    ("container", "content"),
    [
        ([1, 2], [3]),
        ({"a": 1}, {"b": 2}),
        (defaultdict(list, a=[1]), {"b": [2]}),
        (Counter("aab"), {"c": 5}),
        (OrderedDict(a=1), {"b": 2}),
        (deque([1, 2], maxlen=2), [3, 4]),
        ({1, 2}, {3}),
        (bytearray(b"ab"), b"xyz"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_container_is_refilled_and_stays_the_object_it_is(container: Any, content: Any) -> None:
    before = copy.deepcopy(container)
    act = Refill(container, content)
    act.commit()
    assert sorted(container) == sorted(content)
    assert not isinstance(content, dict) or dict(container) == content
    act.undo()
    assert container == before
    assert list(container) == list(before), "in the same order"


def test_acts_that_never_began_are_undone_without_harm() -> None:
    for act in (Refill([1], [2]), LoadObject(Fragile(), {}, "x")):
        act.undo()
    assert Exchange([]).undo() is None


# --------------------------------------------------------------------------------------- optimizer


def test_an_optimizer_goes_back_to_exactly_what_it_was() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    held = optimizer.param_groups[0]
    state, inner = optimizer.state_dict(), optimizer.state[parameter]
    groups = [{"lr": 9.0, "initial_lr": 9.0, "new": True}]
    act = LoadOptimizer(optimizer, "optimizer")
    act.state, act.groups = {parameter: {"step": torch.tensor(7.0)}}, groups
    act.commit()
    assert held["lr"] == 9.0, "the group is changed in place: schedulers hold it"
    act.undo()
    assert_same(optimizer.state_dict(), state)
    assert optimizer.state[parameter] is inner
    assert optimizer.param_groups[0] is held
    assert "new" not in held
    assert "initial_lr" not in held
