"""`holdfast run` and `holdfast service` as they are typed: which directory, which command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from holdfast.cli import protect
from holdfast.cli.main import main
from holdfast.cli.protect import COMMANDS
from holdfast.i18n import language
from tests.manage.runs import desk


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What a supervisor was begun with; it runs nothing."""
    seen: dict[str, object] = {}

    class Spy:
        def __init__(
            self,
            command: object,
            directory: object,
            limits: object,
            *_more: object,
            **_named: object,
        ) -> None:
            seen.update(command=command, directory=directory, limits=limits)

        def run(self) -> int:
            return 0

    monkeypatch.setattr(protect.supervisor, "Supervisor", Spy)
    return seen


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_needs_no_torch(name: str) -> None:
    done = desk(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"holdfast {name} " in done.stdout
    assert "-- holdfast train" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--"],
        ["true"],
        ["--no-such", "--", "true"],
        ["--backoff", "-1", "--", "true"],
        ["--backoff", "nan", "--", "true"],
        ["--give-up-after", "0", "--", "true"],
        ["--give-up-after", "0", "--", "true"],
        ["--", "no-such-program"],
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(
    name: str, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "directory"),
    [
        (["--", "true"], "checkpoints"),
        (["--checkpoint-dir", "a", "--", "true", "--checkpoint-dir", "b"], "a"),
        (["--", "true", "--checkpoint-dir", "b", "--other"], "b"),
        (["--", "true", "--checkpoint-dir=b"], "b"),
        (["--", "true", "--checkpoint-dir"], "checkpoints"),
        (["--", "env", "holdfast", "train", "--checkpoint-dir", "b"], "b"),
        (["--", "env", "python", "-m", "holdfast", "train", "--config", "c.json"], "of the file"),
        (["--", "env", "python", "train_cli.py", "--config", "c.json"], "of the file"),
        (["--", "env", "holdfast", "train", "--no-such-option"], "checkpoints"),
        (["--", "env", "holdfast", "train", "--help"], "checkpoints"),
    ],
)
def test_the_run_directory_is_that_of_the_command(
    argv: list[str],
    directory: str,
    began: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.json").write_text('{"checkpoint_dir": "of the file"}')
    assert main(["run", *argv]) == 0
    assert began["directory"] == Path(directory)
    assert began["command"] == argv[argv.index("--") + 1 :]


def test_options_of_the_command_are_its_own(began: dict[str, object]) -> None:
    words = ["true", "--give-up-after", "7", "--", "--help"]
    assert main(["run", "--give-up-after", "3", "--", *words]) == 0
    assert began["command"] == words
    assert began["limits"].give_up_after == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "ahead", [["--lang", "zh"], ["--lang=zh", "--debug"], ["--debug", "--lang", "zh"]], ids=" ".join
)
def test_what_stands_before_the_command_is_for_holdfast(
    began: dict[str, object], ahead: list[str]
) -> None:
    assert main([*ahead, "run", "--", sys.executable, "mine.py"]) == 0
    assert began["command"] == [sys.executable, "mine.py"]
    assert language() == "zh"


def test_holdfast_is_found_where_it_is_not_on_the_path(
    began: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["run", "--", "holdfast", "train"]) == 0
    assert began["command"] == [sys.executable, "-m", "holdfast", "train"]


def test_a_service_has_absolute_programs_and_the_limits_that_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "go.sh"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    limits = ["--backoff", "0.5", "--give-up-after", "1000000", "--checkpoint-dir", "runs/a"]
    words = ["--name", "night", *limits, "--", "./go.sh", "50%"]
    assert main(["service", "--json", *words]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["name"] == "night.service"
    line = f"{sys.executable} -m holdfast run --give-up-after 1000000 --backoff 0.5"
    assert f"ExecStart={line} --checkpoint-dir runs/a -- {script} " in made["unit"]
    assert f"WorkingDirectory={tmp_path}\n" in made["unit"]
    assert "loginctl enable-linger" in made["install"]
    assert main(["service", *words]) == 0
    assert capsys.readouterr().out == made["unit"]


@pytest.mark.parametrize("flags", [["--fresh"], ["--checkpoint", "x.pt"], ["--resume", "x.pt"]])
def test_a_service_that_would_begin_anew_at_each_boot_is_refused(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["service", "--", "holdfast", "train", *flags]) == 2
    assert "anew" in capsys.readouterr().err
    assert main(["service", "--", "holdfast", "train", "--resume"]) == 0
