"""`holdfast compare` as people run it: pipes, terminals, JSON, damage, and other people's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint.format.container import Reader
from holdfast.cli import compare as command
from holdfast.cli.main import main
from holdfast.manage.compare.manifests import compare
from holdfast.table import Screen
from holdfast.training.inference import Continuation
from tests.manage.runs import desk, desk_json, flip, make_run
from tests.support import identity, write_state
from tests.training.runs import config_for, train, write_corpus

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process, which has torch already: (status, stdout, stderr)."""

    def call(*argv: str | Path) -> tuple[int, str, str]:
        status = main(["compare", *map(str, argv)])
        return (status, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of a language model; `b` has another vocabulary."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_corpus(folder)
    train(config_for(folder / "a", data, epochs=2))
    train(config_for(folder / "b", data, epochs=1, vocab_size=280))
    return folder


# --------------------------------------------------------------------------------------- weights


def test_tensors_are_compared_in_whole_lines(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a")
    done = desk("compare", a / "model_epoch_1.pt", a, a / "model_epoch_4.pt", "--tensors")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    for label in "BC":
        at = lines.index(f"Tensors of {label} against A (model)")
        assert lines[at + 1].split()[:3] == ["layer", "relative", "cosine"]
        assert [line.split()[0] for line in lines[at + 2 : at + 4]] == ["weight", "bias"] or {
            line.split()[0] for line in lines[at + 2 : at + 4]
        } == {"weight", "bias"}
        assert lines[at + 4].startswith("all")


def test_the_same_file_twice_is_the_same_bit_by_bit(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", (1.0,)) / "model_epoch_1.pt"
    found = desk("compare", path, path, "--tensors", "--sections", "all")
    assert "All 8 tensors are the same, bit by bit." in found.stdout
    document = desk_json("compare", path, path, "--sections", "all")
    drift = document["drift"]["B"]
    assert drift["identical"] and drift["sections"] == ["model", "optimizer"]
    assert drift["total"]["relative"] == 0.0 and drift["total"]["changed"] == 0


def test_json_has_every_tensor_and_nothing_that_was_not_asked_for(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a")
    plain = desk_json("compare", a, a / "model_epoch_1.pt")
    assert set(plain) == {"checkpoints", "metrics", "config", "environment"}
    drift = desk_json("compare", a, a / "model_epoch_1.pt", "--tensors")["drift"]["B"]
    assert [(t["name"], t["shape"]) for t in drift["tensors"]] == [
        ("weight", [4, 8]), ("bias", [4])
    ]  # fmt: skip
    for tensor in drift["tensors"]:
        assert 0 < tensor["relative"] < 1 and tensor["changed"] == tensor["elements"]
        assert set(tensor["largest"]["values"]) == {"A", "B"}
        values = tensor["largest"]["values"]
        assert abs(values["B"] - values["A"]) == pytest.approx(tensor["largest"]["change"])
    assert [layer["name"] for layer in drift["layers"]] and not drift["identical"]


def test_damage_in_the_weights_ends_with_four_and_one_line(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a")
    with Reader(a / "model_epoch_1.pt") as reader:
        place = reader.record("checkpoint/data/0").offset
    flip(a / "model_epoch_1.pt", place)
    assert desk("compare", a, a / "model_epoch_1.pt").returncode == 0  # only manifests are read
    done = desk("compare", a, a / "model_epoch_1.pt", "--tensors")
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1 and "model_epoch_1.pt is damaged" in done.stderr


def test_sections_that_are_not_there_and_numbers_that_cannot_be_meant(
    tmp_path: Path, run: Run
) -> None:
    a = make_run(tmp_path / "a", (1.0,))
    status, _out, told = run(a, a, "--sections", "model,ema")
    assert status == 1 and "section ema" in told and "model, optimizer" in told
    for flags in (["--tokens", "0"], ["--max-tokens", "0"], ["--temperature", "-1"],
                  ["--temperature", "nan"], ["--temperature", "inf"]):  # fmt: skip
        status, out, told = run(a, a, *flags)
        assert status == 2 and flags[0] in told and out == ""


# ---------------------------------------------------------------------------------------- models


def test_each_model_continues_the_prompt_and_the_seed_decides(trained: Path, run: Run) -> None:
    argv = [trained / "a", trained / "b", "--prompt", "今天", "--tokens", "8"]
    status, out, told = run(*argv, "--json")
    assert (status, told) == (0, "")
    found = json.loads(out)["continuations"]
    assert (found["prompt"], found["tokens"], found["seed"]) == ("今天", 8, 0)
    assert set(found["texts"]) == {"A", "B"}
    assert set(found["texts"]["A"]) == {"text", "ended", "seconds"}
    again, other = (json.loads(run(*argv, "--json", "--seed", s)[1]) for s in ("0", "1"))
    texts = [
        {label: one["text"] for label, one in found["texts"].items()}
        for found in (found, again["continuations"], other["continuations"])
    ]
    assert texts[0] == texts[1] != texts[2]
    shown = run(*argv)[1]
    assert "Continuations of “今天”\nA\n" in shown and texts[0]["A"].split("\n")[0] in shown


def test_each_model_is_measured_on_the_same_text(trained: Path, run: Run) -> None:
    text = trained / "corpus.txt"
    argv = [trained / "a", trained / "a" / "model_epoch_1.pt", trained / "b", "--eval", text]
    found = json.loads(run(*argv, "--json")[1])["evaluation"]
    measured = found["measured"]
    assert found["better"] in "AB" and not found["same_tokenizer"]
    assert len({one["text_bytes"] for one in measured.values()}) == 1
    assert measured["A"]["tokens"] == measured["B"]["tokens"] != measured["C"]["tokens"]
    status, out, told = run(*argv, "--max-tokens", "200")
    assert status == 0 and told == "" and "The tokenizers differ" in out
    row = {line[:21].strip(): line[21:].split() for line in out.splitlines()}
    assert row["tokens"][0] == row["tokens"][1] and 196 <= int(row["tokens"][0]) <= 200
    assert row["loss (nats per token)"][-1] == "-" and row["bits per byte"][-1] in "AB"
    alike = run(*argv[:2], "--eval", text)[1]
    assert "The tokenizers differ" not in alike


def test_what_a_stranger_saved_and_what_is_missing_is_one_line(
    trained: Path, tmp_path: Path, run: Run
) -> None:
    strange = make_run(tmp_path / "strange", (1.0,))
    status, _out, told = run(trained / "a", strange, "--prompt", "今天")
    assert status == 4 and len(told.splitlines()) == 1
    assert "model_epoch_1.pt does not say what its model is" in told
    status, _out, told = run(trained / "a", trained / "b", "--eval", tmp_path / "no.txt")
    assert status == 3 and len(told.splitlines()) == 1 and "no.txt" in told


def test_only_one_model_is_in_memory_at_a_time(
    trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    from holdfast.training import inference

    seen: list[weakref.ref[Any]] = []
    original = inference.load_for_inference

    def load(source: Path) -> inference.Loaded:
        gc.collect()
        assert not any(model() is not None for model in seen)
        loaded = original(source, device="cpu")
        seen.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(inference, "load_for_inference", load)
    text = trained / "corpus.txt"
    assert (
        run(trained / "a", trained / "b", trained / "a", "--prompt", "今", "--eval", text)[0] == 0
    )
    assert len(seen) == 3


# ------------------------------------------------------------------------------------- the screen


def test_texts_fit_a_terminal_and_are_whole_in_a_pipe(tmp_path: Path) -> None:
    subjects = compare([str(make_run(tmp_path / name, (1.0,))) for name in "ab"]).subjects
    told = {
        "A": Continuation("天气很好。\n" + "天" * 60, "length", 1.0),
        "B": Continuation("word " * 20 + "\x1b[2J", "end", 1.0),
    }
    from rich.cells import cell_len

    shown = command.texts(subjects, "今", told, Screen(60))
    assert shown[1] == "A" and all(cell_len(line) <= 60 for line in shown)
    pipe = command.texts(subjects, "今", told, Screen())
    assert pipe[1:4] == ["A", "天气很好。", "天" * 60]
    for lines in (shown, pipe):
        text = "\n".join(lines)
        assert "\x1b[2J" not in text and "[it ended the text here]" in text


def test_a_metric_of_one_and_one_that_is_no_number_never_win(tmp_path: Path) -> None:
    metrics = [{"val_loss": 2.0, "f1": 0.4}, {"val_loss": float("nan")}, {"val_loss": 1.5}]
    paths = [
        write_state(tmp_path / f"{i}.pt", {"w": torch.ones(1)}, **identity(1, metrics=one))
        for i, one in enumerate(json.loads(json.dumps(metrics).replace("NaN", '"nan"')))
    ]
    found = {m.name: m for m in compare([str(path) for path in paths]).metrics}
    assert found["val_loss"].better == "C" and found["f1"].better is None
    assert found["f1"].values == {"A": 0.4}
    lines = compare([str(path) for path in paths]).lines(Screen())
    row = next(line for line in lines if line.startswith("val_loss"))
    assert row.split() == ["val_loss", "2.0000", "nan", "(nan)", "1.5000", "(-0.5000)", "C"]
    row = next(line for line in lines if line.startswith("f1"))
    assert row.split() == ["f1", "0.4000", "-", "-", "-"]
