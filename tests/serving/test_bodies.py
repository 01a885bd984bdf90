"""Bodies that are made to hold the server up: refused at little cost, in few words."""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable

import httpx
import pytest

_SIZE = 1 << 20
_CPU = 0.5  # seconds of this process, client and server together, for one such request
_MEMORY = 100  # MiB that it may add to the most that this process ever had


def filled(before: str, piece: str, after: str) -> bytes:
    """A body just below the limit of 1 MiB."""
    count = (_SIZE - len(before) - len(after)) // len(piece)
    return (before + piece * count + after).encode()


BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "numbers, the last is none": ("completions", lambda: filled('{"prompt":[', "1,", '"a"]}')),
    "texts, the last is none": ("completions", lambda: filled('{"prompt":[', '"a",', "1]}")),
    "as many prompts": ("completions", lambda: filled('{"prompt":[', '"a",', '"a"]}')),
    "empty prompts": ("completions", lambda: filled('{"prompt":[', "[],", '"a"]}')),
    "nested": ("completions", lambda: filled('{"prompt":', "[", "")),
    "nested and wide": ("completions", lambda: filled('{"x":[', "[[[[]]]],", "1]}")),
    "long numbers": ("completions", lambda: filled('{"prompt":[', "9" * 4000 + ",", '"a"]}')),
    "one long number": ("completions", lambda: filled('{"n":', "9", "}")),
    "stop strings": ("completions", lambda: filled('{"prompt":"a","stop":[', "1,", "1]}")),
    "stop ids": ("completions", lambda: filled('{"prompt":"a","stop_token_ids":[', '"",', "1]}")),
    "half surrogates": ("completions", lambda: filled('{"prompt":["\\ud800"', ",[]", "]}")),
    "a long key": ("completions", lambda: filled('{"logit_bias":{"', "x", '":"a"}}')),
    "many keys": ("completions", lambda: json.dumps(
        {"prompt": "a", "logit_bias": {str(i): "" for i in range(80_000)}}).encode()),
    "a long model": ("completions", lambda: filled('{"model":"', "m", '"}')),
    "empty messages": ("chat/completions", lambda: filled('{"messages":[', "{},", "{}]}")),
    "numbers for messages": ("chat/completions", lambda: filled('{"messages":[', "1,", "{}]}")),
    "empty parts": ("chat/completions", lambda: filled(
        '{"messages":[{"role":"user","content":[', "{},", "{}]}]}")),
    "numbers for parts": ("chat/completions", lambda: filled(
        '{"messages":[{"role":"user","content":[', "1,", "{}]}]}")),
    "a long role": ("chat/completions", lambda: filled(
        '{"messages":[{"content":"a","role":"', "r", '"}]}')),
    "many messages": ("chat/completions", lambda: filled(
        '{"messages":[', '{"role":"user","content":"a"},', '{"role":"user","content":"a"}]}')),
}  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="ru_maxrss")
@pytest.mark.parametrize("name", BODIES)
def test_a_large_body_is_refused_at_little_cost_and_in_few_words(url: str, name: str) -> None:
    path, make = BODIES[name]
    body = make()
    assert len(body) <= _SIZE
    before, most = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = httpx.post(f"{url}/v1/{path}", content=body, timeout=60)
    cost = time.process_time() - before
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) >> 10
    assert answer.status_code in (400, 404) and len(answer.content) < 2000, "no long echo"
    assert cost < _CPU and more < _MEMORY, (cost, more)


def test_others_are_answered_while_large_bodies_are_read(url: str) -> None:
    body = filled('{"prompt":[', "1,", '"a"]}')
    bad = [threading.Thread(target=httpx.post, args=(f"{url}/v1/completions",),
                            kwargs={"content": body, "timeout": 60}) for _ in range(8)]  # fmt: skip
    for thread in bad:
        thread.start()
    waits = []
    while any(thread.is_alive() for thread in bad):
        began = time.monotonic()
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        waits.append(time.monotonic() - began)
    for thread in bad:
        thread.join()
    assert sorted(waits)[len(waits) // 2] < 1, waits


def test_a_body_in_chunks_of_a_byte_is_refused_at_little_cost(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nTransfer-Encoding: chunked\r\n"
    before = time.process_time()
    with socket.create_connection((host, int(port)), 30) as connection:
        came = b""
        try:
            connection.sendall(head.encode() + b"\r\n" + b"1\r\n1\r\n" * 500_000)
            came = connection.recv(4096)
        except ConnectionError:
            pass  # closed while we were sending
        assert b" 200 " not in came
    assert time.process_time() - before < _CPU
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_body_in_decent_chunks_is_read(url: str) -> None:
    body = json.dumps({"prompt": "春" * 200, "max_tokens": 1, "temperature": 0}).encode()
    pieces = (body[i : i + 7] for i in range(0, len(body), 7))
    assert httpx.post(f"{url}/v1/completions", content=pieces, timeout=60).status_code == 200
