"""Who may ask, how much, and how often: everything that is refused before anybody looks inside.

An ASGI layer around the application: the Host and the Origin, the key, the size of the body, the
rate. Nothing about models is known here.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.guarding import Hosts, Origins, bearer_of, host_name, is_loopback, same_secret
from holdfast.i18n import _
from holdfast.serving.protocol import ApiError, too_many

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_CLIENTS = 10_000  # that a rate is kept for; the ones that were quiet longest are forgotten
_OPEN = ("/health", "/", "/favicon.ico")  # answered without a key: they tell nothing of a model
_WRONG_KEYS = 30.0  # a minute and client: then no key of that client is looked at


class _Rate:
    """A bucket a client: it holds a minute's worth and fills evenly."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str) -> int:
        """Seconds until `client` may take one; 0: now."""
        left = self._left(client)
        return 0 if left >= 1 else max(1, math.ceil((1 - left) * 60 / self._rate))

    def take(self, client: str) -> None:
        """One less for `client`."""
        left = self._left(client)
        self._buckets.pop(client, None)
        self._buckets[client] = (left - 1, time.monotonic())
        if len(self._buckets) > _CLIENTS:
            self._buckets.popitem(last=False)

    def _left(self, client: str) -> float:
        now = time.monotonic()
        left, then = self._buckets.get(client, (self._rate, now))
        return min(self._rate, left + (now - then) * self._rate / 60)


@dataclass(slots=True)
class Limits:
    """What a server lets in."""

    host: str = "127.0.0.1"
    api_key: str | None = None
    max_body: int = 1 << 20
    """Bytes of a request's body."""
    max_held: int = 64 << 20
    """Bytes of the bodies of all requests under way."""
    patience: float = 30.0
    """Seconds until the whole body must have come."""
    rate: float | None = None
    """Requests a minute and client; None: as many as they like."""
    allowed_hosts: Sequence[str] = ()
    """Names beside its own that a server which only this machine can reach answers to."""
    allowed_origins: Sequence[str] = ()
    """Web pages from elsewhere that may ask."""
    _hosts: Hosts = field(init=False)
    _origins: Origins = field(init=False)
    _asked: _Rate | None = field(init=False)
    _wrong_keys: _Rate = field(init=False)

    def __post_init__(self) -> None:
        self._hosts = Hosts(self.host, self.allowed_hosts)
        self._origins = Origins(self.allowed_origins)
        self._asked = _Rate(self.rate) if self.rate is not None else None
        self._wrong_keys = _Rate(_WRONG_KEYS)

    def check(self, scope: Scope) -> None:
        """Raise ApiError where a request must not go on."""
        headers = headers_of(scope)
        self._check_host(headers)
        path, client = scope["path"], (scope.get("client") or ["?"])[0]
        if path in _OPEN or path.startswith("/static/"):
            return
        if scope["method"] == "OPTIONS" and self.page_of(headers) is not None:
            return  # a browser asks without the key whether the page may ask with it
        self._check_key(headers, client)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > self.max_body:
            raise self.too_large()
        if self._asked is not None and scope["method"] == "POST":
            wait = self._asked.wait(client)
            if wait:
                raise too_many(
                    _("Rate limit reached: {rate:g} requests a minute.", rate=self.rate),
                    wait, "rate_limit_exceeded",
                )  # fmt: skip
            self._asked.take(client)

    def _check_host(self, headers: dict[str, str]) -> None:
        """A web page must not reach a server on this machine: neither by a name of its own that
        it points at 127.0.0.1 (DNS rebinding), nor by a form that it sends here."""
        host = headers.get("host", "")
        if is_loopback(self.host) and not self._hosts.knows(host):
            raise ApiError(
                403, _("The Host header {host} is not this server. Behind a proxy or from a "
                       "container, start the server with --allowed-host {name}.",
                       host=host[:100], name=(host_name(host) or "NAME")[:100]),
                code="forbidden_host",
            )  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and not self._origins.allow(origin, host):
            raise ApiError(
                403, _("Requests from the web page {origin} are not answered. To answer them, "
                       "start the server with --allowed-origin {origin}.", origin=origin[:100]),
                code="forbidden_origin",
            )  # fmt: skip

    def page_of(self, headers: dict[str, str]) -> str | None:
        """The origin of the web page that asks, where it is one of those that were named."""
        origin = headers.get("origin")
        return origin if origin is not None and self._origins.named(origin) else None

    def _check_key(self, headers: dict[str, str], client: str) -> None:
        if self.api_key is None:
            return
        given = bearer_of(headers.get("authorization", ""))
        if given is None:
            raise ApiError(
                401, _("You didn't provide an API key: send it in an Authorization header "
                       "(Authorization: Bearer YOUR_KEY)."),
                code="missing_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        # Before the key is looked at: whoever guesses must not learn that a guess was right.
        wait = self._wrong_keys.wait(client)
        if wait:
            raise too_many(_("Too many wrong API keys: try again in {seconds} s.", seconds=wait),
                           wait, "too_many_wrong_keys")  # fmt: skip
        if not same_secret(given, self.api_key):
            self._wrong_keys.take(client)
            raise ApiError(401, _("Incorrect API key provided."), code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})  # fmt: skip

    def too_slow(self) -> ApiError:
        """What is said where the rest of a body does not come."""
        return ApiError(
            408, _("The whole request did not come within {seconds:g} s.", seconds=self.patience),
            code="request_timeout", headers={"Connection": "close"},
        )  # fmt: skip

    def too_large(self) -> ApiError:
        """What is said of a body that is too large."""
        return ApiError(
            413, _("The body of the request is larger than {limit} bytes.", limit=self.max_body),
            code="request_too_large", headers={"Connection": "close"},  # the rest is not read
        )  # fmt: skip


def headers_of(scope: Scope) -> dict[str, str]:
    """The headers of a request by their names in lower case."""
    return {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}


class Gate:
    """The layer around an application: refuses what `Limits` refuses, and counts what is read."""

    def __init__(self, app: App, limits: Limits, counted: Callable[[str, int], None]) -> None:
        """`counted` is told the route and the status of every answer."""
        self._app, self._limits, self._counted = app, limits, counted
        self._held = 0  # bytes of the bodies of all requests under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limits = self._limits
        headers = headers_of(scope)
        page = limits.page_of(headers)
        until = time.monotonic() + limits.patience
        read = 0
        started = complete = False

        async def receive_limited() -> MutableMapping[str, Any]:
            nonlocal read, complete
            if complete:  # from now on only the end of the connection comes, whenever that is
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), until - time.monotonic())
            except asyncio.TimeoutError as error:
                raise limits.too_slow() from error
            complete = not message.get("more_body", False)
            size = len(message.get("body", b""))
            read += size
            self._held += size
            if read > limits.max_body:
                raise limits.too_large()
            if self._held > limits.max_held:
                raise too_many(_("The server is busy: too many large requests at once."), 1,
                               "server_overloaded")  # fmt: skip
            return message

        async def send_counted(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                route = getattr(scope.get("route"), "path", "other")  # not what anybody may write
                self._counted(route, message["status"])
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
                if page is not None:
                    message["headers"] += _for_page(page, headers)
            await send(message)

        try:
            limits.check(scope)
            if page is not None and scope["method"] == "OPTIONS":
                await send_counted({"type": "http.response.start", "status": 204, "headers": []})
                await send_counted({"type": "http.response.body", "body": b""})
                return
            await self._app(scope, receive_limited, send_counted)
        except ApiError as error:
            if started:
                raise
            await _send_error(error, send_counted)
        finally:
            self._held -= read


def _for_page(page: str, headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """What lets a browser show our answer to a web page from elsewhere (CORS)."""
    said = {
        "access-control-allow-origin": page,
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": headers.get("access-control-request-headers", "*"),
        "access-control-expose-headers": "retry-after",
        "vary": "origin",
    }
    return [(name.encode(), value.encode("latin-1")) for name, value in said.items()]


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
