"""Who gets in: names, origins, tokens, methods; and the headers that go out with every answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from holdfast.guarding import (
    HEADERS,
    Guard,
    Hosts,
    Origins,
    Rate,
    host_name,
    is_loopback,
    new_token,
    same_origin,
    same_secret,
)
from holdfast.monitor.web.app import refusal

TOKEN = "secret"


async def _app(_scope: Any, _receive: Any, send: Any) -> None:
    headers = [(b"content-type", b"text/plain"), (b"cache-control", b"max-age=5")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"inside"})


def ask(
    query: str = "", *, bound: str = "127.0.0.1", token: str | None = TOKEN,
    allowed: tuple[list[str], list[str]] = ([], []), **headers: str | list[str],
) -> tuple[int, dict[str, str], bytes]:  # fmt: skip
    """One request through a guard: status, headers, body."""
    given = {"host": "127.0.0.1:8765", **headers}
    pairs = [
        (name.encode(), value.encode())
        for name, values in given.items()
        for value in ([values] if isinstance(values, str) else values)
    ]
    guard = Guard(_app, hosts=Hosts(bound, allowed[0]), origins=Origins(allowed[1]), secret=token,
                  cookie="c", refusal=refusal)  # fmt: skip
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": query.encode(),
             "headers": pairs}  # fmt: skip
    asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
    answer = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answer, sent[1]["body"]


def test_the_token_opens_once_and_the_cookie_from_then_on() -> None:
    status, headers, body = ask(f"token={TOKEN}")
    assert (status, body) == (200, b"inside")
    cookie = headers["set-cookie"]
    assert cookie.startswith(f"c={TOKEN};")
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    status, headers, _body = ask(cookie=f"other=1; c={TOKEN}")
    assert status == 200 and "set-cookie" not in headers
    assert ask(authorization=f"Bearer {TOKEN}")[0] == 200
    assert ask(authorization=f"bearer  {TOKEN}")[0] == 200


@pytest.mark.parametrize(
    "request_",
    [{}, {"query": "token=wrong"}, {"query": "token="}, {"cookie": "c=wrong"}, {"cookie": "c="},
     {"query": f"token={TOKEN}&token=x"}, {"cookie": f"d={TOKEN}"},
     {"query": "token=wrong", "cookie": f"c={TOKEN}"},  # the address is of another start
     {"authorization": "Bearer wrong"}, {"authorization": ["Bearer secret", "Bearer x"]}],
)  # fmt: skip
def test_without_the_right_token_a_page_says_what_to_open(request_: dict[str, Any]) -> None:
    status, headers, body = ask(**request_)
    assert status == 401
    assert b"inside" not in body and b"holdfast dashboard" in body
    assert headers["content-security-policy"] and "set-cookie" not in headers


def test_names_of_strangers_are_not_answered_even_with_the_token() -> None:
    """DNS rebinding: the browser of the victim sends the stranger's name as Host."""
    for host in ("evil.example", "evil.example:8765", "127.0.0.1.evil.example", "10.0.0.5:8765",
                 "", "localhost:8765@evil", "a b"):  # fmt: skip
        assert ask(f"token={TOKEN}", host=host)[0] == 403, host
    assert ask(f"token={TOKEN}", host=["127.0.0.1", "evil.example"])[0] == 403
    for host in ("127.0.0.1:1", "localhost:9000", "LOCALHOST", "[::1]:8765", "127.0.0.2"):
        assert ask(f"token={TOKEN}", host=host)[0] == 200, host


def test_bound_to_the_network_every_name_is_answered_but_only_with_the_secret() -> None:
    for host in ("192.168.1.7:8765", "[fe80::1]:80", "localhost", "box.lan"):
        assert ask(f"token={TOKEN}", bound="0.0.0.0", host=host)[0] == 200, host
        assert ask(bound="0.0.0.0", host=host)[0] == 401
    with pytest.raises(AssertionError):
        ask(bound="0.0.0.0", token=None)


def test_pages_of_other_origins_are_refused() -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999", "file://", "https://["):
        assert ask(f"token={TOKEN}", origin=origin)[0] == 403, origin
    assert ask(f"token={TOKEN}", origin="http://127.0.0.1:8765")[0] == 200
    assert same_origin("https://Box:1", "box:1") and not same_origin("ftp://box:1", "box:1")


def test_names_and_origins_that_the_user_allowed_are_answered_and_others_told_how() -> None:
    allowed = (["Box.example:8443", "172.17.0.1"], ["https://box.example/"])
    for host in ("box.example", "BOX.example:8443", "172.17.0.1:8765"):
        assert ask(f"token={TOKEN}", host=host, allowed=allowed)[0] == 200, host
        status, _headers, body = ask(f"token={TOKEN}", host=host)
        assert status == 403 and b"--allowed-host" in body
    for origin in ("https://box.example", "https://BOX.example:443"):
        assert ask(f"token={TOKEN}", origin=origin, allowed=allowed)[0] == 200, origin
        status, _headers, body = ask(f"token={TOKEN}", origin=origin)
        assert status == 403 and b"--allowed-origin" in body
    for origin in ("http://box.example", "https://box.example:444", "https://evil.example"):
        assert ask(f"token={TOKEN}", origin=origin, allowed=allowed)[0] == 403, origin
    assert same_origin("https://box.example", "box.example:443"), "a proxy may write the port"


def test_every_answer_has_the_headers_and_keeps_its_own() -> None:
    _status, headers, _body = ask(f"token={TOKEN}")
    assert headers["cache-control"] == "max-age=5"
    for name, value in HEADERS.items():
        assert name == "cache-control" or headers[name] == value
    assert "unsafe" not in HEADERS["content-security-policy"]
    assert "frame-ancestors 'none'" in HEADERS["content-security-policy"]
    assert ask()[1]["cache-control"] == "no-store"


def test_without_a_token_the_names_are_still_checked() -> None:
    assert ask(token=None)[0] == 200
    assert ask(token=None, host="evil.example")[0] == 403


def test_a_rate_is_for_each_client_and_fills_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("holdfast.guarding.time.monotonic", lambda: now[0])
    rate = Rate(3)

    def taken(client: str) -> bool:
        wait = rate.wait(client)
        if not wait:
            rate.take(client)
        return not wait

    assert [taken("1.2.3.4") for _ in range(4)] == [True, True, True, False]
    assert taken("5.6.7.8")
    now[0] += 20
    assert [taken("1.2.3.4") for _ in range(2)] == [True, False]


def test_small_parts() -> None:
    assert len(new_token()) >= 32 and new_token() != new_token()
    assert same_secret("ä", "ä") and not same_secret(None, "x") and not same_secret("\udc80", "x")
    assert (
        host_name("[::1]:8") == "::1" and host_name("a.b.:8") == "a.b" and host_name("[x") is None
    )
    assert is_loopback("localhost") and is_loopback("127.9.9.9") and not is_loopback("0.0.0.0")
