"""The desk as a user meets it: every command on a real run that was interrupted and lost a file, on
a second run, on an empty directory, on one that is no run, and while a training writes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from holdfast.errors import Interrupted
from holdfast.training import loop
from holdfast.training.options.config_files import save_config
from holdfast.training.trainer import Trainer
from tests import processes
from tests.support import damage
from tests.training.conftest import small_shape  # noqa: F401 - for all tests here
from tests.training.runs import config_for, train, write_corpus

ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("LANGUAGE", "HOLDFAST_LANG")},
    "LC_ALL": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
}
CHINESE = re.compile("[\u4e00-\u9fff]")

# What only looks: the words after `holdfast`, where {a} and {b} stand for the runs.
LOOKS = [
    "list {a} {b}",
    "list {a} {b} --json",
    "list {a} --sort loss",
    "show {a}",
    "show {a} --json",
    "show {a}/model_epoch_2.pt --tensors",
    "history {a}",
    "history {a} {b} --plot",
    "history {a} --json",
    "compare {a} {b}",
    "compare {a} {b} --json",
    "compare {a}/model_epoch_2.pt {a} --tensors",
    "compare {a}/model_epoch_2.pt {a} --tensors --json",
    "verify {a}",
    "verify {a} --json",
    "clean {a} --keep 1 --keep-best 1 --dry-run",
    "clean {a} --keep 1 --json --dry-run",
    "monitor {a} --once",
    "monitor {a} --once --json",
]


@dataclass(frozen=True)
class Runs:
    """Two finished runs; `a` was interrupted, and lost a file that lies in its quarantine."""

    a: Path
    b: Path
    corpus: Path


def holdfast(
    words: str | list[str], lang: str = "en", timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    argv = words.split() if isinstance(words, str) else words
    return processes.run(*argv, "--lang", lang, environment=ENVIRONMENT, timeout=timeout)


def _interrupted_after(step: int, config_path: Path, corpus: Path) -> None:
    original = loop.after_step

    def after_step(self: Trainer) -> None:
        if self.progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "after_step", after_step)
        with pytest.raises(Interrupted):
            train(config_for(config_path, corpus, epochs=3, temp_every_steps=5))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("desk")
    corpus = write_corpus(place)
    a, b = place / "a", place / "b"
    _interrupted_after(26, a, corpus)
    damage(next((a / "temp").glob("*step26.pt")))
    said = train(config_for(a, corpus, epochs=3, temp_every_steps=5))
    assert "quarantine/" in said
    assert list((a / "quarantine").rglob("*.pt"))
    train(config_for(b, corpus, epochs=2, learning_rate=5e-4))
    return Runs(a, b, corpus)


@pytest.mark.parametrize(
    ("words", "lang"),
    [(words, "en") for words in LOOKS]
    + [(words, "zh") for words in LOOKS if "--json" not in words],
)
def test_each_look_is_plain_complete_and_in_the_language(runs: Runs, words: str, lang: str) -> None:
    before = {p: p.stat().st_mtime_ns for p in runs.a.rglob("*") if p.is_file()}
    done = holdfast(words.format(a=runs.a, b=runs.b), lang)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert "\x1b" not in done.stdout + done.stderr
    assert not re.search(r"…( |$)", done.stdout), "nothing is cut in a pipe"
    if "--json" in words:
        json.loads(done.stdout)
    else:
        assert bool(CHINESE.search(done.stdout.replace("今天", ""))) == (lang == "zh")  # a prompt
    if "verify" not in words:  # which says in the history what it has read
        assert {p: p.stat().st_mtime_ns for p in runs.a.rglob("*") if p.is_file()} == before


FIRST_OF_EACH = list({words.split()[0]: words for words in reversed(LOOKS)}.values())


@pytest.mark.parametrize("place", ["empty", "no run", "missing"])
@pytest.mark.parametrize("words", FIRST_OF_EACH)
def test_what_is_no_run_is_one_line_and_stays_as_it_was(
    runs: Runs, words: str, place: str, tmp_path: Path
) -> None:
    directory = tmp_path / "x"
    if place != "missing":
        directory.mkdir()
    if place == "no run":
        (directory / "letter.txt").write_text("Dear reader")
        (directory / "model.pt").write_bytes(b"not a checkpoint")
    done = holdfast(words.format(a=directory, b=directory))
    assert done.returncode in (0, 1, 3, 4), (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2, done.stderr
    there = {p.name for p in directory.rglob("*")} if directory.exists() else None
    assert there == {"missing": None, "empty": set(), "no run": {"letter.txt", "model.pt"}}[place]


@pytest.fixture
def training(runs: Runs, tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A run directory that is written to as often as can be."""
    directory, file = tmp_path / "live", tmp_path / "config.json"
    config = config_for(directory, runs.corpus, epochs=500, temp_every_steps=2, keep_last_n=2)
    save_config(config, file)
    process = processes.start(
        "train", "--config", file, "--quiet", environment=ENVIRONMENT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (directory / "best_model.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    yield directory, process
    process.kill()
    process.wait()


def test_every_look_works_while_a_training_writes(
    runs: Runs, training: tuple[Path, subprocess.Popen[str]]
) -> None:
    live, process = training
    for words in LOOKS:
        if "model_epoch_2" in words:  # it comes and goes
            continue
        done = holdfast(words.format(a=live, b=runs.b))
        assert done.returncode == 0, (words, done.stdout, done.stderr)
    assert process.poll() is None, "the training goes on"
