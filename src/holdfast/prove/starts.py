"""One start of a command under proof: its output as it comes, a signal at a chosen moment, and no
process left behind.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from holdfast.errors import ConfigError
from holdfast.i18n import _

_TICK = 0.02  # seconds between two looks at the files
GRACE = 30.0  # seconds that a training has to save and to end after SIGTERM


@dataclass(slots=True)
class Ended:
    """How a start went."""

    lines: list[str] = field(default_factory=list)
    status: int | None = None  # as Popen has it; None where it was out of time
    struck: bool = False  # whether the signal was sent
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.status != 0

    @property
    def words(self) -> str:
        """The last thing that it said."""
        said = [line.strip() for line in self.lines if line.strip()]
        return said[-1] if said else _("it said nothing")


@dataclass(frozen=True, slots=True)
class Strike:
    """A signal, once `due(lines so far)` says so, or that many seconds later."""

    signal: int
    due: Callable[[int], bool]
    delay: float = 0.0


def start(
    words: Sequence[str],
    directory: Path,
    *,
    limit: float,
    environment: Mapping[str, str] | None = None,
    strike: Strike | None = None,
    heard: Callable[[int], None] = lambda _lines: None,
) -> Ended:
    """Run a command to its end, or until it was struck; `limit` is in seconds.

    `heard(lines)` is called again and again, with the number of lines so far. Raises `ConfigError`
    where there is no such program.
    """
    began = time.monotonic()
    try:
        child = subprocess.Popen(
            words,
            cwd=directory,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise ConfigError(
            "{program}: {reason}. Name a command that runs in this directory.",
            program=words[0],
            reason=error.strerror,
        ) from error
    assert child.stdout is not None
    ended = Ended()
    in_time = False
    try:
        in_time = _follow(child, child.stdout, ended, began + limit, strike=strike, heard=heard)
    finally:
        _kill(child)
        child.wait()
        child.stdout.close()
    ended.status = child.returncode if in_time else None
    ended.seconds = time.monotonic() - began
    return ended


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill a command with all that it has begun."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _follow(
    child: subprocess.Popen[bytes],
    pipe: IO[bytes],
    ended: Ended,
    deadline: float,
    *,
    strike: Strike | None,
    heard: Callable[[int], None],
) -> bool:
    """Read until the command has ended; False where time ran out first."""
    rest = b""
    at = None  # when to strike
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            data = b""
            for _key, _events in selector.select(_TICK):
                data = os.read(pipe.fileno(), 1 << 16)
                if not data:
                    selector.unregister(pipe)
            *lines, rest = (rest + data).replace(b"\r", b"\n").split(b"\n")
            ended.lines += [line.decode("utf-8", "replace") for line in lines if line.strip()]
            heard(len(ended.lines))
            now = time.monotonic()
            if strike is not None and not ended.struck:
                if at is None and strike.due(len(ended.lines)):
                    at = now + strike.delay
                if at is not None and now >= at and child.poll() is None:
                    ended.struck = True
                    deadline = min(deadline, now + GRACE)
                    if strike.signal == signal.SIGKILL:
                        _kill(child)
                    else:
                        child.send_signal(strike.signal)
            if child.poll() is not None and not data:
                if rest.strip():
                    ended.lines.append(rest.decode("utf-8", "replace"))
                return True
            if now > deadline:
                return ended.struck
