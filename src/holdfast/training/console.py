"""Show a training to a person: a live bar that never covers a line, or plain lines in a pipe.

Everything said goes through here, to the terminal and, without the bar, into the log file. A dead
terminal or a closed pipe ends the talking, never the training.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from holdfast.formatting import format_age, format_seconds
from holdfast.i18n import _, encode_anything
from holdfast.table import PIPE, Column, render

log = logging.getLogger("holdfast")

PLAIN_EVERY = 10.0  # seconds between progress lines where there is no terminal
REDRAW_EVERY = 0.25  # seconds between two drawings of the bar


@dataclass(slots=True)
class Status:
    """The contents of the bar; the trainer keeps them up to date."""

    epoch: int = 1
    epochs: int | None = None
    step: int = 0
    total_steps: int = 0
    loss: float = float("nan")
    smoothed: float = float("nan")
    learning_rate: float = 0.0
    tokens_per_second: float = 0.0
    eta: float = float("nan")  # seconds
    durable_step: int | None = None
    durable_at: float = 0.0  # time.monotonic()
    memory_step: int = 0  # of the newest snapshot that outlives this process; 0: none
    failing: bool = False  # whether saves fail since the durable step


def _discard(fd: int) -> None:
    """Send what is written to `fd` from now on to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, fd)
    os.close(nowhere)


class _Rich(RichConsole):
    """rich ends the process when a pipe is closed; a training must outlive its reader."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Console:
    """Says things. One for a run; use as a context manager around the training."""

    def __init__(
        self,
        *,
        quiet: bool = False,
        log_file: Path | None = None,
        stream: TextIO | None = None,
        terminal: bool | None = None,
    ) -> None:
        self._stream = stream or sys.stdout
        encode_anything(self._stream)
        self._quiet = quiet
        self.terminal = self._stream.isatty() if terminal is None else terminal
        # Plain lines must not be wrapped: a pipe has no width.
        width = None if self.terminal else 10_000
        self._rich = _Rich(
            file=self._stream,
            force_terminal=self.terminal,
            width=width,
            highlight=False,
            soft_wrap=not self.terminal,
            emoji=False,
            markup=False,
        )
        self._log: TextIO | None = None
        if log_file is not None:
            self.open_log(log_file)
        self._live: Live | None = None
        self._dead = False
        self._last_drawn = time.monotonic()
        self.status = Status()

    # ------------------------------------------------------------------------------------ talking

    def say(self, text: str = "", *, style: str = "", important: bool = False) -> None:
        """Say a line above the bar; with `--quiet` only if it is `important`."""
        self._write_log(text)
        if self._dead or (self._quiet and not important):
            return
        stamp = "" if self.terminal or not text else f"{_clock()} "
        with self._survive():
            for line in text.split("\n"):
                # A line feed that rich puts into a command makes two of it when it is copied.
                self._rich.print(
                    Text(stamp + line, style=style if self.terminal else ""), soft_wrap=True
                )

    def warn(self, text: str) -> None:
        """Say a line that is shown even with `--quiet`."""
        self.say(f"⚠️  {text}", style="yellow", important=True)

    def alarm(self, text: str) -> None:
        """Say a line that must not be missed; on a terminal with its bell."""
        self.say(f"🚨 {text}", style="bold red", important=True)
        if self.terminal and not self._dead:
            with self._survive():
                self._stream.write("\a")

    def note(self, text: str) -> None:
        """Write a line to the log file alone."""
        self._write_log(text)

    def table(self, rows: list[list[str]], *, header: list[str]) -> None:
        """Show a small table, with `--quiet` too."""
        columns = [Column(title) for title in header]
        self.say("\n".join(render(columns, rows, PIPE)), important=True)

    def ask(self, question: str, *, default: bool = True) -> bool:
        """Ask the person at the terminal a yes-or-no question."""
        hint = "[Y/n]" if default else "[y/N]"
        while True:
            self._rich.print(f"{question} {hint} ", end="")
            try:
                answer = input().strip().lower()
            except EOFError:
                return default
            if not answer:
                return default
            if answer[0] in "yn是否":
                return answer[0] in "y是"

    def open_log(self, path: Path) -> None:
        """From now on, write everything that is said to `path` as well."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log = path.open("a", encoding="utf-8", errors="backslashreplace")

    def _write_log(self, text: str) -> None:
        if self._log is None:
            return
        try:
            for line in text.split("\n"):
                self._log.write(f"{_clock()} {line}\n" if line else "\n")
            self._log.flush()
        except OSError:  # a full disk: the run goes on without its log
            self._log = None

    @contextlib.contextmanager
    def _survive(self) -> Iterator[None]:
        """Stop talking when the terminal is gone (EIO, EPIPE, a closed file); training goes on."""
        try:
            yield
            self._stream.flush()
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not self._stream.closed:
                # Not the end of the terminal: to be silent from here on would hide every alarm.
                log.warning("%s", error)
                return
            self._dead = True
            self._live = None
            with contextlib.suppress(OSError, ValueError):  # not a file
                # What could not be written fails again at exit, and changes the exit status to 120.
                _discard(self._stream.fileno())

    # ------------------------------------------------------------------------------------ the bar

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop_bar()
        if self._log is not None:
            self._log.close()
            self._log = None

    def start_bar(self) -> None:
        if not self.terminal or self._quiet or self._dead:
            return
        # Redrawn by `progress`, in the training thread: a thread of rich's own would meet the end
        # of the terminal where no handler of ours is.
        self._live = Live(
            get_renderable=self._render,
            console=self._rich,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with self._survive():
            self._live.start()

    def stop_bar(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with self._survive():
                live.stop()

    def stepped(self) -> None:
        """Do nothing; called after each update of the weights, for a console that watches it."""

    def progress(self, *, force: bool = False) -> None:
        """The status has changed: the bar redraws itself; in a pipe a line now and then."""
        now = time.monotonic()
        if self._live is not None:
            if force or now - self._last_drawn >= REDRAW_EVERY:
                self._last_drawn = now
                with self._survive():
                    self._live.refresh()
        elif not self.terminal and (force or now - self._last_drawn >= PLAIN_EVERY):
            self._last_drawn = now
            self.say(self._headline() + "  " + self._details())

    def working(self, label: str, done: int, total: int) -> None:
        """Progress of something before training (tokenizing): shown in place, or at its end."""
        if self.terminal and not self._quiet and not self._dead and total:
            percent = f"\r  {label} {100 * done // total:3d} %"
            with self._survive():
                self._stream.write(percent + ("\r\x1b[K" if done >= total else ""))

    def _render(self) -> RenderableType:
        status = self.status
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1, min_width=8)
        bar.add_column(no_wrap=True, justify="right")
        total = max(1, status.total_steps)
        percent = f"{100 * status.step // total} %"
        eta = _("ETA {time}", time=_duration(status.eta))
        bar.add_row(
            self._headline(), ProgressBar(total=total, completed=status.step), f"{percent}  {eta}"
        )
        return Group(bar, Text(self._details(with_eta=False), no_wrap=True, overflow="ellipsis"))

    def _headline(self) -> str:
        s = self.status
        epoch = f"{s.epoch}/{s.epochs}" if s.epochs else f"{s.epoch}"
        return _(
            "Epoch {epoch} · step {step}/{total}", epoch=epoch, step=s.step, total=s.total_steps
        )

    def _details(self, *, with_eta: bool = True) -> str:
        """Return the second line. Safety comes first: a narrow terminal cuts the end off."""
        s = self.status
        parts = [
            self._safety(),
            _("loss {loss} (smoothed {smoothed})", loss=_loss(s.loss), smoothed=_loss(s.smoothed)),
            _("{rate} tokens/s", rate=f"{s.tokens_per_second:,.0f}"),
            f"lr {s.learning_rate:.2e}",
        ]
        if with_eta:
            parts.append(_("ETA {time}", time=_duration(s.eta)))
        return " · ".join(parts)

    def _safety(self) -> str:
        """The last durable step and its age: what would be lost if the power went now; and the
        step that a kill of this process would leave in memory."""
        s = self.status
        text = _("nothing durable yet")
        if s.durable_step is not None:
            age = format_age(time.monotonic() - s.durable_at)
            text = _("durable: step {step}, {age} ago", step=s.durable_step, age=age)
        if s.failing:
            text = _("⚠️  saving fails") + " · " + text
        if s.memory_step > (s.durable_step or 0):
            text += " · " + _("in memory: step {step}", step=s.memory_step)
        return text


def _clock() -> str:
    return datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")


def _loss(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _duration(seconds: float) -> str:
    return "--" if math.isnan(seconds) else format_seconds(seconds)
