"""What is counted of injected faults, how a recovery is judged, and the table.

The words of the table: a state is *acknowledged* when the saver has said so and the parent has read
it. *Lost*: what was recovered is older than that, or nothing. *Wrong*: it has other bits than the
step it claims to be. *Human*: the saver's own way to go on ended with an error.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Tally:
    """One row: a class of faults against one saver."""

    fault: str
    saver: str
    until_failed: bool = False  # what must fail has shown it with its first failure
    points: int = 0  # that fired
    states: int = 0  # distinct directories afterwards
    recovered: int = 0  # to the newest acknowledged step, or a newer one
    lost: int = 0
    wrong: int = 0
    human: int = 0
    repeated: int = 0  # the most steps that had to be done again
    seconds: float = 0.0
    notes: str = ""  # what a reader of the row should know
    skipped: str = ""  # why there is nothing in this row
    examples: list[str] = field(default_factory=list)  # of what went wrong, for a person
    _seen: set[str] = field(default_factory=set, repr=False)

    @property
    def decided(self) -> bool:
        """True once no further point is wanted."""
        return self.until_failed and bool(self.failed)

    @property
    def failed(self) -> int:
        """Points after which the saver did not keep its word."""
        return self.points - self.recovered

    def note(self, directory: Path) -> None:
        """Count the state of a directory after a fault."""
        self._seen.add(fingerprint(directory))
        self.states = len(self._seen)

    def judge(self, verdict: Verdict, what: object) -> None:
        """Count one point that has fired; `what` says which one it was."""
        self.points += 1
        problem = verdict.problem
        if not problem:
            self.recovered += 1
        elif problem == "lost":
            self.lost += 1
        elif problem == "wrong":
            self.wrong += 1
        else:
            self.human += 1
        if problem and len(self.examples) < 5:
            self.examples.append(f"{what}: {verdict}")
        self.repeated = max(self.repeated, verdict.reached - max(verdict.step, 0))

    def to_json(self) -> dict[str, Any]:
        hidden = ("_seen", "until_failed")
        return {name: value for name, value in asdict(self).items() if name not in hidden}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one recovery came to."""

    announced: int  # the newest step that was acknowledged
    reached: int  # the last step that was trained before the fault
    step: int = -1  # that was recovered; 0 a new beginning; -1 an error
    same: bool = False  # bit for bit what that step was
    goes_on: bool = False  # trained on and saved, it came to what the undisturbed run came to
    error: str = ""

    @property
    def problem(self) -> str:
        """ "" where everything was as promised; "lost", "wrong" or "human"."""
        if self.step < 0:
            return "human"
        if self.step and not (self.same and self.goes_on):
            return "wrong"
        return "lost" if self.step < self.announced else ""

    def __str__(self) -> str:
        return (
            f"announced {self.announced}, reached {self.reached}, recovered {self.step}, "
            f"same bits {self.same}, goes on {self.goes_on} {self.error}".rstrip()
        )


def fingerprint(directory: Path) -> str:
    """Names, bytes and links of a directory, less what differs from run to run anyway: the names
    of temporary files."""
    seen: dict[int, int] = {}
    rows = []
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and not p.is_symlink()):
        name = str(path.relative_to(directory))
        if path.name.startswith(".holdfast-"):
            name = str(path.parent.relative_to(directory) / "temporary")
        inode = seen.setdefault(path.stat().st_ino, len(seen))
        rows.append(f"{name} {inode} {path.stat().st_size}")
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


HEADER = ("fault", "saver", "points", "states", "recovered", "lost", "wrong", "human", "repeated")


def table(rows: list[Tally]) -> str:
    """The rows as Markdown, the columns of a length."""
    lines = [list(HEADER)]
    for row in rows:
        values = [row.points, row.states, row.recovered, row.lost, row.wrong, row.human,
                  row.repeated]  # fmt: skip
        counts = ["–"] * len(values) if row.skipped else [f"{value:,}" for value in values]
        said = row.skipped or row.notes
        name = row.saver + (f" ({said})" if said else "")
        lines.append([row.fault, name, *counts])
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    out = []
    for number, line in enumerate(lines):
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("| " + " | ".join(cells) + " |")
        if number == 0:
            marks = ["-" * w if i < 2 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
            out.append("|" + "|".join(f" {mark} " for mark in marks) + "|")
    return "\n".join(out)


def machine() -> str:
    """What the matrix ran on, without naming the machine."""
    import platform

    import torch

    return (
        f"{platform.system()} {platform.release()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
