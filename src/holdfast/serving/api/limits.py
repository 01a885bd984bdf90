"""Refuse requests that are too large or too slow, before they are read.

An ASGI layer around the application: the size of the body, and the time until it has come.
Who may ask at all is decided by holdfast.guarding.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass

from holdfast import guarding
from holdfast.guarding import Answer, App, Headers, Message, Receive, Refused, Scope, Send
from holdfast.i18n import _
from holdfast.serving.api.protocol import ApiError, too_many

GUESSES = 30.0  # wrong keys a minute and client


def open_to_all(path: str) -> bool:
    """Return whether `path` needs no key: it tells nothing of a model."""
    return path in ("/health", "/", "/favicon.ico") or path.startswith("/static/")


def refusal(refused: Refused) -> Answer:
    """Return the answer to a request that the guard has refused."""
    host, origin = refused.named[:100], refused.named[:100]
    name = (guarding.host_name(refused.named) or "NAME")[:100]
    message = {
        guarding.FOREIGN_HOST: _(
            "The Host header {host} is not this server. Behind a proxy or from a container, start "
            "the server with --allowed-host {name}.",
            host=host,
            name=name,
        ),
        guarding.FOREIGN_ORIGIN: _(
            "Requests from the web page {origin} are not answered. To answer them, start the "
            "server with --allowed-origin {origin}.",
            origin=origin,
        ),
        guarding.NO_SECRET: _(
            "You didn't provide an API key: send it in an Authorization header (Authorization: "
            "Bearer YOUR_KEY)."
        ),
        guarding.WRONG_SECRET: _("Incorrect API key provided."),
        guarding.GUESSING: _(
            "Too many wrong API keys: try again in {seconds} s.", seconds=refused.wait
        ),
    }[refused.reason]
    if refused.wait:
        return answer_of(too_many(message, refused.wait, refused.reason))
    status = guarding.STATUS[refused.reason]
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return answer_of(ApiError(status, message, code=refused.reason, headers=headers))


def answer_of(error: ApiError) -> Answer:
    """Return an error as a whole answer."""
    body = json.dumps(error.body(), ensure_ascii=False).encode()
    return error.status, {"content-type": "application/json", **error.headers}, body


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The sizes and times that a server accepts."""

    max_body: int = 1 << 20
    """Bytes of a request's body."""
    max_held: int = 64 << 20
    """Bytes of the bodies of all requests under way."""
    patience: float = 30.0
    """Seconds until the whole body must have come."""

    def too_slow(self) -> ApiError:
        """Return the error over a body of which the rest does not come."""
        return ApiError(
            408,
            _("The whole request did not come within {seconds:g} s.", seconds=self.patience),
            code="request_timeout",
            headers={"Connection": "close"},
        )

    def too_large(self) -> ApiError:
        """Return the error over a body that is too large."""
        return ApiError(
            413,
            _("The body of the request is larger than {limit} bytes.", limit=self.max_body),
            code="request_too_large",
            headers={"Connection": "close"},  # the rest is not read
        )


class Gate:
    """The layer around an application: refuse what `Limits` refuses."""

    def __init__(self, app: App, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._held = 0  # bytes of the bodies of all requests under way

    def _check(self, scope: Scope) -> None:
        length = Headers(scope).only("content-length") or "0"
        if length.isdigit() and int(length[:20]) > self._limits.max_body:
            raise self._limits.too_large()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits = self._limits
        until = time.monotonic() + limits.patience
        read = 0
        started = complete = False

        async def receive_limited() -> Message:
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
                busy = _("The server is busy: too many large requests at once.")
                raise too_many(busy, 1, "server_overloaded")
            return message

        async def noting_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive_limited, noting_start)
        except ApiError as error:
            if started:
                raise
            await guarding.respond(send, answer_of(error))
        finally:
            self._held -= read
