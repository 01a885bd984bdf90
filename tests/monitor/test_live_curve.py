"""A long run becomes a small curve, at a cost of what is new."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from rich.cells import cell_len

from holdfast.monitor import live_curve
from holdfast.monitor.live_curve import LIMIT, Curve, Series, draw
from holdfast.monitor.measured import Evaluation, Point


def point(step: int, loss: float | None = None) -> Point:
    value = 100 / (step + 10) if loss is None else loss
    return Point(step, "", 1, value, value, 1e-3, 1.0, None, None)


def evaluation(step: int, loss: float | None) -> Evaluation:
    return Evaluation(step, "", loss, None, None)


def test_few_points_are_drawn_as_they_are() -> None:
    found = Curve()
    assert found.update([point(10, 3.0), point(20, 2.0)], [evaluation(20, 2.5)])
    assert found.series == Series(((10, 3.0), (20, 2.0)), ((10, 3.0), (20, 2.0)), ((20.0, 2.5),))


def test_an_evaluation_that_is_no_number_is_not_drawn() -> None:
    found = Curve()
    measured = [evaluation(10, math.nan), evaluation(20, 2.5), evaluation(30, math.inf)]
    found.update([point(10), point(30)], measured)
    assert found.series.validation == ((20.0, 2.5),)
    assert draw(found.series, 60, 12)


def test_nothing_new_is_no_new_curve() -> None:
    found, points = Curve(), [point(10)]
    found.update(points, [])
    assert not found.update(points, [])
    assert found.update([*points, point(20)], [])
    assert found.update([*points, point(20)], [evaluation(20, None)])


def test_a_long_run_is_merged_into_few_points_that_keep_its_mean() -> None:
    points = [point(10 * i, float(i % 7)) for i in range(1, 20_001)]
    found = Curve()
    for i in range(0, 20_000, 3333):  # as they come
        found.update(points[: i + 3333], [])
    found.update(points, [])
    at_once = Curve()
    at_once.update(points, [])
    assert found.series == at_once.series
    assert LIMIT / 2 <= len(found.series.raw) <= LIMIT
    mean = sum(p.loss or 0 for p in points) / len(points)
    assert sum(loss for _step, loss in found.series.raw) / len(found.series.raw) == (
        pytest.approx(mean, rel=0.01)
    )
    assert found.series.raw[0][0] < 400
    assert found.series.raw[-1][0] > 199_600


def test_undone_steps_are_gone() -> None:
    points = [point(10 * i) for i in range(1, 11)]
    found = Curve()
    found.update(points, [])
    del points[5:]
    assert found.update(points, [])
    assert [step for step, _loss in found.series.raw] == [10, 20, 30, 40, 50]
    points[3:] = [point(35), point(38), point(45), point(55)]  # and others have come meanwhile
    assert found.update(points, [])
    assert [step for step, _loss in found.series.raw] == [10, 20, 30, 35, 38, 45, 55]
    assert found.update([], [])
    assert found.series == Series()


def test_losses_that_are_no_numbers_are_left_out() -> None:
    found = Curve()
    bad = Point(30, "", 1, None, None, None, None, None, None)
    found.update([point(10), point(20, math.nan), bad], [evaluation(10, None)])
    assert [step for step, _loss in found.series.raw] == [10]
    assert found.series.validation == ()


def test_a_look_costs_what_is_new() -> None:
    points = [point(i) for i in range(1, 100_001)]
    found = Curve()
    found.update(points, [])
    began = time.process_time()
    for i in range(100_001, 100_051):
        points.append(point(i))
        found.update(points, [])
    assert (time.process_time() - began) / 50 < 0.02


@pytest.mark.parametrize(("width", "height"), [(20, 4), (43, 9), (80, 24), (200, 60)])
def test_a_curve_has_the_size_that_it_was_given(width: int, height: int) -> None:
    found = Curve()
    found.update([point(10 * i) for i in range(1, 500)], [evaluation(2000, 1.0)])
    lines = draw(found.series, width, height).split("\n")
    assert len(lines) == height
    assert all(cell_len(line.plain) <= width for line in lines)
    assert any("o" in line.plain for line in lines), "the validation"
    assert any("\u2800" <= c <= "\u28ff" for line in lines for c in line.plain), "the training"


def test_the_axes_are_labelled_with_steps_and_losses() -> None:
    found = Curve()
    found.update([point(10, 4.0), point(1000, 2.0)], [])
    lines = [line.plain for line in draw(found.series, 60, 12).split("\n")]
    assert lines[-1].split() == ["10", "258", "505", "752", "1000"]
    labels = [float(line.split("┤")[0]) for line in lines if "┤" in line]
    assert labels == sorted(labels, reverse=True)
    assert labels[0] == pytest.approx(4.1)
    assert labels[-1] == pytest.approx(1.9)


def test_colours_are_those_that_everybody_can_tell_apart() -> None:
    found = Curve()
    points = [
        Point(10 * i, "", 1, 3.0 + i % 5, 9.0 - i / 10, 1e-3, 1.0, None, None) for i in range(50)
    ]
    found.update(points, [evaluation(200, 1.0)])
    drawn = draw(found.series, 60, 12)
    used = {span.style.color.number for span in drawn.spans if _coloured(span.style)}
    assert used == {live_curve.TRAINING, live_curve.SMOOTHED, live_curve.VALIDATION}


def _coloured(style: Any) -> bool:
    return getattr(style, "color", None) is not None and style.color.number is not None


@pytest.mark.parametrize(
    "series",
    [
        Series(((10, 2.0),)),
        Series(((10, 2.0),), ((10, 2.0),)),
        Series((), (), ((10.0, 2.0),)),
        Series(((10, 2.0), (20, 2.0)), ((10, 2.0), (20, 2.0))),
        Series(((10, 0.0), (20, 1e9)), ((10, 1e-9), (20, 0.0))),
    ],
)
def test_odd_curves_are_drawn_too(series: Series) -> None:
    assert len(draw(series, 40, 8).split("\n")) == 8


def test_nothing_is_drawn_where_there_is_nothing_or_no_room() -> None:
    assert not draw(Series(), 80, 24)
    assert not draw(Series(((10, 2.0),)), 10, 24)
    assert not draw(Series(((10, 2.0),)), 80, 3)
