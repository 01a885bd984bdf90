"""Who may ask, how much, and how often: everything that is refused before anybody looks inside.

An ASGI layer around the application: the Host and the Origin, the key, the size of the body, the
rate. Nothing about models is known here.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.i18n import _
from holdfast.serving.protocol import ApiError, too_many

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_CLIENTS = 10_000  # that a rate is kept for; the ones that were quiet longest are forgotten
_OPEN = ("/health", "/", "/favicon.ico")  # answered without a key: they tell nothing of a model
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(slots=True)
class Limits:
    """What a server lets in."""

    host: str = "127.0.0.1"
    api_key: str | None = None
    max_body: int = 1 << 20
    """Bytes of a request's body."""
    patience: float = 30.0
    """Seconds until the next piece of a body must have come."""
    rate: float | None = None
    """Requests a minute and client; None: as many as they like."""
    _buckets: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def check(self, scope: Scope) -> None:
        """Raise ApiError where a request must not go on."""
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        self._check_host(headers)
        path = scope["path"]
        if path in _OPEN or path.startswith("/static/"):
            return
        self._check_key(headers)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_body:
            raise self.too_large()
        if self.rate is not None and scope["method"] == "POST":
            self._check_rate((scope.get("client") or ["?"])[0])

    def _check_host(self, headers: dict[str, str]) -> None:
        """A web page must not reach a server on this machine: neither by a name of its own that
        it points at 127.0.0.1 (DNS rebinding), nor by a form that it sends here."""
        host = headers.get("host", "")
        if is_loopback(self.host) and _name_of(host) not in (*_LOCAL_NAMES, self.host):
            raise ApiError(403, _("The Host header {host} is not this server.", host=host[:100]),
                           code="forbidden_host")  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(
                403, _("Requests from the web page {origin} are not answered.",
                       origin=origin[:100]),
                code="forbidden_origin",
            )  # fmt: skip

    def _check_key(self, headers: dict[str, str]) -> None:
        if self.api_key is None:
            return
        kind, _space, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not given.strip():
            raise ApiError(
                401, _("You didn't provide an API key: send it in an Authorization header "
                       "(Authorization: Bearer YOUR_KEY)."),
                code="missing_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        # utf-8 on both sides: compare_digest refuses text that is not ASCII.
        if not hmac.compare_digest(given.strip().encode(), self.api_key.encode()):
            raise ApiError(401, _("Incorrect API key provided."), code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})  # fmt: skip

    def _check_rate(self, client: str) -> None:
        """A bucket a client: it holds a minute's requests and fills evenly."""
        assert self.rate is not None
        now = time.monotonic()
        tokens, then = self._buckets.pop(client, (self.rate, now))
        tokens = min(self.rate, tokens + (now - then) * self.rate / 60)
        allowed = tokens >= 1
        self._buckets[client] = (tokens - allowed, now)
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)
        if not allowed:
            raise too_many(
                _("Rate limit reached: {rate:g} requests a minute.", rate=self.rate),
                max(1, math.ceil((1 - tokens) * 60 / self.rate)), "rate_limit_exceeded",
            )  # fmt: skip

    def too_slow(self) -> ApiError:
        """What is said where the rest of a body does not come."""
        return ApiError(
            408, _("The rest of the request did not come within {seconds:g} s.",
                   seconds=self.patience),
            code="request_timeout", headers={"Connection": "close"},
        )  # fmt: skip

    def too_large(self) -> ApiError:
        """What is said of a body that is too large."""
        return ApiError(
            413, _("The body of the request is larger than {limit} bytes.", limit=self.max_body),
            code="request_too_large", headers={"Connection": "close"},  # the rest is not read
        )  # fmt: skip


def _name_of(host: str) -> str:
    """The host of a Host header, without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


class Gate:
    """The layer around an application: refuses what `Limits` refuses, and counts what is read."""

    def __init__(self, app: App, limits: Limits, counted: Callable[[str, int], None]) -> None:
        """`counted` is told the route and the status of every answer."""
        self._app, self._limits, self._counted = app, limits, counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read = 0
        started = complete = False

        async def receive_limited() -> MutableMapping[str, Any]:
            nonlocal read, complete
            if complete:  # from now on only the end of the connection comes, whenever that is
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._limits.patience)
            except asyncio.TimeoutError as error:
                raise self._limits.too_slow() from error
            complete = not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > self._limits.max_body:
                raise self._limits.too_large()
            return message

        async def send_counted(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                route = getattr(scope.get("route"), "path", "other")  # not what anybody may write
                self._counted(route, message["status"])
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            self._limits.check(scope)
            await self._app(scope, receive_limited, send_counted)
        except ApiError as error:
            if started:
                raise
            await _send_error(error, send_counted)


async def _send_error(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body(), ensure_ascii=False).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **{name.lower(): value for name, value in error.headers.items()},
    }
    await send({
        "type": "http.response.start",
        "status": error.status,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
    })  # fmt: skip
    await send({"type": "http.response.body", "body": body})
