"""Who may ask: keys, hosts, web pages from elsewhere, and how often."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from holdfast import listening
from holdfast.errors import ConfigError
from holdfast.guarding import Receive, is_loopback
from holdfast.serving.api.limits import Gate, Limits
from tests.serving.models import serving


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.3.2.1"])
def test_loopback_is_recognised(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.0.4", "example.org", "127.evil.org", ""]
)
def test_what_others_can_reach_is_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_a_stranger_s_name_and_page_and_two_of_either_are_refused(url: str) -> None:
    with httpx.Client(base_url=url) as http:

        def status(*headers: tuple[str, str]) -> int:
            return http.get("/v1/models", headers=httpx.Headers(list(headers))).status_code

        for host in ("localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
            assert status(("host", host)) == 200, host
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example:8000"):
            assert status(("host", host)) == 403, host
        local = ("host", "localhost:8000")
        assert status(local, ("origin", "http://localhost:8000")) == 200
        for origin in ("http://evil.example", "http://localhost:9000", "null"):
            assert status(local, ("origin", origin)) == 403
        both = ("origin", "http://evil.example"), ("origin", "http://localhost:8000")
        assert status(local, *both) == status(local, *reversed(both)) == 403


def test_a_body_that_stops_half_way_is_not_waited_for_for_ever() -> None:
    async def app(_scope: object, receive: Receive, _send: object) -> None:
        while (await receive()).get("more_body"):
            pass

    async def stalls() -> dict[str, Any]:
        if not pieces:
            await asyncio.sleep(60)
        return pieces.pop()

    async def send(message: MutableMapping[str, Any]) -> None:
        answers.append(message)

    answers: list[MutableMapping[str, Any]] = []
    pieces = [{"type": "http.request", "body": b"{", "more_body": True}]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions",
             "headers": [(b"host", b"localhost")], "client": ("1.2.3.4", 5)}  # fmt: skip
    gate = Gate(app, Limits(patience=0.05))
    asyncio.run(asyncio.wait_for(gate(scope, stalls, send), 10))
    assert answers[0]["status"] == 408
    assert b"request_timeout" in answers[1]["body"]


def test_a_connection_on_which_no_request_comes_is_closed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "PATIENCE", 0.4)
    with serving(run) as url:
        address = url.removeprefix("http://").split(":")[0], int(url.rpartition(":")[2])
        head = f"GET /health HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\n".encode()
        body = {"prompt": "春", "max_tokens": 1500, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as stream:
            for sent in (b"", head, head + b"\r\n" + head):  # the last: a second one has begun
                with socket.create_connection(address, timeout=10) as connection:
                    connection.sendall(sent)
                    came = b""
                    while piece := connection.recv(4096):
                        came += piece
                    assert came.count(b"200 OK") == sent.count(b"\r\n\r\n")
            assert list(stream.iter_lines())[-2:] == ["data: [DONE]", ""], "who is answered stays"


def test_a_body_that_comes_in_drops_is_not_waited_for_for_ever() -> None:
    async def app(_scope: object, receive: Receive, _send: object) -> None:
        while (await receive()).get("more_body"):
            pass

    async def drops() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message: MutableMapping[str, Any]) -> None:
        answers.append(message)

    answers: list[MutableMapping[str, Any]] = []
    scope = {"type": "http", "method": "POST", "path": "/v1/completions",
             "headers": [(b"host", b"localhost")], "client": ("1.2.3.4", 5)}  # fmt: skip
    gate = Gate(app, Limits(patience=0.2))
    asyncio.run(asyncio.wait_for(gate(scope, drops, send), 10))
    assert answers[0]["status"] == 408


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_of_too_many_connections_the_one_that_asks_nothing_for_longest_makes_room(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "most_connections", lambda: 4)
    with serving(run) as url:
        held = [connected(url)]
        held[0].sendall(b"GET /health HT")  # the beginning of a request counts as none
        time.sleep(0.1)
        held += [connected(url) for _ in range(3)]
        time.sleep(0.1)
        assert httpx.get(f"{url}/health", timeout=20).status_code == 200
        assert held[0].recv(100) == b"", "it was closed"
        held[1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert held[1].recv(100).startswith(b"HTTP/1.1 200 "), "the others are not"
        for connection in held:
            connection.close()


def test_a_connection_too_many_is_refused_where_all_are_answered(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "most_connections", lambda: 2)
    body = b'{"prompt": "a", "max_tokens": 4000, "ignore_eos": true, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    with serving(run) as url:
        busy = [connected(url) for _ in range(2)]
        for connection in busy:
            connection.sendall(head % len(body) + body)
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        with connected(url) as one_more:
            came = b""
            while piece := one_more.recv(4096):
                came += piece
        assert came.startswith(b"HTTP/1.1 503 ") and b"too_many_connections" in came
        for connection in busy:
            connection.close()
        time.sleep(0.2)
        assert httpx.get(f"{url}/health", timeout=20).status_code == 200


def test_who_reads_nothing_of_the_answers_is_let_go(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "SLOWEST", 0.3)
    with serving(run) as url:
        address = url.removeprefix("http://").split(":")[0], int(url.rpartition(":")[2])
        asked = f"GET /metrics HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\n\r\n".encode()
        with socket.create_connection(address, timeout=20) as connection:
            try:
                for _ in range(200_000):  # until it reads no more of what we ask
                    connection.sendall(asked)
            except (ConnectionError, TimeoutError) as error:
                assert isinstance(error, ConnectionError), "it was not let go"
            else:
                raise AssertionError("all of it was taken in")
        assert httpx.get(f"{url}/health").status_code == 200


def test_who_guesses_keys_is_soon_not_listened_to(run: Path) -> None:
    with serving(run, api_key="s3cret") as url, httpx.Client() as http:

        def tried(key: str) -> httpx.Response:
            return http.get(f"{url}/v1/models", headers={"authorization": f"bearer {key}"})

        assert tried("s3cret").status_code == 200, "the scheme is the same in lower case"
        statuses = [tried(f"guess{i}").status_code for i in range(60)]
        assert statuses[:5] == [401] * 5 and statuses[-1] == 429
        answer = tried("s3cret")
        assert answer.status_code == 429, "or a right guess would be told"
        assert int(answer.headers["retry-after"]) <= 5
        assert answer.json()["error"]["code"] == "too_many_wrong_keys"


def test_a_proxy_s_name_and_page_are_answered_where_they_were_allowed(run: Path) -> None:
    site = "https://LLM.example.com"
    allowed: Any = {
        "allowed_hosts": ["llm.example.com:8443", "172.17.0.1"],
        "allowed_origins": [site],
    }
    with serving(run, **allowed) as url, httpx.Client(base_url=url) as http:

        def status(**headers: str) -> int:
            return http.get("/v1/models", headers=headers).status_code

        assert status(host="llm.example.com") == status(host="LLM.example.com:80") == 200
        assert status(host="172.17.0.1:8000") == 200
        refused = http.get("/v1/models", headers={"host": "host.docker.internal:8000"})
        assert refused.status_code == 403
        assert "--allowed-host host.docker.internal" in refused.json()["error"]["message"]

        assert status(host="llm.example.com:443", origin="https://llm.example.com") == 200
        page = http.get("/v1/models", headers={"origin": "https://llm.example.com"})
        assert page.headers["access-control-allow-origin"] == "https://llm.example.com"
        refused = http.get("/v1/models", headers={"origin": "https://evil.example"})
        assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
        assert "--allowed-origin https://evil.example" in refused.json()["error"]["message"]

        asking = {"access-control-request-method": "POST", "origin": "https://llm.example.com",
                  "access-control-request-headers": "authorization,x-stainless-os"}  # fmt: skip
        before = http.options("/v1/chat/completions", headers=asking)
        assert before.status_code == 204
        assert before.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
        asking["origin"] = "https://evil.example"
        assert http.options("/v1/chat/completions", headers=asking).status_code == 403


def test_with_a_key_nothing_of_a_model_is_told_without_it(run: Path) -> None:
    with serving(run, api_key="s3cret") as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret") as client:
            assert client.completions.create(model="best", prompt="春", max_tokens=1).choices
        for key in ("wrong", "s3cre", "s3cret2", "s3crét"):
            with httpx.Client(headers=[(b"authorization", f"Bearer {key}".encode())]) as http:
                for path in ("/v1/models", "/metrics", "/v1/anything"):
                    answer = http.get(url + path)
                    assert answer.status_code == 401
                    assert answer.json()["error"]["code"] == "invalid_api_key"
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
        for headers in ({}, {"authorization": "Basic s3cret"}, {"authorization": "Bearer"}):
            answer = httpx.get(f"{url}/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "missing_api_key"
        assert httpx.get(f"{url}/").status_code == httpx.get(f"{url}/health").status_code == 200


def test_another_host_without_a_key_is_refused(run: Path) -> None:
    with (
        pytest.raises(ConfigError, match="needs an --api-key"),
        serving(run, host="0.0.0.0"),
    ):
        pass


def test_the_page_is_served_with_a_strict_policy_and_nothing_beside_it(url: str) -> None:
    page = httpx.get(f"{url}/")
    assert page.status_code == 200 and "<!doctype html>" in page.text.lower()
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py",
                 "/static//etc/passwd", "/static/nothing.js", "/static/"):  # fmt: skip
        assert httpx.get(url + path).status_code == 404
    allowed = httpx.options(f"{url}/v1/models", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in allowed.headers
