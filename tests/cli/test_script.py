"""The scripts in the root of a clone, started with a Python that has no packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("train_cli.py", "train_chinese.py", "train_manager.py")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in for .venv is a shell script")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    place = tmp_path / "a clone"
    place.mkdir()
    (place / "src").symlink_to(ROOT / "src")
    for script in SCRIPTS:
        shutil.copy(ROOT / script, place)
    return place


def bare(script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `script` with a Python that sees the standard library alone."""
    return subprocess.run(
        [sys.executable, "-S", str(script), *words], capture_output=True, text=True, check=False,
        timeout=60, env={**os.environ, "PYTHONPATH": "", "HOLDFAST_LANG": "en"},
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_environment_beside_the_script_is_used(clone: Path, script: str) -> None:
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s|" in-venv "$@"\n')
    python.chmod(0o755)
    done = bare(clone / script, "--option", "two words")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"in-venv|{clone / script}|--option|two words|"


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_one_a_line_says_what_to_type(clone: Path, script: str) -> None:
    done = bare(clone / script, "--help")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "lacks torch" in done.stderr and f"make -C '{clone}' install" in done.stderr
