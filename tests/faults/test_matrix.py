"""The short form of the matrix: every row shows what it must. Each test makes some of the rows in a
process of its own, because the shim has to be there from the start of one. Each imports everything,
so they are few; tests run side by side, so there is more than one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import inject, matrix

SEED = 20261121  # the same points in every run of the tests; `make faults` takes others
ROOT = Path(__file__).parents[2]

GROUPS = [
    ["killed at a call", "a call fails once", "calls fail from there on", "killed or failed call"],
    ["power loss", "real power cut", "bit rot", "rot in what a killed process left",
     "killed between the moves"],
    ["a short write", "a lying write", "an error while a save is read back",
     "an error while a start reads", "disk full", "hostile files", "a training killed",
     "a signal inside an evaluation"],
]  # fmt: skip


def made(words: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """The report of the rows that contain one of `words`."""
    call = [sys.executable, "-m", "tests.faults", "--quick", "--json", "--jobs", "1"]
    done = subprocess.run(
        [*call, "--seed", str(SEED), "--rows", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.timeout(600)
@pytest.mark.parametrize("words", GROUPS, ids=lambda words: words[0])
def test_nothing_that_was_announced_is_lost(words: list[str]) -> None:
    report = made(words, inject.environment())
    assert report["problems"] == []
    assert report["rows"], "no row has such a name"
    skipped = [row["skipped"] for row in report["rows"] if row["skipped"]]
    if len(skipped) == len(report["rows"]):
        pytest.skip(skipped[0])


def test_without_a_compiler_pythons_own_calls_are_the_seam() -> None:
    words = ["a lying write: holdfast", "killed at a call: torch.save over"]
    report = made(words, {**os.environ, "OMP_NUM_THREADS": "1", "HOLDFAST_FAULTS": "seam"})
    assert report["problems"] == []
    rows = {row["saver"]: row for row in report["rows"]}
    ours, mutant = rows["holdfast"], rows["holdfast, mutant: pruned before it is verified"]
    assert ours["points"] == ours["recovered"] > 0
    assert mutant["recovered"] < mutant["points"]
    assert "compiler" in rows["torch.save over latest.pt"]["skipped"]


def test_every_row_of_the_short_form_is_in_a_group() -> None:
    for row in matrix.chosen([], full=False):
        assert sum(any(word in row.name for word in group) for group in GROUPS) == 1, row.name
