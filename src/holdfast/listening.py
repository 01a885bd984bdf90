"""Open the socket of a server and bound its connections: in number and in time.

The dashboard and the API server share it. uvicorn alone waits for ever for a request and for a
client that reads nothing, and open files are few.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from holdfast.errors import ConfigError
from holdfast.i18n import _

PATIENCE = 30.0  # seconds until the head of a request must have come
SLOWEST = 60.0  # seconds in which a client must read some of what waits for it
_CONNECTIONS = 1000  # at a time: each may hold a body, and open files are few
_PIECES = 5000  # of a body: a chunk of one byte costs as much time as one of 64 KiB


def shown_host(host: str) -> str:
    """Return `host` as it stands in an address; of one that means every way in, our name."""
    if host in ("0.0.0.0", "::", ""):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def listen(host: str, ports: Sequence[int]) -> socket.socket:
    """Return a socket that listens at `host`, at the first of `ports` that no other program uses.

    Raises ConfigError where there can be none.
    """
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError("--host {host} is no address of this machine.", host=host) from error
    for port in ports:
        try:
            return _listen_at(found, port)
        except OverflowError as error:
            told = _("--port {port} is not between 0 and 65535.", port=port)
            raise ConfigError(told) from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE and port != ports[-1]:
                continue
            known = {
                errno.EADDRINUSE: _(
                    "port {port} is in use by another program; choose another --port", port=port
                ),
                errno.EADDRNOTAVAIL: _("{host} is no address of this machine", host=host),
                errno.EACCES: _(
                    "port {port} may not be opened by this user; choose one from 1024 on", port=port
                ),
            }
            if error.errno not in known:
                raise
            raise ConfigError("Cannot listen: {reason}.", reason=known[error.errno]) from error
    raise AssertionError("the last port returns or raises")


def _listen_at(found: tuple[Any, ...], port: int) -> socket.socket:
    family, kind, protocol, _name, address = found
    listening = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would share the port with another program
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address[0], port, *address[2:]))
        listening.listen(2048)  # two that are only bound may share a port
    except BaseException:  # whatever ends this leaks no socket
        listening.close()
        raise
    return listening


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


class Connection(H11Protocol):
    """A connection that is closed where no request comes, or nothing of an answer is read.

    Where there are too many, the one on which no request has come for the longest time makes room.
    Where all are being answered, a new one is refused.
    """

    _timer: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def __init__(self, config: uvicorn.Config, *args: Any, **more: Any) -> None:
        super().__init__(config, *args, **more)
        self.conn = _Requests(h11.SERVER)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        if len(self.connections) <= most_connections():
            return
        others = (
            one
            for one in self.connections
            if isinstance(one, Connection) and one is not self and one.idle
        )
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
        """Answer 400 as uvicorn does, where no answer has begun: there cannot be a second one."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading = self.loop.call_later(SLOWEST, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    @property
    def idle(self) -> bool:
        """True while no request is read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        self.since = self.loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(PATIENCE, self._give_up)

    def _give_up(self) -> None:
        if self.idle:
            self.transport.close()


@functools.cache
def most_connections() -> int:
    """Return half of the files that this process may open, and no more than are of use."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return _CONNECTIONS
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _CONNECTIONS if soft == resource.RLIM_INFINITY else min(_CONNECTIONS, soft // 2)


def _full() -> bytes:
    """Return the answer to a connection too many: no request of it is read."""
    error = {
        "message": _("The server has too many connections: try again in a moment."),
        "type": "server_error",
        "param": None,
        "code": "too_many_connections",
    }
    body = json.dumps({"error": error}, ensure_ascii=False).encode()
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        b"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
