"""`holdfast doctor` as it is typed: lines, JSON, exit statuses, the proof with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli import doctor as cli
from holdfast.cli.main import main
from holdfast.manage.doctor import disk_checks, machine_checks
from holdfast.manage.doctor.findings import BAD, Finding
from holdfast.training.options.config_files import save_config
from holdfast.training.proving import Stage
from tests.manage.runs import make_run
from tests.support import tree_of
from tests.training.runs import ROOT, config_for, write_corpus

COMMAND = [sys.executable, "-m", "holdfast", "doctor", "--lang", "en"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FIRST_PROBE", 1 << 20), ("PROBE", 1 << 20), ("SYNCS", 5)):
        monkeypatch.setattr(disk_checks, name, value)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), passages=3)


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Path:
    file = tmp_path / "config.json"
    save_config(config_for(tmp_path / "runs" / "a", corpus, sample_tokens=0), file)
    return file


# ------------------------------------------------------------------------------------ the checks


def test_a_line_for_each_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    before = tree_of(run)
    assert main(["doctor", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line[0] in "✓⚠✗-" for line in lines[:-1])
    assert any(line.startswith("✓ checkpoints: 4, none is damaged") for line in lines)
    assert lines[-1].startswith(f"Checks: {len(lines) - 1}. Bad: 0. Warnings: ")
    assert tree_of(run) == before, "nothing was changed"


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path / "not" / "yet"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["directory"] == str(tmp_path / "not" / "yet")
    assert told["state"] in ("ok", "warn")
    assert {"free_space", "fsync", "torch", "gpu"} <= {check["name"] for check in told["checks"]}
    assert set(told["checks"][0]) == {"name", "state", "found", "advice"}
    assert list(tmp_path.iterdir()) == [], "the directory is not made"


def test_something_bad_is_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine_checks, "main_memory", lambda *_: Finding("memory", BAD, "gone"))
    assert main(["doctor", str(tmp_path)]) == 6
    assert "✗ memory: gone" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path), "--json"]) == 6
    assert json.loads(capsys.readouterr().out)["state"] == "bad"


@pytest.mark.parametrize("words", [["--help"], ["--prove-resume", "--help"]])
def test_help_tells_of_both(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *words])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "--prove-resume" in told and "holdfast doctor runs/a --json" in told


# ------------------------------------------------------------------------------------- the proof


@pytest.mark.slow  # with processes that are forks: tests/training/test_proving.py
def test_the_proof_as_a_user_calls_it(tmp_path: Path, config: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--prove-resume", "--config", str(config), "--steps", "3", "--more", "2"],
        capture_output=True, text=True, cwd=ROOT, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "✓ Equal to the last bit: 3 steps, SIGKILL, resume, 2 steps, and 5 steps straight.\n"
    )
    assert "tensors" in done.stdout
    for name in ("straight: ", "to the kill: ", "resumed: "):
        assert name in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}, "nothing is left behind"


def test_ended_from_outside_it_leaves_nothing_behind(tmp_path: Path, config: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--prove-resume", "--config", str(config), "--dir", str(tmp_path)],
        stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stderr is not None
    assert "straight" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    process.stderr.close()
    deadline = time.monotonic() + 10
    while list(tmp_path.glob(".holdfast-prove-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}


class Asked(Exception):
    """Raised in place of a proof, with what it was asked for."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ask for a proof on the command line; what training would have been proved."""

    def prove(config: Any, **options: Any) -> None:
        raise Asked(config, options)

    monkeypatch.setattr("holdfast.training.proving.prove", prove)

    def ask(*words: object) -> tuple[Any, dict[str, Any]]:
        with pytest.raises(Asked) as told:
            cli.run_doctor(["--prove-resume", *map(str, words)], "holdfast doctor")
        return told.value.args  # type: ignore[return-value]

    return ask


def test_it_takes_the_options_of_train(tmp_path: Path, asked: Any) -> None:
    config, options = asked("--epochs", 7, "-b", 3, "--checkpoint-dir", tmp_path / "a" / "b")
    assert (config.training.epochs, config.training.batch_size) == (7, 3)
    assert (options["steps"], options["more"]) == (10, 10)
    assert options["place"] == tmp_path, "beside the run directory, as far as that exists"
    config, options = asked("--steps", 4, "--more", 2, "--preset", "quick", "--dir", tmp_path)
    assert (options["steps"], options["more"], options["place"]) == (4, 2, tmp_path)
    assert config.sources["epochs"] == "preset"


def test_a_run_directory_brings_its_own_configuration(
    tmp_path: Path, corpus: Path, asked: Any
) -> None:
    run = tmp_path / "run"
    save_config(config_for(run, corpus, epochs=9), run / "config.json")
    config, _options = asked(run)
    assert config.training.epochs == 9
    config, _options = asked("--checkpoint-dir", run, "--epochs", 2)
    assert config.training.epochs == 2, "a flag wins"
    config, _options = asked(run, "--preset", "quick")
    assert config.sources["epochs"] == "preset", "and so does another recipe"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps 0: expected a positive number"),
        (["--more", "-1"], "--more -1: expected a positive number"),
        (["--steps", "x"], "invalid int value"),
        (["--dir", "/nowhere/at/all"], "there is no such directory"),
        (["--bacth-size", "3"], "batch-size"),
    ],
)
def test_wrong_options_end_with_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--prove-resume", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_difference_is_shown_and_is_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from holdfast.prove.resume import OUTSIDE, Proof, explain
    from holdfast.prove.states import Difference
    from holdfast.training.proving import TrainingProof

    first = Difference("model.weight", (0, 1), "0.5", "0.25")
    proof = explain(Proof(False, None, first, also=("rng.torch",), killed=True), OUTSIDE)
    found = TrainingProof(proof, 3, 2, 4, "batch", ("aa", "bb"))

    def prove(_config: Any, **options: Any) -> TrainingProof:
        options["progress"](Stage("straight", 1, 5, 2.0))
        return found

    monkeypatch.setattr("holdfast.training.proving.prove", prove)
    words = ["doctor", "--prove-resume", "--dir", str(tmp_path)]
    assert main(words) == 4
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "✗ Different: 3 steps, SIGKILL, resume, 2 steps, against 5 steps straight.",
        "  First in step 4, its batch of data: aa straight, bb interrupted",
        "  At the end model.weight[0, 1]: 0.5 ≠ 0.25: what was saved came back as it was: a step "
        "depends on something that is not in the state (also different: rng.torch)",
    ]
    assert err == "straight: step 1/5, about 2.0 s left\n"
    assert main([*words, "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert told["equal"] is False and told["cause"] == OUTSIDE
    assert told["first"] == {"path": "model.weight", "index": [0, 1], "a": "0.5", "b": "0.25"}
    assert told["first_step"]["step"] == 4
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - the shortest way to say it
