"""The API as the official client sees it: what it asks for is what it gets."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from holdfast.training.inference import load_for_inference
from holdfast.training.text.tokenizer import TextTokenizer
from tests.serving.models import CONTEXT, POEM, beginnings, serving

START, REST = POEM[:6], POEM[6:]


def complete(client: openai.OpenAI, prompt: Any = START, **options: Any) -> Any:
    options = {"model": "best", "max_tokens": 20, "temperature": 0, **options}
    return client.completions.create(prompt=prompt, **options)


def chat(client: openai.OpenAI, text: str = START, **options: Any) -> Any:
    options = {"model": "best", "max_tokens": 20, "temperature": 0, **options}
    return client.chat.completions.create(messages=[{"role": "user", "content": text}], **options)


def test_the_models_are_the_run_s_checkpoints_with_the_best_first(client: openai.OpenAI) -> None:
    found = {model.id: model for model in client.models.list()}
    assert list(found) == ["best", "latest", "model_epoch_2", "model_epoch_1"]
    best = found["best"].to_dict()
    assert (best["step"], best["epoch"], best["val_loss"]) == (200, 2, 0.5)
    assert best["context_length"] == CONTEXT and best["owned_by"] == "holdfast"
    assert client.models.retrieve("model_epoch_1").to_dict()["step"] == 100


def test_a_greedy_completion_is_what_transformers_generates(
    client: openai.OpenAI, run: Path, tokenizer: TextTokenizer
) -> None:
    model = load_for_inference(run, device="cpu").model
    given = torch.tensor([tokenizer.encode(START)])
    output = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False,
                            max_new_tokens=200, pad_token_id=0)[0, given.shape[1] :]  # fmt: skip
    answer = complete(client, max_tokens=200)
    assert answer.choices[0].text == tokenizer.decode(output.tolist()) == REST
    assert answer.choices[0].finish_reason == "stop", "the poem has an end, and the model knows it"
    assert answer.usage.prompt_tokens == given.shape[1]
    assert answer.usage.completion_tokens == len(output), "the end of text was drawn as well"
    assert answer.usage.total_tokens == given.shape[1] + len(output)
    assert answer.system_fingerprint.startswith("step_200_")


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_stream_is_the_same_text_in_whole_characters(client: openai.OpenAI, api: str) -> None:
    ask = complete if api == "completions" else chat
    whole = ask(client, max_tokens=100).choices[0]
    stream = ask(client, max_tokens=100, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    if api == "chat":
        assert chunks[0].choices[0].delta.role == "assistant"
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(texts) == whole.message.content == REST
    else:
        texts = [chunk.choices[0].text for chunk in chunks]
        assert "".join(texts) == whole.text == REST
    assert len([text for text in texts if text]) > 10, "it came in pieces"
    assert not any("\ufffd" in text for text in texts)
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage.completion_tokens > len(REST)
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_a_stream_is_sent_as_server_sent_events_that_end_with_done(url: str) -> None:
    body = {"prompt": START, "max_tokens": 5, "stream": True, "model": "best", "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    texts = [
        json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]
    ]
    assert REST.startswith("".join(texts))


def test_an_answer_ends_before_a_stop_string_also_in_a_stream(client: openai.OpenAI) -> None:
    before = REST.partition("天上")[0]
    for stop in ("天上", ["没有", "天上宫", "天上"]):
        choice = complete(client, stop=stop, max_tokens=100).choices[0]
        assert (choice.text, choice.finish_reason) == (before, "stop")
        stream = complete(client, stop=stop, max_tokens=100, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == before


def test_a_character_that_max_tokens_cuts_is_left_out(client: openai.OpenAI) -> None:
    tail = "高处不胜寒。"  # bytes, in this tokenizer
    start = POEM[: -len(tail)]
    texts = {complete(client, start, max_tokens=n).choices[0].text for n in range(1, 8)}
    assert texts == {"", "高", "高处", "高处不"}
    assert complete(client, start, max_tokens=4).choices[0].finish_reason == "length"


def test_the_same_seed_gives_the_same_text_alone_and_in_a_crowd(client: openai.OpenAI) -> None:
    wanted = {"temperature": 1.5, "seed": 11, "max_tokens": 40, "top_p": 0.95}
    alone = complete(client, **wanted).choices[0].text
    others = [START, POEM[3:5], POEM[:20]] * 5

    async def crowd() -> list[str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="x") as many:
            answers = [
                many.completions.create(model="best", prompt=prompt, max_tokens=30 + i)
                for i, prompt in enumerate(others)
            ]
            same = [many.completions.create(model="best", prompt=START, **wanted) for _ in "ab"]
            *_rest, a, b = await asyncio.gather(*answers, *same)
            return [a.choices[0].text, b.choices[0].text]

    assert asyncio.run(crowd()) == [alone, alone]
    assert complete(client, **{**wanted, "seed": 12}).choices[0].text != alone
    unseeded = {**wanted, "seed": openai.omit}
    assert len({complete(client, **unseeded).choices[0].text for _ in range(4)}) == 4


def test_n_gives_different_texts_and_the_same_ones_for_a_seed(client: openai.OpenAI) -> None:
    first = complete(client, n=3, seed=4, temperature=1.5)
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2] and len(set(texts)) == 3
    again = complete(client, n=3, seed=4, temperature=1.5)
    assert [choice.text for choice in again.choices] == texts
    streamed = ["", "", ""]
    for chunk in complete(client, n=3, seed=4, temperature=1.5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_prompts_are_a_text_several_texts_or_tokens(
    client: openai.OpenAI, tokenizer: TextTokenizer
) -> None:
    tokens = tokenizer.encode(START)
    text = complete(client).choices[0].text
    for prompt in ([START], tokens, [tokens]):
        assert complete(client, prompt).choices[0].text == text
    several = complete(client, [START, POEM[:12]], n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == text
    assert several.usage.prompt_tokens == len(tokens) + len(tokenizer.encode(POEM[:12]))
    assert complete(client, "").usage.prompt_tokens == 1, "nothing is the beginning of a text"


def test_echo_repeats_the_prompt_and_with_logprobs_says_how_likely_it_was(
    client: openai.OpenAI, run: Path, tokenizer: TextTokenizer
) -> None:
    model = load_for_inference(run, device="cpu").model
    tokens = tokenizer.encode(START)
    truth = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = [float(truth[i, token]) for i, token in enumerate(tokens[1:])]
    assert complete(client, START, echo=True).choices[0].text.startswith(POEM[:9])
    scored = complete(client, START, echo=True, max_tokens=0, logprobs=1).choices[0]
    assert (scored.text, scored.finish_reason) == (START, "length")
    assert scored.logprobs.token_logprobs[0] is None
    assert scored.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-3)
    assert len(scored.logprobs.tokens) == len(scored.logprobs.text_offset) == len(tokens)
    stream = complete(client, START, echo=True, logprobs=1, stream=True)
    told = [lp for chunk in stream for lp in chunk.choices[0].logprobs.token_logprobs]
    assert told[1 : len(tokens)] == pytest.approx(expected, abs=1e-3) and len(told) > len(tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_of_text_is_a_token_with_a_logprob(
    client: openai.OpenAI, run: Path, tokenizer: TextTokenizer, stream: bool
) -> None:
    """What lm-evaluation-harness sums up, `token_logprobs[context:-1]`, is the continuation only
    where the one token after it is always there."""
    model = load_for_inference(run, device="cpu").model
    tokens = tokenizer.encode(POEM)
    truth = model(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    options: Any = {"echo": True, "logprobs": 1, "max_tokens": 1}
    if stream:
        chunks = [c.choices[0] for c in complete(client, POEM, stream=True, **options)]
        values = [v for c in chunks if c.logprobs for v in c.logprobs.token_logprobs]
        offsets = [v for c in chunks if c.logprobs for v in c.logprobs.text_offset]
        finish = chunks[-1].finish_reason
    else:
        answer = complete(client, POEM, **options)
        choice = answer.choices[0]
        values, offsets = choice.logprobs.token_logprobs, choice.logprobs.text_offset
        finish = choice.finish_reason
        assert choice.text == POEM, "it adds nothing to the text"
        assert answer.usage.completion_tokens == 1
        assert choice.logprobs.tokens[-1] == "<|endoftext|>"
    assert finish == "stop" and len(values) == len(tokens) + 1
    assert values[-1] == pytest.approx(float(truth[tokenizer.eos_id]), abs=1e-3)
    assert offsets[-1] == len(POEM)


def test_the_end_of_text_is_told_in_a_chat_without_bytes(client: openai.OpenAI) -> None:
    choice = chat(client, POEM[:-1], logprobs=True, max_tokens=20).choices[0]
    last = choice.logprobs.content[-1]
    assert (choice.finish_reason, last.token, last.bytes) == ("stop", "<|endoftext|>", [])


def test_stop_token_ids_end_a_text_as_its_end_does(
    client: openai.OpenAI, tokenizer: TextTokenizer
) -> None:
    text = tokenizer.encode(REST)
    body = {"stop_token_ids": [text[3], 5]}
    answer = complete(client, max_tokens=60, logprobs=0, extra_body=body)
    choice = answer.choices[0]
    before = tokenizer.decode(text[:3]).rstrip("\ufffd")  # a character that was cut is left out
    assert (choice.text, choice.finish_reason) == (before, "stop")
    assert len(choice.logprobs.tokens) == 4, "which token ended it is told"
    assert len(choice.logprobs.tokens) == answer.usage.completion_tokens
    ignoring = complete(client, max_tokens=60, extra_body={**body, "ignore_eos": True})
    assert ignoring.choices[0].text == choice.text
    for bad in ([10**6], [-1], ["a"], "5", [1] * 500):
        with pytest.raises(openai.BadRequestError, match="stop_token_ids"):
            complete(client, extra_body={"stop_token_ids": bad})


def test_a_short_prompt_keeps_its_room_beside_a_long_one(client: openai.OpenAI) -> None:
    wanted: Any = {"max_tokens": 30, "extra_body": {"ignore_eos": True}}
    alone = complete(client, [5, 6, 7], **wanted).choices[0]
    long, short = complete(client, [[5] * (CONTEXT - 3), [5, 6, 7]], **wanted).choices
    assert short.text == alone.text and short.finish_reason == "length"
    assert long.finish_reason == "length" and len(long.text) < len(alone.text)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\x1e"])
def test_no_character_of_a_text_ends_the_line_of_an_event(url: str, separator: str) -> None:
    prompt = f"a{separator}b"
    body = {"prompt": prompt, "echo": True, "max_tokens": 1, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line and line != "data: [DONE]"]
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines]
    assert "".join(texts).startswith(prompt)


def test_logprobs_of_a_completion_belong_to_its_tokens(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=3, max_tokens=30).choices[0]
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == 30
    for name, value, top, at in zip(told.tokens, told.token_logprobs, told.top_logprobs,
                                    told.text_offset, strict=True):  # fmt: skip
        assert len(top) == 3 and top[name] == value == max(top.values()) <= 0
        if not name.startswith("bytes:"):
            assert (START + choice.text)[at:].startswith(name)
    stopped = complete(client, logprobs=0, max_tokens=90, stop="天上").choices[0]
    assert "天" not in stopped.logprobs.tokens and len(stopped.logprobs.top_logprobs[0]) == 1


def test_logprobs_of_a_chat_have_the_bytes_of_each_token(client: openai.OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=2, max_tokens=30).choices[0]
    told = choice.logprobs.content
    text = b"".join(bytes(one.bytes) for one in told).decode(errors="ignore")
    assert text == choice.message.content
    assert all(len(one.top_logprobs) == 2 for one in told)
    assert all(math.isclose(one.logprob, one.top_logprobs[0].logprob) for one in told)
    stream = chat(client, logprobs=True, max_tokens=30, stream=True)
    streamed = [one for c in stream if c.choices[0].logprobs
                for one in c.choices[0].logprobs.content]  # fmt: skip
    assert [one.token for one in streamed] == [one.token for one in told]
    assert streamed[0].top_logprobs == []


def test_penalties_top_k_and_bias_reach_the_model(
    client: openai.OpenAI, tokenizer: TextTokenizer
) -> None:
    same = complete(client).choices[0].text
    assert complete(client, temperature=2, extra_body={"top_k": 1}).choices[0].text == same
    assert complete(client, temperature=2, top_p=0).choices[0].text == same
    a = tokenizer.encode("天")[0]
    assert complete(client, logit_bias={str(a): 100}, max_tokens=3).choices[0].text == "天天天"
    varied = complete(client, logit_bias={str(a): 30}, frequency_penalty=2, presence_penalty=2,
                      max_tokens=100).choices[0].text  # fmt: skip
    assert varied.startswith("天天") and set(varied) != {"天"}
    endless = complete(client, max_tokens=200, extra_body={"ignore_eos": True}).choices[0]
    assert endless.finish_reason == "length"


def test_a_chat_is_the_messages_texts_for_a_model_without_a_template(
    client: openai.OpenAI,
) -> None:
    parts: Any = [{"type": "text", "text": POEM[7:10]}, {"type": "text", "text": POEM[10:12]}]
    answer = client.chat.completions.create(
        model="best", temperature=0, max_completion_tokens=300,
        messages=[{"role": "user", "content": parts}],
    )  # fmt: skip
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == POEM[12:]
    plain = "古\n" + START
    assert complete(client, plain).usage.prompt_tokens == client.chat.completions.create(
        model="best", max_tokens=1,
        messages=[{"role": "system", "content": "古"}, {"role": "user", "content": START}],
    ).usage.prompt_tokens  # fmt: skip


def test_any_checkpoint_of_the_run_answers_by_its_name(client: openai.OpenAI) -> None:
    first = complete(client, model="model_epoch_1")
    assert first.model == "model_epoch_1" and first.choices[0].text != REST[:20]
    assert first.system_fingerprint.startswith("step_100_")
    latest = complete(client, model="latest")
    assert latest.choices[0].text == complete(client).choices[0].text
    assert latest.model == "latest"


def test_many_clients_at_once_all_get_their_own_answer(
    client: openai.OpenAI, tokenizer: TextTokenizer
) -> None:
    known = beginnings(tokenizer)
    starts = [known[i % len(known)] for i in range(48)]
    assert len(known) > 10

    async def one(many: openai.AsyncOpenAI, start: str, stream: bool) -> str:
        options: Any = {"model": "best", "prompt": start, "max_tokens": 300, "temperature": 0}
        if not stream:
            return str((await many.completions.create(**options)).choices[0].text)
        chunks = await many.completions.create(stream=True, **options)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="x") as many:
            return await asyncio.gather(*(one(many, s, i % 2 == 0) for i, s in enumerate(starts)))

    assert asyncio.run(everyone()) == [POEM[len(start) :] for start in starts]


def test_one_file_is_enough_and_its_model_has_its_name(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "poet.pt"
    alone.write_bytes((run / "best_model.pt").read_bytes())
    with serving(alone) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        assert [model.id for model in client.models.list()] == ["poet"]
        assert complete(client, model="poet", max_tokens=99).choices[0].text == REST
        with pytest.raises(openai.NotFoundError):
            complete(client, model="best")


def test_several_runs_are_told_apart_by_their_directories(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    with serving(other, run) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        names = [model.id for model in client.models.list()]
        assert names[0] == "other/best" and {"run/best", "run/model_epoch_1"} <= set(names)
        assert client.models.retrieve("run/model_epoch_1").id == "run/model_epoch_1"
        assert complete(client, model="run/best").model == "run/best"
