"""Ends of somebody's training loop: clean, by a signal, by an exception, with the interpreter."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import CheckpointManager, EverySteps, load
from holdfast.checkpoint.system.signals import Stopped
from holdfast.errors import ConfigError
from tests.support import Toy, after, assert_same, events, in_child, snapshot


def newest(directory: Path) -> int:
    return int(load(directory / "latest.pt", only="global_step"))


def start(code: str, *args: str | Path) -> subprocess.Popen[str]:
    """Python code in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- clean


def test_a_clean_end_saves_the_last_step(tmp_path: Path) -> None:
    """A resume from it is, to the bit, as if the training had never ended."""
    toy = Toy()
    with toy.manager(tmp_path, save_when=[EverySteps(5)]) as engine:
        engine.resume()
        for _step in range(7):
            toy.step()
            engine.after_step(toy.now)
        torch.randn(5), random.random()  # an evaluation at the end draws as it likes
    assert events(tmp_path)[-2]["reason"] == "end"
    toy = Toy(seed=3)
    with toy.manager(tmp_path) as engine:
        assert engine.resume() is not None
        while toy.now < 9:
            toy.step()
        engine.save(step=9)
    assert_same(snapshot(toy.state), snapshot(after(9).state))


def test_what_the_disk_has_is_not_saved_again(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, save_when=[EverySteps(2)]) as engine:
        for _step in range(4):
            toy.step()
            engine.after_step(toy.now)
    durable = [e["step"] for e in events(tmp_path) if e["event"] == "durable"]
    assert durable == sorted(set(durable))
    assert durable[-1] == 4


def test_a_loop_that_counts_anew_in_each_epoch_keeps_its_end(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, rng=False) as engine:
        for _epoch in range(2):
            for step in range(1, 4):
                toy.step()
                engine.after_step(step)
            if _epoch == 0:
                engine.save(step=3)
    assert load(tmp_path / "latest.pt", only="losses") == toy.losses


def test_a_step_that_was_begun_and_not_told_is_not_saved_as_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy = Toy()
    with caplog.at_level(logging.WARNING, "holdfast"):
        engine = toy.manager(tmp_path)
        for _step in range(3):
            toy.step()
            engine.save_async(step=toy.now)
        toy.step()
        engine.close()
    assert newest(tmp_path) == 3
    assert_same(load(tmp_path / "latest.pt", only="losses"), toy.losses[:3])
    assert "training has gone on after step 3" in caplog.text


def test_the_optimizer_of_another_training_does_not_count(tmp_path: Path) -> None:
    toy, other = Toy(), Toy(seed=4)
    with toy.manager(tmp_path) as engine:
        toy.step()
        engine.after_step(1)
        other.step()
    assert newest(tmp_path) == 1


def test_without_saving_a_close_only_gives_back(tmp_path: Path) -> None:
    toy = Toy()
    engine = toy.manager(tmp_path)
    toy.step()
    engine.after_step(1)
    engine.close(save=False)
    assert not list(tmp_path.rglob("*.pt"))


# ---------------------------------------------------------------------------------- an exception


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("memory_every", [0, 1])
def test_after_an_exception_the_newest_whole_step_is_durable(
    tmp_path: Path, memory_every: int, begun: bool
) -> None:
    """`begun`: the optimizer has begun the next step. Then only memory has a whole one."""
    toy = Toy()
    told = list[str]()
    with pytest.raises(RuntimeError, match="out of memory"), toy.manager(
        tmp_path, save_when=[EverySteps(4)], memory_every=memory_every,
        on_event=lambda event, _fields: told.append(event),
    ) as engine:  # fmt: skip
        engine.resume()
        for _step in range(6):
            toy.step()
            engine.after_step(toy.now)
        expected = snapshot(toy.state)
        torch.randn(3)
        if begun:
            toy.step()
        raise RuntimeError("CUDA out of memory")
    memory = memory_every and "memory_off" not in told
    assert newest(tmp_path) == (6 if memory or not begun else 4)
    if newest(tmp_path) == 6:
        again = Toy(seed=8)
        with again.manager(tmp_path) as engine:
            engine.resume()
            assert_same(snapshot(again.state), expected)
            again.step()
        assert again.losses == after(7).losses, "random streams are those after the step"


def test_an_exception_before_the_first_step_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Toy().manager(tmp_path):
        raise ZeroDivisionError
    assert not list(tmp_path.rglob("*.pt"))


def test_the_exception_is_seen_though_nothing_can_be_saved_any_more(tmp_path: Path) -> None:
    from tests.support import Broken

    broken = Broken()
    with pytest.raises(ZeroDivisionError), CheckpointManager(tmp_path, {"x": broken}) as engine:
        engine.after_step(1)
        broken.error = RuntimeError("the GPU has failed")
        raise ZeroDivisionError
    with CheckpointManager(tmp_path, {"x": Broken()}) as engine:
        assert engine.resume() is None, "and the directory is free again"


# --------------------------------------------------------------------------------------- signals

LOOP = """
    import sys, time, torch
    from holdfast import CheckpointManager, EverySteps
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    with CheckpointManager(sys.argv[1], state, save_when=[EverySteps(1000)]) as manager:
        resumed = manager.resume()
        for step in range(resumed.step + 1 if resumed else 1, 500):
            optimizer.zero_grad()
            model(torch.randn(2, 3)).sum().backward()
            optimizer.step()
            time.sleep(0.02)
            print(step, flush=True)
            manager.after_step(step)
"""


def test_a_process_that_is_told_to_end_saves_its_step(tmp_path: Path) -> None:
    process = start(LOOP, tmp_path / "run")
    assert process.stdout is not None
    for line in process.stdout:
        if line == "5\n":
            process.terminate()
    _out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    step = newest(tmp_path / "run")
    assert 5 <= step < 499
    assert f"Stopped at step {step}; step {step} is durable." in error
    assert "Traceback" not in error


def trained(directory: Path, number: int, handler: Any = None) -> int:
    """Train in a forked process that gets signal `number` in its third step; its exit status."""

    def work() -> None:
        if handler is not None:
            signal.signal(number, handler)
        toy = Toy()
        with toy.manager(directory) as engine:
            for _step in range(6):
                toy.step()
                if toy.now == 3:
                    os.kill(os.getpid(), number)
                engine.after_step(toy.now)

    pid = os.fork()
    if pid == 0:
        status = 0
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            work()
        except SystemExit as error:
            status = int(error.code or 0)
        except BaseException:  # noqa: BLE001 - the parent is told by the exit status
            status = 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_lets_the_step_be_finished_and_saved(tmp_path: Path, name: str) -> None:
    number = getattr(signal, name)
    assert trained(tmp_path, number) == 128 + number
    assert load(tmp_path / "latest.pt", only="losses") == after(3).losses


def test_a_handler_that_was_there_is_called_as_well(tmp_path: Path) -> None:
    def mine(_number: int, _frame: Any) -> None:
        (tmp_path / "mine").touch()

    assert trained(tmp_path / "run", signal.SIGUSR1, mine) == 128 + signal.SIGUSR1
    assert newest(tmp_path / "run") == 3
    assert (tmp_path / "mine").exists()


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    assert trained(tmp_path, signal.SIGHUP, signal.SIG_IGN) == 0
    assert newest(tmp_path) == 6


def test_ctrl_c_is_a_keyboard_interrupt_for_the_loop(tmp_path: Path) -> None:
    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        toy = Toy()
        with pytest.raises(KeyboardInterrupt) as caught, toy.manager(tmp_path) as engine:
            toy.step()
            engine.after_step(1)
            os.kill(os.getpid(), signal.SIGINT)
            toy.step()
            engine.after_step(2)
            raise AssertionError("not stopped")
        assert isinstance(caught.value, Stopped)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    assert in_child(work) == 0
    assert newest(tmp_path) == 2


def test_a_signal_after_the_last_step_ends_the_process_when_all_is_saved(tmp_path: Path) -> None:
    def work() -> None:
        toy = Toy()
        with pytest.raises(SystemExit) as caught, toy.manager(tmp_path) as engine:
            toy.step()
            engine.after_step(1)
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.code == 143

    assert in_child(work) == 0
    assert newest(tmp_path) == 1


def test_a_loop_that_tells_no_steps_is_ended_by_a_signal_as_ever(tmp_path: Path) -> None:
    """Nothing would look at a flag."""

    def work() -> None:
        with Toy().manager(tmp_path) as engine:
            engine.save(step=1)
            os.kill(os.getpid(), signal.SIGTERM)

    assert in_child(work) == -signal.SIGTERM


# --------------------------------------------------------------------- the end of the interpreter

AT_EXIT = """
    import {first}
    import sys, threading, time, torch
    {before}
    from holdfast import CheckpointManager
    manager = CheckpointManager(sys.argv[1], {{"w": torch.arange(3_000_000)}}, {options})
    def save():
        print("saved", manager.save(step=1, strict=True).entry.step, flush=True)
    {after}
"""


@pytest.mark.parametrize(
    ("before", "after_", "options"),
    [
        ("", "atexit.register(save)", ""),
        ("", "atexit.register(save)", "memory_every=1, overlap=True"),
        ("", "atexit.register(save); manager.save_async(step=0)", "overlap='always'"),
        ("atexit.register(lambda: save())", "", ""),
        ("", "threading.Thread(target=lambda: (time.sleep(.5), save())).start()", ""),
    ],
    ids=["atexit", "memory", "in flight", "before the import", "thread"],
)
def test_a_save_while_the_interpreter_ends_is_done(
    tmp_path: Path, before: str, after_: str, options: str
) -> None:
    code = AT_EXIT.format(first="atexit", before=before, after=after_, options=options)
    process = start(code, tmp_path / "run")
    out, error = process.communicate(timeout=60)
    assert out == "saved 1\n", error
    assert load(tmp_path / "run" / "latest.pt", only="w").sum() == sum(range(3_000_000))


def test_a_save_when_most_of_python_is_gone_is_refused_at_once(tmp_path: Path) -> None:
    # torch imports dill if it is there, which keeps the program's module until all others are gone.
    code = AT_EXIT.format(
        first="sys; sys.modules['dill'] = None", before="", options="",
        after="class Last:\n        def __del__(self): save()\n    last = Last()",
    )  # fmt: skip
    out, error = start(code, tmp_path / "run").communicate(timeout=60)
    assert (out, "SaveFailed: Python is ending" in error) == ("", True), error


# ----------------------------------------------------------------------------------------- ranks


def test_one_rank_of_several_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="rank 0 of 2") as error:
        Toy().manager(tmp_path)
    assert "torch.distributed.checkpoint" in str(error.value)
    assert "--" not in str(error.value)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WORLD_SIZE", "1")
    Toy().manager(tmp_path).close()


def test_ranks_that_begin_after_the_manager_are_refused(tmp_path: Path) -> None:
    """As with torch.multiprocessing.spawn, which tells no environment."""

    def rank(number: int) -> None:
        engine = Toy().manager(tmp_path / str(number)) if number == 0 else None
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/meet", rank=number, world_size=2
        )
        if engine is not None:
            for act in (engine.resume, lambda: engine.save(step=1)):
                with pytest.raises(ConfigError, match="rank 0 of 2"):
                    act()
        torch.distributed.barrier()

    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    other = os.fork()
    if other == 0:
        status: Any = 1
        try:
            rank(1)
            status = 0
        finally:
            os._exit(status)
    try:
        assert in_child(lambda: rank(0)) == 0
    finally:
        os.waitpid(other, 0)
    assert "WORLD_SIZE" not in os.environ, "torch.distributed was asked, not the environment"
