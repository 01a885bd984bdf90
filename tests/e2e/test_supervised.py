"""A real training under `holdfast run`: killed, it ends as if nothing had been."""

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

from holdfast import load
from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.training.options.config_files import save_config
from tests.e2e.test_command_line import ENVIRONMENT, ROOT
from tests.training.runs import config_for, difference, final_state, train, write_corpus

OPTIONS = {"epochs": 1, "temp_every_steps": 4}
TRAIN = [sys.executable, "-m", "holdfast", "train", "--lang", "en"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def config_of(directory: Path, corpus: Path) -> Path:
    file = directory.with_suffix(".json")
    save_config(config_for(directory, corpus, **OPTIONS), file)
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
    return max(
        (event["step"] for event in Catalog(directory).history.known.announced.values()), default=0
    )


def pids(directory: Path) -> list[int]:
    try:
        text = (directory / "logs" / "supervisor.log").read_text("utf-8")
    except FileNotFoundError:
        return []
    return [int(found) for found in re.findall(r"started process (\d+)", text)]


def test_a_training_that_is_killed_ends_as_one_that_was_not(tmp_path: Path, corpus: Path) -> None:
    """Told to begin anew, too: the restart must not obey that again."""
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    process = supervised("--config", str(config_of(killed, corpus)), "--fresh")
    wait_for(lambda: durable(killed) >= 4)
    os.kill(*pids(killed), signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (out, err)
    assert "SIGKILL" in err
    assert len(pids(killed)) == 2
    assert not (killed / "archive").exists()
    train(config_for(straight, corpus, **OPTIONS))
    assert difference(final_state(killed), final_state(straight)) is None


def test_a_signal_saves_and_ends_it(tmp_path: Path, corpus: Path) -> None:
    directory = tmp_path / "run"
    process = supervised("--config", str(config_of(directory, corpus)))
    wait_for(lambda: durable(directory) >= 4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, (out, err)
    assert len(pids(directory)) == 1
    told = re.search(r"Stopped at step (\d+); step (\d+) is durable", err)
    assert told is not None, (out, err)
    assert told[1] == told[2]
    assert load(directory / "latest.pt", only="global_step") == int(told[1])
