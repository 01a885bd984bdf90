"""Take a walk in a process of its own and compare it with its record."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.golden.frozen import DROPPED, ENVIRONMENT

ROOT = Path(__file__).parents[2]
RECORDS = Path(__file__).parent / "record"
WALKS = ("loop", "zh", "en", "old")
_WIDTH = 300  # characters of a line that a person is shown

_HASH = re.compile(r"\b[0-9a-f]{16,64}\b")
_NUMBER = re.compile(r"-?\d+(?:\.\d+(?:e[-+]\d+)?|e[-+]\d+)")


def walked(name: str) -> list[str]:
    """Take the walk; returns its lines. Raises `CalledProcessError`, its traceback printed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(DROPPED)}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden.walk", name],
        env={**env, **ENVIRONMENT, "PYTHONPATH": path}, cwd=ROOT, stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL, timeout=280, check=True,
    )  # fmt: skip
    return done.stdout.decode("utf-8").splitlines()


def recorded(name: str) -> list[str]:
    return (RECORDS / f"{name}.txt").read_text("utf-8").splitlines()


def record(name: str) -> None:
    RECORDS.mkdir(exist_ok=True)
    text = "\n".join([*walked(name), ""])
    (RECORDS / f"{name}.txt").write_text(text, "utf-8")


def made_with_others(name: str, now: list[str]) -> str | None:
    """Why this record is not for this place, or None: other libraries write other bytes."""
    before = recorded(name)[0]
    return None if before == now[0] else f"recorded: {before}; here: {now[0]}"


def first_difference(name: str, now: list[str]) -> str | None:
    """Where the walk leaves its record, with what led to it; None where it does not."""
    before, there = recorded(name), now
    if before[1] != there[1] and name != "loop":
        before, there = _blurred(before), _blurred(there)
    else:
        before, there = before[2:], there[2:]
    if before == there:
        return None
    at = next(
        (i for i, (a, b) in enumerate(zip(before, there, strict=False)) if a != b),
        min(len(before), len(there)),
    )
    titles = [line for line in before[: at + 1] if line.startswith("## ")]
    lines = [f"{name}: {titles[-1] if titles else ''}"]
    lines += [f"    {line[:_WIDTH]}" for line in before[max(0, at - 3) : at]]
    rows = difflib.ndiff(before[at : at + 4], there[at : at + 4])
    lines += [_around(row, before[at], there[at]) if at < min(len(before), len(there)) else row
              for row in rows if row[0] in "-+"]  # fmt: skip
    lines.append("- recorded, + now; if the change is meant: python -m tests.golden record")
    return "\n".join(lines)


def _around(row: str, a: str, b: str) -> str:
    """A long line from shortly before the first character that differs."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    if row[2:] not in (a, b) or same < _WIDTH // 2:
        return row[:_WIDTH]
    return f"{row[:60]} … {row[2:][same - 40 : same + _WIDTH // 2]}"


def _blurred(lines: list[str]) -> list[str]:
    """What has to be the same where another processor computes other last digits: everything but
    fractions, hashes of what was computed, and texts that a model has made."""
    seen = []
    for line in lines[2:]:
        if "✍️" in line:  # the sample
            continue
        line = _HASH.sub("HASH", _NUMBER.sub("#", line))  # noqa: PLW2901
        seen.append(re.sub(r" {2,}", "  ", line))
    return seen
