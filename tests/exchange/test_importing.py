"""Models from elsewhere: every form becomes a run, and training goes on where it had stopped."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import load
from holdfast.errors import (
    CheckpointError,
    ConfigError,
    DamagedCheckpoint,
    DataError,
    HoldfastError,
    StateMismatch,
)
from holdfast.exchange import importing
from holdfast.exchange.export import export
from holdfast.exchange.importing import Imported, import_model
from holdfast.serving.engine.engine import end_ids_of
from holdfast.training import models
from holdfast.training.inference import load_for_inference
from holdfast.training.options.config import ModelConfig
from tests.exchange.strangers import Stranger, batches, settings, tokenizer
from tests.training.runs import config_for, train, write_corpus

FORMS = ("model", "model_state_dict", "bare")


def import_form(directory: Path, stranger: Stranger, form: str, **changes: Any) -> Imported:
    path = directory / "theirs.pt"
    torch.save({**stranger.state(form), **changes}, path)
    config, words = stranger.save_beside(directory)
    return import_model(
        str(path), str(directory / "run"), model_config=str(config), tokenizer=str(words)
    )


def moments_of(state: dict[str, Any], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """exp_avg by the name of its parameter, in a checkpoint of ours."""
    named = list(model.named_parameters())
    names = [n for n, p in named if p.dim() >= 2] + [n for n, p in named if p.dim() < 2]
    entries = state["optimizer"]["state"]
    return {name: entries[i]["exp_avg"] for i, name in enumerate(names)}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_a_run_with_the_same_weights(
    tmp_path: Path, kind: str, form: str
) -> None:
    stranger = Stranger(kind).train(3)
    done = import_form(tmp_path, stranger, form)
    loaded = load_for_inference(tmp_path / "run", device="cpu")
    ids = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, stranger.model.eval()(ids).logits)
    assert loaded.tokenizer.to_state() == tokenizer().to_state()
    assert (done.step, bool(done.optimizer)) == ((0, True) if form == "bare" else (3, False))


@pytest.mark.parametrize("how", [{}, {"grouped": True}, {"named": True}], ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_moments_go_to_the_parameters_that_they_belong_to(
    tmp_path: Path, kind: str, how: dict[str, bool]
) -> None:
    stranger = Stranger(kind, **how).train(4)
    assert import_form(tmp_path, stranger, "model").optimizer == ""
    state = load(tmp_path / "run" / "latest.pt")
    found = moments_of(state, stranger.model)
    for name, parameter in stranger.model.named_parameters():
        assert torch.equal(found[name], stranger.optimizer.state[parameter]["exp_avg"]), name
    groups = state["optimizer"]["param_groups"]
    assert all(group["betas"] == (0.9, 0.99) for group in groups)
    assert [g["weight_decay"] for g in groups] == [0.05, 0.0 if how.get("grouped") else 0.05]


@pytest.mark.parametrize("form", FORMS)
def test_training_goes_on_without_a_jump(tmp_path: Path, form: str) -> None:
    """The stranger's loss has fallen a good way; with us it goes on from there, and goes on
    falling, with the optimizer's state or without."""
    stranger = Stranger("gpt2").train(150)
    began, before = stranger.losses[0], sum(stranger.losses[-10:]) / 10
    done = import_form(tmp_path, stranger, form)
    data = write_corpus(tmp_path, 20)
    options = {"context_length": "none", "vocab_size": "none", "dropout": "none", "model": "gpt2",
               "epochs": "none", "num_steps": done.step + 60, "batch_size": 4,
               "gradient_accumulation": 1, "schedule": "constant", "warmup_ratio": 0}  # fmt: skip
    said = train(config_for(tmp_path / "run", data, resume="auto", **options))
    assert f"step {done.step})" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert next(line["step"] for line in lines if line["event"] == "step") == done.step + 1
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert began - before > 1.0, "or there was nothing to lose"
    assert first < before + 0.25 * (began - before)
    assert last < first + 0.05
    betas = load(tmp_path / "run" / "latest.pt")["optimizer"]["param_groups"][0]["betas"]
    assert betas == ((0.9, 0.95) if form == "bare" else (0.9, 0.99)), "theirs stay"


def test_the_first_step_with_us_is_the_stranger_s_next_step(tmp_path: Path) -> None:
    """Same batch, same settings: the imported optimizer makes of it what theirs makes of it."""
    stranger = Stranger("llama").train(5)
    import_form(tmp_path, stranger, "model")
    state = load(tmp_path / "run" / "latest.pt")
    loaded = load_for_inference(tmp_path / "run", device="cpu")
    model = loaded.model.train().requires_grad_(True)
    parameters = list(model.parameters())
    ours = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() >= 2]},
         {"params": [p for p in parameters if p.dim() < 2]}]
    )  # fmt: skip
    ours.load_state_dict(state["optimizer"])
    ids = batches(1, 5)[0]
    model(input_ids=ids, labels=ids).loss.backward()
    ours.step()
    stranger.train(1)
    for mine, theirs in zip(model.parameters(), stranger.model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_what_wrappers_put_before_the_names_is_taken_off(tmp_path: Path, prefix: str) -> None:
    stranger = Stranger("llama").train(1)
    state = stranger.state("model")
    state["model"] = {prefix + name: value for name, value in state["model"].items()}
    torch.save(state, tmp_path / "x.pt")
    done = import_model(str(tmp_path / "x.pt"), str(tmp_path / "run"))
    assert done.optimizer == ""
    assert done.check.difference == 0


def test_there_and_back_again_is_bit_identical(tmp_path: Path) -> None:
    """export hf → import → export hf; and a model of transformers from outside."""
    for kind in ("gpt2", "llama"):
        stranger, place = Stranger(kind).train(1), tmp_path / kind
        stranger.model.save_pretrained(place / "theirs")
        tokenizer().save(place / "theirs")
        import_model(str(place / "theirs"), str(place / "run"))
        export(str(place / "run"), "hf", out=str(place / "first"))
        import_model(str(place / "first"), str(place / "again"))
        export(str(place / "again"), "hf", out=str(place / "second"))
        weights = [
            (place / name / "model.safetensors").read_bytes()
            for name in ("theirs", "first", "second")
        ]
        assert weights[0] == weights[1] == weights[2]
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (place / "first" / name).read_bytes() == (place / "second" / name).read_bytes()


def test_a_bf16_model_comes_back_in_bf16(tmp_path: Path) -> None:
    Stranger("llama").model.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    tokenizer().save(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), str(tmp_path / "run"))
    assert load(tmp_path / "run" / "latest.pt", only="model")["lm_head.weight"].dtype is (
        torch.float32
    )
    export(str(tmp_path / "run"), "safetensors", out=str(tmp_path / "back"), dtype="bf16")
    files = [tmp_path / name / "model.safetensors" for name in ("theirs", "back")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_weights_that_holdfast_exported_become_a_run_again(tmp_path: Path) -> None:
    import_form(tmp_path, Stranger("gpt2").train(2), "model")
    export(str(tmp_path / "run"), "weights", out=str(tmp_path / "w.pt"))
    done = import_model(str(tmp_path / "w.pt"), str(tmp_path / "again"))
    assert (done.form, done.step, done.check.difference) == ("model", 0, 0)


def test_a_run_needs_nothing_of_where_it_came_from(tmp_path: Path) -> None:
    """Also a run that the trainer began from a directory: the checkpoint says what it is."""
    stranger = Stranger("gpt2")
    stranger.model.save_pretrained(tmp_path / "theirs")
    tokenizer().save(tmp_path / "theirs")
    data = write_corpus(tmp_path)
    options = {"context_length": "none", "vocab_size": "none", "dropout": "none",
               "model": str(tmp_path / "theirs"), "epochs": "none"}  # fmt: skip
    train(config_for(tmp_path / "run", data, num_steps=2, **options))
    (tmp_path / "theirs" / "config.json").unlink()
    said = train(config_for(tmp_path / "run", data, num_steps=4, **options))
    assert "Finished: 4 steps" in said


# ------------------------------------------------------------------------- what cannot be imported


def test_shapes_that_do_not_fit_are_told_by_name(tmp_path: Path) -> None:
    state = Stranger("gpt2").state("bare")
    state["transformer.wpe.weight"] = torch.zeros(7, 32)
    state["transformer.h.9.extra"] = torch.zeros(1)
    del state["transformer.ln_f.bias"]
    torch.save(state, tmp_path / "x.pt")
    config, words = Stranger("gpt2").save_beside(tmp_path)
    with pytest.raises(StateMismatch) as caught:
        import_model(str(tmp_path / "x.pt"), str(tmp_path / "run"), model_config=str(config),
                     tokenizer=str(words))  # fmt: skip
    message = str(caught.value)
    assert "transformer.wpe.weight is [7, 32] in the file and [32, 32] in the model" in message
    assert "transformer.ln_f.bias is missing" in message
    assert "transformer.h.9.extra is only in the file" in message
    assert not (tmp_path / "run").exists()


def test_a_directory_whose_weights_do_not_fit_is_refused(tmp_path: Path) -> None:
    Stranger("llama").model.save_pretrained(tmp_path / "theirs")
    settings("llama", hidden_size=64, num_hidden_layers=3).save_pretrained(tmp_path / "theirs")
    with pytest.raises(StateMismatch, match=r"layers\.2\.\S+ is missing.* and \d+ more"):
        import_model(str(tmp_path / "theirs"), str(tmp_path / "run"))


class Evil:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._marker),)


def test_code_is_refused_by_its_name_and_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"model": {}, "x": Evil(marker)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"\((posix|nt)\.mkdir\).*save it again"):
        import_model(str(tmp_path / "x.pt"), str(tmp_path / "run"))
    assert not marker.exists()


def test_code_of_a_directory_is_not_run_either(tmp_path: Path) -> None:
    marker, theirs = tmp_path / "ran", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "evil.py").write_text(f"import os; os.mkdir({str(marker)!r})")
    (theirs / "config.json").write_text(
        json.dumps({"model_type": "nobody's", "auto_map": {"AutoConfig": "evil.Config",
                                                           "AutoModelForCausalLM": "evil.Model"}})
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="cannot be loaded by transformers"):
        import_model(str(theirs), str(tmp_path / "run"))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model_config": None}, "--model-config FILE"),
        ({"model_config": {"n_layer": 2}}, "--model-config FILE"),
        ({"model_config": {"model_type": "no-such"}}, "no-such"),
        ({"tokenizer": None}, "--tokenizer DIR"),
        ({"model": {"a": 1}}, "no weights"),
    ],
    ids=str,
)
def test_what_is_missing_is_asked_for(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    torch.save({**Stranger("gpt2").train(1).state("model"), **change}, tmp_path / "x.pt")
    with pytest.raises((ConfigError, CheckpointError), match=what):
        import_model(str(tmp_path / "x.pt"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(settings("gpt2", vocab_size=100))
    model.save_pretrained(tmp_path / "theirs")
    tokenizer().save(tmp_path / "theirs")
    with pytest.raises(StateMismatch, match="another model"):
        import_model(str(tmp_path / "theirs"), str(tmp_path / "run"))


def test_an_optimizer_that_does_not_fit_begins_anew_and_says_why(tmp_path: Path) -> None:
    stranger = Stranger("gpt2").train(2)
    optimizer = stranger.optimizer.state_dict()
    other = torch.optim.SGD(stranger.model.parameters(), lr=0.1, momentum=0.9).state_dict()
    swapped = {**optimizer, "state": {0: optimizer["state"][1], **{
        i: e for i, e in optimizer["state"].items() if i}}}  # fmt: skip
    partial = {**optimizer, "state": {k: v for k, v in optimizer["state"].items() if k != 3}}
    for i, (state, why) in enumerate([(other, "not an Adam"), (swapped, "other shapes"),
                                      (partial, "moments for every"), ({}, "as those of torch"),
                                      (7, "none in the source")]):  # fmt: skip
        place = tmp_path / str(i)
        place.mkdir()
        done = import_form(place, stranger, "model", optimizer=state)
        assert why in done.optimizer
        assert done.step == 0
        assert load(place / "run" / "latest.pt")["optimizer"]["state"] == {}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damage_ends_in_our_own_words(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(Stranger("gpt2").train(1).state("model"), path)
    good = path.read_bytes()
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    for size in (0, 100, len(good) // 2, len(good) - 10):
        path.write_bytes(good[:size] + bytes(rng.randrange(256) for _ in range(3)))
        with pytest.raises(CheckpointError):
            import_model(str(path), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_damaged_file_of_ours_is_not_read_as_anybody_s(tmp_path: Path) -> None:
    import_form(tmp_path, Stranger("gpt2").train(1), "model")
    path = tmp_path / "run" / "latest.pt"
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    with pytest.raises(DamagedCheckpoint):
        import_model(str(path), str(tmp_path / "again"))


def test_nothing_is_left_where_it_goes_wrong_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_args: object, **_named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importing, "load_for_inference", stop)  # what is written is read back
    from holdfast.errors import Interrupted

    with pytest.raises(Interrupted, match="nothing was imported"):
        import_form(tmp_path, Stranger("gpt2").train(1), "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "theirs.pt", "tokenizer"]


def test_where_something_is_already_nothing_is_touched(tmp_path: Path) -> None:
    done = import_form(tmp_path, Stranger("gpt2").train(1), "model")
    before = sorted((p.name, p.stat().st_mtime_ns) for p in done.run.iterdir())
    with pytest.raises(ConfigError, match="is there already"):
        import_model(str(tmp_path / "theirs.pt"), str(done.run))
    with pytest.raises(ConfigError, match="is a run already"):
        import_model(str(done.run), str(tmp_path / "other"))
    (tmp_path / "plain").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        import_model(str(tmp_path / "plain"), str(tmp_path / "other"))
    assert sorted((p.name, p.stat().st_mtime_ns) for p in done.run.iterdir()) == before
    import_model(str(tmp_path / "theirs.pt"), str(tmp_path / "plain"))  # an empty one will do


# ---------------------------------------------------------------- directories as they are found


def hugging_face(folder: Path, **changes: Any) -> Path:
    """A directory of a small Llama as transformers writes it, with our tokenizer."""
    import transformers

    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(settings("llama", **changes))
    model.save_pretrained(folder)
    tokenizer().save(folder)
    return folder


def rewrite(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **fields}), "utf-8")


def test_a_bert_vocabulary_is_a_tokenizer_and_its_separator_ends_a_text(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"今天气很好我们去公园"]
    theirs = hugging_face(tmp_path / "theirs", vocab_size=len(words), eos_token_id=50256)
    for file in ("tokenizer.json", "special_tokens_map.json"):
        (theirs / file).unlink()
    (theirs / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    (theirs / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    rewrite(theirs / "config.json", tokenizer_class="BertTokenizer")
    import_model(str(theirs), str(tmp_path / "run"))
    loaded = load_for_inference(tmp_path / "run", device="cpu")
    assert loaded.tokenizer.encode("今天") == [5, 6] and loaded.tokenizer.eos_id == 3


def test_a_sentencepiece_tokenizer_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    theirs = hugging_face(tmp_path / "theirs")
    (theirs / "tokenizer.json").unlink()
    (theirs / "tokenizer.model").write_bytes(b"\x0a\x02\x08\x01")
    rewrite(theirs / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    with pytest.raises(DataError, match="pip install sentencepiece protobuf"):
        import_model(str(theirs), str(tmp_path / "run"))


@pytest.mark.parametrize("named", [[0, 7], 7])
def test_every_end_of_text_that_generation_config_names_travels(
    tmp_path: Path, named: int | list[int]
) -> None:
    theirs = hugging_face(tmp_path / "theirs")
    rewrite(theirs / "generation_config.json", eos_token_id=named)
    import_model(str(theirs), str(tmp_path / "run"))
    loaded = load_for_inference(tmp_path / "run", device="cpu")
    assert end_ids_of(loaded.model, loaded.tokenizer.eos_id) == {0, 7}
    model = models.load_model(ModelConfig(model=str(theirs)))
    assert end_ids_of(model, 0) == {0, 7}


@pytest.mark.parametrize("form", ["bare", "model"])
def test_the_first_training_changes_no_schedule_that_there_never_was(
    tmp_path: Path, form: str
) -> None:
    done = import_form(tmp_path, Stranger("gpt2").train(3), form)
    options = {"context_length": "none", "vocab_size": "none", "dropout": "none", "model": "gpt2",
               "epochs": "none", "num_steps": done.step + 2, "batch_size": 4}  # fmt: skip
    said = train(config_for(tmp_path / "run", write_corpus(tmp_path, 20), **options))
    assert f"step {done.step})" in said
    assert "scheduler" not in said


def test_a_pytorch_model_bin_is_trained_from_as_it_is_imported(tmp_path: Path) -> None:
    theirs = hugging_face(tmp_path / "theirs")
    whole = models.load_model(ModelConfig(model=str(theirs))).state_dict()
    (theirs / "model.safetensors").unlink()
    torch.save(whole, theirs / "pytorch_model.bin")
    again = models.load_model(ModelConfig(model=str(theirs))).state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    name = next(iter(whole))
    torch.save({n: t for n, t in whole.items() if n != name}, theirs / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=f"no weights for {name}"):
        models.load_model(ModelConfig(model=str(theirs)))


@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("way", ["import", "train"])
def test_code_beside_a_model_is_never_run_and_never_asked_about(
    tmp_path: Path, where: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, mark = hugging_face(tmp_path / "theirs"), tmp_path / "code was run"
    (theirs / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass T: pass\n")
    auto = dict.fromkeys(("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"), "evil.T")
    if where == "tokenizer_config.json":
        (theirs / "tokenizer.json").unlink()
        (theirs / "vocab.json").write_text("{}")
        rewrite(theirs / where, auto_map=auto | {"AutoTokenizer": ["evil.T", "evil.T"]},
                tokenizer_class="EvilTokenizer")  # fmt: skip
    else:
        rewrite(theirs / where, auto_map=auto, model_type="evil")
    monkeypatch.setattr("builtins.input", lambda *_words: pytest.fail("it asked"))
    with pytest.raises(HoldfastError, match="which holdfast never runs"):
        if way == "import":
            import_model(str(theirs), str(tmp_path / "run"))
        else:
            data = write_corpus(tmp_path, 5)
            train(config_for(tmp_path / "run", data, model=str(theirs), dropout="none",
                             vocab_size="none", context_length="none"))  # fmt: skip
    assert not mark.exists()


def test_a_link_out_of_the_directory_is_not_copied_into_a_checkpoint(tmp_path: Path) -> None:
    theirs = hugging_face(tmp_path / "theirs")
    secret = tmp_path / "secret"
    secret.write_text("root:x:0")
    (theirs / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(DataError, match="is a link out of its directory"):
        import_model(str(theirs), str(tmp_path / "run"))
    # The cache of huggingface_hub is made of links, and works.
    cached = tmp_path / "hub" / "snapshots" / "main"
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    cached.mkdir(parents=True)
    (theirs / "chat_template.jinja").unlink()
    for number, file in enumerate(sorted(theirs.iterdir())):
        file.rename(tmp_path / "hub" / "blobs" / str(number))
        (cached / file.name).symlink_to(f"../../blobs/{number}")
    import_model(str(cached), str(tmp_path / "run"))
    assert load_for_inference(tmp_path / "run", device="cpu").tokenizer.encode("今天")


# ------------------------------------------------------------------------------------- nanoGPT


class Block(torch.nn.Module):
    """A block with nanoGPT's names and its torch linear layers; computes nothing here."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.ln_1 = torch.nn.LayerNorm(width, bias=bias)
        self.attn = torch.nn.Module()
        self.attn.c_attn = torch.nn.Linear(width, 3 * width, bias=bias)
        self.attn.c_proj = torch.nn.Linear(width, width, bias=bias)
        self.ln_2 = torch.nn.LayerNorm(width, bias=bias)
        self.mlp = torch.nn.Module()
        self.mlp.c_fc = torch.nn.Linear(width, 4 * width, bias=bias)
        self.mlp.c_proj = torch.nn.Linear(4 * width, width, bias=bias)


class NanoGPT(torch.nn.Module):
    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(3)
        width, bias = sizes["n_embd"], sizes["bias"]
        self.transformer = torch.nn.Module()
        self.transformer.wte = torch.nn.Embedding(sizes["vocab_size"], width)
        self.transformer.wpe = torch.nn.Embedding(sizes["block_size"], width)
        blocks = [Block(width, bias) for _layer in range(sizes["n_layer"])]
        self.transformer.h = torch.nn.ModuleList(blocks)
        self.transformer.ln_f = torch.nn.LayerNorm(width, bias=bias)
        self.lm_head = torch.nn.Linear(width, sizes["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.2)


def nanogpt_checkpoint(folder: Path, *, bias: bool, prefix: str = "") -> tuple[Path, NanoGPT]:
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 48}
    sizes |= {"vocab_size": tokenizer().vocab_size, "bias": bias, "dropout": 0.0}
    model = NanoGPT(sizes)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
         {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}], lr=1e-3,
    )  # fmt: skip
    for step in range(3):
        torch.manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    state[prefix + "transformer.h.0.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    torch.save(
        {"model": state, "optimizer": optimizer.state_dict(), "model_args": sizes, "iter_num": 3,
         "best_val_loss": 1.5, "config": {"dataset": "x", "learning_rate": 1e-3}},
        folder / "ckpt.pt",
    )  # fmt: skip
    model.adam = optimizer  # type: ignore[assignment]
    return folder / "ckpt.pt", model


@torch.no_grad()
def their_logits(model: NanoGPT, ids: torch.Tensor) -> torch.Tensor:
    """The forward pass that the names stand for, one head and one position at a time."""
    t, heads = model.transformer, 4
    tokens = ids.shape[1]
    x = t.wte(ids) + t.wpe(torch.arange(tokens))
    for block in t.h:
        q, k, v = block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1)
        parts = []
        for head in range(heads):
            part = slice(head * 8, head * 8 + 8)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / 8**0.5
            scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
            parts.append(scores.softmax(-1) @ v[..., part])
        x = x + block.attn.c_proj(torch.cat(parts, -1))
        x = x + block.mlp.c_proj(torch.nn.functional.gelu(block.mlp.c_fc(block.ln_2(x))))
    return model.lm_head(t.ln_f(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_nanogpt_computes_what_it_computed(
    tmp_path: Path, bias: bool, prefix: str
) -> None:
    path, theirs = nanogpt_checkpoint(tmp_path, bias=bias, prefix=prefix)
    tokenizer().save(tmp_path / "words")
    done = import_model(str(path), str(tmp_path / "run"), tokenizer=str(tmp_path / "words"))
    ids = torch.arange(40)[None] * 7 % 300
    loaded = load_for_inference(tmp_path / "run", device="cpu")
    with torch.no_grad():
        ours = loaded.model(ids).logits
    assert torch.allclose(
        ours, their_logits(theirs, ids), rtol=0, atol=1e-4 * float(ours.abs().max())
    )
    assert loaded.max_context == 48
    if not bias:  # its optimizer knows nothing of the biases that a GPT-2 has
        assert "have other shapes" in done.optimizer and done.step == 0
        return
    assert done.optimizer == "" and done.step == 3
    state = load(tmp_path / "run" / "latest.pt")
    found = moments_of(state, loaded.model)
    for name, parameter in theirs.named_parameters():
        moment = theirs.adam.state[parameter]["exp_avg"]  # type: ignore[index]
        turned = moment.dim() == 2 and ".h." in name
        assert torch.equal(found[name], moment.t() if turned else moment), name


def test_what_only_looks_like_nanogpt_is_refused(tmp_path: Path) -> None:
    path, _model = nanogpt_checkpoint(tmp_path, bias=True)
    state = torch.load(path)
    state["model_args"]["n_head"] = 2  # other heads: the shapes are the same
    torch.save(state, path)
    tokenizer().save(tmp_path / "words")
    import_model(str(path), str(tmp_path / "run"), tokenizer=str(tmp_path / "words"))  # its word
    state["model_args"]["n_layer"] = 1
    torch.save(state, path)
    with pytest.raises(StateMismatch, match="is only in the file"):
        import_model(str(path), str(tmp_path / "other"), tokenizer=str(tmp_path / "words"))
