"""An independent tool kills our trainer at the file events of its saves, in all of its modes.

`ckpt-chaos` records every file that a run creates, renames or removes, ends a new run at each of
these (before it; with the file torn; by SIGTERM; with all undone that was not synced), has it
resumed, and compares the end with that of the undisturbed run.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.runs import SAMPLE

MODES = ("before", "torn", "term", "unsynced")
POINTS = 5  # of each mode, spread over the whole run
RESULT = """
import hashlib, pickle, sys
import holdfast

state = holdfast.load(sys.argv[1] + "/latest.pt")
found = hashlib.sha256()

def walk(value):
    if hasattr(value, "numpy"):
        found.update(value.contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key in value:
            walk(value[key])
    elif isinstance(value, (list, tuple)):
        for each in value:
            walk(each)
    else:
        found.update(repr(value).encode())

for key in ("model", "optimizer", "scheduler", "rng", "progress", "history", "best_loss"):
    walk(state[key])
print(found.hexdigest())
"""


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.skipif(not importlib.util.find_spec("ckpt_chaos"), reason="needs ckpt-chaos")
def test_it_passes_every_point_and_loses_no_work(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(SAMPLE.read_text("utf-8")[:1500], "utf-8")
    (tmp_path / "result.py").write_text(RESULT)
    train = [
        sys.executable, "-m", "holdfast", "train", "--model", "tiny", "--data-file", "text.txt",
        "--cache-dir", "cache", "--context-length", "16", "--vocab-size", "300", "--batch-size",
        "2", "--num-steps", "12", "--save-every", "4", "--keep-last-n", "0", "--memory-every", "0",
        "--sample-tokens", "0", "--threads", "1", "--yes", "--lang", "en", "--checkpoint-dir",
        "{out}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_chaos", "run", "--work", "work", "--modes", ",".join(MODES),
         "--max-points", str(POINTS * len(MODES)),
         "--checkpoint-glob", "{out}/checkpoint_step_*.pt",
         "--step-regex", r"Going on from .*step (\d+)",
         "--result-cmd", f"{sys.executable} result.py {{out}}",
         "--fail-on", "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK", "--", *train],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    counts = done.stdout.rstrip().splitlines()[-1]
    assert re.fullmatch(r"PASS: \d+", counts), done.stdout
