"""--notify: what the user's program is told, and that it can neither delay nor end a training."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from holdfast.errors import ConfigError, Interrupted, SaveFailed
from holdfast.training import notify
from holdfast.training.notify import Notifier, split

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the programs here are scripts")


class Program:
    """A script that writes down how it was called."""

    def __init__(self, place: Path, body: str = "") -> None:
        self.path, self._told = place / "tell me.sh", place / "told"
        self.path.write_text(
            f'#!/bin/sh\nprintf "%s|%s|%s|%s|%s|%s\\n" "$HOLDFAST_EVENT" "$HOLDFAST_STEP" '
            f'"$HOLDFAST_DIR" "$HOLDFAST_MESSAGE" "$#" "$*" >> "{self._told}"\n{body}\n'
        )
        self.path.chmod(0o755)

    @property
    def command(self) -> str:
        return f"'{self.path}' --to 'me and you'"

    @property
    def told(self) -> list[list[str]]:
        if not self._told.exists():
            return []
        return [line.split("|") for line in self._told.read_text().splitlines()]


def notifier(command: str | None, directory: Path) -> tuple[Notifier, list[str]]:
    warned: list[str] = []
    made = Notifier(command, directory, warned.append)
    return made, warned


def test_the_contract(tmp_path: Path) -> None:
    program = Program(tmp_path)
    told, warned = notifier(program.command, tmp_path / "run")
    with told:
        told.begin(lambda: 7)
        told.send("finished", "all is well; $HOME `ls`")
    message = "all is well; $HOME `ls`"
    arguments = f"--to me and you {message}"
    assert program.told == [
        ["finished", "7", str(tmp_path / "run"), message, "3", arguments]
    ]  # fmt: skip
    assert warned == []


@pytest.mark.parametrize(
    ("error", "event", "message"),
    [
        (SaveFailed("nothing could be saved"), "crashed", "nothing could be saved"),
        (RuntimeError("CUDA error\nand more"), "crashed", "RuntimeError: CUDA error"),
        (RuntimeError(), "crashed", "RuntimeError: "),
        (Interrupted("stopped", signal.SIGTERM), "interrupted", "stopped"),
    ],
)
def test_a_bad_end_is_told(tmp_path: Path, error: Exception, event: str, message: str) -> None:
    program = Program(tmp_path)
    told, _warned = notifier(program.command, tmp_path)
    with pytest.raises(type(error)), told:
        told.begin(lambda: 3)
        raise error
    assert [(line[0], line[3]) for line in program.told] == [(event, message)]


@pytest.mark.parametrize("error", [Interrupted("stopped", signal.SIGINT), KeyboardInterrupt()])
def test_whoever_pressed_ctrl_c_knows(tmp_path: Path, error: BaseException) -> None:
    program = Program(tmp_path)
    told, _warned = notifier(program.command, tmp_path)
    with pytest.raises(type(error)), told:
        told.begin(lambda: 3)
        raise error
    assert program.told == []


def test_before_training_begins_and_without_a_command_nobody_is_told(tmp_path: Path) -> None:
    program = Program(tmp_path)
    told, _warned = notifier(program.command, tmp_path)
    with pytest.raises(SaveFailed), told:
        raise SaveFailed("at once")
    assert program.told == []
    told, warned = notifier(None, tmp_path)
    with told:
        told.begin(lambda: 1)
        told.send("finished", "done")
    assert warned == []


def test_sending_does_not_wait_and_the_end_does(tmp_path: Path) -> None:
    program = Program(tmp_path, "sleep 0.3; echo late >> " + str(tmp_path / "late"))
    told, _warned = notifier(program.command.replace("me and you", "x"), tmp_path)
    with told:
        told.begin(lambda: 1)
        began = time.monotonic()
        told.send("unsafe", "full")
        assert time.monotonic() - began < 0.25
    assert (tmp_path / "late").exists()


def test_a_program_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "TIMEOUT", 0.3)
    late = tmp_path / "late"
    program = Program(tmp_path, f"(sleep 1; touch {late}) &\nsleep 60")
    told, warned = notifier(program.command, tmp_path)
    began = time.monotonic()
    with told:
        told.begin(lambda: 1)
        told.send("finished", "done")
    assert time.monotonic() - began < 5
    assert len(warned) == 1
    assert "no end after" in warned[0]
    time.sleep(1.2)
    assert not late.exists()


def test_its_failure_is_a_warning(tmp_path: Path) -> None:
    program = Program(tmp_path, "exit 3")
    told, warned = notifier(program.command, tmp_path)
    with told:
        told.begin(lambda: 1)
        told.send("finished", "done")
    assert len(warned) == 1
    assert "exit status 3" in warned[0]


def test_a_program_that_is_not_there_is_said_at_the_start_and_costs_nothing(
    tmp_path: Path,
) -> None:
    told, warned = notifier("no-such-program-anywhere now", tmp_path)
    with told:
        told.begin(lambda: 1)
        assert "no-such-program-anywhere" in warned[0]
        told.send("finished", "done")
    assert len(warned) == 2


def test_a_command_that_is_no_list_of_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quotation"):
        Notifier("mail 'me", tmp_path, print)
    assert split("a 'b c' d\\ e") == ["a", "b c", "d e"]
    assert split(None) == []


def test_any_message_can_be_passed_on(tmp_path: Path) -> None:
    program = Program(tmp_path)
    told, warned = notifier(program.command, tmp_path)
    with told:
        told.begin(lambda: 1)
        told.send("crashed", "坏了\0 \udc80 \ud800")
    assert program.told[0][3] == "坏了 ? ?"
    assert warned == []


def test_it_runs_with_the_signals_of_a_fresh_process(tmp_path: Path) -> None:
    """The handlers of a training that only set a flag are not inherited by what it starts."""
    program = Program(tmp_path, "kill -TERM $$; touch " + str(tmp_path / "survived"))
    told, warned = notifier(program.command, tmp_path)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with told:
            told.begin(lambda: 1)
            told.send("finished", "done")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "survived").exists()
    assert "exit status -15" in warned[0]
