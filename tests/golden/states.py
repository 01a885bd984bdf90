"""States of which a file lies in `files/`, written by the first version that people used.

No float arithmetic makes them, so that they are the same bits on every processor. Never change one:
add another, and write its file (README.md).
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BYTES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
    torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def _of_bytes(dtype: torch.dtype, count: int) -> torch.Tensor:
    """A tensor whose bytes count upwards; bool has 0 and 1 only."""
    size = torch.empty(0, dtype=dtype).element_size()
    data = [i % (2 if dtype is torch.bool else 120) for i in range(count * size)]
    return torch.tensor(data, dtype=torch.uint8).view(dtype)


def dtypes() -> dict[str, Any]:
    state: dict[str, Any] = {str(dtype): _of_bytes(dtype, 5) for dtype in (*FLOATS, *BYTES)}
    state["scalar"] = torch.tensor(7, dtype=torch.int32)
    state["empty"] = torch.empty(0, 3)
    state["a page and more"] = torch.arange(1500, dtype=torch.int32).reshape(30, 50)
    state["numpy"] = np.arange(7, dtype=np.int16)
    return state


def views() -> dict[str, Any]:
    """Tied weights, views of one storage, what is not contiguous, a parameter."""
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "weight": weight,
        "tied": weight,
        "row": weight[1],
        "column": weight[:, 2],
        "turned": weight.t(),
        "list": [weight, {"again": weight}],
    }


def values() -> dict[str, Any]:
    """Plain Python values of every kind, and where they are hard to write as JSON."""
    nan = struct.unpack("<d", bytes.fromhex("010000000000f87f"))[0]
    shared = ["the same list"]
    ordered = OrderedDict([("b", 1), ("a", 2)])
    return {
        "floats": [0.1, -0.0, float("inf"), -float("inf"), nan, 5e-324, 1.7976931348623157e308],
        "integers": [0, -1, 2**53, 2**53 + 1, -(2**63), 2**64, 10**40],
        "others": [None, True, False, "", "一步都不丢 🛟", '\0\n"\\', b"", b"\x00\xff", 1 + 2j],
        "tuples": ((), (1,), ((2, 3), [4])),
        "keys": {1: "int", "1": "str", 2: "two", (3, "x"): "tuple", 0.5: "float"},
        "ordered": ordered,
        "set": {3, 1, 2},
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "shared": [shared, shared],
        "bytearray": bytearray(b"abc"),
        "empty": {"dict": {}, "list": []},
    }


STATES = {"dtypes": dtypes, "views": views, "values": values}
