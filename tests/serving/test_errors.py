"""Whatever is wrong with a request: the error that clients know, and a server that stays up."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from holdfast.i18n import set_language
from holdfast.serving.api.protocol import ApiError, parse_completion
from holdfast.training.text.tokenizer import TextTokenizer
from tests.serving.models import CONTEXT, POEM, Training, poet, serving


def post(url: str, body: Any, path: str = "/v1/completions", **options: Any) -> httpx.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{url}{path}", content=data, timeout=30, **options)


def told(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.fixture(autouse=True)
def stays_up(url: str) -> Any:
    yield
    assert post(url, {"prompt": "春", "max_tokens": 1}).status_code == 200


def test_an_unknown_model_is_404_with_the_name_of_the_error(client: openai.OpenAI) -> None:
    for name in ("gpt-9", "../run/best_model.pt", "/etc/passwd", "temp/temp_step1", "model.pt"):
        with pytest.raises(openai.NotFoundError) as error:
            client.completions.create(model=name, prompt="春")
        assert error.value.code == "model_not_found" and name in error.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_too_long_a_prompt_is_told_with_the_limit(client: openai.OpenAI, api: str) -> None:
    for text in ("春" * CONTEXT, "x" * 900_000):
        with pytest.raises(openai.BadRequestError) as error:
            if api == "completions":
                client.completions.create(model="best", prompt=text)
            else:
                client.chat.completions.create(
                    model="best", messages=[{"role": "user", "content": text}]
                )
        assert error.value.code == "context_length_exceeded"
        assert f"maximum context length is {CONTEXT} tokens" in error.value.message
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="best", prompt=[5] * CONTEXT)


def test_more_tokens_than_the_model_can_see_are_as_many_as_it_can(client: openai.OpenAI) -> None:
    prompt = [5] * (CONTEXT - 3)
    answer = client.completions.create(model="best", prompt=prompt, max_tokens=10**6, extra_body={
        "ignore_eos": True})  # fmt: skip
    assert answer.usage is not None and answer.usage.total_tokens == CONTEXT
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1), ("temperature", "0.5"), ("temperature", -1), ("top_p", 1.5),
        ("top_k", 0.5), ("max_tokens", -1), ("max_tokens", True), ("n", 0), ("n", 129),
        ("stop", ["a"] * 5), ("stop", [""]), ("stop", 3), ("seed", 2**63), ("seed", "x"),
        ("presence_penalty", 3), ("frequency_penalty", -2.5), ("logprobs", 21), ("logprobs", -1),
        ("logit_bias", {"99999": 1}), ("logit_bias", {"x": 1}), ("logit_bias", {"1": 101}),
        ("logit_bias", {"9" * 5000: 1}),
        ("prompt", 5), ("prompt", []), ("prompt", [99999]), ("prompt", [-1]), ("prompt", [[1], 2]),
        ("prompt", {"a": 1}), ("stream", "yes"), ("model", 7), ("suffix", "b"), ("best_of", 3),
    ],
)  # fmt: skip
def test_a_field_that_is_wrong_is_named(url: str, field: str, value: Any) -> None:
    answer = post(url, {"prompt": "春", "model": "best", field: value})
    error = told(answer)
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"].split("[")[0].split(".")[0] == field and field in error["message"]


@pytest.mark.parametrize(
    ("body", "english", "chinese"),
    [
        ({"n": 0}, "Invalid 'n': it must be at least 1", "'n' 无效：不能小于 1"),
        ({"top_p": 2}, "it may be at most 1", "不能大于 1"),
        ({"seed": 1 << 63}, f"it must be less than {1 << 63}", f"必须小于 {1 << 63}"),
        ({"seed": 0.5}, "a whole number is needed", "需要一个整数"),
        ({"temperature": "1"}, "a number is needed", "需要一个数"),
        ({"stream": 1}, "true or false is needed", "需要 true 或 false"),
        ({"model": 1}, "a text is needed", "需要一段文本"),
        ({"logit_bias": []}, "an object is needed", "需要一个对象"),
        ({"stream_options": 1}, "an object is needed", "需要一个对象"),
        ({"prompt": ["a", 5]}, "a list of token ids", "token 编号"),
        ({"stop": 5}, "a text or a list of texts is needed", "需要一段文本，或一个文本列表"),
    ],
)  # fmt: skip
def test_why_a_field_is_refused_is_said_in_the_user_s_language(
    body: dict[str, Any], english: str, chinese: str
) -> None:
    for language, words in (("en", english), ("zh", chinese)):
        set_language(language)
        with pytest.raises(ApiError) as refused:
            parse_completion(json.dumps({"prompt": "春", **body}).encode())
        assert words in refused.value.message


@pytest.mark.parametrize(
    "body",
    [
        {}, {"messages": []}, {"messages": [{"role": "wizard", "content": "a"}]},
        {"messages": [{"content": "a"}]}, {"messages": "hello"},
        {"messages": [{"role": "user", "content": 5}]}, {"messages": [{"role": 1}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3},
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 0},
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]},
        {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json"}},
        {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
        {"messages": [{"role": "user", "content": ["a"]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        {"messages": [{"role": "user", "content": "a"}], "modalities": ["text", "audio"]},
    ],
)  # fmt: skip
def test_a_conversation_that_is_wrong_is_refused(url: str, body: Any) -> None:
    answer = post(url, body, "/v1/chat/completions")
    assert answer.status_code == 400 and told(answer)["param"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b'{"prompt": "a",}', b"[1]", b"null", b'"a"', b'{"temperature": NaN}',
        b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"n": ' + b"9" * 5000,
        b"[" * 100_000, b'{"a":' * 50_000,
    ],
)  # fmt: skip
def test_a_body_that_is_not_json_is_400(url: str, body: bytes) -> None:
    answer = post(url, body)
    assert answer.status_code == 400
    assert told(answer)["code"] == "invalid_json"


def test_fields_of_other_servers_that_change_the_text_are_refused(url: str) -> None:
    changing = {"repetition_penalty": 1.2, "min_p": 0.1, "min_tokens": 5, "grammar": "root ::= x"}
    for field, value in changing.items():
        answer = post(url, {"prompt": "春", "max_tokens": 1, field: value})
        assert answer.status_code == 400 and told(answer)["param"] == field
    body = {"prompt": "春", "max_tokens": 1, "repetition_penalty": 1.0, "min_p": 0, "grammar": None}
    assert post(url, body).status_code == 200, "these say nothing"


def test_fields_that_nobody_knows_do_not_matter(url: str) -> None:
    body = {"prompt": "春", "max_tokens": 1, "user": "me", "store": True, "metadata": {"a": 1},
            "some_new_field": [1], "stream_options": None, "logit_bias": None}  # fmt: skip
    assert post(url, body).status_code == 200


def test_unknown_places_and_methods_are_told_in_the_same_form(url: str) -> None:
    answer = httpx.get(f"{url}/v1/nothing")
    assert answer.status_code == 404 and "GET /v1/nothing" in told(answer)["message"]
    answer = httpx.get(f"{url}/v1/completions")
    assert answer.status_code == 405 and told(answer)["type"] == "invalid_request_error"


def test_a_body_that_is_too_large_is_413_also_where_its_size_is_not_told(url: str) -> None:
    large = b'{"prompt": "' + b"a" * (1 << 20) + b'"}'
    answer = post(url, large)
    assert answer.status_code == 413 and told(answer)["code"] == "request_too_large"

    def chunks() -> Any:
        for start in range(0, len(large), 1 << 16):
            yield large[start : start + (1 << 16)]

    answer = httpx.post(f"{url}/v1/completions", content=chunks(), timeout=30)
    assert answer.status_code == 413


def test_what_can_be_read_can_be_asked_for_without_its_content(url: str) -> None:
    for path in ("/health", "/metrics", "/v1/models", "/v1/models/best", "/"):
        answer = httpx.head(f"{url}{path}")
        assert answer.status_code == 200 and not answer.content, path


def test_bytes_that_are_no_request_at_all_leave_the_server_up(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    for nonsense in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\n"):
        with socket.create_connection((host, int(port)), 5) as connection:
            connection.sendall(nonsense)
        assert httpx.get(f"{url}/health").status_code == 200, nonsense


def test_a_limit_beyond_every_vocabulary_is_none(url: str) -> None:
    for top_k in (10**6, 2**62, 10**30):  # does not end the texts of others
        assert post(url, {"prompt": "春", "max_tokens": 1, "top_k": top_k}).status_code == 200


def test_who_leaves_before_the_body_has_come_is_counted_and_no_error(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
                           'Content-Length: 99\r\n\r\n{"prom'.encode())  # fmt: skip
        time.sleep(0.2)
    wait_for(lambda: figure(url, 'holdfast_requests_total{path="/v1/completions",status="499"}'))
    assert not caplog.records


def test_too_many_texts_at_once_are_told_with_the_limit(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 72"):  # batch 8 and queue 64
        client.completions.create(model="best", prompt=["春"] * 37, n=2)


def test_a_damaged_checkpoint_is_an_error_of_the_server_and_the_others_go_on(
    run: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "model_epoch_1.pt"
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with serving(copy) as url:
        answer = post(url, {"model": "model_epoch_1", "prompt": "春"})
        assert answer.status_code == 500 and told(answer)["code"] == "model_unavailable"
        assert "model_epoch_1" in told(answer)["message"]
        assert answer.headers["x-should-retry"] == "false", "asking again does not help"
        assert post(url, {"model": "best", "prompt": "春"}).status_code == 200


def test_a_tokenizer_that_fails_is_an_error_of_the_server_in_one_line(
    tmp_path: Path, tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    words = WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="nowhere")
    files = {"tokenizer.json": Tokenizer(words).to_str()}
    training = Training(tmp_path / "run", poet(tokenizer, steps=1), TextTokenizer(files, 0))
    training.epoch(1.0)
    training.close()
    with serving(tmp_path / "run") as url:
        answer = post(url, {"prompt": "春"})
        assert answer.status_code == 500 and told(answer)["code"] == "tokenizer_failed"
        assert "UNK" in told(answer)["message"]
        assert post(url, {"prompt": "a", "max_tokens": 1}).status_code == 200
    assert not any(record.exc_info for record in caplog.records), "no traceback"


# ------------------------------------------------------------------------ too much, and gone again


def endless(**more: Any) -> dict[str, Any]:
    return {"model": "best", "prompt": POEM[:6], "max_tokens": CONTEXT, "ignore_eos": True, **more}


def figure(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def wait_for(what: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(run: Path, stream: bool) -> None:
    with serving(run, batch=1, queue=1) as url:
        before = time.monotonic()
        with pytest.raises(httpx.ReadTimeout):
            if stream:
                with httpx.stream("POST", f"{url}/v1/completions", json=endless(stream=True)) as r:
                    next(r.iter_lines())
                    raise httpx.ReadTimeout("enough")
            httpx.post(f"{url}/v1/completions", json=endless(), timeout=0.3)
        assert post(url, {"prompt": "春", "max_tokens": 2}).status_code == 200
        assert time.monotonic() - before < 3, "it did not wait for 4000 tokens"
        assert figure(url, "holdfast_cancelled_requests_total") == 1
        assert figure(url, "holdfast_running_texts") == 0
        assert 'status="500"' not in httpx.get(f"{url}/metrics").text, "no error of the server"


def test_a_full_queue_is_429_with_the_time_to_wait(run: Path) -> None:
    with serving(run, batch=1, queue=1) as url, httpx.Client(timeout=30) as http:
        with (
            http.stream("POST", f"{url}/v1/completions", json=endless(stream=True)) as first,
            http.stream("POST", f"{url}/v1/completions", json=endless(stream=True)) as second,
        ):
            assert first.status_code == second.status_code == 200
            answer = post(url, {"prompt": "春", "max_tokens": 1})
            assert answer.status_code == 429 and told(answer)["code"] == "server_overloaded"
            assert int(answer.headers["retry-after"]) >= 1
            assert figure(url, "holdfast_waiting_texts") == 1
        wait_for(lambda: post(url, {"prompt": "春", "max_tokens": 1}).status_code == 200)
