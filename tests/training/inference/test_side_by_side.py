"""Models beside each other: the same text with the same seed, the trainer's own measure."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import load
from holdfast.errors import ConfigError, DataError
from holdfast.training import models
from holdfast.training.inference import (
    Loaded,
    continue_text,
    evaluate,
    load_for_inference,
    read_text,
    sample_text,
    shorten,
    side_by_side,
)
from holdfast.training.options.config import ModelConfig
from holdfast.training.text.corpus import Corpus, files_by_content
from holdfast.training.text.tokenizer import TextTokenizer, train_tokenizer
from tests.support import identity, write_state
from tests.training.runs import SAMPLE, config_for, train, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("side")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    train(config_for(folder / "run", write_corpus(folder), epochs=1))
    return load_for_inference(folder / "run", device="cpu")


def made(path: Path, *, passages: int, vocabulary: int, context: int = 32) -> Loaded:
    """An untrained model with a tokenizer of its own, from a checkpoint."""
    texts = SAMPLE.read_text("utf-8").split("\n\n")[:passages]
    tokenizer = train_tokenizer(texts, vocabulary)
    torch.manual_seed(0)
    config = ModelConfig(model="tiny", context_length=context)
    model: Any = models.build_model(
        config, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id
    )
    state = {
        "model": model.state_dict(),
        "model_config": models.plain_config(model),
        "tokenizer": tokenizer.to_state(),
    }
    write_state(path, state, **identity(1))
    return load_for_inference(path, device="cpu")


# ----------------------------------------------------------------------------------- evaluating


def test_the_measure_is_the_one_that_the_trainer_takes(loaded: Loaded, folder: Path) -> None:
    """The validation documents of the run as a file give its own validation loss."""
    corpus = Corpus(files_by_content([folder / "corpus.txt"]), val_fraction=0.1, seed=42)
    corpus.scan()
    val = [text for for_validation, text in corpus.pieces() if for_validation]
    path = folder / "val.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in val]
    path.write_text("\n".join(lines), "utf-8")
    seen: list[tuple[int, int]] = []
    found = evaluate(loaded, read_text(str(path)), lambda done, total: seen.append((done, total)))
    saved = load(folder / "run" / "best_model.pt", only="val_loss")
    assert found.loss == pytest.approx(saved, rel=1e-5)
    metrics = loaded.entry.metrics
    assert found.bits_per_byte == pytest.approx(metrics["bits_per_byte"], rel=1e-5)
    assert found.perplexity == pytest.approx(metrics["perplexity"], rel=1e-4)
    assert found.text_bytes == sum(len(text.encode()) for text in val)
    assert (found.context_length, found.precision) == (16, "float32")
    assert found.speed == found.text_bytes / found.seconds
    assert seen[-1] == (found.text_bytes, found.text_bytes)
    assert [done for done, _all in seen] == sorted(done for done, _all in seen)


def test_a_text_of_many_chunks_is_measured_as_one(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.training.text import tokenizer

    documents = SAMPLE.read_text("utf-8").split("\n\n")[:12]
    whole = evaluate(loaded, documents)
    monkeypatch.setattr(tokenizer, "CHUNK", 50)
    pieces = evaluate(loaded, documents)
    assert (pieces.tokens, pieces.text_bytes) == (whole.tokens, whole.text_bytes)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-6)


def test_fewer_rows_in_a_batch_change_nothing(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large vocabulary leaves room for few rows; the measure must not know."""
    documents = SAMPLE.read_text("utf-8").split("\n\n")[:4]
    whole = evaluate(loaded, documents)
    monkeypatch.setattr(side_by_side, "LOGITS", 1)
    assert evaluate(loaded, documents).loss == pytest.approx(whole.loss, rel=1e-5)


def test_an_even_guess_costs_what_its_tokenizer_s_vocabulary_says(tmp_path: Path) -> None:
    """Per token a larger vocabulary looks worse, whatever it is worth; bits per byte compare."""
    documents = SAMPLE.read_text("utf-8").split("\n\n")[:20]
    for vocabulary in (300, 600):
        one = made(tmp_path / f"{vocabulary}.pt", passages=40, vocabulary=vocabulary)
        with torch.no_grad():
            for parameter in one.model.parameters():
                parameter.zero_()  # every token is as likely as any other
        found = evaluate(one, documents)
        size = one.tokenizer.vocab_size
        assert found.loss == pytest.approx(math.log(size), rel=1e-5)
        assert found.perplexity == pytest.approx(size, rel=1e-4)
        bits = math.log2(size) * found.tokens / found.text_bytes
        assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)


def test_a_shortened_text_is_cut_once_and_in_whole_characters(loaded: Loaded) -> None:
    tokenizer: TextTokenizer = loaded.tokenizer
    documents = SAMPLE.read_text("utf-8").split("\n\n")[:5]
    whole = sum(len(tokenizer.encode(text)) + 1 for text in documents)
    assert shorten(documents, tokenizer, whole) == documents
    for most in (1, 2, 10, 57, whole // 2, whole - 1):
        cut = shorten(documents, tokenizer, most)
        used = sum(len(tokenizer.encode(text)) + 1 for text in cut)
        assert used <= max(most, 4) and "\ufffd" not in "".join(cut) and cut
        assert used >= min(most, whole) - 4  # the last character may have been cut in its bytes
        assert all(text == documents[i] for i, text in enumerate(cut[:-1]))
        assert documents[len(cut) - 1].startswith(cut[-1])


def test_a_file_without_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n ", "utf-8")
    with pytest.raises(DataError, match=r"empty\.txt: there is no text"):
        read_text(str(tmp_path / "empty.txt"))
    with pytest.raises(DataError, match="does not exist"):
        read_text(str(tmp_path / "nothing.txt"))


# ----------------------------------------------------------------------------------- continuing


def test_a_continuation_is_the_sample_of_that_seed_without_the_prompt(loaded: Loaded) -> None:
    first, again, other = (
        continue_text(loaded, "今天", tokens=10, seed=seed, temperature=0.8) for seed in (1, 1, 2)
    )
    assert first.text == again.text != other.text
    whole = sample_text(loaded.model, loaded.tokenizer, "今天", 10, context_length=16, seed=1)
    assert whole == "今天" + first.text


def test_without_temperature_the_likeliest_token_is_taken(loaded: Loaded) -> None:
    texts = {
        continue_text(loaded, "今天", tokens=8, seed=seed, temperature=0.0).text
        for seed in range(3)
    }
    assert len(texts) == 1


def test_how_a_continuation_ended_is_told(tmp_path: Path) -> None:
    one = made(tmp_path / "a.pt", passages=20, vocabulary=300, context=32)

    def ended(tokens: int) -> str:
        return continue_text(one, "今", tokens=tokens, seed=0, temperature=0.0).ended

    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter.zero_()
        one.model.lm_head.weight[7] = 1.0  # tied: an embedding of ones wins with itself
        one.model.lm_head.weight[one.tokenizer.encode("今")] = 1.0
        one.model.model.norm.weight.fill_(1.0)
    assert ended(4) == "length" and ended(500) == "context"
    with torch.no_grad():
        one.model.lm_head.weight[7] = 0.0
        one.model.lm_head.weight[one.tokenizer.eos_id] = 9.0
    assert ended(4) == "end"
    with torch.no_grad():
        one.model.lm_head.weight[3] = math.nan
    assert ended(4) == "nan"


def test_a_prompt_that_leaves_no_room_is_refused_with_the_limit(loaded: Loaded) -> None:
    with pytest.raises(ConfigError, match=r"prompt has \d+ tokens.*sees 16 at most"):
        continue_text(loaded, "今天天气" * 20, tokens=4, seed=0, temperature=1.0)


def test_a_model_that_sees_more_than_it_was_trained_on_may_go_on_there(loaded: Loaded) -> None:
    assert loaded.max_context == 16
    longer = replace(loaded, max_context=40)  # rotary positions have no table that ends
    text = continue_text(longer, "今天", tokens=30, seed=3, temperature=0.8)
    assert text.ended in ("length", "end") and len(longer.tokenizer.encode(text.text)) > 8
