"""Turn signals that ask to stop into a flag.

Handlers only set a flag that the training loop reads between steps. They keep what was there
before them and give it back; what is ignored (nohup ignores SIGHUP) stays ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class SignalGuard:
    """Turns a signal that asks to stop into the flag `requested` while it is active.

    A second SIGINT raises KeyboardInterrupt at once: published files are intact at any moment.
    In a forked child (a data-loader worker) the handlers step aside. For a loop of your own:

        with SignalGuard() as guard:
            for step in ...:
                ...train...
                if guard.requested:
                    manager.save(step=step)
                    sys.exit(128 + guard.requested)

    The `with` block of a `CheckpointManager` does that by itself.
    """

    def __init__(self, on_request: Callable[[int], None] | None = None) -> None:
        self.requested: int | None = None
        self.requested_at = 0.0  # time.monotonic()
        self._on_request = on_request
        self._before: dict[int, Any] = {}
        self._owner = 0
        self._active = False

    def activate(self) -> None:
        """Begin to guard, where that has not been done."""
        if not self._active:
            self.__enter__()

    def __enter__(self) -> SignalGuard:
        self._active = True
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread only; nothing to guard here
        self._owner = os.getpid()
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            # None is a handler that was not set from Python: we could not give it back.
            if number is None or signal.getsignal(number) in (signal.SIG_IGN, None):
                continue
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        self._active = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number)
        if os.getpid() != self._owner:
            signal.signal(number, before if before is not None else signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        first = self.requested is None
        if first:
            self.requested_at = time.monotonic()
        self.requested = number
        if first and self._on_request is not None:
            self._on_request(number)
        custom = callable(before) and before is not signal.default_int_handler
        if custom and before is not None:
            before(number, frame)


class Stopped(SystemExit):
    """Ends the process after a signal, with status 128 + its number; the state is saved."""


class StoppedByInterrupt(Stopped, KeyboardInterrupt):
    """The same after Ctrl-C, which a loop may expect as KeyboardInterrupt."""


def stopped(number: int) -> Stopped:
    """Return the exception that ends the process after signal `number`."""
    kind = StoppedByInterrupt if number == signal.SIGINT else Stopped
    return kind(128 + number)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Hold a KeyboardInterrupt back until the block is done, then raise it: never swallowed.

    A handler of the user's own stays in charge.
    """
    pending: list[int] = []
    active = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if active:
        signal.signal(signal.SIGINT, lambda number, _frame: pending.append(number))
    try:
        yield
    finally:
        if active:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if pending:
            raise KeyboardInterrupt
