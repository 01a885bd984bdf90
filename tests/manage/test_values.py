"""The torch-free reader of plain values gives what the engine's own reader gives."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import CheckpointManager, load
from holdfast.checkpoint.format import plain_state, read_manifest
from holdfast.errors import ForeignCheckpoint
from holdfast.manage.output import flatten, json_ready

SHARED = {"learning_rate": 1e-3, "betas": (0.9, 0.95)}
STATE: dict[str, Any] = {
    "first": SHARED,
    "config": SHARED,  # an alias: written once, referred to here
    "nothing": None,
    "flags": [True, False, 1, 0],
    "large": 2**70,
    "odd": {1: "one", (2, "b"): "two", None: "none"},
    "numbers": [math.inf, -math.inf, -0.0, 1e-300],
    "complex": 1 + 2j,
    "set": {1, 2, 3},
    "bytes": b"\x00\xff",
    "empty": [{}, [], (), ""],
    "ordered": OrderedDict(b=1, a=2),
    "text": "一步都不丢",
}


def test_plain_values_are_those_that_the_engine_reads(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run", STATE) as manager:
        manager.save(step=1)
    path = tmp_path / "run" / "latest.pt"
    plain, full = plain_state(read_manifest(path), path), load(path)
    for key, value in STATE.items():
        assert plain[key] == full[key] == value, key
        assert type(plain[key]) is type(full[key]) or key == "ordered"
    assert plain["first"] is plain["config"]


def test_tensors_stand_as_what_the_manifest_says_of_them(tmp_path: Path) -> None:
    state = {"w": torch.zeros(2, 3, dtype=torch.bfloat16), "dtype": torch.float16, "nan": math.nan}
    with CheckpointManager(tmp_path / "run", state) as manager:
        manager.save(step=1)
    path = tmp_path / "run" / "latest.pt"
    plain = plain_state(read_manifest(path), path)
    assert (plain["w"]["dtype"], plain["w"]["shape"]) == ("bfloat16", [2, 3])
    assert plain["dtype"] == "float16" and math.isnan(plain["nan"])


@pytest.mark.parametrize(
    "tree", [{}, {"unknown": 1}, {"tensor": 9}, {"ref": 0}, {"float": "zz"}, {"dict": [[1]]}]
)
def test_a_tree_that_makes_no_sense_is_refused(tree: Any) -> None:
    with pytest.raises(ForeignCheckpoint, match="makes no sense"):
        plain_state({"tensors": [], "tree": tree}, "x.pt")


def test_nested_settings_become_dotted_names() -> None:
    nested = {"a": {"b": 1, "c": {}}, "groups": [{"lr": 1}], "betas": (0.9, 0.95)}
    assert flatten(nested) == {"a.b": 1, "a.c": {}, "groups.0.lr": 1, "betas": (0.9, 0.95)}


def test_json_gets_names_for_numbers_that_it_lacks() -> None:
    assert json_ready({1: (math.nan, -math.inf), "b": {2}}) == {"1": ["nan", "-inf"], "b": "{2}"}
