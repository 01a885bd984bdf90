"""Curves in a terminal: whole lines of one width, signs beside colours, room for what is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len

from holdfast import i18n
from holdfast.monitor.curves import CHECKPOINT, INTERRUPTED, KINDS, Curves, Series
from holdfast.monitor.terminal.plot import (
    SMOOTHED,
    TRAINING,
    VALIDATION,
    lines,
    losses,
    ticks,
)
from holdfast.table import Screen
from tests.monitor.views import curves, run_with_metrics

PIPE = Screen()
NONE = Series([], [])


@pytest.fixture(autouse=True)
def english() -> Iterator[None]:
    i18n.set_language("en")
    yield
    i18n.set_language("en")


def plain(
    loss: Series, val_loss: Series = NONE, smoothed: Series = NONE, **marks: list[int]
) -> Curves:
    every = {kind: marks.get(kind, []) for kind in KINDS}
    return Curves("run", loss, smoothed, val_loss, every)


def test_a_pipe_gets_the_drawing_without_colour(tmp_path: Path) -> None:
    text = "\n".join(lines([curves(run_with_metrics(tmp_path / "run"))], PIPE))
    assert "\x1b" not in text
    assert "loss in nats a token" in text
    assert text.count("●") > 4 and "▲" in text and "⠤" in text
    assert "⠒⠤ training loss   ● validation loss   ▲ checkpoint" in text


@pytest.mark.parametrize(("width", "height"), [(60, 20), (80, 24), (120, 40), (200, 60)])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_it_fits_the_terminal(tmp_path: Path, width: int, height: int, language: str) -> None:
    i18n.set_language(language)
    run = curves(run_with_metrics(tmp_path / "run"))
    found = lines([run], Screen(width, colour=False), height)
    assert max(map(cell_len, found)) <= width
    assert len(found) < height and sum("┌" in line for line in found) == 1


def test_several_runs_differ_by_sign_and_are_named(tmp_path: Path) -> None:
    a = curves(run_with_metrics(tmp_path / "a"), "first")
    b = curves(run_with_metrics(tmp_path / "b", shift=0.5), "second")
    text = "\n".join(lines([a, b], PIPE, 24))
    assert "first: training loss" in text and "• second: training loss" in text
    assert "A validation loss" in text and "B validation loss" in text
    drawn = text.split("┘")[0]
    assert drawn.count("•") > 10 and "A" in drawn and "B" in drawn and "⠤" in drawn


def test_an_interruption_after_the_last_point_is_on_the_plot() -> None:
    run = plain(Series([10, 20], [3.0, 2.0]), **{INTERRUPTED: [27], CHECKPOINT: [20]})
    drawn = "\n".join(lines([run], PIPE)).split("┘")[0]
    assert "✗" in drawn and "▲" in drawn


def test_odd_curves_are_drawn_too() -> None:
    for run in (
        plain(Series([5], [2.5])),
        plain(Series([0], [0.0])),
        plain(NONE, Series([5], [2.5])),
        plain(Series([1, 2, 3], [1e-9, 1e9, -4.0])),
        plain(Series([1, 2], [3.0, 3.0])),
        plain(Series([10**9, 10**9 + 1], [3.0, 2.0])),
    ):
        assert len(lines([run], PIPE)) > 12
    assert lines([], PIPE) == lines([plain(NONE)], PIPE) == ["There is nothing to plot yet."]


def test_colour_only_where_the_terminal_has_it(tmp_path: Path) -> None:
    run = curves(run_with_metrics(tmp_path / "run"))
    assert "\x1b[38;5;32m" in "\n".join(lines([run], Screen(80, colour=True)))
    assert "\x1b" not in "\n".join(lines([run], Screen(80, colour=False)))


def test_a_label_cannot_drive_the_terminal() -> None:
    runs = [plain(Series([1, 2], [1.0, 2.0])) for _ in range(2)]
    shown = [
        Curves("a\x1b[2J", *(getattr(r, n) for n in r.__slots__ if n != "label")) for r in runs
    ]
    assert "\x1b" not in "\n".join(lines(shown, PIPE))


def test_ticks_are_round_and_within() -> None:
    assert ticks(0, 412, 6) == [0, 100, 200, 300, 400]
    assert ticks(6.1, 7.3, 8) == [6.2, 6.4, 6.6, 6.8, 7.0, 7.2]
    assert ticks(0.1, 0.5, 4) == [0.1, 0.2, 0.3, 0.4, 0.5]
    for low, high in ((0, 1e-9), (-5, 7e12), (2.9999, 3.0001)):
        found = ticks(low, high, 5)
        assert 1 <= len(found) <= 7 and all(low * 1.01 - 1 <= t <= high * 1.01 for t in found)


# ------------------------------------------------------------------------------------- the monitor


def live() -> Curves:
    steps = list(range(10, 5000, 10))
    loss = Series(steps, [4 + (step // 10) % 5 for step in steps])
    smoothed = Series(steps, [9 - step / 1000 for step in steps])
    return plain(loss, Series([2000], [5.0]), smoothed)


@pytest.mark.parametrize(("width", "height"), [(20, 4), (43, 9), (80, 24), (200, 60)])
def test_the_curve_of_the_monitor_has_the_size_that_it_was_given(width: int, height: int) -> None:
    found = losses(live(), width, height)
    assert len(found) == height and all(line.cell_len <= width for line in found)
    assert any("o" in line.plain for line in found), "the validation"
    assert any("\u2800" <= c <= "\u28ff" for line in found for c in line.plain), "the training"


def test_each_curve_of_the_monitor_has_its_colour_and_one_bad_batch_is_cut_off() -> None:
    run = live()
    run.loss.values[7] = 1e9
    found = losses(run, 60, 12)
    styles = [span.style for line in found for span in line.spans]
    colours = {style.color.number for style in styles if getattr(style, "color", None)}
    assert colours >= {TRAINING, SMOOTHED, VALIDATION}
    labels = [float(line.plain.split("┤")[0]) for line in found if "┤" in line.plain]
    assert labels == sorted(labels, reverse=True) and labels[0] < 10


def test_odd_curves_and_none_and_no_room_are_no_error_for_the_monitor() -> None:
    for run in (
        plain(Series([10], [2.0])),
        plain(NONE, Series([10], [2.0])),
        plain(Series([10, 20], [0.0, 1e9]), smoothed=Series([10, 20], [1e-9, 0.0])),
    ):
        assert len(losses(run, 40, 8)) == 8
    assert losses(plain(NONE), 80, 24) == losses(live(), 10, 24) == losses(live(), 80, 3) == []
