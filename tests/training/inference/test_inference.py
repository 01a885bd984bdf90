"""From a checkpoint to a model that answers: the same numbers, one copy, errors that say why."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import load
from holdfast.errors import CheckpointError, DamagedCheckpoint, ForeignCheckpoint, HoldfastError
from holdfast.training import models
from holdfast.training.inference import load_for_inference
from holdfast.training.options.config import ModelConfig
from holdfast.training.text.tokenizer import TextTokenizer, train_tokenizer
from tests.manage.runs import cut, flip, make_run
from tests.support import identity, write_state
from tests.training.runs import SAMPLE, config_for, train, write_corpus


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training of one epoch of a model of ours."""
    folder = tmp_path_factory.mktemp("inference")
    train(config_for(folder / "run", write_corpus(folder), epochs=1))
    return folder / "run"


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(SAMPLE.read_text("utf-8").split("\n\n")[:20], 300)


def made(tokenizer: TextTokenizer, **options: Any) -> Any:
    torch.manual_seed(0)
    config = ModelConfig(model="tiny", context_length=16, **options)
    return models.build_model(config, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)


def state_of(model: Any, tokenizer: TextTokenizer, **more: Any) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "model_config": models.plain_config(model),
        "tokenizer": tokenizer.to_state(),
        **more,
    }


def test_a_run_directory_stands_for_its_best_model_with_everything_that_is_needed(
    run: Path,
) -> None:
    loaded = load_for_inference(run, device="cpu")
    saved = load(run / "best_model.pt")
    assert loaded.entry.epoch == 1 and "best_model.pt" in loaded.entry.names
    assert (loaded.context_length, loaded.max_context) == (16, 16)
    assert loaded.config == saved["config"] and loaded.model_config == saved["model_config"]
    assert loaded.tokenizer.to_state() == saved["tokenizer"]
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    found = loaded.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in saved["model"].items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_logits_are_those_of_the_model_that_was_saved(
    architecture: str, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    """Buffers that no state holds (rotary frequencies, masks) are made as in training."""
    import transformers

    if architecture == "llama":
        model = made(tokenizer, dropout=0.3)
    else:
        shape: Any = transformers.GPT2Config(
            n_layer=2, n_embd=32, n_head=2, n_positions=16, vocab_size=tokenizer.vocab_size,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(shape)
    write_state(tmp_path / "a.pt", state_of(model, tokenizer), **identity(1))
    loaded = load_for_inference(tmp_path / "a.pt", device="cpu")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, model.eval()(ids).logits)
    assert loaded.config == {} and loaded.entry.step == 1


def test_a_model_of_another_maker_that_was_trained_on_comes_back_as_it_is(tmp_path: Path) -> None:
    import transformers

    theirs = tmp_path / "theirs"
    trained = train_tokenizer(SAMPLE.read_text("utf-8").split("\n\n")[:20], 300)
    trained.save(theirs)
    shape: Any = transformers.Qwen2Config(
        vocab_size=trained.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(theirs)
    options = {"model": str(theirs), "vocab_size": "none", "epochs": 1, "dropout": "none"}
    train(config_for(tmp_path / "run", write_corpus(tmp_path), **options))
    loaded = load_for_inference(tmp_path / "run", device="cpu")
    assert type(loaded.model).__name__ == "Qwen2ForCausalLM"
    assert (loaded.context_length, loaded.max_context) == (16, 64)
    weights = load(tmp_path / "run" / "best_model.pt", only="model")
    assert all(torch.equal(loaded.model.state_dict()[k], v) for k, v in weights.items())


def test_tied_weights_are_one_memory_also_where_they_are_cast(run: Path) -> None:
    for dtype in (None, torch.bfloat16):
        model = load_for_inference(run, device="cpu", dtype=dtype).model
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.dtype == (dtype or torch.float32)
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_random_streams_and_torch_itself_are_left_as_they_were(run: Path) -> None:
    register, before = torch.nn.Module.register_parameter, torch.get_rng_state()
    load_for_inference(run, device="cpu")
    assert torch.nn.Module.register_parameter is register
    assert torch.equal(torch.get_rng_state(), before)


_PEAK = """
import re, sys, torch, transformers
from pathlib import Path
from holdfast.training.inference import load_for_inference
transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM
# Not getrusage: a child begins with the peak of its parent there.
status = Path("/proc/self/status").read_text
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status())[1])
load_for_inference(sys.argv[1], device="cpu")
before = peak()
load_for_inference(sys.argv[2], device="cpu")
print(peak() - before)
"""


def test_many_threads_may_load_at_once(run: Path) -> None:
    before = torch.nn.Module.register_parameter
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _i: load_for_inference(run), range(12)))
    assert torch.nn.Module.register_parameter is before
    assert not any(p.is_meta for one in loaded for p in one.model.parameters())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_the_peak_is_one_copy_of_the_weights_and_the_optimizer_is_not_read(
    run: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    import transformers

    shape: Any = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=1024, intermediate_size=4096,
        num_hidden_layers=2, num_attention_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape)
    weights = {n: torch.zeros(v.shape, dtype=v.dtype) for n, v in model.state_dict().items()}
    size = sum(value.nbytes for value in weights.values())
    moments = {i: {"exp_avg": torch.ones_like(value)} for i, value in enumerate(weights.values())}
    state = {**state_of(model, tokenizer), "model": weights, "optimizer": {"state": moments}}
    path = write_state(tmp_path / "large.pt", state, **identity(1))
    assert path.stat().st_size > 2 * size > 250_000_000
    del state, weights, moments
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(run), str(path)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 1.35 * size


def test_what_is_damaged_is_refused_wherever_the_weights_are_hit(
    run: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    for harm in (flip, cut):
        path = tmp_path / f"{harm.__name__}.pt"
        write_state(path, state_of(made(tokenizer), tokenizer), **identity(1))
        harm(path)
        with pytest.raises(DamagedCheckpoint, match=rf"{harm.__name__}\.pt is damaged"):
            load_for_inference(path)


def test_what_cannot_be_used_for_text_is_told_in_one_line(
    tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    model = made(tokenizer)
    whole = state_of(model, tokenizer)

    def told(error: type[HoldfastError], name: str, **changes: Any) -> str:
        state = {k: v for k, v in {**whole, **changes}.items() if v is not None}
        write_state(tmp_path / f"{name}.pt", state, **identity(1))
        with pytest.raises(error) as raised:
            load_for_inference(tmp_path / f"{name}.pt")
        assert "\n" not in str(raised.value) and f"{name}.pt" in str(raised.value)
        return str(raised.value)

    assert "what its model is" in told(ForeignCheckpoint, "a", model_config=None)
    assert "what its model is" in told(ForeignCheckpoint, "b", model_config={"layers": 2})
    assert "what its tokenizer is" in told(ForeignCheckpoint, "c", tokenizer=None)
    assert "does not know (martian)" in told(
        ForeignCheckpoint, "d", model_config={**whole["model_config"], "model_type": "martian"}
    )
    weights = dict(whole["model"])
    weights["model.norm.weight"] = torch.ones(3)
    assert "model.norm.weight" in told(CheckpointError, "e", model=weights)
    del weights["model.norm.weight"]
    assert "model.norm.weight" in told(CheckpointError, "f", model=weights)
    more = {**whole["model"], "strange.weight": torch.ones(3)}
    assert "strange.weight" in told(CheckpointError, "g", model=more)
    assert "holds no model" in told(ForeignCheckpoint, "h", model=None)


def test_a_stranger_s_run_a_missing_one_and_an_empty_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ForeignCheckpoint, match="saved by another training loop"):
        load_for_inference(make_run(tmp_path / "run", (1.0,)))
    with pytest.raises(HoldfastError, match=r"no checkpoint at .*nowhere\.pt"):
        load_for_inference(tmp_path / "nowhere.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HoldfastError, match="no checkpoints in"):
        load_for_inference(tmp_path / "empty")
    torch.save({"model": {}}, tmp_path / "theirs.pt")
    with pytest.raises(ForeignCheckpoint, match="not written by holdfast"):
        load_for_inference(tmp_path / "theirs.pt")
