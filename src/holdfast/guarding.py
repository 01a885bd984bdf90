"""Decide who may talk to a server of ours: by its names, the origin of a page, and a secret.

The dashboard and the API server stand behind this one guard. Plain ASGI: it knows nothing of runs
or models, and imports no framework.
"""

from __future__ import annotations

import hmac
import ipaddress
import math
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_HOST = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[^\s:/@\[\]]+))(?::\d{1,5})?")

# The hash of an empty text: the style element that plotly makes, empty, and fills rule by rule.
EMPTY_STYLE = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
HEADERS = {
    "content-security-policy": f"default-src 'none'; script-src 'self'; style-src 'self' "
    f"{EMPTY_STYLE}; img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",  # unless the answer itself says something else
}


def new_token() -> str:
    """Return a secret of 192 bits that fits into an address."""
    return secrets.token_urlsafe(24)


def same_secret(given: str | None, expected: str) -> bool:
    """Return whether `given` is the secret; it takes as long for one that is nearly right."""
    return given is not None and hmac.compare_digest(
        given.encode("utf-8", "surrogatepass"), expected.encode()
    )


def bearer_of(header: str) -> str | None:
    """Return the secret of an `Authorization` header; its scheme may be in any case (RFC 9110)."""
    kind, _space, given = header.strip().partition(" ")
    return (given.strip() or None) if kind.lower() == "bearer" else None


def is_loopback(host: str) -> bool:
    """Return whether `host`, a name or an address, can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Hosts:
    """The names that a server answers to.

    A page of a stranger can make its own name resolve to our address (DNS rebinding). The browser
    then still sends that name as `Host`. So a server that only this machine reaches answers to
    loopback addresses, to localhost, and to the names in `also`, by which a proxy or a container
    asks. One that others can reach is protected by its secret, and answers to every name. Ports
    are not compared: a tunnel changes them.
    """

    def __init__(self, bound: str, also: Iterable[str] = ()) -> None:
        self.loopback_only = is_loopback(bound)
        self._names = {"localhost", *(host_name(name) or name.lower() for name in also)}

    def knows(self, header: str) -> bool:
        """Return whether a `Host` header is one of ours."""
        name = host_name(header) or ""
        return not self.loopback_only or name in self._names or is_loopback(name)


def host_name(header: str) -> str | None:
    """Return the name in a `Host` header without its port; None where it makes no sense."""
    found = _HOST.fullmatch(header)
    if found is None:
        return None
    return str(found["six"] or found["name"]).lower().removesuffix(".")


def same_origin(origin: str, host: str) -> bool:
    """Return whether an `Origin` header names the server that `host`, the `Host` header, names."""
    scheme, _slashes, place = origin.lower().partition("://")
    if scheme not in _PORTS or not place:
        return False
    port = _PORTS[scheme]  # browsers leave it out, some proxies write it
    return place.removesuffix(port) == host.lower().removesuffix(port)


_PORTS = {"http": ":80", "https": ":443"}


class Origins:
    """The web pages that may ask beside our own: those that the user has named.

    A proxy may tell us another `Host` than the one that the browser sees.
    """

    def __init__(self, also: Iterable[str] = ()) -> None:
        self._also = frozenset(_plain_origin(origin) for origin in also)

    def named(self, origin: str) -> bool:
        """Return whether the user has named `origin`."""
        return _plain_origin(origin) in self._also

    def allow(self, origin: str, host: str) -> bool:
        """Return whether a page of `origin` may ask where `host` is the `Host` header."""
        return same_origin(origin, host) or self.named(origin)


def _plain_origin(origin: str) -> str:
    scheme, slashes, place = origin.strip().lower().rstrip("/").partition("://")
    return scheme + slashes + place.removesuffix(_PORTS.get(scheme, ":"))


class Rate:
    """So many a minute for each client: a bucket that holds a minute's worth and fills evenly."""

    _CLIENTS = 10_000  # the ones that were quiet longest are forgotten

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str) -> int:
        """Return the seconds until `client` may take one; 0: now."""
        left = self._left(client)
        return 0 if left >= 1 else max(1, math.ceil((1 - left) * 60 / self._rate))

    def take(self, client: str) -> None:
        """Take one from the bucket of `client`."""
        left = self._left(client)
        self._buckets.pop(client, None)
        self._buckets[client] = (left - 1, time.monotonic())
        if len(self._buckets) > self._CLIENTS:
            self._buckets.popitem(last=False)

    def _left(self, client: str) -> float:
        now = time.monotonic()
        left, then = self._buckets.get(client, (self._rate, now))
        return min(self._rate, left + (now - then) * self._rate / 60)


@dataclass
class Refused(Exception):
    """A request that is not let in; each server says so in its own form."""

    reason: str  # FOREIGN_HOST, FOREIGN_ORIGIN, NO_SECRET, WRONG_SECRET, or GUESSING
    named: str = ""  # the host or the origin
    wait: int = 0  # seconds until it is worth trying again


FOREIGN_HOST, FOREIGN_ORIGIN = "forbidden_host", "forbidden_origin"
NO_SECRET, WRONG_SECRET, GUESSING = "missing_api_key", "invalid_api_key", "too_many_wrong_keys"
STATUS = {FOREIGN_HOST: 403, FOREIGN_ORIGIN: 403, NO_SECRET: 401, WRONG_SECRET: 401, GUESSING: 429}

Answer = tuple[int, Mapping[str, str], bytes]
"""Status, headers and body."""


class Guard:
    """Stand in front of an application: turn away requests that are not meant, set the headers.

    With a `secret`, a request brings it in `Authorization: Bearer`; where there is a `cookie`, also
    once as `?token=`, which the answer turns into a cookie that scripts cannot read and other sites
    cannot send. A wrong one is refused even where the cookie is right.
    """

    def __init__(
        self,
        app: App,
        *,
        hosts: Hosts,
        origins: Origins,
        secret: str | None,
        refusal: Callable[[Refused], Answer],
        cookie: str | None = None,
        open_to_all: Callable[[str], bool] = lambda _path: False,
        guesses: float | None = None,
    ) -> None:
        """`open_to_all` tells the paths that need no secret; `guesses` how many wrong secrets a
        minute a client may try before none of its secrets is looked at (None: as many as it likes,
        for a secret that is too long to be guessed)."""
        assert secret is not None or hosts.loopback_only, (
            "a server that others can reach needs a secret"
        )
        self._app, self._hosts, self._origins = app, hosts, origins
        self._secret, self._cookie, self._refusal = secret, cookie, refusal
        self._open_to_all = open_to_all
        self._guesses = None if guesses is None else Rate(guesses)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no page of ours opens a web socket
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope)
        page = headers.only("origin")
        page = page if page is not None and self._origins.named(page) else None
        extra = dict(HEADERS) if page is None else {**HEADERS, **_cors(page, headers)}
        try:
            self._check_names(headers)
            if page is not None and scope["method"] == "OPTIONS":
                # A browser asks without the secret whether the page may ask with it.
                await respond(_with_headers(send, extra), (204, {}, b""))
                return
            if self._check_secret(scope, headers):
                cookie = f"{self._cookie}={self._secret}; HttpOnly; SameSite=Strict; Path=/"
                extra["set-cookie"] = cookie
        except Refused as refused:
            await respond(_with_headers(send, extra), self._refusal(refused))
            return
        await self._app(scope, receive, _with_headers(send, extra))

    def _check_names(self, headers: Headers) -> None:
        host = headers.only("host") or ""
        if not self._hosts.knows(host):
            raise Refused(FOREIGN_HOST, host)
        for origin in headers.all("origin"):
            if not self._origins.allow(origin, host):
                raise Refused(FOREIGN_ORIGIN, origin)

    def _check_secret(self, scope: Scope, headers: Headers) -> bool:
        """Raise Refused over a wrong secret; return whether to set the cookie."""
        if self._secret is None or self._open_to_all(scope["path"]):
            return False
        given, in_address = bearer_of(headers.only("authorization") or ""), False
        if self._cookie is not None:
            query = scope.get("query_string", b"").decode("latin-1")
            asked = parse_qs(query, keep_blank_values=True).get("token")
            in_address = asked is not None
            given = "".join(asked) if asked else given or headers.cookie(self._cookie)
        if given is None:
            raise Refused(NO_SECRET)
        client = (scope.get("client") or ["?"])[0]
        # Before the secret is looked at: a client that guesses must not learn of a right guess.
        if self._guesses is not None and (wait := self._guesses.wait(client)):
            raise Refused(GUESSING, wait=wait)
        if not same_secret(given, self._secret):
            if self._guesses is not None:
                self._guesses.take(client)
            raise Refused(WRONG_SECRET)
        return in_address


def _cors(page: str, headers: Headers) -> dict[str, str]:
    """Return the headers that let a browser show our answer to a page from elsewhere (CORS)."""
    return {
        "access-control-allow-origin": page,
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": headers.only("access-control-request-headers") or "*",
        "access-control-expose-headers": "retry-after",
        "vary": "origin",
    }


def _with_headers(send: Send, headers: Mapping[str, str]) -> Send:
    """Return a `send` that adds `headers` where the answer has none of that name."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = list(message.get("headers", []))
            there = {bytes(name).lower() for name, _value in own}
            added = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            own += [(name, value) for name, value in added if name not in there]
            message = {**message, "headers": own}
        await send(message)

    return wrapped


async def respond(send: Send, answer: Answer) -> None:
    """Send a whole answer."""
    status, headers, body = answer
    given = {**headers, "content-length": str(len(body))}
    pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


class Headers:
    """The headers of a request; one that stands twice where it should once counts as none."""

    def __init__(self, scope: Scope) -> None:
        self._pairs = [
            (bytes(name).decode("latin-1").lower(), bytes(value).decode("latin-1"))
            for name, value in scope.get("headers", [])
        ]

    def all(self, name: str) -> list[str]:
        return [value for key, value in self._pairs if key == name]

    def only(self, name: str) -> str | None:
        found = self.all(name)
        return found[0] if len(found) == 1 else None

    def cookie(self, name: str) -> str | None:
        for text in self.all("cookie"):
            try:
                cookies = SimpleCookie(text)
            except CookieError:
                continue
            if name in cookies:
                return cookies[name].value
        return None
