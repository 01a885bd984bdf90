"""The findings of `holdfast doctor`: one line each.

A finding is good, something to know, something to mend, or a question that this system does not
answer. No torch in this room.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from holdfast.i18n import N_, _
from holdfast.table import printable

OK, WARN, BAD, UNKNOWN = "ok", "warn", "bad", "unknown"

_MARKS = {OK: "✓", WARN: "⚠", BAD: "✗", UNKNOWN: "-"}

TITLES = {
    "directory": N_("directory"),
    "free_space": N_("free space"),
    "free_names": N_("free inodes"),
    "file_system": N_("file system"),
    "write_speed": N_("writing"),
    "fsync": "fsync",
    "hard_links": N_("hard links"),
    "memory": N_("memory"),
    "shared_memory": N_("shared memory"),
    "removal_at_logout": N_("shared memory at logout"),
    "gpu": "GPU",
    "python": "Python",
    "torch": "PyTorch",
    "extras": N_("extras"),
    "lock": N_("run directory"),
    "checkpoints": N_("checkpoints"),
    "quarantine": N_("set aside"),
    "remains": N_("left in memory"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, how it is, what was found, and what to do about it."""

    name: str  # a key of `TITLES`, for scripts
    state: str  # "ok", "warn", "bad" or "unknown"
    found: str
    advice: str = ""

    def line(self) -> str:
        text = f"{_MARKS[self.state]} {_(TITLES[self.name])}: {self.found}"
        return printable(f"{text} → {self.advice}" if self.advice else text)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "state": self.state,
            "found": self.found,
            "advice": self.advice or None,
        }


def unknown(name: str) -> Finding:
    """Return a finding for what this platform does not tell."""
    return Finding(name, UNKNOWN, _("not known here"))


def worst(findings: Iterable[Finding]) -> str:
    """ "bad", "warn" or "ok", whichever is the worst that was found."""
    states = {finding.state for finding in findings}
    return next((state for state in (BAD, WARN) if state in states), OK)
