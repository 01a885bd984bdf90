"""The named models have the sizes that are promised, and our loss is the library's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from holdfast.errors import ConfigError
from holdfast.training import models
from holdfast.training.options.config import ModelConfig


def parameters(name: str, vocab_size: int) -> int:
    with torch.device("meta"):
        model = models.build_model(ModelConfig(model=name), vocab_size=vocab_size, eos_id=0)
    return sum(p.numel() for p in model.parameters())


def test_gpt2_small_has_exactly_the_published_number_of_parameters() -> None:
    assert parameters("gpt2-small", 50_257) == 124_046_592  # context 512 instead of 1024


@pytest.mark.usefixtures("shape_as_shipped")
def test_tiny_and_mini_are_as_large_as_they_say() -> None:
    assert 2e6 < parameters("tiny", 8192) < 8e6
    assert 25e6 < parameters("mini", 8192) < 27e6


@pytest.mark.parametrize("name", list(models.SHAPES))
def test_context_and_dropout_are_the_users(name: str) -> None:
    config = ModelConfig(model=name, context_length=32, dropout=0.25)
    with torch.device("meta"):
        model = models.build_model(config, vocab_size=300, eos_id=0)
    assert model.config.max_position_embeddings == 32
    settings = model.config.to_dict()
    assert 0.25 in (settings.get("attn_pdrop"), settings.get("attention_dropout"))
    assert model.config._attn_implementation == "sdpa"


def test_our_loss_is_the_one_of_transformers() -> None:
    torch.manual_seed(0)
    config = ModelConfig(model="tiny", context_length=16)
    model = models.build_model(config, vocab_size=300, eos_id=0)
    tokens = torch.randint(0, 300, (3, 17))
    theirs = model(input_ids=tokens[:, :16], labels=tokens[:, :16]).loss
    logits = model(input_ids=tokens[:, :15]).logits
    ours = models.next_token_loss(logits, tokens[:, 1:16])
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_ignored_targets_do_not_count() -> None:
    logits = torch.randn(1, 4, 10)
    targets = torch.tensor([[1, 2, -100, -100]])
    expected = models.next_token_loss(logits[:, :2], targets[:, :2])
    assert torch.equal(models.next_token_loss(logits, targets), expected)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    decayed, free = models.parameter_groups(model, 0.1)
    assert [p.dim() for p in decayed["params"]] == [2]
    assert all(p.dim() == 1 for p in free["params"])
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


def test_an_unknown_model_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        models.check_model_exists(str(tmp_path / "gpt2-smal"))
    assert "gpt2-small" in str(error.value)
    assert "\n" not in str(error.value)
    models.check_model_exists("tiny")


def test_a_folder_without_weights_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    models.check_model_exists(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be loaded") as error:
        models.load_model(ModelConfig(model=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_context_beyond_the_model_is_refused() -> None:
    with torch.device("meta"):
        model = models.build_model(ModelConfig(model="tiny"), vocab_size=300, eos_id=0)
    with pytest.raises(ConfigError, match="128"):
        models.context_of(model, 4096)


def test_precision_follows_the_hardware_unless_told() -> None:
    cpu = torch.device("cpu")
    assert models.choose_precision("fp32", cpu) is torch.float32
    assert models.choose_precision("bf16", cpu) is torch.bfloat16
    expected = torch.bfloat16 if models.has_bf16(cpu) else torch.float32
    assert models.choose_precision("auto", cpu) is expected
