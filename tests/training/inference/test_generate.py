"""Samples: the same seed the same text, the global random streams untouched, a stop obeyed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from holdfast.training import models
from holdfast.training.inference.generate import (
    CONTEXT,
    LENGTH,
    Draw,
    Pieces,
    Sampling,
    TextStream,
    sample_text,
)
from holdfast.training.options.config import ModelConfig
from holdfast.training.text.tokenizer import TextTokenizer, train_tokenizer
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


def _as_before(  # what the trainer's samples were made by before text came in pieces
    model: torch.nn.Module,
    tokenizer: TextTokenizer,
    prompt: str,
    length: int,
    *,
    context_length: int,
    seed: int,
) -> str:
    generator = torch.Generator("cpu").manual_seed(seed)
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    model.eval()
    given, cache = torch.tensor([ids[-context_length:]]), None
    with torch.no_grad():
        for _ in range(min(length, context_length - given.shape[1])):
            output = model(input_ids=given, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[0, -1].float() / 0.8
            logits[tokenizer.eos_id] = -torch.inf
            best = torch.topk(logits, min(50, logits.numel()))
            choice = torch.multinomial(torch.softmax(best.values, 0), 1, generator=generator)
            ids.append(int(best.indices[choice]))
            given = torch.tensor([ids[-1:]])
    return tokenizer.decode(ids).rstrip("\ufffd")


def test_the_samples_of_a_training_are_what_they_were_before_text_came_in_pieces(
    parts: tuple[torch.nn.Module, TextTokenizer],
) -> None:
    for seed, prompt in enumerate(("今天", "", "春江潮水连海平", "今天" * 40, "a\ufffd")):
        new = sample_text(*parts, prompt, 25, context_length=32, seed=seed, may_end=False)
        assert new == _as_before(*parts, prompt, 25, context_length=32, seed=seed)


def _stream(parts: tuple[torch.nn.Module, TextTokenizer], length: int, **more: Any) -> TextStream:
    sampling = Sampling(**{"seed": 7, **more.pop("sampling", {})})
    return TextStream(
        *parts, "今天", length, context_length=more.pop("context_length", 32), sampling=sampling,
        may_end=False, **more,
    )  # fmt: skip


def test_pieces_are_whole_characters_that_come_one_by_one(
    parts: tuple[torch.nn.Module, TextTokenizer],
) -> None:
    """A model that has learned nothing draws single bytes: most tokens are no character."""
    stream = _stream(parts, 120, slide=True, sampling={"top_k": 0, "temperature": 1.5})
    pieces = list(stream)
    assert stream.tokens == 120
    assert 10 < len(pieces) < 120  # several tokens wait for the end of their character
    whole = parts[1].decode(stream.ids)
    assert whole.startswith("".join(pieces))
    assert whole[len("".join(pieces)) :].strip("\ufffd") == ""  # all but a character cut in two


def test_a_character_of_four_bytes_is_given_out_when_it_is_complete(
    parts: tuple[torch.nn.Module, TextTokenizer],
) -> None:
    _model, tokenizer = parts
    pieces = Pieces(tokenizer, tokenizer.encode("今天"))
    given = [pieces.add(token) for token in tokenizer.encode("🦀𠮷!") * 30]
    assert "".join(given) == "🦀𠮷!" * 30
    assert given[:4] == ["", "", "", "🦀"]


def test_bytes_that_are_no_characters_are_shown_while_they_come(
    parts: tuple[torch.nn.Module, TextTokenizer],
) -> None:
    """A broken model may draw the same byte for ever: a person sees that it writes."""
    _model, tokenizer = parts
    half = tokenizer.encode("🦀")[0]
    pieces = Pieces(tokenizer, tokenizer.encode("今天"))
    given = "".join(pieces.add(token) for token in [half] * 900)
    assert 890 < len(given) < 900
    assert set(given) == {"\ufffd"}
    assert "".join(pieces.add(token) for token in tokenizer.encode("好好")).endswith("好好")


def test_past_the_context_the_window_moves_or_the_text_ends_and_says_so(
    parts: tuple[torch.nn.Module, TextTokenizer],
) -> None:
    ended = _stream(parts, 100)
    text = "".join(ended)
    assert (ended.ended, ended.moved) == (CONTEXT, 0)
    assert ended.tokens == 32 - ended.prompt_tokens
    moved = _stream(parts, 100, slide=True)
    assert "".join(moved).startswith(text)  # the same up to there
    assert (moved.ended, moved.tokens) == (LENGTH, 100)
    assert moved.moved == 5  # at 32 tokens, then every 16


def test_after_the_window_moved_the_model_reads_its_last_half_and_nothing_else(
    parts: tuple[torch.nn.Module, TextTokenizer],
) -> None:
    model, _tokenizer = parts
    stream = _stream(parts, 40, slide=True, sampling={"temperature": 0})
    list(stream)
    first = 32  # the token that was drawn first after the move
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([stream.ids[first - 16 : first]])).logits[0, -1]
    logits[0] = -torch.inf
    assert stream.ids[first] == int(logits.argmax())


def test_a_prompt_longer_than_the_context_is_read_from_its_end(
    parts: tuple[torch.nn.Module, TextTokenizer],
) -> None:
    sampling = Sampling(seed=1)
    stream = TextStream(
        *parts, "今天" * 40, 10, context_length=32, sampling=sampling, may_end=False, slide=True
    )
    list(stream)
    assert stream.prompt_tokens > 32
    assert (stream.read_tokens, stream.tokens, stream.moved) == (16, 10, 0)


def test_temperature_top_p_and_the_penalty_do_what_they_say(
    parts: tuple[torch.nn.Module, TextTokenizer],
) -> None:
    greedy = "".join(_stream(parts, 20, sampling={"temperature": 0}))
    assert greedy == "".join(_stream(parts, 20, sampling={"temperature": 0, "seed": 8}))
    assert greedy == "".join(_stream(parts, 20, sampling={"top_p": 1e-6, "top_k": 0}))
    assert greedy == "".join(_stream(parts, 20, sampling={"temperature": 1e-320}))
    stream = _stream(parts, 25, sampling={"temperature": 0, "frequency_penalty": 50.0})
    list(stream)
    drawn = stream.ids[-25:]
    assert len(set(drawn)) == 25  # what was said once is not said again


def test_top_p_keeps_the_fewest_tokens_with_that_share() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    for share, kept in ((0.39, {1}), (0.41, {1, 3}), (0.71, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        draw = Draw(Sampling(seed=0, temperature=1, top_k=0, top_p=share), forbidden=None)
        assert {draw(logits.clone()) for _ in range(200)} == kept


def test_a_stream_that_is_left_gives_the_model_back_as_it_was(
    parts: tuple[torch.nn.Module, TextTokenizer],
) -> None:
    model, _tokenizer = parts
    model.train()
    pieces = iter(_stream(parts, 20))
    next(pieces), next(pieces)
    assert not model.training
    assert torch.is_grad_enabled()  # between two pieces the caller computes as ever
    pieces.close()  # type: ignore[attr-defined]
    assert model.training
