"""The command line of the desk, as processes: exit status, pipes, questions, JSON, languages."""

from __future__ import annotations

import csv
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import i18n
from holdfast.checkpoint.system.lock import FileLock
from holdfast.cli import clean, compare, history, show, states, verify
from holdfast.cli import list as listing
from holdfast.cli.main import main
from holdfast.errors import ConfigError
from tests.manage.runs import (
    copy_without_links,
    cut,
    desk,
    desk_json,
    flip,
    forget_verified,
    make_run,
    names_in,
)
from tests.support import processor_seconds

COMMANDS = {
    **listing.COMMANDS, **show.COMMANDS, **history.COMMANDS, **compare.COMMANDS, **clean.COMMANDS,
    **verify.COMMANDS, **states.COMMANDS,
}  # fmt: skip
PROGRAM = [sys.executable, "-c", "import sys; from holdfast.cli.main import main; sys.exit(main())"]


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LANGUAGE", "en")
    monkeypatch.setenv("HOLDFAST_LANG", "en")
    i18n.set_language("en")
    yield
    i18n.set_language("en")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", config={"training": {"epochs": 4}})


# ------------------------------------------------------------------------------ all commands


def test_no_command_imports_torch_and_all_end_with_zero(run: Path, tmp_path: Path) -> None:
    """`desk` asserts in the process that torch has not been imported."""
    other = make_run(tmp_path / "other", (3.0,))
    for argv in (
        ["list", run, other],
        ["show", run],
        ["show", run / "best_model.pt", "--tensors"],
        ["history", run, "--csv", tmp_path / "out.csv"],
        ["history", run, other, "--plot", "--events"],
        ["compare", run, other],
        ["verify", run],
        ["verify", run, "--all"],
        ["pin", "model_epoch_1.pt", run],
        ["rollback", "300", run, "--yes"],
        ["clean", run, "--keep", "2", "--temp", "--quarantine", "--yes"],
    ):
        done = desk(*argv)
        assert (done.returncode, done.stderr) == (0, ""), argv
        assert done.stdout
    assert len(list(csv.DictReader((tmp_path / "out.csv").open()))) == 4


def test_answers_come_in_a_moment(run: Path) -> None:
    """0.3 s on a machine at rest is the promise; processor time, since this one is not."""
    for argv in (["list", run], ["show", run], ["history", run], ["compare", run, run],
                 ["clean", run, "--help"]):  # fmt: skip
        took = [processor_seconds(lambda argv=argv: desk(*argv)) for _attempt in range(3)]  # type: ignore[misc]
        assert min(took) < 0.5, argv
        assert desk(*argv).returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_fits_the_terminal(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        COMMANDS[name][1](["--help"], f"train_manager.py {name}")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"\n  train_manager.py {name}" in text and "--json" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_option_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--nonsense.*; see holdfast {name} --help"):
        COMMANDS[name][1](["--nonsense", "x", "y"], f"holdfast {name}")


@pytest.mark.parametrize("name", ["list", "history", "clean"])
def test_a_missing_directory_ends_with_one_and_says_what_to_name(name: str, tmp_path: Path) -> None:
    done = desk(name, tmp_path / "nothing")
    assert done.returncode == 1 and done.stdout == ""
    assert "There is no directory" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["list", "history", "clean", "verify"])
def test_an_empty_directory_is_one_line_and_stays_empty(name: str, tmp_path: Path) -> None:
    done = desk(name, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["list", "history", "clean", "verify"])
def test_the_default_directory_is_the_trainers(name: str, tmp_path: Path) -> None:
    make_run(tmp_path / "checkpoints", (1.0,))
    done = desk(name, cwd=tmp_path)
    assert done.returncode == 0 and "model_epoch_1.pt" in done.stdout


def test_a_reader_that_goes_away_is_no_error(run: Path) -> None:
    for argv in (["list", run], ["show", run], ["history", run, "--events"], ["verify", run]):
        process = subprocess.Popen(
            [*PROGRAM, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(30) in (0, 141)
        assert process.stderr.read() == b""
        process.stderr.close()


def test_a_full_disk_behind_the_output_is_one_line(run: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PROGRAM, "list", str(run)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "disk is full" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="a shell of another kind")
@pytest.mark.parametrize("closed", [">&-", "<&-", ">&- 2>&- <&-"])
def test_a_stream_that_is_closed_is_no_traceback(run: Path, closed: str) -> None:
    words = ["sh", "-c", f'"$@" {closed}', "sh", *PROGRAM, "clean", str(run), "--keep", "1"]
    done = subprocess.run(words, text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr  # nobody can be asked


def test_a_file_where_temp_should_be_hides_nothing(run: Path) -> None:
    shutil.rmtree(run / "temp", ignore_errors=True)
    (run / "temp").write_text("x")
    for name in ("list", "verify"):
        done = desk(name, run)
        assert done.returncode == 0 and "model_epoch_4.pt" in done.stdout, done.stderr


def test_a_pipe_that_only_knows_ascii_gets_every_line(run: Path) -> None:
    done = desk("list", run, env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert done.returncode == 0 and "? best" in done.stdout
    found = desk("list", run, "--json", env={"PYTHONIOENCODING": "ascii"})
    assert json.loads(found.stdout)["directories"][0]["checkpoints"]


def test_chinese_is_spoken_when_asked_for(run: Path) -> None:
    for name in ("list", "show", "history", "verify"):
        done = desk(name, run, "--lang", "zh")
        assert done.returncode == 0 and "model_epoch_4.pt" in done.stdout


# ------------------------------------------------------------------------------ list, history


def test_one_missing_directory_does_not_hide_the_others(run: Path, tmp_path: Path) -> None:
    done = desk("list", tmp_path / "gone", run)
    assert done.returncode == 1
    assert "model_epoch_2.pt" in done.stdout and f"{run}:" in done.stdout
    assert "gone" in done.stderr


def test_lists_of_a_copied_directory_are_the_same_in_json(run: Path, tmp_path: Path) -> None:
    copy = copy_without_links(run, tmp_path / "copy")
    first, second = (desk_json("list", place)["directories"][0] for place in (run, copy))
    assert first["checkpoints"] == second["checkpoints"]
    assert set(first) == {
        "directory", "checkpoints", "disk_bytes", "damaged", "unreadable", "foreign",
        "quarantine", "archive",
    }  # fmt: skip
    record = first["checkpoints"][0]
    assert record["names"] == ["model_epoch_4.pt", "latest.pt", "model.pt"]
    assert (record["latest"], record["best"], record["verified"]) == (True, False, True)
    assert set(record) >= {
        "id", "run_id", "generation", "step", "epoch", "kind", "reason", "created", "size", "loss",
        "metrics", "parent", "train_loss", "val_loss", "damaged",
    }  # fmt: skip


def test_grep_finds_the_best_in_a_pipe(run: Path) -> None:
    lines = [line for line in desk("list", run).stdout.splitlines() if "best" in line]
    assert len(lines) == 1 and lines[0].startswith("model_epoch_2.pt")


def test_sorting_by_what_does_not_exist_names_what_does(run: Path) -> None:
    done = desk("list", run, "--sort", "colour")
    assert done.returncode == 2 and "step" in done.stderr and "loss" in done.stderr


def test_history_json_has_epochs_and_events(run: Path) -> None:
    found = desk_json("history", run)
    assert [epoch["val_loss"] for epoch in found["epochs"]] == [4.0, 2.0, 3.0, 2.5]
    assert [epoch["best"] for epoch in found["epochs"]] == [False, True, False, False]
    assert set(found["epochs"][0]) == {
        "epoch", "step", "train_loss", "val_loss", "perplexity", "time", "checkpoint", "fate",
        "best",
    }  # fmt: skip
    assert found["events"][0]["event"] == "began"


def test_a_csv_that_cannot_be_written_is_one_line(run: Path, tmp_path: Path) -> None:
    done = desk("history", run, "--csv", tmp_path / "no" / "such" / "out.csv")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


# --------------------------------------------------------------------------- compare, verify


def test_one_checkpoint_is_no_comparison(run: Path) -> None:
    done = desk("compare", run)
    assert done.returncode == 2 and "two or more" in done.stderr


def test_a_damaged_file_ends_with_four_and_says_what_to_do(run: Path) -> None:
    flip(run / "model_epoch_1.pt")
    done = desk("verify", run)
    assert done.returncode == 4 and "✗ " in done.stdout and "DAMAGED" in done.stdout
    assert "Damaged: 1." in done.stdout and "Nothing was moved" in done.stdout
    assert desk("verify", run / "model_epoch_1.pt").returncode == 4
    assert desk("verify", run / "model_epoch_2.pt").returncode == 0
    found = desk("verify", run, "--json")
    assert found.returncode == 4
    states = {Path(f["path"]).name: f["state"] for f in json.loads(found.stdout)["files"]}
    assert states["model_epoch_1.pt"] == "damaged" and states["model_epoch_4.pt"] == "intact"
    assert "damaged" in desk("list", run).stdout
    cut(run / "model_epoch_3.pt")
    assert desk("compare", run, run / "model_epoch_3.pt").returncode == 4


def test_what_lies_in_quarantine_is_told_and_is_no_failure(run: Path) -> None:
    flip(run / "model_epoch_1.pt")
    (run / "quarantine").mkdir()
    (run / "model_epoch_1.pt").rename(run / "quarantine" / "model_epoch_1.pt")
    assert "quarantine/" not in desk("verify", run).stdout
    done = desk("verify", run, "--all")
    assert done.returncode == 0 and "damaged, set aside already" in done.stdout
    assert "Damaged: 0." in done.stdout
    found = desk_json("verify", run, "--all")
    assert (found["damaged"], found["quarantined"]) == (0, 1)
    assert [f["place"] for f in found["files"]] == ["run"] * 3 + ["quarantine"]


def test_a_foreign_file_beside_the_checkpoints_is_named_and_no_error(run: Path) -> None:
    (run / "notes.pt").write_bytes(b"not a checkpoint")
    done = desk("verify", run)
    assert done.returncode == 0 and "notes.pt: not checked" in done.stdout
    assert desk("verify", run / "notes.pt").returncode == 4


# --------------------------------------------------------------------------------------- clean


def test_without_a_terminal_nothing_goes_unless_it_was_told(run: Path) -> None:
    before = names_in(run)
    for argv in (["--keep", "1"], ["--keep", "1", "--json"]):
        done = desk("clean", run, *argv, stdin=subprocess.DEVNULL)
        assert done.returncode == 2 and "--yes" in done.stderr
    assert desk("clean", run, "--keep", "1", "--dry-run").returncode == 0
    assert not desk_json("clean", run, "--keep", "1", "--dry-run")["done"]
    assert names_in(run) == before
    assert desk("clean", run, "--keep", "1", "--yes").returncode == 0
    assert names_in(run) == before - {"model_epoch_1.pt"}


def test_json_tells_what_went_and_why(run: Path) -> None:
    done = desk("clean", run, "--keep", "1", "--yes", "--json")
    found = json.loads(done.stdout)
    assert found["done"] and [row["names"] for row in found["removed"]] == [["model_epoch_1.pt"]]
    assert found["removed"][0]["reason"] == "older" and found["bytes_freed"] > 0
    assert {row["reason"] for row in found["kept"]} == {"newest", "two_verified", "best"}


def test_without_options_the_trainers_own_retention_is_meant(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (1.0, 2.0, 3.0, 4.0, 5.0))
    assert desk("clean", run, "--yes").returncode == 0
    assert {f"model_epoch_{n}.pt" for n in (1, 3, 4, 5)} <= names_in(run)
    assert "model_epoch_2.pt" not in names_in(run)


def test_nothing_verified_yet_is_said_with_the_command_that_helps(run: Path) -> None:
    forget_verified(run)
    done = desk("clean", run, "--keep", "1", "--yes")
    assert done.returncode == 0 and f"holdfast verify {run}" in done.stdout
    assert desk("verify", run).returncode == 0
    assert desk("clean", run, "--keep", "1", "--yes").stdout.endswith("came back.\n")
    assert "model_epoch_1.pt" not in names_in(run)


def test_a_negative_number_is_refused(run: Path) -> None:
    done = desk("clean", run, "--keep", "-1", "--yes")
    assert done.returncode == 2 and "--keep -1" in done.stderr


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *argv: str | Path) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*PROGRAM, *map(str, argv)], stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def read_until(self, wanted: str) -> None:
        while wanted not in self.text:
            self.text += os.read(self.master, 4096).decode()

    def end(self) -> int:
        try:
            while chunk := os.read(self.master, 4096):
                self.text += chunk.decode()
        except OSError:
            pass  # EIO: the other side is closed
        os.close(self.master)
        return self.process.wait(30)


@pytest.mark.parametrize(
    ("answer", "status", "goes"),
    [("\n", 1, False), ("n\n", 1, False), ("y\n", 0, True), ("是\n", 0, True), ("\x04", 1, False)],
)
def test_on_a_terminal_it_asks_and_the_default_is_no(
    run: Path, answer: str, status: int, goes: bool
) -> None:
    terminal = Terminal("clean", run, "--keep", "1")
    terminal.read_until("[y/N]")
    assert "older than the last 1" in terminal.text
    os.write(terminal.master, answer.encode())
    assert terminal.end() == status, terminal.text
    assert ("model_epoch_1.pt" not in names_in(run)) == goes


def test_ctrl_c_at_the_question_removes_nothing(run: Path) -> None:
    before = names_in(run)
    terminal = Terminal("clean", run, "--keep", "1")
    terminal.read_until("[y/N]")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130 and "Traceback" not in terminal.text
    assert names_in(run) == before


def test_a_terminal_sees_progress_and_colour(run: Path) -> None:
    terminal = Terminal("verify", run)
    assert terminal.end() == 0
    assert "checking 1/4: model_epoch_4.pt" in terminal.text
    assert "░░░" in terminal.text and "/s" in terminal.text
    terminal = Terminal("list", run)
    assert terminal.end() == 0 and "\x1b[1mfile" in terminal.text


def test_the_main_program_knows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help", "--lang", "en"]) == 0
    text = capsys.readouterr().out
    for name, (summary, _work) in COMMANDS.items():
        assert name in text and summary in text


# ----------------------------------------------------------------------------- rollback, pin


def test_going_back_is_shown_done_and_undone(run: Path) -> None:
    shown = desk("rollback", "200", run, "--dry-run")
    assert shown.returncode == 0 and "Back to step 200 (model_epoch_2.pt" in shown.stdout
    assert "/generation_1/" in shown.stdout and "model_epoch_4.pt" in shown.stdout
    assert "model_epoch_4.pt" in names_in(run)
    done = desk("rollback", "200", run, "--yes")
    assert (done.returncode, done.stderr) == (0, "") and "Done: step 200" in done.stdout
    undo = done.stdout.split("To undo it: ")[1].split()
    assert undo[:2] == ["holdfast", "rollback"] and undo[2].endswith("model_epoch_4.pt")
    assert desk("rollback", undo[2], "--yes").returncode == 0
    assert (run / "latest.pt").samefile(run / "model_epoch_4.pt")
    assert "the run went back to step 200; generation 2 begins" in desk("history", run).stdout


def test_going_back_asks_no_questions_of_a_script(run: Path) -> None:
    before = names_in(run)
    for argv in ([], ["--json"]):
        done = desk("rollback", "200", run, *argv, stdin=subprocess.DEVNULL)
        assert done.returncode == 2 and "--yes" in done.stderr
    assert not desk_json("rollback", "200", run, "--dry-run")["done"]
    assert names_in(run) == before
    found = desk_json("rollback", "200", run, "--yes")
    assert found["done"] and found["generation"] == 2
    again = desk("rollback", "200", run, "--yes")
    assert again.returncode == 0 and "nothing to go back behind" in again.stdout


@pytest.mark.parametrize(("answer", "status"), [("\n", 1), ("y\n", 0)])
def test_on_a_terminal_going_back_asks(run: Path, answer: str, status: int) -> None:
    terminal = Terminal("rollback", "best_model.pt", run)
    terminal.read_until("[y/N]")
    os.write(terminal.master, answer.encode())
    assert terminal.end() == status, terminal.text
    assert ("model_epoch_4.pt" in {path.name for path in run.glob("*.pt")}) == (status == 1)


def test_bad_ends_of_going_back(run: Path, tmp_path: Path) -> None:
    flip(run / "model_epoch_1.pt")
    with FileLock(run / ".run.lock"):
        locked = desk("rollback", "200", run, "--yes")
    ends = [
        (locked, 5, "Another process"),
        (desk("rollback", "100", run, "--yes"), 4, "is damaged"),
        (desk("rollback", "250", run, "--yes"), 4, "the nearest are of step 100, 200, 300, 400"),
        (desk("rollback", "1", tmp_path / "gone", "--yes"), 1, "no directory"),
        (desk("rollback"), 2, "STEP|FILE"),
    ]
    for done, status, words in ends:
        assert done.returncode == status and words in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "gone").exists() and not (run / "archive").exists()


def test_the_directory_is_found_from_the_file(run: Path) -> None:
    done = desk("rollback", run / "model_epoch_2.pt", "--dry-run")
    assert done.returncode == 0 and "step 200" in done.stdout
    done = desk("rollback", "model_epoch_2.pt", "--dry-run", cwd=run)
    assert done.returncode == 0 and "step 200" in done.stdout


def test_pinning_and_letting_go(run: Path) -> None:
    assert "Step 100 (model_epoch_1.pt) is pinned" in desk("pin", "100", run).stdout
    assert "was pinned already" in desk("pin", run / "model_epoch_1.pt").stdout
    assert "🔒 pinned" in desk("list", run).stdout
    assert desk("clean", run, "--keep", "1", "--yes").returncode == 0
    assert "model_epoch_1.pt" in names_in(run)
    found = desk_json("pin", "--remove", "100", run)
    assert set(found) == {"directory", "id", "step", "names", "pinned", "changed"}
    assert (found["pinned"], found["changed"]) == (False, True)
    assert "was not pinned" in desk("pin", "--remove", "100", run).stdout
    assert desk("pin", "77", run).returncode == 4
