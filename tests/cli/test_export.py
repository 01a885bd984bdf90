"""`holdfast export` and `holdfast import` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from holdfast.cli.export import COMMANDS
from holdfast.cli.main import main
from tests.exchange.strangers import Stranger
from tests.manage.runs import desk


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("theirs") / "theirs.pt"
    torch.save(Stranger("gpt2").train(2).state("model"), path)
    return path


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_needs_no_torch(name: str) -> None:
    done = desk(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"  holdfast {name} " in done.stdout


def test_in_and_out_again(
    theirs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["import", str(theirs), "--out", "runs/mine"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert "Optimizer: taken over; training goes on at step 2." in out
    assert "holdfast train --checkpoint-dir runs/mine --resume --data-file TEXT" in out
    assert main(["export", "runs/mine", "--to", "hf"]) == 0
    out, err = capsys.readouterr()
    assert "→ mine-hf (hf, fp32)" in out
    assert "largest difference 0 (allowed" in out
    assert (tmp_path / "mine-hf" / "README.md").is_file()
    assert main(["export", "runs/mine", "--to", "hf"]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert main(["export", "runs/mine", "--to", "weights", "--json", "--dtype", "bf16"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["target"], shown["dtype"]) == ("mine-weights.pt", "bf16")


def test_the_context_may_be_chosen_and_the_json_tells_of_it(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import", str(theirs), "--out", str(tmp_path / "run"), "--json"]
    assert main([*words, "--context-length", "64"]) == 2
    assert "32 tokens" in capsys.readouterr().err
    assert main([*words, "--context-length", "16"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == ["source", "run", "form", "architecture", "parameters", "context_length",
                           "step", "optimizer_begun_anew_because", "check", "seconds",
                           "notes"]  # fmt: skip
    assert shown["context_length"] == 16
    assert shown["optimizer_begun_anew_because"] is None


@pytest.mark.parametrize(
    ("argv", "status", "what"),
    [
        (["export", "no/such"], 2, "--to"),
        (["export", "no/such", "--to", "hf"], 1, "There is no checkpoint at no/such"),
        (["export", "no/such", "--to", "gguf"], 2, "hf"),
        (["import", "no/such"], 4, "There is nothing at no/such"),
        (["import"], 2, "DIR|FILE"),
    ],
    ids=str,
)
def test_a_wrong_call_is_one_line(
    argv: list[str], status: int, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert what in err
