"""A command that is started again when it crashes: what is behind `holdfast run -- CMD`.

`Restarts` decides, and knows neither processes nor clocks; `Supervisor` starts, waits and passes
signals on. The command runs in a process group of its own, so that each signal, Ctrl-C in a
terminal too, reaches it once and from here: a second one would mean "leave at once". It has no
stdin, so that it asks no question at night.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from holdfast.checkpoint.rundir import Catalog, Entry, now
from holdfast.checkpoint.system import FileLock, filesystem, run_lock
from holdfast.errors import ConfigError, DataError, Diverged, GaveUp, Interrupted, RunLocked
from holdfast.formatting import format_seconds, parse_time
from holdfast.i18n import _
from holdfast.manage.story import describe
from holdfast.table import printable
from holdfast.training.unattended import RESTART

BACKOFF = 10.0  # seconds before the first restart, by default
LONGEST_BACKOFF = 300.0  # seconds; doubling ends here
GIVE_UP_AFTER = 3  # crashes in a row without progress
HEALTHY = 600.0  # seconds that a command without checkpoints of ours must live for "progress"
PATIENCE = 60.0  # seconds for the lock of a run, and for what a command leaves behind
LOG = "supervisor.log"

# The same command would end the same way; 126 and 127 are a shell's "cannot run" and "not found".
_OURS = (ConfigError, DataError, RunLocked, GaveUp, Diverged)
FINAL = frozenset({*(error.exit_code for error in _OURS), 126, 127})
_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
_ASKING = (*_FORWARDED, "SIGQUIT")  # these ask for an end, not a restart
ASKED = frozenset(int(getattr(signal, name)) for name in _ASKING if hasattr(signal, name))
_CAUSES = ("failed", "interrupted", "quarantined", "damaged")  # events that may explain a crash


# ------------------------------------------------------------------------------- the decision


@dataclass(frozen=True, slots=True)
class Limits:
    """The number of crashes in a row without progress that end it; the first pause in seconds."""

    give_up_after: int = GIVE_UP_AFTER
    backoff: float = BACKOFF


@dataclass(frozen=True, slots=True)
class End:
    """The end of a command: `status` negative for the signal that killed it, `lived` in seconds,
    `step` and `epoch` those of the newest durable state, None where there is no run of ours to
    look at, or it does not say."""

    status: int
    lived: float
    step: int | None = None
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Start again in `delay` seconds, or not (None); `gave_up` tells a failure from an end."""

    why: str
    delay: float | None = None
    gave_up: bool = False


class Restarts:
    """Decides after each end. Bounded: only a step beyond the furthest one, or another epoch, in
    which steps may be counted anew, is progress: a training of N steps is started at most
    `give_up_after` * (N + 1) times."""

    def __init__(
        self,
        limits: Limits,
        step: int | None = None,
        epoch: int | None = None,
        *,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._limits, self._chance = limits, chance
        self._epoch, self._furthest = epoch or 0, step or 0
        self._restarts = 0
        self._repeats = 0  # crashes in a row without progress, the last one included

    def after(self, end: End) -> Decision:
        """Decide what to do after `end`."""
        if end.status == 0:
            return Decision(_("finished"))
        if end.status in FINAL:
            return Decision(_("the same command would end the same way"))
        if shell_status(end.status) - 128 in ASKED:
            return Decision(_("somebody asked it to stop"))
        self._repeats = 1 if self._progressed(end) else self._repeats + 1
        if self._repeats >= self._limits.give_up_after:
            return Decision(
                _("crashes in a row without getting further: {count}", count=self._repeats),
                gave_up=True,
            )
        self._restarts += 1
        why = _(
            "restart {number}; crashes without getting further: {count} of {limit}",
            number=self._restarts,
            count=self._repeats,
            limit=self._limits.give_up_after,
        )
        return Decision(why, delay=self._delay())

    def _progressed(self, end: End) -> bool:
        if end.step is None:
            return end.lived >= HEALTHY
        epoch = end.epoch or 0
        further = epoch > self._epoch or end.step > self._furthest
        if further:
            self._epoch, self._furthest = max(epoch, self._epoch), end.step
        return further

    def _delay(self) -> float:
        """Doubles with each repeat, up to `LONGEST_BACKOFF`; by chance between half and whole, so
        that many trainings that one fault has ended do not come back in one moment."""
        whole = self._limits.backoff * 2.0 ** min(self._repeats - 1, 64)
        return min(whole, LONGEST_BACKOFF) * (0.5 + 0.5 * self._chance())


def shell_status(status: int) -> int:
    """An exit status as a shell has it: 128 and the number of the signal that killed."""
    return status if status >= 0 else 128 - status


def ending(status: int) -> str:
    """Return the end of a command in words, with the name of a signal."""
    number = shell_status(status) - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = str(number)
    if status < 0 and name == "SIGKILL":
        return _("killed by SIGKILL (kill -9, or the system when memory ran out)")
    if status < 0:
        return _("killed by {signal}", signal=name)
    if number > 0 and name != str(number):
        return _("exit status {status} ({signal})", status=status, signal=name)
    return _("exit status {status}", status=status)


# -------------------------------------------------------------------------- the run directory


def newest(directory: Path) -> Entry | None:
    """The newest durable checkpoint in a directory that need not exist."""
    try:
        return Catalog(directory).scan(cached=True).newest
    except OSError:
        return None


def durable(directory: Path) -> tuple[int | None, int | None]:
    """Return step and epoch of the newest durable state; None where no run of ours has been."""
    found = newest(directory)
    if found is not None:
        return found.step, found.epoch
    return (0 if run_lock(directory).path.exists() else None), None


def await_free(directory: Path, tell: Callable[[str], None], patience: float = PATIENCE) -> None:
    """Wait until no training runs in `directory`: one whose supervisor was killed is still saving.

    Raises RunLocked after `patience` seconds.
    """
    lock = run_lock(directory)
    if not lock.path.exists():
        return
    with contextlib.suppress(OSError):  # not ours to write: the command itself will say so
        try:
            lock.acquire()
        except RunLocked:
            tell(
                _(
                    "another process works in {directory}; waiting for it, at most {time}",
                    directory=directory,
                    time=format_seconds(patience),
                )
            )
            lock = FileLock(lock.path, wait=patience)
            lock.acquire()
        lock.release()


class Log:
    """Says lines, and keeps them durably in `logs/` of the run directory.

    Unless it may `create` that directory, the lines wait until there is one.
    """

    def __init__(self, directory: Path, say: Callable[[str], None], *, create: bool) -> None:
        self._directory, self._say, self._create = directory, say, create
        self._waiting: list[str] = []

    def __call__(self, line: str) -> None:
        self._say(printable(line))
        self.keep(line)

    def keep(self, line: str) -> None:
        """A line for the log alone."""
        self._waiting.append(f"{now()} {printable(line)}")
        if self._create or self._directory.is_dir():
            with contextlib.suppress(OSError):  # a full disk: with the next line, perhaps
                self._write()

    def _write(self) -> None:
        place = self._directory / "logs"
        filesystem.make_directory(place)
        while self._waiting:
            filesystem.append_line(place / LOG, self._waiting[0])
            self._waiting.pop(0)


# ---------------------------------------------------------------------------------- processes


class Supervisor:
    """Runs `command` until it is done, asked to stop, or not worth another start.

    `directory` is its run directory, which is made for the log only where `create` says so: it may
    be no more than a guess. `say` shows a line to the person who is there.
    """

    def __init__(
        self,
        command: Sequence[str],
        directory: Path,
        limits: Limits,
        say: Callable[[str], None],
        *,
        create: bool = False,
    ) -> None:
        self._command, self._directory, self._limits = list(command), directory, limits
        self._log = Log(directory, say, create=create)
        self._child: subprocess.Popen[bytes] | None = None
        self._asked: int | None = None
        self._undelivered: list[int] = []

    def run(self) -> int:
        """Returns the exit status of the last start. Raises GaveUp, Interrupted (between two
        starts), RunLocked, and ConfigError where the command cannot be started."""
        await_free(self._directory, self._log)
        before = newest(self._directory)
        restarts = Restarts(self._limits, *durable(self._directory))
        environment = {name: value for name, value in os.environ.items() if name != RESTART}
        with self._passing_signals_on(), _adopting():
            while True:
                end = self._live(environment)
                if self._asked is not None:
                    return shell_status(end.status)
                decision = restarts.after(end)
                if decision.delay is None:
                    return self._over(end, decision)
                self._log(
                    _(
                        "starting it again in {time} ({why})",
                        why=decision.why,
                        time=format_seconds(decision.delay),
                    )
                )
                self._pause(decision.delay)
                environment[RESTART] = "" if before is None else before.id

    def _live(self, environment: dict[str, str]) -> End:
        """Start the command once and wait for its end."""
        began, wall = time.monotonic(), time.time()
        try:
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                env=environment,
                preexec_fn=_before_exec(),  # noqa: PLW1509 - we have no thread
            )
        except OSError as error:
            raise ConfigError(
                "{command} cannot be started: {reason}. Check the command after --.",
                command=printable(self._command[0]),
                reason=error.strerror or error,
            ) from error
        self._deliver()
        self._log(
            _(
                "started process {pid}: {command}",
                pid=self._child.pid,
                command=shlex.join(self._command),
            )
        )
        status = self._child.wait()
        child, self._child = self._child, None
        if status != 0 or self._asked is not None:
            _end_group(child.pid, self._asked or signal.SIGTERM)
        end = End(status, time.monotonic() - began, *durable(self._directory))
        self._tell(end, wall)
        return end

    def _tell(self, end: End, began: float) -> None:
        parts = [
            _("ended after {time}: {how}", time=format_seconds(end.lived), how=ending(end.status))
        ]
        if end.step is not None:
            parts.append(_("newest durable step {step}", step=end.step))
        cause = self._cause(began) if end.status else None
        if cause is not None:
            parts.append(_("from the history: {event}", event=cause))
        self._log("; ".join(parts))

    def _cause(self, began: float) -> str | None:
        """The last event since `began` that may explain a crash, as a sentence."""
        try:
            events = list(Catalog(self._directory).events(*_CAUSES))
        except OSError:
            return None
        time_of = parse_time(events[-1].get("time")) if events else None
        return describe(events[-1]) if time_of and time_of.timestamp() >= began else None

    def _over(self, end: End, decision: Decision) -> int:
        if decision.gave_up:
            self._log.keep(_("gave up: {why}", why=decision.why))
            raise GaveUp(
                "Gave up ({why}); it ended last with: {how}. Its messages above, or "
                "{log}, say why; when that is mended, run the same command again.",
                why=decision.why,
                how=ending(end.status),
                log=self._directory / "logs",
            )
        if end.status:
            self._log(_("not started again: {why}", why=decision.why))
        return shell_status(end.status)

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._asked is None and (rest := deadline - time.monotonic()) > 0:
            time.sleep(min(rest, 0.1))
        if self._asked is not None:
            self._log.keep(_("stopped while waiting to start it again"))
            raise Interrupted("Stopped between two starts; the same command goes on.", self._asked)

    # -------------------------------------------------------------------------------- signals

    @contextlib.contextmanager
    def _passing_signals_on(self) -> Iterator[None]:
        before: dict[int, Any] = {}
        handlers = dict.fromkeys(_FORWARDED, self._handle) | {"SIGTSTP": self._suspend}
        for name, handler in handlers.items():
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                before[number] = signal.signal(number, handler)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._asked = self._asked or number
        self._undelivered.append(number)
        self._deliver()

    def _deliver(self) -> None:
        """Pass on what has come, each once; a signal may come while the command is being started.

        On Windows a console sends Ctrl-C to all of its processes itself.
        """
        while self._undelivered and self._child is not None:
            number = self._undelivered.pop(0)
            if os.name != "nt":
                self._child.send_signal(number)

    def _suspend(self, _number: int, _frame: FrameType | None) -> None:
        """Ctrl-Z: the command stops and goes on with us."""
        child = self._child
        for number in (signal.SIGSTOP, signal.SIGCONT):
            if child is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
            if number == signal.SIGSTOP:
                os.kill(os.getpid(), signal.SIGSTOP)


_SET_DEATH_SIGNAL, _SET_SUBREAPER = 1, 36  # prctl(2)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _before_exec() -> Callable[[], None] | None:
    """Return what the new process does first: it gets a group and dies with its supervisor.

    Where Linux's death signal is missing, the lock of the run keeps a second training out.
    """
    if os.name == "nt":
        return None
    supervisor = os.getpid()

    def prepare() -> None:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it may write to the terminal all the same
        _prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != supervisor:  # it died before the kernel knew
            os._exit(1)

    return prepare


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Orphans of the command become our children, so that `_end_group` sees their end."""
    _prctl(_SET_SUBREAPER, 1)
    try:
        yield
    finally:
        _prctl(_SET_SUBREAPER, 0)


def _end_group(group: int, number: int) -> None:
    """Let nothing of a command that has ended live on: loader workers, or the training itself
    where a shell script was the command. Each gets `number`, then time, then SIGKILL."""
    if os.name == "nt":
        return
    for each in (number, signal.SIGKILL):
        deadline = time.monotonic() + PATIENCE
        try:
            os.killpg(group, each)
            while time.monotonic() < deadline:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(-group, os.WNOHANG)
                os.killpg(group, 0)
                time.sleep(0.01)
        except (ProcessLookupError, PermissionError):  # none is left, or none of ours
            return
