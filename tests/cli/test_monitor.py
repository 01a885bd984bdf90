"""`holdfast monitor` as a process: one snapshot for scripts, and the screen on a real terminal."""

from __future__ import annotations

import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.checkpoint.system.lock import FileLock
from holdfast.cli.monitor import run_monitor
from tests.manage.runs import Training, desk, desk_json, make_run
from tests.monitor.recorded import Recorded, ago

SCRIPT = Path(__file__).parents[2] / "monitor_training.sh"
posix = pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")


# ---------------------------------------------------------------------------------------- --once


def test_a_finished_run_is_printed_whole_and_well(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    run = Recorded(directory)
    run.started(0, ago(100))
    run.step(400, ago(50), loss=1.25)
    run.metric("finished", 400, ago(-5))
    done = desk("monitor", directory, "--once")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert f"run: {directory}" in lines
    assert "state: finished" in lines
    assert "loss: train 1.2500 · smoothed 1.2500 · validation -" in lines
    assert "lost after power cut: nothing" in lines
    assert sum("model_epoch_" in line for line in lines) == 4
    assert "\x1b" not in done.stdout


def test_exit_statuses_tell_stopped_training_and_unable_to_save_apart(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run = Recorded(directory)
    with Training(directory) as training:
        training.epoch(1, 3.0)
        run.started(0, ago(0))
        run.step(110, ago(-1))
        assert desk("monitor", directory, "--once").returncode == 0
        run.event("failed", ago(-2), step=120, reason="No space left on device")
        done = desk("monitor", directory, "--once")
        assert done.returncode == 10
        assert "saving fails: No space left on device" in done.stdout
    done = desk("monitor", directory, "--once")
    assert done.returncode == 9
    assert "state: stopped before the end" in done.stdout


def test_json_is_one_document_for_all_runs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Recorded(make_run(tmp_path / name)).metric("finished", 400, ago(-5))
    told = desk_json("monitor", tmp_path)
    assert [Path(run["directory"]).name for run in told["runs"]] == ["a", "b"]
    assert {run["state"] for run in told["runs"]} == {"finished"}
    assert told["runs"][0]["checkpoints"][0]["file"] == "model_epoch_4.pt"


def test_the_worst_of_several_runs_is_the_exit_status(tmp_path: Path) -> None:
    Recorded(make_run(tmp_path / "a")).metric("finished", 400, ago(-5))
    make_run(tmp_path / "b")
    done = desk("monitor", tmp_path, "--once")
    assert done.returncode == 9
    assert done.stdout.count("run: ") == 2


def test_what_is_no_run_is_an_error_in_one_line(tmp_path: Path) -> None:
    for where, words in (
        (tmp_path / "nowhere", "There is no directory"),
        (tmp_path, "There is no run in"),
        (Path(__file__), "is not a directory"),
    ):
        for flag in ("--once", "--json"):
            done = desk("monitor", where, flag)
            assert done.returncode == 1
            assert done.stdout == ""
            assert len(done.stderr.splitlines()) == 1
            assert words in done.stderr


def test_a_damaged_file_and_torn_lines_are_shown_and_do_no_harm(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    (directory / "model_epoch_3.pt").chmod(0o644)
    os.truncate(directory / "model_epoch_3.pt", 1000)
    run = Recorded(directory)
    run.started(0, ago(10))
    run.torn()
    run.torn("events.jsonl")
    done = desk("monitor", directory, "--once")
    assert (done.returncode, done.stderr) == (9, "")
    assert "model_epoch_3.pt" not in done.stdout
    assert "model_epoch_4.pt" in done.stdout


def test_a_screen_that_fails_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        """As Textual leaves an application that an error has ended: no result, status 1."""

        return_code = 1

        def __init__(self, *_given: object) -> None:
            self.run = lambda: None

    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, Tty())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("holdfast.monitor.terminal.screen.Monitor", Broken)
    assert run_monitor([str(tmp_path)], "holdfast monitor") == 1


def test_without_a_terminal_the_way_out_is_named(tmp_path: Path) -> None:
    done = desk("monitor", make_run(tmp_path / "run"))
    assert done.returncode == 2
    assert "needs a terminal" in done.stderr
    assert "--once" in done.stderr


def test_once_needs_no_extra(tmp_path: Path) -> None:
    """Neither Textual, nor plotext, nor psutil: a bare machine can ask."""
    directory = make_run(tmp_path / "run")
    code = (
        "import sys\n"
        "for name in ('textual', 'plotext', 'psutil'): sys.modules[name] = None\n"
        "from holdfast.cli.main import main\n"
        "sys.exit(main(['monitor', sys.argv[1], '--once']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (9, "")
    assert "model_epoch_4.pt" in done.stdout


# -------------------------------------------------------------------------------------- the screen


class Terminal:
    """A program on a pseudo-terminal of 80x24, and what a person sees there."""

    def __init__(self, *argv: str | Path, code: str | None = None, **env: str) -> None:
        import fcntl
        import pty
        import struct
        import termios

        import pyte

        self.screen = pyte.Screen(80, 24)
        self._stream = pyte.ByteStream(self.screen)
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(slave)
        self._slave = slave  # kept open, so that what was set on it can be read at the end
        code = code or "import sys; from holdfast.cli.main import main; sys.exit(main())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, argv)],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "HOLDFAST_LANG": "en", **env},
        )  # fmt: skip

    def read(self, seconds: float = 0.1) -> str:
        import select

        if select.select([self._master], [], [], seconds)[0]:
            self._stream.feed(os.read(self._master, 65536))
        return "\n".join(self.screen.display)

    def until(self, text: str, seconds: float = 40.0) -> str:
        """The screen as soon as it shows `text`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if text in self.read():
                return "\n".join(self.screen.display)
        raise AssertionError(f"{text!r} is not on\n{self.read()}")

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def ended(self, seconds: float = 20.0) -> int:
        """The exit status; what the program still says is read, or it could not end."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read()
        return self.process.wait(1)

    def modes(self) -> list[object]:
        """How the terminal was left: input, output, control and local modes."""
        import termios

        return list(termios.tcgetattr(self._slave)[:4])

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
        os.close(self._slave)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    found: list[Terminal] = []
    yield found
    for terminal in found:
        terminal.close()


@posix
def test_a_real_file_that_grows_is_watched_on_a_real_terminal(
    tmp_path: Path, terminals: list[Terminal]
) -> None:
    directory = tmp_path / "run"
    terminal = Terminal("monitor", directory)
    terminals.append(terminal)
    terminal.until("Waiting for a training")
    run = Recorded(directory)
    with FileLock(directory / ".run.lock"):
        run.event("began", ago(0), run_id="a", generation=1)
        run.started(0, ago(0))
        run.step(10, ago(0), loss=7.75)
        terminal.until("train 7.7500")
        run.step(20, ago(-1), loss=6.5)
        text = terminal.until("train 6.5000")
        assert "training" in text.splitlines()[0]
        assert "step 20/1000" in text
        assert "no remote copy" in text
        make_run(tmp_path / "made")
        shutil.copy(tmp_path / "made" / "model_epoch_1.pt", directory / "model_epoch_1.pt")
        terminal.until("model_epoch_1.pt")
    terminal.until("stopped before the end")
    terminal.type("q")
    assert terminal.ended() == 0
    assert terminal.modes() == terminal.before[:4], "the terminal is left as it was"


@posix
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (None, 0)]
)
def test_a_signal_ends_it_and_leaves_the_terminal_as_it_was(
    tmp_path: Path, terminals: list[Terminal], number: int | None, status: int
) -> None:
    terminal = Terminal("monitor", make_run(tmp_path / "run"))
    terminals.append(terminal)
    terminal.until("model_epoch_4.pt")
    if number is None:
        terminal.type("\x03")  # Ctrl-C
    else:
        terminal.process.send_signal(number)
    assert terminal.ended() == status
    assert terminal.modes() == terminal.before[:4]
    assert "Traceback" not in terminal.read()


@posix
def test_a_missing_package_is_named_with_what_installs_it(
    tmp_path: Path, terminals: list[Terminal]
) -> None:
    code = (
        "import sys; sys.modules['plotext'] = None\n"
        "from holdfast.cli.main import main; sys.exit(main())"
    )
    terminal = Terminal("monitor", make_run(tmp_path / "run"), code=code)
    terminals.append(terminal)
    terminal.until("plotext")
    assert terminal.ended() == 2
    said = "".join(line for line in terminal.screen.display)  # a long line goes on in the next
    assert "pip install 'holdfast-train[desk]'" in said


# -------------------------------------------------------------------------------------- the script


@posix
def test_the_script_calls_the_monitor_and_says_in_two_languages_what_is_missing(
    tmp_path: Path,
) -> None:
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    place = tmp_path / "project"
    place.mkdir()
    script = Path(shutil.copy(SCRIPT, place))
    bare = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [script, "x"], capture_output=True, text=True, env=bare, check=False, encoding="utf-8"
    )
    assert done.returncode == 2
    assert "not installed" in done.stderr
    assert "尚未安装" in done.stderr
    program = place / ".venv" / "bin" / "holdfast"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho "$0" "$@"\nexit 7\n')
    program.chmod(0o755)
    done = subprocess.run(
        [script, "a dir", "--once"], capture_output=True, text=True, env=bare, check=False
    )
    assert done.returncode == 7
    assert done.stdout.strip() == f"{program} monitor a dir --once"
