"""The examples, killed and started again: to the bit as if they never had been.

Each must fail where a part of its state is forgotten.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from holdfast import load
from tests.protection.loops import EXAMPLES, start
from tests.support import assert_same

DQN = EXAMPLES / "dqn_replay.py"


def trained(
    script: Path, directory: Path, *arguments: str | Path, kills: list[int]
) -> tuple[dict[str, Any], list[str]]:
    """Train to the end, killed soon after each step of `kills`: the last state, and the lines of
    all runs, of a line that was said twice the last."""
    said: dict[str, str] = {}
    left, status = list(kills), -signal.SIGKILL
    while status == -signal.SIGKILL:
        run = start(script, directory, *arguments)
        wanted = f"{left.pop(0)} " if left else "-"
        if run.until(lambda line, wanted=wanted: line.startswith(wanted)):  # type: ignore[misc]
            run.send(signal.SIGKILL)
        status = run.end()
        said.update((line.partition(" ")[0], line) for line in run.lines)
    assert status == 0, run.stderr
    assert not left
    return dict(load(directory / "latest.pt")), list(said.values())


def killing_itself(step: int) -> str:
    """Code that kills its process at this very step, the first time."""
    now = f"    if step == {step} and run.resumed is None:\n"
    return now + "        __import__('os').kill(__import__('os').getpid(), 9)\n"


def changed(script: Path, path: Path, *changes: tuple[str, str]) -> Path:
    text = script.read_text("utf-8")
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    path.write_text(text, "utf-8")
    return path


def chosen(least: int, most: int, count: int) -> list[int]:
    seed = random.randrange(10**6)
    print("seed", seed)
    return sorted(random.Random(seed).sample(range(least, most), count))


# -------------------------------------------------------------------------- an agent and its memory


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """State and losses of the agent that is never killed."""
    return trained(DQN, tmp_path_factory.mktemp("straight") / "run", kills=[])


def test_an_agent_that_is_killed_is_bit_identical(tmp_path: Path, agent: Any) -> None:
    state, said = trained(DQN, tmp_path / "run", kills=chosen(5, 395, 3))
    assert said == agent[1]
    assert_same(state, agent[0])


@pytest.mark.slow
def test_an_agent_that_is_killed_fifty_times_is_bit_identical(tmp_path: Path, agent: Any) -> None:
    state, said = trained(DQN, tmp_path / "run", kills=chosen(5, 395, 50))
    assert said == agent[1]
    assert_same(state, agent[0])


@pytest.mark.parametrize("forgotten", ["target=target", "memory=memory", "dice=dice"])
def test_an_agent_whose_state_is_not_whole_goes_another_way(
    tmp_path: Path, agent: Any, forgotten: str
) -> None:
    end = "    run.step(step, world)\n"
    mutant = changed(
        DQN, tmp_path / "mutant.py", (f", {forgotten}", ""), (end, end + killing_itself(210))
    )
    _state, said = trained(mutant, tmp_path / "run", kills=[])
    assert said != agent[1]
