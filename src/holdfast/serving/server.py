"""From sources to a running server and to its end: sockets, signals, the watcher."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from holdfast.errors import ConfigError
from holdfast.guarding import App, Guard, Hosts, Origins, is_loopback
from holdfast.i18n import _
from holdfast.listening import Connection, listen, shown_host
from holdfast.serving.api.limits import GUESSES, Limits, open_to_all, refusal
from holdfast.serving.app import counted, create_app
from holdfast.serving.library import Library, Options
from holdfast.serving.metrics import Metrics
from holdfast.serving.names import Card
from holdfast.serving.reload import Watcher

log = logging.getLogger("holdfast")

# Seconds after which a thread hands on the interpreter (Python: 0.005). A step of a small model is
# a hundred short operations, and between two of them the event loop would keep it waiting so long:
# 32 clients get 10 % more tokens with this (benchmarks/serve_speed.py).
_SWITCH = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of a server."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    api_key: str | None = None
    allowed_hosts: Sequence[str] = ()
    """Names beside its own that the server answers to."""
    allowed_origins: Sequence[str] = ()
    """Web pages from elsewhere that may ask."""
    grace: float = 20.0
    """Seconds that requests under way have at the end."""
    look_every: float = 1.0
    """Seconds between two looks for a better checkpoint."""
    options: Options = field(default_factory=Options)


@dataclass(frozen=True, slots=True)
class Ready:
    """The address and the models of a server that answers now."""

    url: str
    cards: list[Card]


def check(settings: Settings) -> None:
    """Raise ConfigError where these settings would leave the server open to everybody."""
    if settings.api_key is None and not is_loopback(settings.host):
        raise ConfigError(
            "--host {host} can be reached from other machines: it needs an --api-key (or "
            "HOLDFAST_API_KEY in the environment).",
            host=settings.host,
        )


def serve(sources: Sequence[Path], settings: Settings, ready: Callable[[Ready], None]) -> bool:
    """Serve until a signal asks to stop; whether everything under way was answered.

    `ready` is called when the server answers. Raises HoldfastError where there is nothing to serve
    or no way to be reached.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    try:
        return asyncio.run(Running(sources, settings).run(ready))
    finally:
        sys.setswitchinterval(before)


class Running:
    """A server, from its beginning to its end. `stop` may be called from any thread."""

    def __init__(self, sources: Sequence[Path], settings: Settings) -> None:
        self._sources, self._settings = sources, settings
        self._server: _Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, ready: Callable[[Ready], None]) -> bool:
        """Serve until `stop` or a signal; whether everything under way was answered."""
        settings = self._settings
        check(settings)
        self._loop = loop = asyncio.get_running_loop()
        # Before a model is loaded: a port that is in use is told at once.
        with listen(settings.host, [settings.port]) as listening:
            library = Library(self._sources, settings.options, Metrics(), loop)
            await asyncio.to_thread(library.open)
            watcher = Watcher(library, settings.look_every)
            config = uvicorn.Config(
                guarded(library, settings),
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=max(1, round(settings.grace)),
                backlog=2048,
                http=Connection,
                ws="none",
            )
            port = listening.getsockname()[1]
            url = f"http://{shown_host(settings.host)}:{port}"

            async def say() -> None:
                ready(Ready(url, await library.cards()))

            self._server = server = _Server(config, say)
            watcher.start()
            try:
                await server.serve(sockets=[listening])
            finally:
                watcher.stop()
                library.close()
        return not server.force_exit

    def stop(self) -> None:
        """Answer what is under way, then end."""
        if self._server is not None:
            self._server.should_exit = True


def guarded(library: Library, settings: Settings) -> App:
    """Return the whole server over `library`, as an ASGI application."""
    guard = Guard(
        create_app(library, Limits()),
        hosts=Hosts(settings.host, settings.allowed_hosts),
        origins=Origins(settings.allowed_origins),
        secret=settings.api_key,
        refusal=refusal,
        open_to_all=open_to_all,
        guesses=GUESSES,
    )
    return counted(guard, library.metrics)


class _Server(uvicorn.Server):
    """uvicorn's server with our end: a signal lets requests end, a second Ctrl-C does not."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            await self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, self._asked_to_stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked_to_stop(self, number: int, _frame: FrameType | None) -> None:
        if self.should_exit and number == signal.SIGINT:
            self.force_exit = True
        elif not self.should_exit:
            self.should_exit = True
            log.info(_("Stopping: requests under way are answered; Ctrl-C again ends at once."))
