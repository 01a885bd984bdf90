"""The line of progress: it fits, and it says how far, how fast and how long."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.cells import cell_len

from holdfast.cli.progress import ProgressLine, line
from holdfast.manage.progress import Progress

HALF = Progress(2, 5, Path("runs/a/model_epoch_3.pt"), done=3 << 29, total=3 << 30, seconds=1.5)


def test_a_wide_terminal_gets_all_of_it() -> None:
    assert line(HALF, 120) == (
        "checking 2/5: model_epoch_3.pt  " + "█" * 15 + "░" * 15
        + "   50%  1.50 GiB/3.00 GiB  1.00 GiB/s  1.5 s left"
    )  # fmt: skip


def test_it_says_what_is_being_done() -> None:
    assert line(HALF, 100, "packing it").startswith("packing it  █")


def test_before_the_first_bytes_nobody_knows_how_long() -> None:
    text = line(Progress(1, 5, Path("a.pt"), 0, 3 << 30, 0.0), 100)
    assert "left" not in text and "0 B/s" in text
    assert "0%" in line(Progress(1, 1, Path("a.pt"), 0, 0, 0.0), 100)


@pytest.mark.parametrize("name", ["model.pt", "模型" * 30 + ".pt", "evil\x1b[2J.pt"])
def test_it_fits_on_one_line(name: str) -> None:
    progress = Progress(2, 5, Path(name), 3 << 29, 3 << 30, 1.5)
    for width in range(5, 200):
        text = line(progress, width)
        assert cell_len(text) < width and "\x1b" not in text


def test_nothing_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressLine()
    bar.show(HALF)
    bar.note("loading")
    bar.clear()
    assert capsys.readouterr().err == ""
