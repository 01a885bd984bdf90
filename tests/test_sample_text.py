"""The text that ships with the project: large, varied, and no passage made from a template."""

from __future__ import annotations

import re
from collections import defaultdict

from tests.training.runs import SAMPLE

PASSAGES = [p for p in SAMPLE.read_text("utf-8").split("\n\n") if p.strip()]


def test_it_is_large_enough() -> None:
    assert SAMPLE.stat().st_size >= 100_000
    assert len(PASSAGES) >= 300
    assert all(60 <= len(p) <= 300 for p in PASSAGES)


def test_no_twelve_characters_stand_in_more_than_three_passages() -> None:
    where = defaultdict(set)
    for number, passage in enumerate(PASSAGES):
        text = re.sub(r"\s", "", passage)
        for start in range(len(text) - 11):
            where[text[start : start + 12]].add(number)
    assert max(map(len, where.values())) <= 3


def test_passages_begin_and_end_differently() -> None:
    assert len({p[:4] for p in PASSAGES}) > 0.97 * len(PASSAGES)
    assert len({p[-6:] for p in PASSAGES}) > 0.97 * len(PASSAGES)


def test_it_is_clean_chinese() -> None:
    text = "".join(PASSAGES)
    chinese = sum("\u4e00" <= c <= "\u9fff" for c in text)
    assert chinese > 0.8 * len(text)
    assert "\ufffd" not in text
    assert "\r" not in text
    assert not re.search(
        r"[\u4e00-\u9fff][,!?;:][\u4e00-\u9fff]", text
    )  # punctuation is full-width
    assert len(set(text)) > 2500  # a varied vocabulary of characters
