"""Completion as a shell does it: commands, options, words and files of every command we have."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from holdfast.cli import completion
from holdfast.cli.main import ROOMS, command_of, commands
from holdfast.cli.parsing import Parser, parser_of
from tests.manage.runs import desk

_ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMPREPLY=()
_shtab_holdfast holdfast "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = desk("completion", "bash")
    assert (done.returncode, done.stderr) == (0, "")
    path = tmp_path_factory.mktemp("completion") / "holdfast.bash"
    path.write_text(done.stdout)
    return path


def offered(script: Path, *words: str, cwd: Path) -> set[str]:
    """What a real bash offers for the last of `words`."""
    done = subprocess.run(
        ["bash", "--norc", "-c", _ASK, "bash", str(script), "holdfast", *words],
        capture_output=True, text=True, cwd=cwd, check=True, timeout=30,
    )  # fmt: skip
    assert "not found" not in done.stderr, done.stderr
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_offers_commands_options_words_and_files(script: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "model.pt").touch()
    assert offered(script, "", cwd=tmp_path) >= set(commands())
    assert offered(script, "hist", cwd=tmp_path) == {"history"}
    assert offered(script, "list", "--s", cwd=tmp_path) == {"--sort"}
    assert offered(script, "list", "--sort", "", cwd=tmp_path) >= {"step", "loss", "size", "age"}
    assert offered(script, "train", "--preset", "q", cwd=tmp_path) == {"quick"}
    assert offered(script, "train", "--precision", "b", cwd=tmp_path) == {"bf16"}
    assert offered(script, "train", "--resume", "--ep", cwd=tmp_path) == {"--epochs"}
    assert offered(script, "list", "", cwd=tmp_path) == {"runs"}
    assert offered(script, "show", "", cwd=tmp_path) == {"runs", "model.pt"}
    assert offered(script, "history", "--png", "m", cwd=tmp_path) == {"model.pt"}
    assert offered(script, "history", "a", "b", "--no", cwd=tmp_path) == {"--no-plot"}
    assert offered(script, "completion", "z", cwd=tmp_path) == {"zsh"}


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_shell_gets_every_command(shell: str) -> None:
    done = desk("completion", shell, "--lang", "zh")
    assert done.returncode == 0
    for name in commands():
        assert name in done.stdout, name


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_itself_finds_no_fault_with_the_script(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(desk("completion", shell).stdout)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, timeout=30)


def test_a_shell_that_nobody_knows_is_refused_with_those_there_are() -> None:
    done = desk("completion", "elvish")
    assert done.returncode == 2 and "bash" in done.stderr and "fish" in done.stderr


def test_a_module_offers_what_the_program_looks_for_in_it() -> None:
    for room, names in ROOMS.items():
        module = __import__(f"holdfast.cli.{room}", fromlist=["COMMANDS"])
        assert tuple(module.COMMANDS) == names, room


def test_asking_for_a_parser_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in commands():
        parser = parser_of(command_of(name, "holdfast"), f"holdfast {name}")
        assert isinstance(parser, Parser) and parser.prog == f"holdfast {name}", name
    assert parser_of(lambda _words, _prog: 0, "x") is None
    assert not list(tmp_path.iterdir())
    assert Parser(prog="y").parse_args([])  # and afterwards they read again
