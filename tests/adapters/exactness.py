"""Run a small training straight, and killed and started again; both must be one to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.protection.loops import start
from tests.support import assert_same

SCRIPTS = Path(__file__).parent / "scripts"
Outcome = tuple[dict[str, str], Any]  # the lines of the training by what they are of; its end


def trained(
    script: Path, out: Path, *, workers: int = 0, epochs: int = 3, ends: Sequence[str] = ()
) -> Outcome:
    """Train to the end, and end by a signal at each of `ends` on the way ("SIGKILL batch 7").

    What a start says again it must say as before.
    """
    out.mkdir(exist_ok=True)
    said: dict[str, str] = {}
    for end in [*ends, ""]:
        run = start(script, out, str(workers), str(epochs), end)
        status = run.end()
        name = end.partition(" ")[0]
        expected = {"": 0, "SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138}[name]
        assert status == expected, f"{end or 'the last start'}: {status}\n{run.stderr}"
        for line in run.lines:
            what, _colon, value = line.partition(":")
            before = said.setdefault(what, value)
            assert before == value, f"{what} was {before} and is {value}, before {end or 'the end'}"
    return said, torch.load(out / "end.pt", weights_only=False)


def same(one: Outcome, other: Outcome) -> None:
    assert one[0] == other[0]
    assert_same(one[1], other[1])


def mutant(script: Path, out: Path, *changes: tuple[str, str]) -> Path:
    """Write the script with a mistake in it."""
    text = script.read_text("utf-8")
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    path = out / script.name
    path.write_text(text, "utf-8")
    return path
