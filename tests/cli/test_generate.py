"""`holdfast generate`: from an argument, a pipe and a terminal; interrupted, cut off, misused."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.cli.main import main
from holdfast.training.inference import load_for_inference
from tests import processes
from tests.manage.runs import flip, make_run
from tests.training.runs import config_for, train, write_corpus

# A penalty below 0 rewards what was said: the text runs in a circle and nobody sees its end.
ENDLESS = ["--tokens", "1000000", "--frequency-penalty", "-5", "--seed", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    train(config_for(folder / "run", write_corpus(folder), epochs=1))
    return folder / "run"


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Puts bytes where a pipe would be."""

    def put(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))

    return put


def generated(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> dict[str, Any]:
    assert main(["generate", *map(str, argv), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], status: int, *argv: str | Path) -> str:
    assert main(["generate", *map(str, argv)]) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


# -------------------------------------------------------------------------------------- the text


def test_the_text_begins_with_the_prompt_and_ends_with_a_line_break(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "今天", "--checkpoint", str(run), "--tokens", "12", "--seed", "3"]
    assert main(argv) == 0
    said = capsys.readouterr()
    assert said.out.startswith("今天")
    assert len(said.out) > 3
    assert said.out.endswith("\n")
    assert said.err == ""  # figures are for a terminal


def test_json_tells_text_checkpoint_seed_and_why_it_ended(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = generated(capsys, "今天", "--checkpoint", run, "--tokens", "5", "--seed", "3")
    assert found["prompt"] == "今天"
    assert found["checkpoint"]["step"] == load_for_inference(run).entry.step
    assert found["checkpoint"]["epoch"] == 1
    assert found["context_length"] == 16
    assert found["sampling"] == {"seed": 3, "temperature": 0.8, "top_k": 50, "top_p": 1.0,
                                 "frequency_penalty": 0.0}  # fmt: skip
    assert (found["tokens"], found["ended"]) == (5, "length")
    again = generated(capsys, "今天", "--checkpoint", run / "latest.pt", "--tokens", "5",
                      "--seed", "3")  # fmt: skip
    assert again["text"] == found["text"]
    other = generated(capsys, "今天", "--checkpoint", run, "--tokens", "5", "--seed", "4")
    assert other["text"] != found["text"]


def test_a_text_longer_than_the_context_goes_on(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint", run, "--tokens", "60", "--frequency-penalty", "1", "--seed", "1"]
    found = generated(capsys, "今天", *options)
    assert found["ended"] == "end_of_text" or found["tokens"] == 60
    assert found["window_moves"] == max(0, (found["prompt_tokens"] + found["tokens"] - 9) // 8)


def test_a_prompt_longer_than_the_context_is_said_to_be_cut(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "今天" * 30, "--checkpoint", str(run), "--tokens", "3"]) == 0
    said = capsys.readouterr()
    assert "the model reads the last 8 of them" in said.err
    assert said.out.startswith("今天" * 30)


def test_the_default_is_the_run_directory_of_train(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.parent / "elsewhere").mkdir(exist_ok=True)
    place = run.parent / "elsewhere" / "checkpoints"
    place.exists() or place.symlink_to(run)
    monkeypatch.chdir(place.parent)
    assert generated(capsys, "今天", "--tokens", "2")["checkpoint"]["file"].startswith(
        "checkpoints"
    )


# ---------------------------------------------------------------------------------------- a pipe


def test_the_prompt_may_come_from_a_pipe(
    run: Path, capsys: pytest.CaptureFixture[str], pipe: Callable[[bytes], None]
) -> None:
    for data in ("今天\n".encode(), "\ufeff今天".encode(), "今天\r\n".encode()):
        pipe(data)
        assert generated(capsys, "--checkpoint", run, "--tokens", "2")["prompt"] == "今天"
    pipe("今天".encode()[:-1])  # what `head -c` leaves
    assert generated(capsys, "--checkpoint", run, "--tokens", "2")["prompt"] == "今"
    pipe(b"")
    assert generated(capsys, "--checkpoint", run, "--tokens", "2")["prompt"] == ""


def test_a_pipe_that_is_no_text_or_has_no_end_is_refused_in_a_line(
    run: Path, capsys: pytest.CaptureFixture[str], pipe: Callable[[bytes], None]
) -> None:
    pipe(b"\xff\xfe" * 100)
    assert "not UTF-8" in refusal(capsys, 2, "--checkpoint", run)
    pipe(b"y\n" * (1 << 20))
    assert "tail -c" in refusal(capsys, 2, "--checkpoint", run)


def test_a_reader_that_has_seen_enough_ends_it_quietly(run: Path) -> None:
    words = ["generate", "今天", "--checkpoint", run, *ENDLESS]
    with processes.start(*words, text=False) as process:
        assert process.stdout and process.stderr
        assert process.stdout.read(6).decode() == "今天"
        process.stdout.close()
        assert process.wait(30) == 141
        assert process.stderr.read() == b""


# ------------------------------------------------------------------------------------ a terminal


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *argv: str | Path) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(HOLDFAST_LANG="en", TERM="dumb")
            processes.become(["holdfast", "generate", *map(str, argv)])
        self._bytes = b""

    @property
    def said(self) -> str:
        return self._bytes.decode("utf-8", "replace")

    def until(self, words: str, timeout: float = 60) -> str:
        """What is said until `words` are."""
        end, before = time.monotonic() + timeout, self.said
        while words not in self.said[len(before) :]:
            assert select.select([self.fd], [], [], max(0, end - time.monotonic()))[0], self.said
            try:
                self._bytes += os.read(self.fd, 4096)
            except OSError:  # Linux says so when the other side is gone
                break
        return self.said[len(before) :]

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def status(self) -> int:
        self.until("\0nothing says this")
        _pid, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def test_line_by_line_on_a_terminal_until_ctrl_d(run: Path) -> None:
    terminal = Terminal("--checkpoint", run, "--tokens", "4", "--seed", "1")
    assert "step " in terminal.until("> ")
    for prompt in ("今天", "春江"):
        terminal.type(f"{prompt}\n")
        answer = terminal.until("\n> ")
        assert answer.count(prompt) == 2  # as it was typed, and as the text begins
        assert "tokens/s · seed 1" in answer
    terminal.type("\x04")
    assert terminal.status() == 0


def test_ctrl_c_ends_the_text_and_at_the_prompt_everything(run: Path) -> None:
    terminal = Terminal("--checkpoint", run, *ENDLESS)
    terminal.until("> ")
    terminal.type("今天\n")
    terminal.until("\r\n今天")
    terminal.type("\x03")
    assert "tokens/s" in terminal.until("\n> ")
    time.sleep(0.3)  # it is written before the terminal is listened to
    terminal.type("\x03")
    assert terminal.status() == 130


def test_ctrl_c_keeps_what_was_written_and_exits_with_130(run: Path) -> None:
    words = ["generate", "今天", "--checkpoint", run, *ENDLESS]
    process = processes.start(*words, text=False)
    assert process.stdout
    assert process.stdout.read(9).decode("utf-8", "ignore").startswith("今天")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out.decode("utf-8").endswith("\n")
    assert err == b""


def test_what_a_model_says_does_not_drive_the_terminal(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["generate", "a\x1b[31mb\tc", "--checkpoint", str(run), "--tokens", "1"]
    assert main(argv) == 0
    assert "\x1b[31m" in capsys.readouterr().out  # a pipe gets the text as it is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith("a\\x1b[31mb\tc")


# ---------------------------------------------------------------------------------------- errors


def test_what_is_no_checkpoint_is_told_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "train a model first" in refusal(capsys, 4, "今天")
    assert "nowhere.pt" in refusal(capsys, 1, "今天", "--checkpoint", "nowhere.pt")
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes((run / "latest.pt").read_bytes())
    flip(damaged)
    assert "damaged.pt" in refusal(capsys, 4, "今天", "--checkpoint", damaged)
    (tmp_path / "text.pt").write_text("今天")
    assert "text.pt" in refusal(capsys, 4, "今天", "--checkpoint", "text.pt")
    stranger = make_run(tmp_path / "stranger", [1.0])
    assert "another training loop" in refusal(capsys, 4, "今天", "--checkpoint", stranger)


def test_every_value_out_of_range_is_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--tokens", "0", "--temperature", "-1", "--top-p", "1.5", "--top-k", "-2",
            "--frequency-penalty", "inf", "--seed", "-1"]  # fmt: skip
    assert main(["generate", "今天", *argv]) == 2
    said = capsys.readouterr().err
    for flag in argv[::2]:
        assert flag in said
    assert said.count("\n") == 6


def test_a_prompt_in_another_encoding_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    gbk = os.fsdecode("今天".encode("gbk"))
    assert main(["generate", gbk]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_weights_that_are_not_numbers_are_told(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.training import inference

    real = inference.load_for_inference

    def ruined(source: Any) -> Any:
        loaded = real(source)
        loaded.model.get_output_embeddings().weight.fill_(float("nan"))
        return loaded

    monkeypatch.setattr(inference, "load_for_inference", ruined)
    assert main(["generate", "今天", "--checkpoint", str(run)]) == 4
    assert "not a number" in capsys.readouterr().err
