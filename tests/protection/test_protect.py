"""`protect` as its callers meet it: values, calls that are refused, ends, and what it says."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import signal
import subprocess
import sys
from collections import OrderedDict, deque, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast import EverySteps, load
from holdfast.errors import ConfigError, SaveFailed, StateMismatch, UnsupportedValue
from tests.protection.loops import start
from tests.support import Toy, after, assert_same, bits, snapshot

Batch = namedtuple("Batch", "x y")


@dataclasses.dataclass
class Schedule:
    noise: float
    history: list[int]


def protect(directory: Path, toy: Toy, **options: Any) -> holdfast.Protected:
    return holdfast.protect(directory, **toy.state, **options)


def train(directory: Path, toy: Toy, steps: int, **options: Any) -> holdfast.Protected:
    run = protect(directory, toy, **options)
    step = run.resume(0)
    while step < steps:
        toy.step()
        step += 1
        run.step(step)
    run.close()
    return run


# -------------------------------------------------------------------------------------- values

VALUES: list[Any] = [
    None,
    True,
    2**70,
    -0.0,
    float("inf"),
    3 + 4j,
    "三步",
    b"",
    np.float32(1.1),
    np.int64(7),
    np.array([[1.5, 2.5]]),
    np.array(3, dtype=np.int8),
    torch.arange(6).reshape(2, 3)[:, 1:],
    torch.tensor(2.0, dtype=torch.bfloat16),
    torch.ones(2, requires_grad=True),
    (1, torch.zeros(2), None),
    [1, [2, (3,)]],
    {"a": 1, 2: torch.ones(1), "holdfast": "mine"},
    OrderedDict(b=1, a=2),
    deque([1, 2], 5),
    {1, 2},
    frozenset({"x"}),
    Batch(torch.arange(3), [1.0]),
    Schedule(0.5, [1, 2]),
    torch.float16,
]


def test_values_come_back_by_value_and_type_whatever_the_loop_begins_with(tmp_path: Path) -> None:
    toy = Toy()
    run = protect(tmp_path, toy)
    run.resume(0, *VALUES)
    toy.step()
    run.step(1, *VALUES)
    run.close()
    others = [torch.zeros(4), *[None] * (len(VALUES) - 1)]
    step, *found = protect(tmp_path, Toy(seed=3)).resume(0, *others)
    assert step == 1
    for value, there in zip(VALUES, found, strict=True):
        assert type(there) is type(value)
        if isinstance(value, torch.Tensor):
            assert (there.dtype, there.shape, bits(there)) == (
                value.dtype, value.shape, bits(value)
            )  # fmt: skip
            assert there.requires_grad == value.requires_grad
        elif isinstance(value, np.ndarray):
            assert (there.dtype, there.tolist()) == (value.dtype, value.tolist())
        else:
            assert repr(there) == repr(value)


def test_a_batch_that_is_a_view_of_the_data_set_is_not_written_to(tmp_path: Path) -> None:
    data = torch.arange(10.0)
    for batch in (data[:4], data[4:8]):
        toy = Toy()
        run = protect(tmp_path, toy)
        step, found = run.resume(0, batch)
        toy.step()
        run.step(step + 1, found)
        run.close()
    assert data.tolist() == [*map(float, range(10))]
    assert found.tolist() == [0, 1, 2, 3]


def test_one_value_is_returned_as_itself_and_none_as_an_empty_tuple(tmp_path: Path) -> None:
    train(tmp_path, Toy(), 3)
    assert protect(tmp_path, Toy()).resume(0) == 3
    assert protect(tmp_path / "other", Toy()).resume() == ()


# ------------------------------------------------------------------------------- refused calls


def test_mistakes_are_answered_in_words_at_the_call(tmp_path: Path) -> None:
    toy = Toy()
    run = protect(tmp_path, toy)
    with pytest.raises(ConfigError, match=r"Call run.resume\(...\) before"):
        run.step(1)
    with pytest.raises(UnsupportedValue, match="loop/1 is a "):
        run.resume(0, sys.stdout)
    run.resume(0, None)
    with pytest.raises(ConfigError, match=r"given 2 values and now there are 1"):
        run.step(1)
    with pytest.raises(ConfigError, match=r"run.step\(0\) comes after step 0"):
        run.step(0, None)
    with pytest.raises(ConfigError, match="no whole step"):
        run.save()
    toy.step()
    run.step(1, None)
    with pytest.raises(ConfigError, match=r"run.step\(1\) comes after step 1"):
        run.step(1, None)
    toy.step()
    with pytest.raises(ConfigError, match="no whole step"):
        run.save()
    run.close()
    with pytest.raises(StateMismatch, match="resume was given 3 values, and 2 were saved"):
        protect(tmp_path, toy).resume(0, 1, 2)
    with pytest.raises(ConfigError, match="loop is a name of a checkpoint's own"):
        holdfast.protect(tmp_path, loop=1)
    with pytest.raises(ConfigError, match="also is a list of objects"):
        holdfast.protect(tmp_path, also=toy)


# --------------------------------------------------------------------------- epochs and saves


def test_an_epoch_that_was_ended_is_not_trained_again(tmp_path: Path) -> None:
    """Two steps an epoch, and a draw at its end, as a validation makes."""

    def epochs(toy: Toy, number: int, directory: Path) -> list[tuple[int, int]]:
        run, seen = protect(directory, toy), []
        step = run.resume(0)
        for epoch in range(run.epoch, number):
            for _batch in range(2):
                toy.step()
                step += 1
                run.step(step)
                seen.append((epoch, step))
            run.end_epoch(val_loss=float(torch.rand(())) + 1 - epoch)
        run.close()
        return seen

    whole = Toy()
    assert epochs(whole, 3, tmp_path / "whole") == [(0, 1), (0, 2), (1, 3), (1, 4), (2, 5), (2, 6)]
    assert epochs(Toy(), 1, tmp_path / "run") == [(0, 1), (0, 2)]
    toy = Toy(seed=5)
    assert epochs(toy, 3, tmp_path / "run") == [(1, 3), (1, 4), (2, 5), (2, 6)]
    assert_same(snapshot(toy.state), snapshot(whole.state))
    assert (tmp_path / "run" / "model_epoch_3.pt").samefile(tmp_path / "run" / "best_model.pt")


def test_a_save_is_that_of_the_step_before_it_whatever_is_drawn_meanwhile(tmp_path: Path) -> None:
    """An evaluation at the top of the loop is done again after a resume, with the same draws."""
    toy = Toy()
    run = protect(tmp_path, toy)
    run.resume(0)
    toy.step()
    run.step(1)
    torch.rand(5)
    saved = run.save(val_loss=0.5)
    assert saved is not None
    assert (saved.entry.step, saved.is_best) == (1, True)
    run.close()
    toy = Toy(seed=9)
    train(tmp_path, toy, 3)
    assert toy.losses == after(3).losses


# ---------------------------------------------------------------------- what no state_dict has


@dataclasses.dataclass
class Momentum:
    average: torch.Tensor | None = None
    clock: int = 0


class Memory(nn.Module):
    """Fast weights, momenta and a clock in plain attributes, as in published code."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)
        self.fast, self.constant = torch.zeros(3, 3), torch.ones(3)
        self.levels: dict[str, Momentum] = {}
        self.generator = torch.Generator().manual_seed(1)
        self.optimizer = torch.optim.Adam(self.parameters())

    def step(self) -> None:
        level = self.levels.setdefault("slow", Momentum())
        x = torch.randn(2, 3, generator=self.generator)
        level.clock += 1
        level.average = x.mean(0) if level.average is None else level.average.lerp(x.mean(0), 0.1)
        self.fast += torch.outer(level.average, level.average) / level.clock
        self.optimizer.zero_grad()
        (self.layer(x) @ self.fast).square().mean().backward()
        self.optimizer.step()

    def everything(self) -> Any:
        slow = self.levels["slow"]
        return snapshot([self.fast, slow.average, slow.clock, self, self.optimizer])


def remember(directory: Path, memory: Memory, steps: int, *, also: bool) -> None:
    run = holdfast.protect(
        directory, model=memory, optimizer=memory.optimizer,
        also=[memory] if also else [], save_when=[EverySteps(2)],
    )  # fmt: skip
    for step in range(run.resume(0), steps):
        memory.step()
        run.step(step + 1)
    run.close()


def test_tensors_that_no_state_dict_has_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "holdfast"):
        remember(tmp_path, Memory(), 7, also=False)
    lines = [line for line in caplog.messages if "no state_dict has" in line]
    assert len(lines) == 1
    assert "model.fast, model.levels['slow'].average. Give" in lines[0]


def test_what_is_given_as_also_is_restored_in_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Memory()
    for _step in range(8):
        whole.step()
    with caplog.at_level(logging.WARNING, "holdfast"):
        remember(tmp_path, Memory(), 5, also=True)
    assert "no state_dict has" not in caplog.text
    memory = Memory()
    fast = memory.fast
    remember(tmp_path, memory, 8, also=True)
    assert memory.fast is fast
    assert_same(memory.everything(), whole.everything())
    weights = load(tmp_path / "latest.pt", only="model")
    assert set(weights) == {"layer.weight", "layer.bias"}


@pytest.mark.parametrize("grads", [True, False])
def test_gradients_that_an_optimizer_has_used_are_saved_where_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, grads: bool
) -> None:
    """A loop that never sets them to zero: the gradient is the sum of all."""

    def accumulate(toy: Toy, directory: Path, steps: int) -> None:
        run = protect(directory, toy, grads=grads)
        for step in range(run.resume(0), steps):
            toy.model(torch.randn(4, 3)).square().mean().backward()
            toy.optimizer.step()
            run.step(step + 1)
        run.close()

    whole = Toy()
    accumulate(whole, tmp_path / "whole", 6)
    with caplog.at_level(logging.WARNING, "holdfast"):
        caplog.clear()
        accumulate(Toy(), tmp_path / "run", 3)
    assert ("grads=True" in caplog.text) is not grads
    toy = Toy(seed=4)
    accumulate(toy, tmp_path / "run", 6)
    assert torch.equal(toy.model.weight, whole.model.weight) is grads


# ------------------------------------------------------------------------------ ends and words

SCRIPT = """
import sys, threading, torch, holdfast
from concurrent.futures import ThreadPoolExecutor
torch.manual_seed(0)
model = torch.nn.Linear(3, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def train():
    run = holdfast.protect(sys.argv[1], model=model, optimizer=optimizer)
    for step in range(run.resume(0), 5):
        optimizer.zero_grad()
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
        run.step(step + 1)
"""


def ended(tmp_path: Path, end: str) -> tuple[int, str]:
    """Run the script in a Python of its own: its status and what it says."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + end, tmp_path / "run"],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "HOLDFAST_LANG": "zh"},
    )  # fmt: skip
    return done.returncode, done.stderr


def test_an_exception_of_the_script_leaves_its_last_step(tmp_path: Path) -> None:
    status, said = ended(tmp_path, "train()\nraise ZeroDivisionError")
    assert status == 1
    assert load(tmp_path / "run" / "latest.pt", only="global_step") == 5
    assert "ZeroDivisionError" in said
    assert "💾 第 5 步已落盘" in said, "in the language of the environment"
    assert "异常" in said


def test_sys_exit_leaves_the_last_step(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT + "train()\nsys.exit(3)")
    script = start(path, tmp_path / "run")
    assert script.end() == 3, script.stderr
    assert load(tmp_path / "run" / "latest.pt", only="global_step") == 5
    assert script.stderr.count("step 5 is durable") == 1


def test_a_thread_that_trains_on_behind_the_main_one_is_waited_for(tmp_path: Path) -> None:
    status, said = ended(tmp_path, "threading.Thread(target=train).start()")
    assert (status, "Traceback" in said) == (0, False), said
    assert load(tmp_path / "run" / "latest.pt", only="global_step") == 5


def test_a_process_that_forks_leaves_the_training_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        SCRIPT + "import os, multiprocessing\ntrain()\n"
        "child = multiprocessing.get_context('fork').Process(target=print)\n"
        "child.start(); child.join(); assert child.exitcode == 0\n"
    )
    script = start(path, tmp_path / "run")
    assert script.end() == 0, script.stderr
    assert script.stderr.count("is durable") == 1


def test_quiet_says_nothing_of_saves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "a", Toy(), 3, quiet=True)
    assert capfd.readouterr().err == ""
    train(tmp_path / "b", Toy(), 3)
    assert capfd.readouterr().err.count("\n") == 1


def test_a_cell_that_is_run_again_takes_over_and_loses_nothing_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy = Toy()
    first = protect(tmp_path, toy, memory_every=1)
    step = first.resume(0)
    while step < 3:
        toy.step()
        step += 1
        first.step(step)
    first.manager.wait_for_copy()
    in_memory = first.manager.memory_step
    toy = Toy(seed=6)
    second = protect(tmp_path, toy)
    assert "goes on in its place" in caplog.text
    assert second.resume(0) == in_memory
    with pytest.raises(SaveFailed, match="newer manager"):
        first.step(step + 1)
    second.close()


def test_a_signal_when_no_step_has_come_for_long_ends_the_process_with_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the loop, say: nothing would read the flag."""
    monkeypatch.setattr("holdfast.checkpoint.manager._IDLE", 0.0)
    monkeypatch.setattr("holdfast.checkpoint.manager._IDLE_STEPS", 0)
    run = protect(tmp_path, toy := Toy())
    run.resume(0)
    toy.step()
    run.step(1)
    with pytest.raises(SystemExit) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        copy.copy(0)  # a handler runs between two instructions
    run.close(caught.value)
    assert caught.value.code == 128 + signal.SIGTERM
    assert load(tmp_path / "latest.pt", only="global_step") == 1
