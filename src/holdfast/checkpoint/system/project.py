"""Ask git for the state of the directory that the process was started in: the code that trains.

One rule of patience: git is asked once a process and has `LIMIT` seconds. Where there is no git
work tree nothing is run. No torch here.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

LIMIT = 1.0  # seconds; an answer takes some 10 ms as a rule


@functools.cache
def state() -> dict[str, Any] | None:
    """Return `state_of` the working directory as it was at the first call in this process."""
    try:
        return state_of(Path.cwd())
    except OSError:  # the working directory has been deleted
        return None


def state_of(directory: Path) -> dict[str, Any] | None:
    """Return {"commit", "branch", "dirty"}, or None where git has no answer.

    `branch` is None where no branch is checked out, `commit` where there is none yet; `dirty` is
    True where a file that git knows has been changed since.
    """
    git = shutil.which("git") if _is_work_tree(directory) else None
    if git is None:
        return None
    # Nothing is written; of what the repository's configuration names only content filters
    # (git-lfs and the like) may be started, for files that were changed: git has no switch.
    words = [git, "--no-optional-locks", "-c", "core.fsmonitor=false", "status", "--branch"]
    words += ["--porcelain=v2", "--untracked-files=no", "--ignore-submodules=all"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            words,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=LIMIT,
            check=True,
        )
        return _parse(done.stdout.decode("utf-8", "replace"))
    return None


def _is_work_tree(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        return any((each / ".git").exists() for each in (directory, *directory.parents))
    return False


def _parse(text: str) -> dict[str, Any]:
    """Parse what `git status --porcelain=v2 --branch` printed."""
    found: dict[str, Any] = {"commit": None, "branch": None, "dirty": False}
    for line in text.splitlines():
        if line.startswith("# branch.oid "):
            commit = line.removeprefix("# branch.oid ")
            found["commit"] = None if commit.startswith("(") else commit
        elif line.startswith("# branch.head "):
            branch = line.removeprefix("# branch.head ")
            found["branch"] = None if branch == "(detached)" else branch
        elif not line.startswith("#"):
            found["dirty"] = True
    return found
