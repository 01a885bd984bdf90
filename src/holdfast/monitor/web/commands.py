"""The commands that a page offers for copying. The page itself only reads."""

from __future__ import annotations

import os
import shlex

from holdfast.checkpoint.rundir import BEST
from holdfast.monitor.run_view import STOPPED, TRAINING, RunView


def commands(view: RunView) -> list[dict[str, str]]:
    """Return [{"key", "command"}], the most useful first; `key` names the sentence in the page."""
    state, run = view.state, _quoted(view.directory)
    ours = (view.directory / "config.json").exists()  # else another's loop, of another model
    found: list[dict[str, str]] = []

    def add(key: str, command: str) -> None:
        found.append({"key": key, "command": command})

    if state == STOPPED and ours:
        add("resume", f"holdfast train --checkpoint-dir {run} --resume")
    if state == TRAINING:
        add("monitor", f"holdfast monitor {run}")
    if view.entries:
        best = view.directory / BEST
        if ours:
            add("serve", f"holdfast serve {run}")
        if ours and best.exists():
            add("export", f"holdfast export {_quoted(best)} --to hf")
        add("verify", f"holdfast verify {run}")
        add("clean", f"holdfast clean {run} --keep 2 --dry-run")
    add("report", f"holdfast report {run}")
    return found


def _quoted(path: os.PathLike[str]) -> str:
    return shlex.quote(os.path.abspath(path))  # noqa: PTH100 - links stay as the user made them
