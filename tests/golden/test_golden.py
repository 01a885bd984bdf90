"""Nothing that a user can see has changed, and what earlier versions wrote is read: README.md."""

from __future__ import annotations

import json
import platform
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import holdfast
from tests.golden import replay
from tests.golden.states import STATES
from tests.support import assert_same

FILES = Path(__file__).parent / "files"
HERE = sys.platform == "linux" and platform.machine() == "x86_64"


@pytest.mark.skipif(not HERE, reason="recorded on Linux, x86_64")
@pytest.mark.parametrize("name", replay.WALKS)
def test_what_is_written_and_said_is_as_recorded(name: str) -> None:
    now = replay.walked(name)
    others = replay.made_with_others(name, now)
    if others is not None:
        pytest.skip(others)
    difference = replay.first_difference(name, now)
    if difference is not None:
        pytest.fail(difference, pytrace=False)


@pytest.mark.parametrize("name", STATES)
def test_a_file_of_format_1_is_read_to_the_bit(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.pt"
    path.write_bytes((FILES / f"{name}.pt.golden").read_bytes())
    assert holdfast.verify(path) is None
    assert zipfile.ZipFile(path).testzip() is None
    expected = STATES[name]()
    for key, value in expected.items():  # an array is a tensor in the file
        expected[key] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    for state in (holdfast.load(path), torch.load(path, weights_only=True)):
        assert_same(expected, {key: state[key] for key in expected})


def test_a_loop_that_an_earlier_version_began_comes_to_the_losses_it_would_have_had() -> None:
    """It was killed after step 14, with the disk at step 12; straight on it went up to 24."""
    straight = (FILES / "losses.txt").read_text().splitlines()
    lines = replay.recorded("old")
    resumed = lines[lines.index("## gone on with a loop") :]
    steps = [line for line in resumed if line.startswith("step ")]
    assert steps == straight[14:]


def test_the_desk_tells_scripts_of_an_earlier_versions_runs_what_that_version_told() -> None:
    """Fields may be added."""
    then = _by_key((FILES / "told.txt").read_text("utf-8").splitlines())
    now = _by_key(replay.recorded("old"))
    missing = [key for key, value in then.items() if not _within(value, now.get(key))]
    assert not missing
    assert len(then) > 50


def _by_key(lines: list[str]) -> dict[tuple[str, str], Any]:
    """The lines of `--json` before the runs are gone on with, by command and key."""
    found: dict[tuple[str, str], Any] = {}
    title = ""
    for line in lines:
        if line.startswith("## "):
            title = line
            if not line.startswith("## $ "):
                break
        elif title.endswith("--json") and not line.startswith("ended"):
            key, _space, text = line.partition(" ")
            if text:
                found[title, key] = json.loads(text)
    return found


def _within(then: Any, now: Any) -> bool:
    if isinstance(then, dict) and isinstance(now, dict):
        return all(key in now and _within(value, now[key]) for key, value in then.items())
    if isinstance(then, list) and isinstance(now, list):
        return len(then) == len(now) and all(map(_within, then, now))
    return bool(then == now)
