"""The unit that systemd reads and the line that cron reads: nothing in a command is interpreted."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ConfigError
from holdfast.manage.supervising.service import Service, exec_line, quote

HARD = ["--data-file", "我 的%d $HOME ${X} 书.txt", "", ";", "a\"b'c", "\\n", "a\nb\tc", "-", "#x"]


def service(directory: Path = Path("/srv/my run"), **changes: object) -> Service:
    fields: dict[str, object] = {
        "name": "holdfast",
        "command": (sys.executable, "-m", "holdfast", "run", "--", "/bin/true", *HARD),
        "directory": directory,
        "environment": {"PATH": "/usr/bin:/bin", "HOLDFAST_CACHE": "/a b/100% $x"},
        **changes,
    }
    return Service(**fields)  # type: ignore[arg-type]


def understood(line: str) -> list[str]:
    """What systemd makes of the words of ExecStart, by systemd.syntax(7) and systemd.service(5)."""
    escapes = {"n": "\n", "t": "\t", "\\": "\\", '"': '"', "'": "'"}

    def unescape(found: re.Match[str]) -> str:
        return chr(int(found[2], 16)) if found[2] else escapes[found[1]]

    words = []
    for quoted, plain in re.findall(r'"((?:[^"\\]|\\.)*)"|(\S+)', line):
        word = re.sub(r"\\(x([0-9a-f]{2})|.)", unescape, quoted or plain)
        assert not re.search(r"%(?!%)", word.replace("%%", "")), "a specifier"
        words.append(word.replace("%%", "%"))
    program, *arguments = words
    assert all("$" not in word.replace("$$", "") for word in arguments), "a variable"
    return [program, *(word.replace("$$", "$") for word in arguments)]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1))
def test_systemd_understands_each_word_as_it_is(words: list[str]) -> None:
    assert understood(exec_line(["/bin/true", *words])) == ["/bin/true", *words]


def test_a_word_without_anything_special_is_not_quoted() -> None:
    assert quote("--batch-size=8") == "--batch-size=8"
    assert quote("") == '""'


def setting(text: str, name: str) -> str:
    return re.findall(rf"^{name}=(.*)$", text, re.M)[0]


def test_what_systemd_is_told() -> None:
    unit = service().unit()
    assert setting(unit, "WorkingDirectory") == "/srv/my run"
    assert setting(unit, "RestartPreventExitStatus").split() == [
        "2",
        "3",
        "5",
        "7",
        "8",
        "126",
        "127",
    ]
    assert {"130", "143"} <= set(setting(unit, "SuccessExitStatus").split())
    assert setting(unit, "KillMode") == "mixed"
    assert setting(unit, "KillSignal") == "SIGTERM"
    assert 'Environment="HOLDFAST_CACHE=/a b/100%% $x"' in unit
    head = unit[: unit.index("[Unit]")].splitlines()
    assert all(line.startswith("#") or not line for line in head)
    for command in service().install():
        assert f"#   {command}" in head


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_itself_accepts_the_unit(tmp_path: Path) -> None:
    """`verify` looks for the program and the directory: their names are quoted rightly too."""
    place = tmp_path / "我 的%d $HOME 目录"
    place.mkdir()
    program = place / "run me"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)

    def complaints(made: Service) -> str:
        file = tmp_path / made.file
        file.write_text(made.unit(), "utf-8")
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(file)],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        return done.stderr

    good = service(place, command=(str(program), *HARD))
    assert complaints(good) == ""
    program.unlink()
    assert "run me" in complaints(good), "verify would have noticed"


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "a b"},
        {"name": "../x"},
        {"name": ""},
        {"command": ("/bin/true", "\udcff")},
        {"directory": Path("/a\nb")},
        {"directory": Path("/a ")},
    ],
)
def test_what_systemd_cannot_hold_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        service(**changes)  # type: ignore[arg-type]
