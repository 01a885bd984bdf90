"""The server: routes of the OpenAI API, health, metrics, and the files of the page.

What a request means is decided in api/protocol.py, what is refused before that in api/limits.py.
The tokens come from the models of the library.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mimetypes
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from holdfast.guarding import App
from holdfast.i18n import _
from holdfast.serving.api import answers, protocol
from holdfast.serving.api.answers import ChatForm, CompletionForm, Form, Generation, Prompt
from holdfast.serving.api.limits import Gate, Limits
from holdfast.serving.api.protocol import ApiError, invalid, server_error, too_many
from holdfast.serving.engine.engine import QueueFull
from holdfast.serving.library import Library, Served
from holdfast.serving.metrics import Metrics
from holdfast.version import __version__

log = logging.getLogger("holdfast")

_WEB = Path(__file__).parent / "web"
_READ = ["GET", "HEAD"]  # HEAD: what looks whether a server is up often asks so
_LARGE = 20_000  # bytes from which on a request is read and tokenized beside the event loop


def create_app(library: Library, limits: Limits) -> App:
    """Return the application over `library`, for callers that a guard has let in."""
    app = FastAPI(
        title="Holdfast", version=__version__, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.state.library, app.state.reading = library, asyncio.Semaphore(1)
    app.add_api_route("/v1/models", _models, methods=_READ)
    app.add_api_route("/v1/models/{name:path}", _model, methods=_READ)
    app.add_api_route("/v1/completions", _completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", _chat, methods=["POST"])
    app.add_api_route("/health", _health, methods=_READ)
    app.add_api_route("/metrics", _metrics, methods=_READ)
    _add_page(app)
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _our_fault)
    return Gate(app, limits)


def counted(app: App, metrics: Metrics) -> App:
    """Return `app` with every answer counted, those of its guard too."""

    async def counting(scope: Scope, receive: Receive, send: Send) -> None:
        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(
                    scope.get("route"), "path", "other"
                )  # not the path, which a client writes
                metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        await app(scope, receive, count)

    return counting


# -------------------------------------------------------------------------------------- the models


async def _models(request: Request) -> Response:
    library = _library(request)
    cards = await library.cards()
    data = [card.to_json(library.context_of(card)) for card in cards]
    return JSONResponse({"object": "list", "data": data})


async def _model(name: str, request: Request) -> Response:
    library = _library(request)
    card = await library.card(name)
    return JSONResponse(card.to_json(library.context_of(card)))


# --------------------------------------------------------------------------------- the completions


_Asked = TypeVar("_Asked")


async def _read(request: Request, parse: Callable[[bytes], _Asked]) -> _Asked:
    """Parse the body. A large one is read beside the event loop, where others' streams go on, and
    one at a time: parsing takes up to 50 times its size in memory."""
    body = await request.body()
    if len(body) < _LARGE:
        return parse(body)
    reading: asyncio.Semaphore = request.app.state.reading
    async with reading:
        return await asyncio.to_thread(parse, body)


async def _completions(request: Request) -> Response:
    asked = await _read(request, protocol.parse_completion)
    library = _library(request)
    name, served = await library.acquire(asked.model)
    with _Lease(library, served) as lease:
        given = "" if asked.prompt is None else asked.prompt
        limit = served.context - (0 if asked.max_tokens == 0 else 1)
        prompts = await _prompts(served, given, limit)
        wanted = 16 if asked.max_tokens is None else asked.max_tokens
        sampling = asked.sampling(
            max_tokens=wanted,
            vocabulary=served.vocabulary.size,
            logprobs=asked.logprobs,
            prompt_logprobs=bool(asked.echo) and asked.logprobs is not None,
        )
        form = CompletionForm(
            name,
            served.fingerprint,
            served.vocabulary,
            logprobs=asked.logprobs is not None,
            usage=asked.wants_usage,
        )
        generation = _begin(served, prompts, sampling, asked, echo=bool(asked.echo))
        return await _answer(request, generation, form, asked, lease)


async def _chat(request: Request) -> Response:
    asked = await _read(request, protocol.parse_chat)
    library = _library(request)
    name, served = await library.acquire(asked.model)
    with _Lease(library, served) as lease:
        messages = [{"role": m.role, "content": m.content} for m in asked.messages]
        text = await served.render(messages)
        prompts = await _prompts(served, text, served.context - 1, param="messages")
        wanted = asked.max_completion_tokens or asked.max_tokens or served.context
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        sampling = asked.sampling(
            max_tokens=wanted,
            vocabulary=served.vocabulary.size,
            logprobs=logprobs,
            prompt_logprobs=False,
        )
        form = ChatForm(
            name,
            served.fingerprint,
            served.vocabulary,
            logprobs=bool(asked.logprobs),
            usage=asked.wants_usage,
        )
        generation = _begin(served, prompts, sampling, asked, echo=False)
        return await _answer(request, generation, form, asked, lease)


def _begin(
    served: Served, prompts: Sequence[Prompt], sampling: Any, asked: Any, *, echo: bool
) -> Generation:
    n = asked.n or 1
    protocol.check_count(len(prompts) * n, min(protocol.CHOICES, served.engine.room))
    try:
        return Generation(
            served.engine,
            served.vocabulary,
            prompts,
            sampling,
            context=served.context,
            n=n,
            stops=asked.stop,
            echo=echo,
            json_object=asked.json_object,
        )
    except QueueFull as error:
        raise too_many(
            _(
                "The server is busy: the queue is full. Try again in {seconds} s.",
                seconds=error.retry_after,
            ),
            error.retry_after,
            "server_overloaded",
        ) from error


async def _prompts(
    served: Served, given: str | list[Any], limit: int, param: str = "prompt"
) -> list[Prompt]:
    """Return the prompts of a request. Raises ApiError over one that the model cannot see whole."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise invalid(_("Invalid '{name}': it is empty.", name=param), param)

    def tokenized() -> list[Prompt]:
        try:
            return [
                _prompt(served, one, limit, f"{param}[{i}]" if len(given) > 1 else param)
                for i, one in enumerate(given)
            ]
        except (ApiError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the tokenizer's Rust is no Exception
            raise protocol.tokenizer_failed(error) from error

    large = sum(map(len, given)) >= _LARGE
    return await asyncio.to_thread(tokenized) if large else tokenized()


def _prompt(served: Served, given: str | list[int], limit: int, param: str) -> Prompt:
    tokenizer = served.tokenizer
    if isinstance(given, str):
        least = -(-len(given.encode()) // served.longest)
        if least > limit:  # no need to tokenize what cannot fit
            raise _too_long(served, least, limit, param)
        prompt = Prompt(tokenizer.encode(given) or [tokenizer.eos_id], given)
        if len(prompt.tokens) > limit:
            raise _too_long(served, len(prompt.tokens), limit, param)
        return prompt
    if len(given) > limit:
        raise _too_long(served, len(given), limit, param)
    if not all(0 <= token < served.vocabulary.size for token in given):
        raise invalid(
            _(
                "Invalid '{name}': a token is not in the vocabulary (0 to {last}).",
                name=param,
                last=served.vocabulary.size - 1,
            ),
            param,
        )
    return Prompt(list(given) or [tokenizer.eos_id], answers.shown(tokenizer.decode(given)))


def _too_long(served: Served, count: int, limit: int, param: str) -> ApiError:
    return invalid(
        _(
            "This model's maximum context length is {context} tokens. Your prompt has at least "
            "{count}; at most {limit} leave room for an answer. Please shorten it.",
            context=served.context,
            count=count,
            limit=limit,
        ),
        param,
        "context_length_exceeded",
    )


# ------------------------------------------------------------------------------------- the answers


class _Lease:
    """A model in use: given back when the request is answered, or passed on to its stream."""

    def __init__(self, library: Library, served: Served) -> None:
        self._library, self._served = library, served
        self._passed_on = False

    def __enter__(self) -> _Lease:
        return self

    def __exit__(self, *_exc: object) -> None:
        if not self._passed_on:
            self._library.release(self._served)

    def pass_on(self) -> None:
        """Keep the model beyond the block; the caller calls `end` later."""
        self._passed_on = True

    def end(self, generation: Generation) -> None:
        """Count the tokens and give the model back: the answer is out, or was cancelled."""
        tokens = self._library.metrics.tokens
        tokens.labels("prompt").inc(generation.prompt_tokens)
        tokens.labels("generated").inc(generation.generated_tokens)
        if self._passed_on:
            self._library.release(self._served)


async def _answer(
    request: Request, generation: Generation, form: Form, asked: Any, lease: _Lease
) -> Response:
    if asked.stream:
        lease.pass_on()
        events = answers.events(generation, form, usage=asked.wants_usage)
        return _Stream(events, generation, lease, _library(request))
    async with _watched(request.receive, generation, _library(request)) as watching:
        try:
            body = await answers.whole(generation, form)
        except ApiError as error:
            if watching.done():  # that is why there is no answer: no error of the server
                raise ClientDisconnect from error
            raise
        finally:
            generation.cancel()
            lease.end(generation)
    return JSONResponse(body)


@contextlib.asynccontextmanager
async def _watched(
    receive: Receive, generation: Generation, library: Library
) -> AsyncIterator[asyncio.Task[None]]:
    """Cancel the texts of the request when its client goes away; the task is done then."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        library.metrics.cancelled.inc()
        generation.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield watching
    finally:
        watching.cancel()


class _Stream(Response):
    """Server-sent events; an error in mid-stream becomes an event, as the clients expect it."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[str], generation: Generation, lease: _Lease, library: Library
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._generation, self._lease = events, generation, lease
        self._library = library

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            async with _watched(receive, self._generation, self._library):
                await send(start)
                try:
                    async for event in self._events:
                        await _send_event(send, event)
                except ApiError as error:
                    await _send_event(send, answers.event(error.body()))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._generation.cancel()
            self._lease.end(self._generation)


async def _send_event(send: Send, event: str) -> None:
    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})


# -------------------------------------------------------------------------------- everything else


async def _health(request: Request) -> Response:
    card = (await _library(request).cards())[0]
    return JSONResponse({"status": "ok", "model": card.name, "step": card.entry.step})


async def _metrics(request: Request) -> Response:
    return Response(
        _library(request).metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


def _add_page(app: FastAPI) -> None:
    """Serve the page's files as they are now, and no others."""
    files = {path.name: path for path in _WEB.iterdir()}

    async def index() -> Response:
        page = files["index.html"].read_bytes()
        return Response(page, media_type="text/html; charset=utf-8")

    async def static(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]
        return Response(files[name].read_bytes(), media_type=kind or "application/octet-stream")

    app.add_api_route("/", index, methods=["GET", "HEAD"])
    app.add_api_route("/static/{name}", static, methods=["GET", "HEAD"])


def _library(request: Request) -> Library:
    library: Library = request.app.state.library
    return library


async def _told(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), error
    return JSONResponse(error.body(), error.status, error.headers)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), error
    where = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 405:
        message = _("Not allowed: {where}. Perhaps another HTTP method?", where=where)
    else:
        message = _("Invalid URL ({where})", where=where)
    told = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    return await _told(request, told)


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # only to be counted: the client has gone


async def _our_fault(request: Request, error: Exception) -> Response:
    # uvicorn logs the traceback: it is raised again behind this answer.
    return await _told(request, server_error(_("The server had an error over this request.")))
