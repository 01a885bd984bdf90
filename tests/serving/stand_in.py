"""A server that answers like ours with texts that a test can foresee, and remembers what it was
asked. What the page does in rare cases (a busy server, a connection that breaks) is tried on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

import holdfast

WEB = Path(holdfast.__file__).parent / "serving" / "web"

MODELS = [
    {"id": "best", "step": 1240, "epoch": 2, "val_loss": 3.2145},
    {"id": "latest", "step": 1860, "epoch": 3, "val_loss": 3.2871},
    {"id": "model_epoch_1", "step": 620, "epoch": 1, "val_loss": 3.9022},
    {"id": "model_epoch_3", "step": 1860, "epoch": 3, "val_loss": 3.2871},
]
PIECES = ["，云", "淡风", "轻近", "午天", "。傍", "花随", "柳过", "前川", "。"]


POLICY = "default-src 'none'; form-action 'none'; base-uri 'none'; " + "; ".join(
    f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect")
)


class StandIn:
    """What the tests set and what they ask afterwards."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.models = [{**one, "object": "model", "context_length": 256} for one in MODELS]
        self.pieces = list(PIECES)
        self.delay = 0.01  # seconds before each piece
        self.each = 3  # tokens that a piece is said to have
        self.key = ""
        self.refuse: list[Response] = []  # answered instead, one request each
        self.break_after: int | None = None  # pieces, then the connection breaks
        self.requests: list[dict[str, Any]] = []
        self.cancelled = 0  # streams whose client went away
        self.finish = "stop"

    def refusal(self, request: Request) -> Response | None:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return problem(401, "Incorrect API key provided.")
        return None

    async def answer(self, path: str, body: dict[str, Any]) -> AsyncIterator[str]:
        chat = path.endswith("chat/completions")
        ended = False
        try:
            for i, piece in enumerate(self.pieces):
                await asyncio.sleep(self.delay)
                if self.break_after is not None and i >= self.break_after:
                    raise ConnectionResetError
                part = {"delta": {"content": piece}} if chat else {"text": piece}
                yield event({"choices": [{"index": 0, "finish_reason": None, **part}]})
            last = {"delta": {}} if chat else {"text": ""}
            yield event({"choices": [{"index": 0, "finish_reason": self.finish, **last}]})
            yield event(
                {"choices": [], "usage": {"completion_tokens": self.each * len(self.pieces)}}
            )
            yield "data: [DONE]\n\n"
            ended = True
        finally:
            self.cancelled += not ended


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def problem(status: int, message: str, code: str = "", **headers: str) -> Response:
    body = {"error": {"message": message, "type": "invalid_request_error", "code": code or None}}
    return JSONResponse(body, status, headers)


def build(server: StandIn) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def policy(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    @app.get("/")
    async def page() -> Response:
        return FileResponse(WEB / "index.html")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        return server.refusal(request) or JSONResponse({"object": "list", "data": server.models})

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        if refused := server.refusal(request):
            return refused
        body = await request.json()
        server.requests.append({"path": request.url.path, **body})
        if server.refuse:
            return server.refuse.pop(0)
        return StreamingResponse(
            server.answer(request.url.path, body), media_type="text/event-stream"
        )

    app.mount("/static", StaticFiles(directory=WEB))
    return app


@contextlib.contextmanager
def running(server: StandIn) -> Iterator[str]:
    """The address of `server` while it runs, on loopback."""
    config = uvicorn.Config(build(server), port=0, log_level="critical", lifespan="off")
    process = uvicorn.Server(config)
    thread = threading.Thread(target=process.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not process.started and time.monotonic() < until:
        time.sleep(0.01)
    port = process.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.should_exit = process.force_exit = True
        thread.join(10)
