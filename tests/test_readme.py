"""The Python of the READMEs does what stands beside it, typed as it is printed."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast import load

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.zh-CN.md")

# What a reader has already: a model, its optimizer, and a step of training that tells of itself.
HAVE = """
import sys, time
import torch

torch.manual_seed(0)
total_steps, pause = int(sys.argv[1]), float(sys.argv[2])
model = torch.nn.Linear(10, 10)
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)

def train_one_step():
    optimizer.zero_grad()
    model(torch.randn(4, 10)).square().mean().backward()
    optimizer.step()
    scheduler.step()
    time.sleep(pause)
    print(scheduler.last_epoch, flush=True)
"""


def blocks(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def in_first_state(block: str) -> str:
    """A block by itself: what a block before it has made is made here."""
    state = '\nstate = {"model": model, "optimizer": optimizer, "scheduler": scheduler}\n'
    return HAVE + state + block


def start(code: str, place: Path, total: int, pause: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(total), str(pause)], cwd=place, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(code: str, place: Path, total: int) -> list[int]:
    """The steps that were trained in a process that came to its end."""
    out, error = start(code, place, total, 0).communicate(timeout=120)
    assert "Traceback" not in error, error
    return [int(line) for line in out.splitlines()]


def newest(place: Path) -> int:
    (latest,) = place.glob("runs/*/latest.pt")
    return int(load(latest, only="global_step"))


def test_both_readmes_show_the_same_python() -> None:
    def bare(name: str) -> list[str]:
        return [re.sub(r"#.*", "", block) for block in blocks(name)]

    assert bare(READMES[0]) == bare(READMES[1])
    assert len(bare(READMES[0])) == 2


@pytest.mark.parametrize(("name", "number"), [(READMES[0], 0), (READMES[1], 1)])
def test_a_readme_loop_keeps_its_end_and_goes_on_from_there(
    tmp_path: Path, name: str, number: int
) -> None:
    code = in_first_state(blocks(name)[number])
    assert run(code, tmp_path, 520) == list(range(1, 521))
    assert newest(tmp_path) == 520
    assert run(code, tmp_path, 530) == list(range(521, 531))
    assert newest(tmp_path) == 530


@pytest.mark.parametrize("number", [0, 1])
def test_a_readme_loop_that_is_told_to_end_saves_its_step(tmp_path: Path, number: int) -> None:
    process = start(in_first_state(blocks(READMES[0])[number]), tmp_path, 1000, 0.02)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        if line == "7\n":
            process.terminate()
        last = line
    assert process.wait(60) == 128 + signal.SIGTERM
    process.communicate()
    assert newest(tmp_path) == int(last) < 1000


@pytest.mark.parametrize("number", [0, 1])
def test_a_readme_loop_that_fails_keeps_what_it_had(tmp_path: Path, number: int) -> None:
    code = in_first_state(blocks(READMES[0])[number])
    code = code.replace(
        "    optimizer.zero_grad()\n",
        "    optimizer.zero_grad()\n"
        "    if scheduler.last_epoch == 9: raise RuntimeError('CUDA out of memory')\n",
    )
    process = start(code, tmp_path, 1000, 0)
    _out, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "\nRuntimeError: CUDA out of memory\n" in error
    assert newest(tmp_path) == 9
