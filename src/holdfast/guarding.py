"""Who may talk to a page of ours: a token, the names this server answers to, the same origin.

Plain ASGI, for every server of the house; knows nothing of runs or models, imports no framework.
"""

from __future__ import annotations

import hmac
import html
import ipaddress
import re
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
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
POLICY = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", f"style-src 'self' {EMPTY_STYLE}",
        "img-src 'self' data: blob:", "connect-src 'self'", "base-uri 'none'",
        "form-action 'none'", "frame-ancestors 'none'",
    )
)  # fmt: skip
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",  # unless the answer itself says something else
}


def new_token() -> str:
    """A secret that nobody guesses: 192 bits, fit for an address."""
    return secrets.token_urlsafe(24)


def same_secret(given: str | None, expected: str) -> bool:
    """Whether `given` is the secret; takes as long for one that is nearly right."""
    return given is not None and hmac.compare_digest(
        given.encode("utf-8", "surrogatepass"), expected.encode()
    )


def bearer_of(header: str) -> str | None:
    """The secret in an `Authorization` header; the scheme may be written in any case (RFC 9110)."""
    kind, _space, given = header.strip().partition(" ")
    return (given.strip() or None) if kind.lower() == "bearer" else None


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is this machine and nobody else's way in."""
    if host == "localhost":
        return True
    address = _address(host)
    return address is not None and address.is_loopback


class Hosts:
    """The names a server answers to, by what it was bound to.

    A page of a stranger can make its own name resolve to our address (DNS rebinding); the browser
    then still sends that name as `Host`. So only names that are ours are answered: bound to the
    loopback, its addresses and localhost; else any literal address, which nobody can rebind, what
    was bound to, and the names of this machine; and in any case the names in `also`, by which a
    proxy or a container asks. Ports are not compared: a tunnel changes them.
    """

    def __init__(self, bound: str, also: Iterable[str] = ()) -> None:
        self._loopback_only = is_loopback(bound)
        own = socket.gethostname().lower()
        names = {"localhost", bound.lower(), *(host_name(name) or name.lower() for name in also)}
        self._names = names if self._loopback_only else {*names, own, f"{own}.local"}

    def knows(self, header: str) -> bool:
        """Whether a `Host` header is one of ours."""
        name = host_name(header)
        if name is None:
            return False
        address = _address(name)
        if address is not None and (address.is_loopback or not self._loopback_only):
            return True
        return name in self._names


def host_name(header: str) -> str | None:
    """The name in a `Host` header, without its port; None where the header makes no sense."""
    found = _HOST.fullmatch(header)
    if found is None:
        return None
    return str(found["six"] or found["name"]).lower().removesuffix(".")


def same_origin(origin: str, host: str) -> bool:
    """Whether an `Origin` header names the server that `host`, the `Host` header, names."""
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
        """Whether the user has named `origin`."""
        return _plain_origin(origin) in self._also

    def allow(self, origin: str, host: str) -> bool:
        """Whether a page of `origin` may ask where `host` is the `Host` header."""
        return same_origin(origin, host) or self.named(origin)


def _plain_origin(origin: str) -> str:
    scheme, slashes, place = origin.strip().lower().rstrip("/").partition("://")
    return scheme + slashes + place.removesuffix(_PORTS.get(scheme, ":"))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


class Guard:
    """In front of an application: turns away whoever is not meant, and sets the headers.

    With a `token`, a request brings it once as `?token=`, which the answer turns into a cookie that
    scripts cannot read and other sites cannot send, or in `Authorization: Bearer`. A wrong one is
    refused even where the cookie is right. `refusal` is what the page for 401 says, one paragraph
    each. Without a token everybody who reaches the server with its own name is let in.
    """

    def __init__(
        self,
        app: App,
        *,
        hosts: Hosts,
        token: str | None,
        cookie: str,
        methods: Sequence[str] = ("GET", "HEAD"),
        origins: Origins | None = None,
        refusal: Sequence[str] = (),
        headers: Mapping[str, str] = HEADERS,
    ) -> None:
        self._app, self._hosts, self._token, self._cookie = app, hosts, token, cookie
        self._origins = origins or Origins()
        self._methods, self._refusal = frozenset(methods), tuple(refusal)
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no page of ours opens a web socket
            await send({"type": "websocket.close", "code": 1008})
            return
        status, remember = self._judge(scope)
        if status == 200:
            await self._app(scope, receive, self._with_headers(send, remember))
        else:
            await self._refuse(status, self._with_headers(send, False))

    def _judge(self, scope: Scope) -> tuple[int, bool]:
        """The status, 200 for whoever may come in; and whether to set the cookie."""
        headers = _Headers(scope)
        host, origin = headers.only("host"), headers.all("origin")
        if host is None or not self._hosts.knows(host):
            return 421, False  # Misdirected Request
        if not all(self._origins.allow(each, host) for each in origin):
            return 403, False
        if scope["method"] not in self._methods:
            return 405, False
        return self._judge_token(scope, headers)

    def _judge_token(self, scope: Scope, headers: _Headers) -> tuple[int, bool]:
        if self._token is None:
            return 200, False
        query = scope.get("query_string", b"").decode("latin-1")
        asked = parse_qs(query, keep_blank_values=True).get("token")
        if asked is not None:
            right = len(asked) == 1 and same_secret(asked[0], self._token)
            return (200, True) if right else (401, False)
        given = bearer_of(headers.only("authorization") or "") or headers.cookie(self._cookie)
        return (200, False) if same_secret(given, self._token) else (401, False)

    def _with_headers(self, send: Send, remember: bool) -> Send:
        async def wrapped(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = list(message.get("headers", []))
                there = {bytes(name).lower() for name, _value in own}
                own += [(name, value) for name, value in self._headers if name not in there]
                if remember:
                    cookie = f"{self._cookie}={self._token}; HttpOnly; SameSite=Strict; Path=/"
                    own.append((b"set-cookie", cookie.encode()))
                message = {**message, "headers": own}
            await send(message)

        return wrapped

    async def _refuse(self, status: int, send: Send) -> None:
        said = self._refusal if status == 401 else _WAYS_IN.get(status, ())
        body = _refusal_page(status, said)
        headers = [
            (b"content-type", b"text/html; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _Headers:
    """The headers of a request; one that stands twice where it should once is as good as none."""

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


_WAYS_IN = {
    403: (
        "This request comes from a page of another origin. Behind a proxy, start the dashboard "
        "with --allowed-origin https://NAME.",
        "这个请求来自另一个来源的网页。若经由代理访问，请在启动时加上 --allowed-origin https://名称。",
    ),
    421: (
        "This is not a name that the dashboard answers to. Behind a proxy or from a container, "
        "start it with --allowed-host NAME.",
        "仪表板不认得这个主机名。若经由代理或从容器访问，请在启动时加上 --allowed-host 名称。",
    ),
}  # both languages: who asks has shown nothing yet by which to tell
_REASONS = {401: "401 Unauthorized", 403: "403 Forbidden", 405: "405 Method Not Allowed",
            421: "421 Misdirected Request"}  # fmt: skip


def _refusal_page(status: int, paragraphs: Iterable[str]) -> bytes:
    text = "".join(f"<p>{html.escape(each)}</p>" for each in paragraphs)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{_REASONS[status]}</title><h1>{_REASONS[status]}</h1>{text}"
    ).encode()
