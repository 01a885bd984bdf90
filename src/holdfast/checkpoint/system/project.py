"""Ask git for the state of the directory that the process was started in: the code that trains.

Asked once a process, in the background, and never waited for longer than a moment: what a save does
not know yet it leaves out. Where there is no git work tree nothing is run. No torch here.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

from holdfast.checkpoint.system.threads import Helper

LIMIT = 2.0  # seconds that git may take
_PATIENCE = 0.1  # seconds that one save of a process waits for the answer, all others none


class Question:
    """A question to git about `directory`, and its answer as soon as it is there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._answer: dict[str, Any] | None = None
        self._patience = _PATIENCE
        self._helper: Helper | None = None
        if _is_work_tree(directory):
            with contextlib.suppress(RuntimeError, MemoryError):  # no thread: no answer
                self._helper = Helper(self._ask)

    def answer(self) -> dict[str, Any] | None:
        """{"commit", "branch", "dirty"}, or None where there is no work tree, or no answer yet.

        `branch` is None where no branch is checked out, `commit` where there is none yet; `dirty`
        is whether a file that git knows has been changed since.
        """
        if self._helper is not None and self._answer is None:
            patience, self._patience = self._patience, 0.0
            self._helper.wait(patience)
        return self._answer

    def _ask(self) -> None:
        git = shutil.which("git")
        if git is None:
            return
        # Nothing is written; of what the repository's configuration names only content filters
        # (git-lfs and the like) may be started, for files that were changed: git has no switch.
        words = [
            git,
            "--no-optional-locks",
            "-c",
            "core.fsmonitor=false",
            "status",
            "--branch",
            "--porcelain=v2",
            "--untracked-files=no",
            "--ignore-submodules=all",
        ]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                words,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                timeout=LIMIT,
                check=True,
            )
            self._answer = _parse(done.stdout.decode("utf-8", "replace"))


def _is_work_tree(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        return any((place / ".git").exists() for place in (directory, *directory.parents))
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


_question: Question | None = None


def ask() -> None:
    """Begin to ask, where that has not been done in this process."""
    global _question
    if _question is None:
        with contextlib.suppress(OSError):  # the working directory has been deleted
            _question = Question(Path.cwd())


def state() -> dict[str, Any] | None:
    """The git state of the project in which this process was started, as `Question.answer`."""
    return None if _question is None else _question.answer()
