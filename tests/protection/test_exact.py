"""A loop in the shape of nanoGPT's, killed and started again: to the bit as if it never had been.

The proof must fail where the loop is protected wrongly: each mutant is a mistake of a user's.
"""

from __future__ import annotations

import functools
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from holdfast import load
from tests.protection.loops import EXAMPLES, changed, start
from tests.support import assert_same

LOOP = EXAMPLES / "nanogpt_loop.py"
STEPS = 40


def said(lines: list[str]) -> dict[str, str]:
    """The losses that a run has printed, by what they are of."""
    pairs = [line.partition(": " if line.startswith("step") else " ") for line in lines]
    return {name: value for name, _space, value in pairs}


def steps_of(lines: list[str]) -> list[int]:
    return [int(line.split()[0]) for line in lines if line[:1].isdigit()]


def trained(
    script: Path, directory: Path, ends: list[tuple[int, int]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Train to the end, with a signal at each of `ends`, (step, signal): state and losses."""
    lines: list[str] = []
    for step, number in [*ends, (0, 0)]:
        run = start(script, directory)
        # Never in the first step of a process: there a signal ends it as ever.
        if number and run.until(lambda _line, at=step: steps_of(run.lines)[1:][-1:] >= [at]):  # type: ignore[misc] # noqa: B023
            run.send(number)
            status = -number if number == signal.SIGKILL else 128 + number
            assert run.end() == status, run.stderr
        else:
            assert run.end() == 0, run.stderr
        for name, value in said(run.lines).items():
            known = said(lines).get(name, value)
            assert value == known, f"{name} was {known} and is {value}"
        lines += run.lines
    return dict(load(directory / "latest.pt")), said(lines)


def check(script: Path, directory: Path, ends: list[tuple[int, int]], straight: Path) -> None:
    state, losses = trained(script, directory, ends)
    expected, spoken = undisturbed(script if "mutant" not in script.name else LOOP, straight)
    assert losses == spoken
    assert_same(state, expected)


@functools.cache
def undisturbed(script: Path, directory: Path) -> tuple[dict[str, Any], dict[str, str]]:
    return trained(script, directory, [])


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("straight") / "run"


def test_killed_and_told_to_end_it_is_bit_identical(tmp_path: Path, straight: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    steps = sorted(random.Random(seed).sample(range(2, STEPS - 3, 2), 3))
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
    check(LOOP, tmp_path / "run", list(zip(steps, numbers, strict=True)), straight)


@pytest.mark.slow
def test_killed_fifty_times_it_is_bit_identical(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    longer = "max_iters, warmup_iters = 32, 8, 40", "max_iters, warmup_iters = 32, 8, 240"
    script = changed(LOOP, tmp_path / "long.py", longer)
    steps = sorted(random.Random(seed).sample(range(2, 236, 2), 50))
    numbers = random.Random(seed).choices([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], k=50)
    check(script, tmp_path / "run", list(zip(steps, numbers, strict=True)), tmp_path / "straight")


MUTANTS = {
    "the prefetched batch is not given": [
        ("iter_num, best_val_loss, X, Y = run.resume(iter_num, best_val_loss, X, Y)",
         "iter_num, best_val_loss = run.resume(iter_num, best_val_loss)"),
        ("run.step(iter_num, best_val_loss, X, Y)", "run.step(iter_num, best_val_loss)"),
    ],
    "the manager is made late": [
        ("run = holdfast.protect(out_dir, model=model, optimizer=optimizer, scaler=scaler)\n", ""),
        ("iter_num, best_val_loss, X, Y = run.resume(iter_num, best_val_loss, X, Y)\n", ""),
        ("    for _micro_step", """\
    if "run" not in globals():
        run = holdfast.protect(out_dir, model=model, optimizer=optimizer, scaler=scaler)
        iter_num, best_val_loss, X, Y = run.resume(iter_num, best_val_loss, X, Y)
    for _micro_step"""),
    ],
}  # fmt: skip


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_loop_that_is_protected_wrongly_is_found(
    tmp_path: Path, straight: Path, mistake: str
) -> None:
    script = changed(LOOP, tmp_path / "mutant.py", *MUTANTS[mistake])
    with pytest.raises(AssertionError):
        check(script, tmp_path / "run", [(13, signal.SIGTERM)], straight)


def test_steps_that_are_counted_anew_in_each_epoch_are_refused(tmp_path: Path) -> None:
    again = ("    iter_num += 1\n", "    iter_num = (iter_num + 1) % 20\n")
    run = start(changed(LOOP, tmp_path / "mutant.py", again), tmp_path / "run")
    assert run.end() == 1
    assert "run.step(0) comes after step 19: count the optimizer's steps" in run.stderr
    assert 1 <= load(tmp_path / "run" / "latest.pt", only="global_step") <= 19
