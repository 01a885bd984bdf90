"""Tables: aligned by cells, whole in a pipe, fitting on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len

from holdfast.table import Column, Screen, printable, render, wrapped

COLUMNS = [Column("名称"), Column("n", right=True, hide=1), Column("why", hide=2)]
ROWS = [["检查点", "5", "because"], ["x", "1234", ""]]


def test_columns_align_by_cells_not_by_characters() -> None:
    header, first, second = render(COLUMNS, ROWS, Screen())
    assert first == "检查点     5  because"
    assert second == "x       1234"
    assert cell_len(header.split("n")[0]) == cell_len("检查点  ") + 3


def test_the_least_important_column_steps_back_first() -> None:
    assert render(COLUMNS, ROWS, Screen(16))[1] == "检查点     5"
    assert render(COLUMNS, ROWS, Screen(10))[1] == "检查点"
    assert render(COLUMNS, ROWS, Screen(3))[1] == "检查点"  # the first never goes


def test_a_column_that_says_nothing_is_left_out_on_a_terminal_only() -> None:
    rows = [["a", "1", ""]]
    assert "why" not in render(COLUMNS, rows, Screen(80))[0]
    assert "why" in render(COLUMNS, rows, Screen())[0]


def test_what_is_not_a_terminal_has_no_width_and_no_colour() -> None:
    assert Screen.of(io.StringIO()) == Screen(None, False)


def test_no_color_and_dumb_terminals_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Screen.of(Terminal()).colour
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Screen.of(Terminal()).colour and Screen.of(Terminal()).terminal


def test_control_characters_are_made_visible_and_nothing_else() -> None:
    assert printable("模型 ⭐.pt") == "模型 ⭐.pt"
    assert printable("a\x1b[2J\n\udc80") == r"a\x1b[2J\n\udc80"


def test_a_long_text_goes_on_under_its_beginning_on_a_terminal_and_is_whole_in_a_pipe() -> None:
    text = "latest.pt went to quarantine/: 记录的内容变了。"
    assert wrapped(text, Screen(), "12:00  ") == [f"12:00  {text}"]
    assert wrapped(text, Screen(80), "12:00  ") == [f"12:00  {text}"]
    lines = wrapped(text, Screen(26), "12:00  ")
    assert lines[0] == "12:00  latest.pt went to"
    assert all(line.startswith(" " * 7) and cell_len(line) <= 26 for line in lines[1:])
    assert "".join(lines)[7:].replace(" ", "") == text.replace(" ", "")
    narrow = wrapped(text, Screen(24), "2026-11-29 19:30:55 +0000  ")
    assert narrow[0] == "2026-11-29 19:30:55" and all(cell_len(line) <= 24 for line in narrow)
