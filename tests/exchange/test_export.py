"""Exports: what was written computes what was trained, is whole, or is not there at all."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from holdfast import CheckpointManager
from holdfast.errors import (
    CheckpointError,
    ConfigError,
    DamagedCheckpoint,
    HoldfastError,
    Interrupted,
    ResourceError,
)
from holdfast.exchange import export_formats, target
from holdfast.exchange.export import FORMATS, Exported, export
from holdfast.exchange.export_check import Deviation
from holdfast.exchange.importing import import_model
from holdfast.training.inference import load_for_inference
from tests.exchange.strangers import Stranger, make_run, tokenizer
from tests.support import damage

QUICK = ("hf", "safetensors", "weights")  # ONNX takes seconds and has a file of its own


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("trained"), epochs=2)


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[Path]:
    """A directory in which nothing but the target may be in the end."""
    place = tmp_path / "place"
    place.mkdir()
    yield place
    assert not [p.name for p in place.iterdir() if p.name.startswith(".")]


def out_of(place: Path, form: str) -> str:
    return str(place / ("w.pt" if form == "weights" else form))


@pytest.mark.parametrize("form", QUICK)
def test_the_same_weights_compute_the_same(run: Path, inside: Path, form: str) -> None:
    done = export(str(run), form, out=out_of(inside, form))
    assert done.check is not None
    assert done.check.difference == 0
    assert done.check.same_choice == 1
    assert done.check.source == "validation"
    assert done.dtype == "fp32"
    assert sum(size for _name, size in done.files) > 4_000_000


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("form", QUICK)
def test_other_dtypes_are_what_they_say(run: Path, inside: Path, form: str, dtype: str) -> None:
    done = export(str(run), form, out=out_of(inside, form), dtype=dtype)
    assert done.check is not None
    assert 0 < done.check.difference <= done.check.allowed
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    original = load_for_inference(run, device="cpu").model.state_dict()
    if form == "weights":
        found = torch.load(done.target, weights_only=True)["model"]
    else:
        from safetensors.torch import load_file

        found = load_file(done.target / "model.safetensors")
        assert json.loads((done.target / "config.json").read_text())["dtype"] == (
            str(wanted).removeprefix("torch.")
        )
    for name, tensor in found.items():
        assert torch.equal(tensor, original[name].to(wanted)), name


def test_a_batch_of_texts_goes_on_as_each_text_alone(run: Path, inside: Path) -> None:
    import transformers

    done = export(str(run), "hf", out=out_of(inside, "hf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(done.target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(done.target)

    def go_on(*texts: str) -> list[str]:
        given = tokenizer(list(texts), return_tensors="pt", padding=True)
        ids = model.generate(**given, do_sample=False, max_new_tokens=8, min_new_tokens=8)
        return [tokenizer.decode(one[-8:]) for one in ids]

    short, long = "今天", "春江潮水连海平，海上明月共潮生"
    assert go_on(short, long) == go_on(short) + go_on(long)


def test_tied_weights_are_written_once_and_are_tied_again(run: Path, inside: Path) -> None:
    import transformers
    from safetensors import safe_open

    done = export(str(run), "hf", out=out_of(inside, "hf"))
    with safe_open(str(done.target / "model.safetensors"), "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - it is no dictionary
    model = transformers.AutoModelForCausalLM.from_pretrained(done.target)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_untied_weights_stay_two(tmp_path: Path, inside: Path) -> None:
    import_stranger(tmp_path, "llama")
    done = export(str(tmp_path / "run"), "weights", out=out_of(inside, "weights"))
    model = load_for_inference(done.target, device="cpu").model
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def import_stranger(directory: Path, kind: str) -> None:
    torch.save(Stranger(kind).train(2).state("model"), directory / "theirs.pt")
    import_model(str(directory / "theirs.pt"), str(directory / "run"))


@pytest.mark.parametrize("trained", [True, False], ids=["ours", "brought along"])
def test_the_tokenizer_gives_the_ids_of_training(
    run: Path, tmp_path: Path, inside: Path, trained: bool
) -> None:
    """On the sample text, special tokens, spaces, line ends and rare characters."""
    import transformers

    if not trained:
        import_stranger(tmp_path, "gpt2")
    source = run if trained else tmp_path / "run"
    export(str(source), "hf", out=out_of(inside, "hf"))
    ours = load_for_inference(source, device="cpu").tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(inside / "hf")
    sample = (Path(__file__).parents[2] / "data" / "zh_sample.txt").read_text("utf-8")
    rare = "".join(map(chr, [*range(0x250), *range(0x2000, 0x2070), 0x1F600, 0x20000, 0xFFFD]))
    special = "<|endoftext|>"
    for text in (sample[:20_000], f" {special}a {special} b{special}\n", "  \t\r\n\n 　x  ", rare,
                 "e\u0301 é", "", *export_formats.tricky_texts(ours)):  # fmt: skip
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text), ascii(text[:50])
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert theirs.eos_token_id == ours.eos_id == theirs.pad_token_id


def test_transformers_generates_with_what_was_written(run: Path, inside: Path) -> None:
    import transformers

    export(str(run), "hf", out=out_of(inside, "hf"))
    config = json.loads((inside / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["use_cache"] is True
    model = transformers.AutoModelForCausalLM.from_pretrained(inside / "hf")
    assert model.generation_config.eos_token_id == 0
    words = transformers.AutoTokenizer.from_pretrained(inside / "hf")
    ids = model.generate(**words("今天", return_tensors="pt"), max_new_tokens=5)
    assert ids.shape[1] > len(words("今天")["input_ids"])


def test_a_large_model_is_written_in_pieces(
    run: Path, inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_formats, "SHARD_BYTES", 3_000_000)
    done = export(str(run), "hf", out=out_of(inside, "hf"))
    names = [name for name, _size in done.files]
    assert "model.safetensors.index.json" in names
    assert sum(name.startswith("model-0000") for name in names) >= 4
    done = export(str(run), "safetensors", out=out_of(inside, "safetensors"))
    assert [n for n, _s in done.files if n.endswith(".safetensors")] == ["model.safetensors"]


def test_weights_alone_open_everywhere_and_serve(run: Path, inside: Path) -> None:
    export(str(run), "weights", out=str(inside / "w.pt"))
    state = torch.load(inside / "w.pt", weights_only=True)
    assert {"model", "model_config", "tokenizer"} <= set(state)
    assert not {"optimizer", "rng", "scheduler"} & set(state)
    whole = (run / "latest.pt").stat().st_size
    assert (inside / "w.pt").stat().st_size < 0.4 * whole
    again = export(str(inside / "w.pt"), "hf", out=str(inside / "hf"))
    assert again.check is not None
    assert again.check.difference == 0


def test_nothing_of_the_machine_is_in_an_export(run: Path, inside: Path) -> None:
    for form in QUICK:
        done = export(str(run), form, out=out_of(inside, form))
        for name, _size in done.files:
            content = (done.target / name if done.target.is_dir() else done.target).read_bytes()
            for secret in (str(run.parent), f"{Path.home()}/", str(Path(__file__).parents[1])):
                assert secret.encode() not in content, (form, name, secret)


def test_a_run_stands_for_its_best(run: Path, inside: Path) -> None:
    best = load_for_inference(run / "best_model.pt", device="cpu").entry.step
    assert export(str(run), "weights", out=str(inside / "w.pt")).step == best
    first = export(str(run / "model_epoch_1.pt"), "weights", out=str(inside / "first.pt"))
    assert first.source == run / "model_epoch_1.pt"


# --------------------------------------------------------------------------- files of strangers


@pytest.mark.parametrize("form", ["safetensors", "weights"])
@pytest.mark.parametrize("ours", [True, False], ids=["our engine", "torch.save"])
def test_of_a_stranger_s_file_the_weights_are_exported(
    tmp_path: Path, inside: Path, form: str, ours: bool
) -> None:
    model = torch.nn.Linear(3, 2)
    if ours:
        with CheckpointManager(tmp_path / "run", {"model": model}) as manager:
            manager.save(step=7)
        source = tmp_path / "run" / "latest.pt"
    else:
        source = tmp_path / "theirs.pt"
        tied = {**model.state_dict(), "again": model.weight}
        torch.save({"model_state_dict": tied, "epoch": 3}, source)
    done = export(str(source), form, out=out_of(inside, form))
    assert done.check is None
    assert done.step == (7 if ours else None)
    assert "was not asked for logits" in "\n".join(done.lines())
    if form == "weights":
        found = torch.load(done.target, weights_only=True)["model"]
    else:
        from safetensors.torch import load_file

        found = load_file(done.target / "model.safetensors")
        assert bool(done.notes) is not ours
    assert torch.equal(found["weight"], model.weight)


@pytest.mark.parametrize("form", ["hf", "onnx"])
def test_what_a_stranger_s_file_cannot_become_is_said(
    tmp_path: Path, inside: Path, form: str
) -> None:
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "theirs.pt")
    with pytest.raises(CheckpointError, match=r"--to safetensors.*holdfast import \S*theirs.pt"):
        export(str(tmp_path / "theirs.pt"), form, out=out_of(inside, form))


# ------------------------------------------------------------------------------- where it fails


def test_one_wrong_weight_is_found_and_nothing_is_left(
    run: Path, inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = PreTrainedModel.save_pretrained

    def spoiled(model: Any, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            next(model.parameters())[0, 0] += 0.5
        write(model, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoiled)
    with pytest.raises(Deviation, match=r"not the model.*largest difference"):
        export(str(run), "hf", out=str(inside / "hf"))
    assert Deviation.exit_code != 0
    assert list(inside.iterdir()) == []


def test_a_tokenizer_that_cuts_otherwise_is_found(
    run: Path, inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = type(tokenizer()).save

    def spoiled(self: Any, folder: Path) -> None:
        save(self, folder)
        path = Path(folder) / "tokenizer.json"
        path.write_text(path.read_text("utf-8").replace('{"type":"NFC"}', "null"), "utf-8")

    monkeypatch.setattr(type(tokenizer()), "save", spoiled)
    with pytest.raises(Deviation, match="other tokens"):
        export(str(run), "hf", out=str(inside / "hf"))
    assert list(inside.iterdir()) == []


def test_ruined_weights_are_told_as_such(tmp_path: Path, inside: Path) -> None:
    state = Stranger("gpt2").state("model")
    state["model"]["transformer.wpe.weight"].fill_(float("nan"))
    from holdfast.exchange.export_formats import write_state

    write_state(state, tmp_path / "x.pt", None)
    with pytest.raises(HoldfastError, match="weights are ruined"):
        export(str(tmp_path / "x.pt"), "hf", out=str(inside / "hf"))


def test_damage_is_found_before_anything_is_written(
    run: Path, tmp_path: Path, inside: Path
) -> None:
    shutil.copy(run / "best_model.pt", tmp_path / "x.pt")
    (tmp_path / "x.pt").chmod(0o644)
    damage(tmp_path / "x.pt")
    with pytest.raises(DamagedCheckpoint):
        export(str(tmp_path / "x.pt"), "hf", out=str(inside / "hf"))
    assert list(inside.iterdir()) == []


@pytest.mark.parametrize(
    ("question", "what"),
    [
        (["no/such.pt", "hf"], "There is no checkpoint at"),
        ([".", "hf"], "There are no checkpoints in"),
        (["x", "huggingface"], "did you mean .*hf"),
        (["x", "safetensor"], "did you mean .*safetensors"),
        (["x", "xyz"], ", ".join(FORMATS)),
        (["x", "hf", "float16"], "did you mean .*fp16"),
        (["x", "onnx", "bf16"], "fp16 or fp32"),
    ],
    ids=str,
)
def test_wrong_questions_are_answered_in_one_line(
    inside: Path, monkeypatch: pytest.MonkeyPatch, question: list[str], what: str
) -> None:
    monkeypatch.chdir(inside)
    source, form, *dtype = question
    with pytest.raises(HoldfastError, match=what) as caught:
        export(source, form, dtype=dtype[0] if dtype else None)
    assert "\n" not in str(caught.value)
    assert list(inside.iterdir()) == []


def test_what_is_there_stays(run: Path, inside: Path) -> None:
    place = inside / "hf"
    place.mkdir()
    (place / "mine.txt").write_text("mine")
    file = inside / "a-file"
    file.write_text("of an earlier export")
    for there in (place, file, run / "latest.pt"):
        with pytest.raises(ConfigError, match="is there already"):
            export(str(run), "safetensors", out=str(there))
    with pytest.raises(ConfigError, match="is a directory"):
        export(str(run), "weights", out=str(place))
    assert (place / "mine.txt").read_text() == "mine"
    (place / "mine.txt").unlink()
    export(str(run), "safetensors", out=str(place))  # it is empty
    assert sorted(path.name for path in inside.iterdir()) == ["a-file", "hf"]
    assert (place / "model.safetensors").is_file()


def test_no_room_is_known_before_anything_is_written(
    run: Path, inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target.filesystem, "free_bytes", lambda _path: 70 << 20)
    with pytest.raises(ResourceError, match=r"70\.0 MiB free, and \d+ MiB are needed"):
        export(str(run), "hf", out=str(inside / "hf"))
    assert list(inside.iterdir()) == []


def test_a_missing_package_is_named_with_its_extra(
    run: Path, inside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    with pytest.raises(ConfigError, match=r"onnxruntime: pip install 'holdfast-train\[export\]'"):
        export(str(run), "onnx", out=str(inside / "onnx"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(
    run: Path, inside: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write = PreTrainedModel.save_pretrained

    def interrupted(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        assert [p.name[0] for p in inside.iterdir()] == ["."], "it is being written"
        os.kill(os.getpid(), number)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", interrupted)
    with pytest.raises(Interrupted, match="nothing was exported") as caught:
        export(str(run), "hf", out=str(inside / "hf"))
    assert caught.value.exit_code == 128 + number
    assert list(inside.iterdir()) == []


def test_the_json_form_is_what_the_documents_say(run: Path, inside: Path) -> None:
    done: Exported = export(str(run), "safetensors", out=str(inside / "s"))
    shown = done.to_json()
    assert list(shown) == ["target", "to", "dtype", "source", "step", "files", "seconds", "check",
                           "tensors", "notes"]  # fmt: skip
    assert list(shown["check"]) == ["text", "tokens", "largest_difference", "allowed_difference",
                                    "largest_logit", "same_choice"]  # fmt: skip
    json.dumps(shown, allow_nan=False)
