"""The examples, killed and started again: to the bit as if they never had been.

Each must fail where a part of its state is forgotten.
"""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from holdfast import load
from tests.protection.loops import EXAMPLES, changed, start
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
        run = start(script, *(arguments or [directory]))
        wanted = f"{left.pop(0)} " if left else "-"
        if run.until(lambda line, wanted=wanted: line.startswith(wanted)):  # type: ignore[misc]
            run.send(signal.SIGKILL)
        status = run.end()
        said.update((line.partition(" ")[0], line) for line in run.lines)
    assert status == 0, run.stderr
    assert not left
    return dict(load(directory / "latest.pt")), list(said.values())


def killing_itself(step: int) -> str:
    """Code that saves three steps before `step` and kills its process there, the first time.

    Without the save a fast machine goes on from one of the first steps, where nothing that a
    mutant forgets has changed yet.
    """
    early = f"    if step == {step - 3} and run.resumed is None:\n        run.save()\n"
    now = f"    if step == {step} and run.resumed is None:\n"
    return early + now + "        __import__('os').kill(__import__('os').getpid(), 9)\n"


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


# ----------------------------------------------------------- levels that learn at their own pace


HOPE = EXAMPLES / "hope" / "train.py"
SLOWEST = 64  # steps between two updates of the slowest level


def configured(place: Path, **training: Any) -> tuple[Path, Path]:
    """Return a run directory and the example's configuration for it, in the form of the guides."""
    config = json.loads((EXAMPLES / "hope" / "config.json").read_text("utf-8"))
    config["training"] |= {"num_steps": 2 * SLOWEST + 12, "save_every": 30, "data_file": str(HOPE)}
    config["training"] |= {"checkpoint_dir": str(place / "run"), **training}
    path = place / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(config), "utf-8")
    return place / "run", path


def nested(script: Path, place: Path, *, kills: list[int], **training: Any) -> Any:
    directory, config = configured(place, **training)
    return trained(script, directory, config, kills=kills)


@pytest.fixture(scope="module")
def continuum(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return nested(HOPE, tmp_path_factory.mktemp("straight"), kills=[])


def test_a_continuum_memory_that_is_killed_is_bit_identical(tmp_path: Path, continuum: Any) -> None:
    """Before, between and after updates of the slowest level; most of its state is no weight."""
    state, said = nested(HOPE, tmp_path, kills=[40, 70, *chosen(80, 130, 1)])
    assert said == continuum[1]
    assert_same(state, continuum[0])
    weights = sum(t.numel() for t in state["model"].values())
    slots = state["optimizer"]["state"].values()
    assert sum(slot[name].numel() for slot in slots for name in ("gathered", "mean", "square")) >= (
        3 * weights
    )


@pytest.mark.slow
def test_a_continuum_memory_that_is_killed_fifty_times_is_bit_identical(
    tmp_path: Path, continuum: Any
) -> None:
    state, said = nested(HOPE, tmp_path, kills=chosen(3, 135, 50))
    assert said == continuum[1]
    assert_same(state, continuum[0])


def test_a_continuum_memory_goes_on_from_what_is_named(tmp_path: Path, continuum: Any) -> None:
    nested(HOPE, tmp_path, kills=[], num_steps=70)
    named = tmp_path / "run" / "checkpoint_step_[36]0.pt"
    state, said = nested(HOPE, tmp_path, kills=[], resume_from=str(named))
    assert said == continuum[1][60:]
    assert_same(state["model"], continuum[0]["model"])
    assert_same(state["also"], continuum[0]["also"])


@pytest.mark.parametrize(
    "forgotten",
    ["    also=[level.memory for level in model.levels],\n", "    optimizer=optimizer,\n"],
    ids=["fast weights", "accumulators"],
)
def test_a_continuum_memory_whose_state_is_not_whole_goes_another_way(
    tmp_path: Path, continuum: Any, forgotten: str
) -> None:
    end = "    run.step(step)\n"
    mutant = changed(HOPE, tmp_path / "mutant.py", (forgotten, ""), (end, end + killing_itself(70)))
    _state, said = nested(mutant, tmp_path, kills=[])
    assert said != continuum[1]
