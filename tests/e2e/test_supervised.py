"""A real training under `holdfast run`: killed again and again, it ends as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.checkpoint.catalog import Catalog
from holdfast.training.layers import save_config
from tests.e2e.test_command_line import ENVIRONMENT, ROOT
from tests.e2e.test_command_line import run as call
from tests.training.runs import config_for, difference, final_state, write_corpus

TRAIN = [sys.executable, "-m", "holdfast", "train", "--lang", "en"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def config_of(directory: Path, corpus: Path) -> Path:
    file = directory.with_suffix(".json")
    save_config(config_for(directory, corpus, epochs=2, temp_every_steps=4), file)
    return file


def supervised(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "holdfast", "run", "--lang", "en", "--backoff", "0", "--"]
    return subprocess.Popen(
        [*command, *TRAIN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def durable(directory: Path) -> int:
    """The newest step that was announced as durable; 0 where none was."""
    return max((event["step"] for event in Catalog(directory).announced()), default=0)


def pids(directory: Path) -> list[int]:
    try:
        text = (directory / "logs" / "supervisor.log").read_text("utf-8")
    except FileNotFoundError:
        return []
    return [int(found) for found in re.findall(r"started process (\d+)", text)]


def kill_at(directory: Path, step: int, start: int) -> None:
    wait_for(lambda: len(pids(directory)) == start and durable(directory) >= step)
    os.kill(pids(directory)[-1], signal.SIGKILL)


def test_a_training_that_is_killed_twice_ends_as_one_that_was_not(
    tmp_path: Path, corpus: Path
) -> None:
    """Told to begin anew, too: the restarts must not obey that again."""
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    process = supervised("--config", str(config_of(killed, corpus)), "--fresh")
    kill_at(killed, 4, start=1)
    kill_at(killed, 12, start=2)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (out, err)
    assert len(pids(killed)) == 3
    assert err.count("SIGKILL") == 2
    assert not (killed / "archive").exists()
    assert call("train", "--config", str(config_of(straight, corpus))).returncode == 0
    assert difference(final_state(killed), final_state(straight)) is None


def test_a_signal_saves_and_ends_it_and_the_same_command_goes_on(
    tmp_path: Path, corpus: Path
) -> None:
    directory = tmp_path / "run"
    words = ["--config", str(config_of(directory, corpus))]
    process = supervised(*words)
    wait_for(lambda: durable(directory) >= 4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, (out, err)
    assert len(pids(directory)) == 1
    told = re.search(r"Stopped at step (\d+); step (\d+) is durable", err)
    assert told is not None, (out, err)
    assert told[1] == told[2]
    again = supervised(*words)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, (out, err)
    assert f"step {told[1]})" in out
