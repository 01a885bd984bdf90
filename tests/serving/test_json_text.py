"""`response_format: json_object`: what comes is a JSON object, or says that it was cut."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.serving.engine.json_text import START, JsonText, State, after
from tests.serving.models import POEM

BYTES = [bytes([byte]) for byte in range(256)]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3),
    max_leaves=8,
)  # fmt: skip


def behind(text: bytes) -> State | None:
    state: State | None = START
    for byte in text:
        state = None if state is None else after(state, byte)
    return state


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=3), st.booleans(), st.sampled_from([None, 2]))
def test_every_object_that_python_writes_may_be_written(
    value: dict[str, Any], plain: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=plain, indent=indent)
    if plain and "\\ud" in text:
        return  # characters that JSON escapes as a pair are written as themselves
    state = behind(text.encode())
    assert state is not None and state[0] == "end", text


@pytest.mark.parametrize("seed", range(200))
def test_whatever_chance_writes_is_json_when_it_ends(seed: int) -> None:
    """Bytes at random, as far as they are allowed; the brackets are likelier, so that it ends."""
    dice = random.Random(seed)
    guide, text = JsonText(BYTES), b""
    likely = b'{}[]",:0123456789.eE+-truefalsn\\ \xe6\x9c\x88\xf0\xed\xa0'
    while not guide.done and len(text) < 3000:
        token = dice.choice(likely) if dice.random() < 0.95 else dice.randrange(256)
        if len(text) > 200 and dice.random() < 0.5:
            token = dice.choice(b'"]}')
        if guide.allows(token):
            guide.take(token)
            text += bytes([token])
    assert guide.done, text
    found = json.loads(text.decode())
    json.dumps(found, ensure_ascii=False).encode()  # no half of a surrogate pair
    assert isinstance(found, dict)


@pytest.mark.parametrize(
    "text",
    [
        "[", '"', "1", "{]", "{,", "{1", '{"a"}', '{"a" 1', '{"a":}', '{"a":1,}', '{"a":[1,]',
        '{"a":01', '{"a":1.}', '{"a":.5', '{"a":+1', '{"a":1e}', '{"a":nul}', '{"a":True',
        '{"a":NaN', '{"a":"\n', '{"a":"\\x', '{"a":"\\u12g', '{"a":"\\ud8', '{"a":1}x', "{}{",
        '{"a":' + "[" * 100, '{"a":' + "1" * 50, "{" + " " * 100, " {",
    ],
)  # fmt: skip
def test_what_is_no_json_or_would_never_end_may_not_be_written(text: str) -> None:
    assert behind(text.encode()) is None


@pytest.mark.parametrize("bad", [b"\x80", b"\xc0\xaf", b"\xe0\x80", b"\xed\xa0", b"\xf5", b"\xff"])
def test_bytes_that_are_no_text_may_not_be_written(bad: bytes) -> None:
    assert behind(b'{"' + bad) is None


# ----------------------------------------------------------------------------------- in the server


def object_of(client: openai.OpenAI, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": POEM[:8]}]
    form: Any = {"type": "json_object"}
    options = {"model": "best", "max_tokens": 100, "seed": 3, "response_format": form, **options}
    return client.chat.completions.create(messages=messages, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0}, {"top_p": 0.5}, {"extra_body": {"top_k": 3}}, {"temperature": 2},
     {"extra_body": {"ignore_eos": True}}, {"frequency_penalty": 2.0}],
)  # fmt: skip
def test_an_answer_is_a_json_object_or_was_cut(
    client: openai.OpenAI, options: dict[str, Any]
) -> None:
    # This model knows nothing of JSON; it is helped to an end now and then.
    brackets = {str(token): 8.0 for token in (3, 60, 94)}
    answer = object_of(client, n=4, logit_bias=brackets, **options)
    for choice in answer.choices:
        text = choice.message.content
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            assert choice.finish_reason == "length"
            state = behind(text.encode())
            assert state is not None and state[0] != "end", text


def test_an_object_ends_its_text_and_a_stream_says_the_same(client: openai.OpenAI) -> None:
    closing = {"logit_bias": _likely(client, "}", 100)}
    whole = object_of(client, logprobs=True, **closing)
    choice = whole.choices[0]
    assert choice.finish_reason == "stop" and json.loads(choice.message.content) == {}
    assert len(choice.logprobs.content) == whole.usage.completion_tokens == 2
    chunks = list(object_of(client, stream=True, **closing))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content and chunks[-1].choices[0].finish_reason == "stop"


def test_the_same_seed_gives_the_same_object_and_others_are_not_changed(
    client: openai.OpenAI,
) -> None:
    first = object_of(client, n=2, max_tokens=40)
    again = object_of(client, n=2, max_tokens=40)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[0] != texts[1]


def test_a_completion_may_be_an_object_too(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="best", prompt=POEM[:8], max_tokens=50, logit_bias=_likely(client, "}", 100),
        extra_body={"response_format": {"type": "json_object"}},
    )  # fmt: skip
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("{}", "stop")


def _likely(client: openai.OpenAI, text: str, bias: int) -> dict[str, int]:
    """The token of one character: those of the printable ASCII stand in their order."""
    answer = client.completions.create(model="best", prompt=text, max_tokens=0, echo=True,
                                       logprobs=0)  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == [text]
    return {str(1 + ord(text) - ord("!")): bias}


@pytest.mark.parametrize(
    "wanted",
    [{"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}, {"type": "grammar"},
     {"type": ["json_object"]}, {"type": None}],
)  # fmt: skip
def test_other_forms_are_refused_with_the_one_that_there_is(url: str, wanted: Any) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for path, body in (("completions", {"prompt": "a"}), ("chat/completions", chat)):
        answer = httpx.post(f"{url}/v1/{path}", json={**body, "response_format": wanted})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == "response_format"
        assert "json_object" in error["message"]
