"""Comparing two states: to the bit, by dotted names, with the first index and both values."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch

from holdfast.prove.states import count_values, differences, first_difference

OTHER_NAN = struct.unpack("d", struct.pack("Q", 0x7FF8_0000_0000_0001))[0]


def told(a: Any, b: Any) -> str:
    return str(first_difference(a, b))


@pytest.mark.parametrize(
    "state",
    [
        {"a": [1, 2.5, "x", None, True, b"y", (1, {2})]},
        {"nan": math.nan, "inf": -math.inf, "complex": complex(math.nan, -0.0)},
        torch.tensor([math.nan, -0.0, 1.0]),
        torch.zeros(0, 3),
        torch.tensor(3),
        torch.zeros(2, 3, dtype=torch.bfloat16).T,
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
    ],
)
def test_a_state_is_equal_to_itself(state: Any) -> None:
    assert first_difference(state, state) is None


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "a.b: 1 ≠ 2"),
        ({"a": 1}, {"a": 1.0}, "a: int ≠ float"),
        ({"a": 1}, {"a": True}, "a: int ≠ bool"),
        ({"a": 0.0}, {"a": -0.0}, "a: 0.0 ≠ -0.0"),
        (
            [math.nan],
            [OTHER_NAN],
            "0: nan (7ff8000000000000) ≠ nan (7ff8000000000001)",
        ),
        ({"a": [1, 2]}, {"a": [1]}, "a: 2 entries ≠ 1 entries"),
        ({"a": 1}, {}, "a: 1 ≠ nothing"),
        ({}, {"a": torch.zeros(2)}, "a: nothing ≠ float32[2]"),
        (torch.zeros(2), torch.zeros(3), "state: float32[2] ≠ float32[3]"),
        (torch.zeros(2), torch.zeros(2).int(), "state: float32[2] ≠ int32[2]"),
        ({"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)}, "w: 1.0 ≠ 2.0"),
        ({"w": torch.tensor([0.0])}, {"w": torch.tensor([-0.0])}, "w[0]: 0.0 ≠ -0.0"),
        ({0: {"x": 1}}, {0: {"x": 3}}, "0.x: 1 ≠ 3"),
    ],
)
def test_the_first_difference_has_a_name_and_both_values(a: Any, b: Any, message: str) -> None:
    assert told(a, b) == message


def test_the_index_is_that_of_the_first_element() -> None:
    """Also in a later chunk, and where the tensor does not lie in memory as it is indexed."""
    a = torch.full((3, 4, 500_000), 33.0).permute(2, 0, 1)
    b = a.clone()
    b[400_000, 1, 2] += 0.5
    b[499_999, 0, 0] += 1
    found = list(differences({"w": a}, {"w": b}))
    assert [(d.path, d.index, d.a, d.b) for d in found] == [("w", (400_000, 1, 2), "33.0", "33.5")]


def test_one_flipped_bit_in_every_dtype_is_found() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int16, torch.uint8,
                  torch.complex64):  # fmt: skip
        a = torch.zeros(5, dtype=dtype)
        b = a.clone()
        b.view(torch.uint8)[3 * a.element_size()] ^= 1
        found = first_difference(a, b)
        assert found is not None and found.index == (3,), dtype


def test_every_difference_comes_in_order() -> None:
    a = {"x": torch.zeros(2), "y": 1, "z": [1, 2]}
    b = {"x": torch.ones(2), "y": 1, "z": [0, 3]}
    assert [d.name for d in differences(a, b)] == ["x[0]", "z.0", "z.1"]


def test_long_values_are_cut() -> None:
    assert len(told({"a": "x" * 500}, {"a": ""})) < 100


def test_counting() -> None:
    assert count_values({"a": torch.zeros(1), "b": [1, (2, torch.zeros(1))]}) == (2, 2)
