"""`holdfast pack` and `unpack` as processes: exit status, one-line errors, JSON, signals."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from holdfast.cli import pack as module
from holdfast.cli.main import main
from holdfast.errors import ConfigError
from tests.manage.runs import desk, desk_json, flip, make_run, names_in

PROGRAM = [sys.executable, "-c", "import sys; from holdfast.cli.main import main; sys.exit(main())"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def test_there_and_back_in_words(run: Path, tmp_path: Path) -> None:
    """`desk` asserts in the process that torch has not been imported."""
    done = desk("pack", "run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("✓ run.tar (") and len(done.stdout.splitlines()) == 1
    assert "4 of them checkpoints; the newest is step 400 (epoch 4). Every" in done.stdout
    shown = desk("unpack", "--list", "run.tar", cwd=tmp_path)
    assert shown.returncode == 0 and "best_model.pt" in shown.stdout
    assert "Every checksum is right" in desk("unpack", "run.tar", "--check", cwd=tmp_path).stdout
    done = desk("unpack", "run.tar", "b c", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("✓ b c: ")
    assert names_in(tmp_path / "b c") == names_in(run)
    assert "To go on" not in done.stdout, "it is no run of our trainer"
    (run / "config.json").write_text("{}")
    desk("pack", run, tmp_path / "x.tar")
    done = desk("unpack", tmp_path / "x.tar", "d e", cwd=tmp_path)
    assert done.stdout.endswith("To go on: holdfast train --checkpoint-dir 'd e'\n")


def test_the_form_for_scripts(run: Path, tmp_path: Path) -> None:
    packed = desk_json("pack", run, tmp_path / "a.tar")
    keys = {"file", "file_bytes", "run", "run_id", "created", "step", "epoch", "checkpoints",
            "bytes", "members", "left_out", "step_in_memory"}  # fmt: skip
    assert set(packed) == keys
    assert packed["file_bytes"] == (tmp_path / "a.tar").stat().st_size
    assert set(packed["members"][0]) == {"name", "size", "step", "link"}
    listed = desk_json("unpack", tmp_path / "a.tar", "--list")
    assert listed == packed
    assert desk_json("unpack", tmp_path / "a.tar", "--check") == packed
    unpacked = desk_json("unpack", tmp_path / "a.tar", tmp_path / "b")
    assert unpacked == {**packed, "directory": str(tmp_path / "b")}


def test_the_archive_alone_may_be_named(run: Path, tmp_path: Path) -> None:
    run.rename(tmp_path / "checkpoints")
    done = desk("pack", "a.tar", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "a.tar").exists()
    desk("pack", cwd=tmp_path)
    assert (tmp_path / "checkpoints.tar").exists()


def test_bad_ends_are_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("not a tar")
    desk("pack", run, tmp_path / "a.tar")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:60_000])
    ends = [
        (desk("pack", tmp_path / "gone", tmp_path / "b.tar"), 1, "There is no directory"),
        (desk("pack", tmp_path / "empty", tmp_path / "b.tar"), 1, "There is no checkpoint in"),
        (desk("pack", run, tmp_path / "a.tar"), 1, "add --force"),
        (desk("pack", run, "a.zip"), 2, "something.tar"),
        (desk("pack", run, run / "a.tar"), 2, "outside"),
        (desk("pack", run, tmp_path / "no" / "a.tar"), 1, "no such file or directory"),
        (desk("unpack", tmp_path / "gone.tar"), 1, "no such file or directory"),
        (desk("unpack", tmp_path / "text.tar"), 4, "no run that holdfast has packed"),
        (desk("unpack", tmp_path / "empty"), 1, "irectory"),
        (desk("unpack", tmp_path / "cut.tar", tmp_path / "b"), 4, "in model_epoch_3.pt"),
        (desk("unpack", tmp_path / "cut.tar", "--check"), 4, "in model_epoch_3.pt"),
        (desk("unpack", tmp_path / "a.tar", run), 1, "is not empty"),
        (desk("unpack", tmp_path / "a.tar", "b", "--list"), 2, "leave b out"),
    ]
    for done, status, words in ends:
        assert done.returncode == status and words in done.stderr, (words, done.stderr)
        assert len(done.stderr.splitlines()) == 1, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "run", "empty", "text.tar", "a.tar", "cut.tar"
    }  # fmt: skip


def test_a_damaged_checkpoint_is_left_out_and_the_status_says_so(run: Path, tmp_path: Path) -> None:
    flip(run / "model_epoch_1.pt")
    done = desk("pack", run, tmp_path / "a.tar")
    assert done.returncode == 4 and "Left out: model_epoch_1.pt: " in done.stdout
    assert "has changed" in done.stdout and "3 of them checkpoints" in done.stdout
    assert desk("unpack", tmp_path / "a.tar", tmp_path / "b").returncode == 0


def test_what_only_memory_holds_is_said(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("holdfast.manage.packing.contents.Taken.unsaved", 450)
    assert main(["pack", str(run), str(tmp_path / "a.tar"), "--lang", "en"]) == 0
    assert "Not in it: step 450, which a killed training" in capsys.readouterr().out


def big(tmp_path: Path) -> Path:
    """A run that takes a moment."""
    run = make_run(tmp_path / "run", (1.0,))
    with (run / "large.bin").open("wb") as file:
        for _i in range(200):
            file.write(os.urandom(1 << 20))
    return run


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_signal_leaves_nothing_half_written_and_progress_is_shown(
    tmp_path: Path, number: int, status: int
) -> None:
    run = big(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "pack", run, tmp_path / "a.tar"], stdin=slave, stdout=slave, stderr=slave,
        env={**os.environ, "HOLDFAST_LANG": "en", "COLUMNS": "120"}, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    text = ""
    while "large.bin" not in text or " left" not in text:
        text += os.read(master, 4096).decode()
    assert {path.name for path in tmp_path.iterdir()} > before, "it has begun to write"
    process.send_signal(number)
    end = time.monotonic() + 20
    try:
        while time.monotonic() < end and (chunk := os.read(master, 4096)):
            text += chunk.decode()
    except OSError:
        pass  # EIO: the other side is closed
    assert process.wait(20) == status
    os.close(master)
    assert "Stopped: no archive was written." in text and "Traceback" not in text
    assert "large.bin" in text and "/s" in text
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", module.COMMANDS)
def test_help_has_an_example_and_fits_the_terminal(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        module.COMMANDS[name][1](["--help"], f"holdfast {name}")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"\n  holdfast {name}" in text and "--json" in text
    assert max(map(len, text.splitlines())) <= 80
    with pytest.raises(ConfigError, match=rf"--nonsense.*; see holdfast {name} --help"):
        module.COMMANDS[name][1](["a.tar", "--nonsense"], f"holdfast {name}")
