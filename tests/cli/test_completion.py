"""Completion as a shell does it: commands, options, words and files of every command we have."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import time
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

# Ctrl-X b shows the line that the shell has made of what was typed, and begins a new one.
_ZSH_LINE = r"""PS1='> '; fpath=("$PWD/functions" $fpath); autoload -Uz compinit; compinit -u -D
shown() { zle -I; print -r -- "<$BUFFER"">"; BUFFER= }; zle -N shown; bindkey '^Xb' shown
"""
# What is typed before Tab, and the line afterwards.
_TYPED = {
    "holdfast hist": "holdfast history ",
    "holdfast list --so": "holdfast list --sort ",
    "holdfast list --sort lo": "holdfast list --sort loss ",
    "holdfast train --preset q": "holdfast train --preset quick ",
    "holdfast list run": "holdfast list runs/",
    "holdfast report run": "holdfast report runs/",
    "holdfast show mod": "holdfast show model.pt ",
    "holdfast show my": "holdfast show my\\ 检查点.pt ",
    "holdfast compare model.pt run": "holdfast compare model.pt runs/",  # the second of several
    "holdfast history runs run": "holdfast history runs runs/",
    "holdfast history --csv mod": "holdfast history --csv model.pt ",
    "holdfast train --resume --ep": "holdfast train --resume --epochs ",
    "holdfast train --resume mod": "holdfast train --resume model.pt ",
    "holdfast --vers": "holdfast --version ",
}


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
    assert offered(script, "history", "--csv", "m", cwd=tmp_path) == {"model.pt"}
    assert offered(script, "history", "a", "b", "--no", cwd=tmp_path) == {"--no-plot"}
    assert offered(script, "completion", "z", cwd=tmp_path) == {"zsh"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes_commands_options_words_and_files(tmp_path: Path) -> None:
    _make_files(tmp_path)
    (tmp_path / "functions").mkdir()
    (tmp_path / "functions" / "_holdfast").write_text(desk("completion", "zsh").stdout)
    with _Terminal(["zsh", "-f", "-i"], tmp_path) as zsh:
        zsh.type(_ZSH_LINE)
        for typed, completed in _TYPED.items():
            zsh.type(f"{typed}\t\x18b")
            assert zsh.between("<", ">").rstrip() == completed.rstrip(), typed


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_offers_commands_options_words_and_files(tmp_path: Path) -> None:
    _make_files(tmp_path)
    (tmp_path / "holdfast.fish").write_text(desk("completion", "fish").stdout)
    asked = "source holdfast.fish; for line in $argv; complete -C $line; echo =====; end"
    typed_here = [*_TYPED, "holdfast list mod"]  # no directory begins so
    typed_here.remove("holdfast train --resume mod")  # no file: see cli/completion.py
    done = subprocess.run(
        ["fish", "--no-config", "-c", asked, *typed_here], capture_output=True, text=True,
        check=True, cwd=tmp_path, timeout=60, env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    for typed, offered_here in zip(typed_here, done.stdout.split("=====\n"), strict=False):
        word = _TYPED.get(typed, "")[typed.rindex(" ") + 1 :].rstrip().replace("\\", "")
        found = [line.split("\t")[0] for line in offered_here.splitlines()]
        assert found == ([word] if word else []), typed


def _make_files(directory: Path) -> None:
    (directory / "runs").mkdir()
    for name in ("model.pt", "my 检查点.pt"):
        (directory / name).touch()


class _Terminal:
    """A shell at a terminal of its own, as a person has it: what is typed, and what it answers."""

    def __init__(self, command: list[str], cwd: Path) -> None:
        pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
        self._fd, theirs = pty.openpty()
        self._shell = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, start_new_session=True,
            env={**os.environ, "TERM": "dumb", "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
        os.close(theirs)
        self._text = ""

    def __enter__(self) -> _Terminal:
        return self

    def __exit__(self, *_error: object) -> None:
        self._shell.kill()
        self._shell.wait()
        os.close(self._fd)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def between(self, begin: str, end: str, seconds: float = 30.0) -> str:
        """What stands between `begin` and `end` on a line of its own; what was before is gone."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for line in self._text.splitlines():
                if line.startswith(begin) and line.endswith(end):
                    self._text = self._text.partition(line)[2]
                    return line[len(begin) : -len(end)]
            if select.select([self._fd], [], [], 0.1)[0]:
                self._text += os.read(self._fd, 65536).decode(errors="replace")
        raise AssertionError(self._text)


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
