"""The git state of the project that trains: right where there is one, absent and free elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from holdfast.checkpoint.format.container import read_manifest
from holdfast.checkpoint.system import project
from tests.manage.runs import make_run

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(directory: Path, *words: str) -> str:
    made = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(made, cwd=directory, check=True, capture_output=True, text=True).stdout


def repository(directory: Path) -> str:
    directory.mkdir()
    git(directory, "init", "-q", "-b", "main")
    (directory / "train.py").write_text("print(1)\n")
    git(directory, "add", "train.py")
    git(directory, "commit", "-q", "-m", "first")
    return git(directory, "rev-parse", "HEAD").strip()


@needs_git
def test_commit_branch_and_changes_are_told(tmp_path: Path) -> None:
    commit = repository(tmp_path / "project")
    below = tmp_path / "project" / "runs"
    below.mkdir()
    assert project.state_of(below) == {"commit": commit, "branch": "main", "dirty": False}
    (below / "not known to git.txt").touch()
    assert project.state_of(below) == {"commit": commit, "branch": "main", "dirty": False}
    (tmp_path / "project" / "train.py").write_text("print(2)\n")
    assert project.state_of(below) == {"commit": commit, "branch": "main", "dirty": True}
    git(tmp_path / "project", "checkout", "-q", "--detach")
    assert project.state_of(below) == {"commit": commit, "branch": None, "dirty": True}


@needs_git
def test_a_project_without_a_commit_has_none(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    assert project.state_of(tmp_path) == {"commit": None, "branch": "main", "dirty": False}


def test_where_there_is_no_work_tree_git_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(project.shutil, "which", lambda _name: pytest.fail("git was looked for"))
    assert not any((place / ".git").exists() for place in (tmp_path, *tmp_path.parents))
    assert project.state_of(tmp_path) is None


def test_a_git_that_hangs_or_lies_costs_a_process_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".git").mkdir()
    slow = tmp_path / "git"
    slow.write_text("#!/bin/sh\nexec sleep 5\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(project, "LIMIT", 0.3)
    began = time.monotonic()
    assert project.state_of(tmp_path) is None
    assert time.monotonic() - began < 2
    slow.write_text("#!/bin/sh\nexit 128\n")
    assert project.state_of(tmp_path) is None


@needs_git
def test_a_checkpoint_says_from_which_source_it_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = repository(tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    project.state.cache_clear()
    run = make_run(tmp_path / "run", (1.0,))
    environment = read_manifest(run / "latest.pt")["environment"]
    assert environment["git"] == {"commit": commit, "branch": "main", "dirty": False}
    project.state.cache_clear()
    monkeypatch.chdir(tmp_path)
    other = make_run(tmp_path / "other", (1.0,))
    project.state.cache_clear()
    assert "git" not in read_manifest(other / "latest.pt")["environment"]
