"""The guard of the suite itself: no signal is ignored, and no test leaves a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
LEAVES = """
import subprocess, sys

CODE = "import time; time.sleep(600)"

def test_leaves_a_child():
    process = subprocess.Popen([sys.executable, "-c", CODE, "left-child"])

def test_leaves_an_orphan():
    inner = f"import subprocess; subprocess.Popen([{sys.executable!r}, '-c', {CODE!r}, 'orphan'])"
    subprocess.run([sys.executable, "-c", inner], check=True)

def test_fails_and_leaves_one():
    subprocess.Popen([sys.executable, "-c", CODE, "left-by-failure"])
    assert False

def test_leaves_nothing():
    subprocess.run([sys.executable, "-c", "pass"], check=True)
"""


def test_a_process_that_a_test_leaves_is_ended_and_told(tmp_path: Path) -> None:
    file = tmp_path / "test_leaves.py"
    file.write_text(LEAVES)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider",
         f"--rootdir={tmp_path}", str(file)],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
    )  # fmt: skip
    assert "3 passed, 1 failed" in done.stdout or "1 failed, 3 passed" in done.stdout, done.stdout
    assert "3 errors" in done.stdout
    for name in ("left-child", "orphan", "left-by-failure"):
        assert f"time.sleep(600) {name}" in done.stdout
    left = [p for p in psutil.process_iter(["cmdline"]) if "time.sleep(600)" in str(p.info)]
    assert not left


def test_ctrl_c_arrives_in_tests_that_run_with_it_ignored(tmp_path: Path) -> None:
    """As in `nohup make test &`: what a test starts can be interrupted."""
    file = tmp_path / "test_interrupt.py"
    file.write_text(
        "import signal, subprocess, sys\n"
        "def test_interrupt():\n"
        "    code = 'import time; print(1, flush=True); time.sleep(60)'\n"
        "    process = subprocess.Popen([sys.executable, '-c', code], stdout=-1, stderr=-1)\n"
        "    process.stdout.readline()\n"
        "    process.send_signal(signal.SIGINT)\n"
        "    assert b'KeyboardInterrupt' in process.communicate(timeout=20)[1]\n"
    )
    command = f"trap '' INT HUP; exec {sys.executable} -m pytest -p tests.conftest"
    done = subprocess.run(
        ["sh", "-c", f"{command} -p no:cacheprovider --rootdir={tmp_path} {file}"],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
