"""`--notify COMMAND`: a program of the user's is told how a training ends, and when it is unsafe.

The contract: COMMAND is split into words as a POSIX shell does and run without one, with the
message as its last argument and these variables: HOLDFAST_EVENT (finished, crashed, interrupted,
unsafe), HOLDFAST_MESSAGE, HOLDFAST_STEP (the last durable one) and HOLDFAST_DIR. It has half a
minute. Training never waits for it, and its failure is a warning.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from holdfast.checkpoint.system import Helper
from holdfast.errors import ConfigError, HoldfastError, Interrupted
from holdfast.i18n import _

TIMEOUT = 30.0  # seconds that the program has


class Notifier:
    """Runs `command` for one training in `directory`; says with `warn` where that fails.

    A context manager around the training: how the block ends is told, and waited for, `TIMEOUT`
    seconds at most. Before `begin` the program is not run: the user is still there.
    """

    def __init__(self, command: str | None, directory: Path, warn: Callable[[str], None]) -> None:
        """Raises `ConfigError` where `command` cannot be split into words."""
        self._words = split(command)
        self._directory, self._warn = directory, warn
        self._durable: Callable[[], int] | None = None
        self._running: list[Helper] = []
        self._failures: queue.SimpleQueue[str] = queue.SimpleQueue()

    def begin(self, durable: Callable[[], int]) -> None:
        """From now on there is a training to tell of; `durable` gives its last durable step."""
        self._durable = durable
        if self._words and shutil.which(self._words[0]) is None:
            self._warn(
                _(
                    "--notify: there is no program {name}; nobody will be told how the training "
                    "ends.",
                    name=self._words[0],
                )
            )

    def send(self, event: str, message: str) -> None:
        """Run the program, and do not wait for it."""
        self._say_failures()
        if not self._words or self._durable is None:
            return
        message = _plain(message)
        environment = {
            **os.environ,
            "HOLDFAST_EVENT": event,
            "HOLDFAST_MESSAGE": message,
            "HOLDFAST_STEP": str(self._durable()),
            "HOLDFAST_DIR": str(self._directory.absolute()),
        }
        try:
            self._running.append(Helper(partial(self._run, [*self._words, message], environment)))
        except (RuntimeError, MemoryError) as error:
            self._failures.put(str(error))

    def __enter__(self) -> Notifier:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Interrupted):
            if error.exit_code != 128 + signal.SIGINT:  # the person who pressed Ctrl-C knows
                self.send("interrupted", str(error))
        elif isinstance(error, Exception):
            self.send("crashed", _told(error))
        if not isinstance(error, KeyboardInterrupt):  # a second Ctrl-C waits for nothing
            self._finish()

    def _finish(self) -> None:
        deadline = time.monotonic() + TIMEOUT + 1
        for call in self._running:
            call.wait(max(0.0, deadline - time.monotonic()))
        self._say_failures()

    def _run(self, words: list[str], environment: dict[str, str]) -> None:
        try:
            # A session of its own: Ctrl-C at the terminal is meant for the training, and what the
            # program has started can be ended with it.
            process = subprocess.Popen(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self._failures.put(str(error))
            return
        try:
            status = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            _kill(process)
            self._failures.put(_("no end after {seconds} seconds", seconds=int(TIMEOUT)))
            return
        if status:
            self._failures.put(_("exit status {status}", status=status))

    def _say_failures(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                reason = self._failures.get_nowait()
                self._warn(
                    _(
                        "--notify: {name} could not tell anybody: {reason}",
                        name=self._words[0],
                        reason=reason,
                    )
                )


def split(command: str | None) -> list[str]:
    """The words of `command`, as a POSIX shell sees them; none without one. Raises ConfigError."""
    try:
        return shlex.split(command or "")
    except ValueError as error:
        message = _(
            "--notify {command}: {reason}; mind the quotation marks",
            command=command,
            reason=error,
        )
        raise ConfigError(message) from error


def _told(error: Exception) -> str:
    """Return a crash in one line: unexpected errors are known by their kind."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    return first if isinstance(error, HoldfastError) else f"{type(error).__name__}: {first}"


def _plain(text: str) -> str:
    """`text` as an argument of a process can be."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _kill(process: subprocess.Popen[Any]) -> None:
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
