"""Samples: the same seed the same text, the global random streams untouched, a stop obeyed."""

from __future__ import annotations

import pytest
import torch

from holdfast.training import models
from holdfast.training.config import ModelConfig
from holdfast.training.generate import sample_text
from holdfast.training.tokenizer import TextTokenizer, train_tokenizer
from tests.training.runs import SAMPLE


@pytest.fixture(scope="module")
def parts() -> tuple[torch.nn.Module, TextTokenizer]:
    tokenizer = train_tokenizer(SAMPLE.read_text("utf-8").split("\n\n")[:20], 400)
    torch.manual_seed(0)
    config = ModelConfig(model="tiny", context_length=32)
    return models.build_model(
        config, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id
    ), tokenizer


def test_same_seed_same_text_and_another_seed_another(
    parts: tuple[torch.nn.Module, TextTokenizer],
) -> None:
    texts = [sample_text(*parts, "今天", 20, context_length=32, seed=s) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("今天")


def test_the_random_streams_of_training_are_not_touched(
    parts: tuple[torch.nn.Module, TextTokenizer],
) -> None:
    before = torch.get_rng_state()
    sample_text(*parts, "今天", 10, context_length=32, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_the_cache_gives_what_reading_everything_again_gives(
    parts: tuple[torch.nn.Module, TextTokenizer],
) -> None:
    """Greedy continuation with the cache equals the one from full passes."""
    model, tokenizer = parts
    text = sample_text(model, tokenizer, "今天", 8, context_length=32, seed=0, top_k=1)
    ids = tokenizer.encode("今天")
    model.eval()
    for _ in range(8):
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    assert text == tokenizer.decode(ids).rstrip("\ufffd")


def test_it_stops_when_told_and_never_exceeds_the_context(
    parts: tuple[torch.nn.Module, TextTokenizer],
) -> None:
    model, tokenizer = parts
    stopped = sample_text(
        model, tokenizer, "今天", 20, context_length=32, seed=0, stop=lambda: True
    )
    assert stopped == "今天"
    sample_text(model, tokenizer, "今天" * 40, 500, context_length=32, seed=0)


def test_a_sample_that_may_not_end_has_its_whole_length(
    parts: tuple[torch.nn.Module, TextTokenizer],
) -> None:
    model, tokenizer = parts
    with torch.no_grad():  # a model that wants nothing but to end
        saved = model.get_output_embeddings().weight.clone()
        model.get_output_embeddings().weight.zero_()
    try:
        texts = [
            sample_text(model, tokenizer, "今天", 20, context_length=32, seed=1, top_k=1, may_end=e)
            for e in (True, False)
        ]
    finally:
        with torch.no_grad():
            model.get_output_embeddings().weight.copy_(saved)
    assert texts[0] == "今天"  # all logits are equal: the first, end-of-text, is the best
    assert len(texts[1]) > len(texts[0])
