"""From sources to a running server and to its end: sockets, signals, the watcher."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from holdfast.errors import ConfigError
from holdfast.guarding import is_loopback
from holdfast.i18n import _
from holdfast.serving.app import create_app
from holdfast.serving.library import Library, Options
from holdfast.serving.limits import Limits
from holdfast.serving.metrics import Metrics
from holdfast.serving.names import Card
from holdfast.serving.protocol import server_error
from holdfast.serving.reload import Watcher

log = logging.getLogger("holdfast")

# Seconds after which a thread hands on the interpreter (Python: 0.005). A step of a small model is
# a hundred short operations, and between two of them the event loop would keep it waiting so long:
# 32 clients get 10 % more tokens with this (benchmarks/serve_speed.py).
_SWITCH = 0.001
_PATIENCE = 30.0  # seconds until the head of a request must have come
_SLOWEST = 60.0  # seconds in which a client must read some of what waits for it
_CONNECTIONS = 1000  # at a time: each may hold a body, and open files are few
_PIECES = 5000  # of a body: a chunk of one byte costs as much time as one of 64 KiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where and how to serve."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    api_key: str | None = None
    rate: float | None = None
    """Requests a minute and client."""
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
    """What is said when the server answers."""

    url: str
    cards: list[Card]


def check(settings: Settings) -> None:
    """Raise ConfigError where these settings would leave the server open to everybody."""
    if settings.api_key is None and not is_loopback(settings.host):
        raise ConfigError(
            _("--host {host} can be reached from other machines: it needs an --api-key (or "
              "HOLDFAST_API_KEY in the environment).", host=settings.host)
        )  # fmt: skip


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
        with _listen(settings.host, settings.port) as listening:
            library = Library(self._sources, settings.options, Metrics(), loop)
            await asyncio.to_thread(library.open)
            watcher = Watcher(library, settings.look_every)
            limits = Limits(
                settings.host, settings.api_key, rate=settings.rate,
                allowed_hosts=settings.allowed_hosts, allowed_origins=settings.allowed_origins,
            )  # fmt: skip
            config = uvicorn.Config(
                create_app(library, limits), log_config=None, access_log=False, lifespan="off",
                server_header=False, timeout_graceful_shutdown=max(1, round(settings.grace)),
                backlog=2048, http=_Connection, ws="none",
            )  # fmt: skip
            port = listening.getsockname()[1]
            url = f"http://{_shown(settings.host)}:{port}"

            async def say() -> None:
                ready(Ready(url, await library.cards()))

            self._server = server = _Server(config, say)
            if settings.options.reload:
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


class _Requests(h11.Connection):
    """A connection whose bodies come in pieces of a decent size."""

    _pieces = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._pieces = 0
        elif isinstance(event, h11.Data):
            self._pieces += 1
            if self._pieces > _PIECES:
                raise h11.RemoteProtocolError("too many pieces")
        return event


class _Connection(H11Protocol):
    """A connection that is closed where no request comes, or nobody reads the answer: uvicorn waits
    for both for ever, and open files are few. Where there are too many, the one on which no request
    has come for the longest time makes room, and where all are answered a new one is refused."""

    _timer: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def __init__(self, config: uvicorn.Config, *args: Any, **more: Any) -> None:
        super().__init__(config, *args, **more)
        self.conn = _Requests(h11.SERVER)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        if len(self.connections) <= _most_connections():
            return
        others = (
            one for one in self.connections
            if isinstance(one, _Connection) and one is not self and one.idle
        )  # fmt: skip
        longest = min(others, key=lambda one: one.since, default=None)
        if longest is None:
            transport.write(_full())
            transport.close()
        else:
            longest.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._timer, self._reading):
            if timer is not None:
                timer.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's, where no answer has begun: there cannot be a second one."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(_SLOWEST, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    @property
    def idle(self) -> bool:
        """Whether no request of it is read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        self.since = self.loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(_PATIENCE, self._give_up)

    def _give_up(self) -> None:
        if self.idle:
            self.transport.close()


@functools.cache
def _most_connections() -> int:
    """Half of the files that this process may have open, and no more than are of use."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return _CONNECTIONS
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _CONNECTIONS if soft == resource.RLIM_INFINITY else min(_CONNECTIONS, soft // 2)


def _full() -> bytes:
    """The answer to a connection too many: no request of it is read."""
    error = server_error(_("The server has too many connections: try again in a moment."),
                         status=503, code="too_many_connections")  # fmt: skip
    body = json.dumps(error.body(), ensure_ascii=False).encode()
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        b"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )


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


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to `host`. Raises ConfigError where there can be none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _name, address = found[0]
        listening = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere it would share the port with another program
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen()  # two that are only bound may share a port
        except BaseException:  # whatever ends this leaks no socket
            listening.close()
            raise
        return listening
    except socket.gaierror as error:
        raise ConfigError(_("--host {host} is no address of this machine.", host=host)) from error
    except OverflowError as error:
        raise ConfigError(_("--port {port} is not between 0 and 65535.", port=port)) from error
    except OSError as error:
        known = {
            errno.EADDRINUSE: _("port {port} is in use by another program; choose another --port",
                                port=port),
            errno.EADDRNOTAVAIL: _("{host} is no address of this machine", host=host),
            errno.EACCES: _("port {port} may not be opened by this user; choose one from 1024 on",
                            port=port),
        }  # fmt: skip
        if error.errno not in known:
            raise
        raise ConfigError(_("Cannot listen: {reason}.", reason=known[error.errno])) from error
