"""Numbers as people read them: units, digits, and no unit that has just been passed."""

from __future__ import annotations

import math

import pytest

from holdfast.formatting import (
    format_age,
    format_bytes,
    format_loss,
    format_seconds,
    format_time,
    parse_time,
    wrap_cells,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (40_960, "40.0 KiB"),
        (10_235, "10.0 KiB"),  # not 9.995 with three decimals, not 10.00
        (163_840, "160 KiB"),
        (1024 * 1024 - 1, "1.00 MiB"),  # not 1024 KiB
        (1_488_570_000, "1.39 GiB"),
        (2**60, "1024 PiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_bytes_have_three_digits_and_a_binary_unit(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (-5, "0.00 s"),
        (0.994, "0.99 s"),
        (0.996, "1.0 s"),
        (8.44, "8.4 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (264.1, "4 min 24 s"),
        (3599.6, "1 h 00 min"),
        (3900, "1 h 05 min"),
        (86_399, "1 d 00 h"),
        (183_600, "2 d 03 h"),
        (math.nan, "-"),
        (math.inf, "-"),
    ],
)
def test_durations_show_two_units_and_never_sixty_of_one(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (59.9, "59 s"), (60, "1 min"), (7199, "1 h"), (47.5 * 3600, "47 h"),
     (48 * 3600, "2 d"), (700 * 86_400, "700 d"), (731 * 86_400, "2 y"), (math.nan, "-")],
)  # fmt: skip
def test_ages_are_rounded_down_to_one_unit(seconds: float, text: str) -> None:
    assert format_age(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(4.89341, "4.8934"), (2980.958, "2981.0"), (3.1e-5, "3.100e-05"), (0.0, "0.0"),
     (-0.5, "-0.5000"), (1e9, "1.000e+09"), (math.nan, "nan"), (math.inf, "inf"), (None, "-")],
)  # fmt: skip
def test_losses_keep_the_digits_that_matter(value: float | None, text: str) -> None:
    assert format_loss(value) == text


def test_times_are_local_and_carry_their_zone() -> None:
    shown = format_time("2026-03-01T10:05:00.123+00:00")
    again = parse_time("2026-03-01T10:05:00.123+00:00")
    assert again is not None and shown == again.strftime("%Y-%m-%d %H:%M:%S %z")
    assert shown[-5] in "+-"


@pytest.mark.parametrize("text", [None, 5, "", "yesterday", "0001-01-01T00:00:00"])
def test_what_is_no_time_is_a_dash_and_no_crash(text: object) -> None:
    assert format_time(text) == "-" or isinstance(format_time(text), str)


def test_a_bracket_stays_with_what_it_holds() -> None:
    for width in range(8, 30):
        lines = wrap_cells("检查点 latest.pt（最新）：【损坏】记录（data/14）的内容变了。", width)
        assert not any(line[0] in "，。：）】" or line[-1] in "（【" for line in lines), lines
    assert wrap_cells("（（", 1) == ["（（"]


def test_a_command_to_copy_is_never_broken() -> None:
    for text in (
        "Its check found damage (`holdfast verify runs/a --sections model`), see there.",
        "检查发现了损坏（`holdfast verify runs/a --sections model`），用它查看。",
    ):
        lines = wrap_cells(text, 20)
        assert any("`holdfast verify runs/a --sections model`" in line for line in lines), lines
    assert wrap_cells("a ` b ` c", 3) == ["a", "` b `", "c"]
    assert wrap_cells("one ` alone", 5) == ["one `", "alone"]
