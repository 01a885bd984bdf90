"""The drift of weights: the numbers that torch gives, in any dtype and order, in flat memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint.format.container import Reader
from holdfast.errors import DamagedCheckpoint, ForeignCheckpoint, HoldfastError
from holdfast.manage.compare import drift_table
from holdfast.manage.compare.drift import Drift, TensorDrift, drift, layer_of
from holdfast.manage.output import json_ready
from holdfast.table import Screen
from tests.support import craft, identity, write_state

LINUX = sys.platform.startswith("linux")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def measured(tmp_path: Path, a: Any, b: Any, **options: Any) -> Drift:
    """The drift between two states, each under the key `model`."""
    for name, state in (("a", a), ("b", b)):
        (tmp_path / f"{name}.pt").unlink(missing_ok=True)
        write_state(tmp_path / f"{name}.pt", state, **identity(1))
    return drift(("A", tmp_path / "a.pt"), ("B", tmp_path / "b.pt"), **options)


def of(tmp_path: Path, a: torch.Tensor, b: torch.Tensor) -> TensorDrift:
    """The drift between two tensors; the file says the same in both directions."""
    (one,) = measured(tmp_path, {"model": {"w": a}}, {"model": {"w": b}}).tensors
    return one


def check(found: TensorDrift, a: torch.Tensor, b: torch.Tensor) -> None:
    """Against what torch computes of the whole tensors."""
    x, y, sums = a.double(), b.double(), found.sums
    assert sums.elements == a.numel()
    assert sums.relative == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-9)
    assert sums.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), rel=1e-9)
    assert sums.changed == int((x != y).sum())
    largest = (y - x).abs().max()
    assert sums.largest == float(largest)
    assert found.index is not None
    at = tuple(found.index)
    assert (y - x).abs()[at] == largest
    assert sums.values == (float(x[at]), float(y[at]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_of_every_width_are_summed_in_float64(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(1)
    a = torch.randn(301, 700).to(dtype)
    b = (a.double() + 0.01 * torch.randn(301, 700)).to(dtype)
    check(of(tmp_path, a, b), a, b)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz], ids=str
)
def test_eight_bit_floats_are_numbers_too(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(2)
    a, b = (torch.randn(64, 65).to(dtype) for _side in "ab")
    check(of(tmp_path, a, b), a, b)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.int32], ids=str)
def test_whole_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(3)
    a, b = (torch.randint(0, 100, (40, 50)).to(dtype) for _side in "ab")
    check(of(tmp_path, a, b), a, b)


def test_booleans_and_complex_numbers(tmp_path: Path) -> None:
    torch.manual_seed(4)
    a, b = (torch.rand(1000) > 0.5 for _side in "ab")
    check(of(tmp_path, a, b), a, b)
    for dtype in (torch.complex64, torch.complex128):
        x = torch.randn(30, 40, dtype=dtype)
        y = x.clone()
        y[3, 5] += 2j
        sums = of(tmp_path, x, y)
        assert (sums.index, sums.sums.changed, sums.sums.elements) == ([3, 5], 1, 1200)
        assert sums.sums.relative == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-5)


def test_another_dtype_is_compared_by_its_values(tmp_path: Path) -> None:
    torch.manual_seed(5)
    a = torch.randn(100, 100)
    b = a.to(torch.bfloat16)
    found = of(tmp_path, a, b)
    check(found, a, b)
    same = of(tmp_path, b, b.float())
    assert (same.sums.changed, same.sums.relative, same.sums.cosine) == (0, 0.0, 1.0)
    whole = measured(tmp_path, {"model": {"w": b}}, {"model": {"w": b.float()}})
    assert not whole.identical  # the values are, the tensors are not


def test_nan_and_the_infinities_are_counted_and_left_out_of_the_norms(tmp_path: Path) -> None:
    a, b = torch.ones(100_000), torch.ones(100_000)
    b[7], a[8], b[8] = math.nan, math.nan, math.nan
    b[9], b[10], a[11], b[99_999] = math.inf, -math.inf, math.inf, 3.0
    found = of(tmp_path, a, b)
    assert (found.sums.nan, found.sums.inf) == ((1, 2), (1, 2))
    assert found.sums.changed == 5  # the same NaN on both sides is no change
    assert (found.sums.largest, found.index) == (2.0, [99_999])
    assert found.sums.relative == pytest.approx(2 / math.sqrt(100_000 - 5))
    strict = json.loads(json.dumps(json_ready(found.to_json(("A", "B"))), allow_nan=False))
    assert strict["nan"] == {"A": 1, "B": 2}


def test_what_has_no_norm_and_what_has_no_elements(tmp_path: Path) -> None:
    zeros, ones = torch.zeros(5), torch.ones(5)
    for a, b, relative, cosine in (
        (zeros, zeros, 0.0, None), (zeros, ones, math.inf, None), (ones, zeros, 1.0, None),
        (ones, ones, 0.0, 1.0), (torch.empty(0, 3), torch.empty(0, 3), 0.0, None),
        (torch.tensor(2.0), torch.tensor(1.0), 0.5, 1.0),
    ):  # fmt: skip
        sums = of(tmp_path, a, b).sums
        assert (sums.relative, sums.cosine) == (relative, cosine)
    assert of(tmp_path, torch.tensor(2.0), torch.tensor(1.0)).index == []


def test_a_sign_of_zero_is_a_changed_element_without_a_change(tmp_path: Path) -> None:
    found = of(tmp_path, torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert (found.sums.changed, found.sums.relative, found.index) == (1, 0.0, None)


# ------------------------------------------------------------------------------------------ order


def test_tensors_that_lie_in_another_order_are_compared_element_by_element(
    tmp_path: Path,
) -> None:
    """Transposed in one file and not in the other, views of a larger storage, expanded ones."""
    torch.manual_seed(6)
    a, b = torch.randn(90, 70), torch.randn(90, 70)
    large = torch.randn(200, 300)
    forms = {
        "transposed": (a, b.t().contiguous().t()),
        "both": (a.t().contiguous().t(), b.t().contiguous().t()),
        "view": (large[10:100, 20:90], b),
        "views": (large[:90, :70], large[50:140, 200:270]),
        "columns": (a, torch.randn(90, 140)[:, ::2]),
        "expanded": (a[:, :1].expand(90, 70), b),
        "one row": (a[:1], b[:1].t().contiguous().t()),
        "cube": (
            torch.randn(6, 7, 8),
            torch.randn(8, 6, 7).permute(1, 2, 0),
        ),
    }
    for x, y in forms.values():
        check(of(tmp_path, x, y), x, y)


def test_a_tensor_of_more_than_one_block(tmp_path: Path) -> None:
    torch.manual_seed(7)
    a, b = torch.randn(3, 700_001), torch.randn(3, 700_001)
    check(of(tmp_path, a, b), a, b)


def test_tied_weights_are_read_and_counted_once(tmp_path: Path) -> None:
    torch.manual_seed(8)
    a, b, other = (torch.randn(50, 20) for _number in range(3))
    tied = measured(
        tmp_path, {"model": {"embed.weight": a, "head.weight": a.view(50, 20)}},
        {"model": {"embed.weight": b, "head.weight": b.view(50, 20)}},
    )  # fmt: skip
    assert [t.same_as for t in tied.tensors] == [None, "embed.weight"]
    assert tied.total.elements == 1000 and [layer.name for layer in tied.layers] == ["embed"]
    assert "head.weight = embed.weight" in "\n".join(drift_table.lines(tied, Screen()))
    for found in tied.tensors:
        check(found, a, b)
    # Tied in one of them only: two comparisons.
    untied = measured(
        tmp_path, {"model": {"embed.weight": a, "head.weight": a}},
        {"model": {"embed.weight": b, "head.weight": other}},
    )  # fmt: skip
    assert [t.same_as for t in untied.tensors] == [None, None]
    check(untied.tensors[1], a, other)


# ------------------------------------------------------------------------------------------ states


def test_layers_are_named_as_people_name_them() -> None:
    names = {
        "model.layers.11.self_attn.q_proj.weight": "model.layers.11",
        "transformer.h.0.ln_1.bias": "transformer.h.0",
        "model.norm.weight": "model.norm",
        "lm_head.weight": "lm_head",
        "0.weight": "0",
        "weight": "weight",
        "state.3.exp_avg": "state.3",
    }
    assert {name: layer_of(name) for name in names} == names


def test_the_most_changed_layer_comes_first_and_sums_its_tensors(tmp_path: Path) -> None:
    torch.manual_seed(9)
    weights = {f"h.{i}.{part}": torch.randn(30, 30) for i in range(4) for part in ("q", "k")}
    moved = {k: v * (1 + 0.1 * ((int(k[2]) * 3) % 4)) for k, v in weights.items()}
    found = measured(tmp_path, {"model": weights}, {"model": moved})
    assert [layer.name for layer in found.layers] == ["h.1", "h.2", "h.3", "h.0"]
    first = found.layers[0].sums
    assert first.relative == pytest.approx(0.3) and first.elements == 1800
    whole, other = (torch.cat([*states.values()]).double() for states in (weights, moved))
    assert found.total.relative == pytest.approx(float((other - whole).norm() / whole.norm()))
    moved["h.3.q"] = moved["h.3.q"].clone()
    moved["h.3.q"][0, 0] = math.nan
    found = measured(tmp_path, {"model": weights}, {"model": moved})
    assert found.layers[0].name == "h.3"  # what is no number is seen first
    table = drift_table.lines(found, Screen())
    assert "NaN/Inf" in table[1] and "1/0" in table[2]


def test_of_other_architectures_what_matches_is_compared_and_the_rest_listed(
    tmp_path: Path,
) -> None:
    same = torch.ones(3)
    found = measured(
        tmp_path, {"model": {"same": same, "shape": torch.ones(2, 3), "mine": same}},
        {"model": {"same": same, "shape": torch.ones(3, 2), "theirs": same, "more": same}},
    )  # fmt: skip
    assert [t.a.name for t in found.tensors] == ["same"] and not found.identical
    document = found.to_json()
    assert document["unlike"] == [
        {"section": "model", "name": "shape", "A": {"shape": [2, 3], "dtype": "float32"},
         "B": {"shape": [3, 2], "dtype": "float32"}}
    ]  # fmt: skip
    assert {k: [t["name"] for t in v] for k, v in document["only_in"].items()} == {
        "A": ["mine"], "B": ["theirs", "more"]
    }  # fmt: skip
    text = drift_table.lines(found, Screen())
    assert "Not comparable: shape (float32[2, 3] → float32[3, 2])" in text
    assert {"Only in A: mine", "Only in B: theirs", "Only in B: more"} <= set(text)
    nothing = measured(tmp_path, {"model": {"x": same}}, {"model": {"y": same}})
    assert "No tensor is in both with the same name and shape." in drift_table.lines(
        nothing, Screen()
    )


def test_sections_are_the_model_unless_others_are_named(tmp_path: Path) -> None:
    weight = torch.ones(4)
    moments = {"state": {0: {"exp_avg": torch.zeros(4), "step": torch.tensor(1.0)}}}
    later = {"state": {0: {"exp_avg": torch.ones(4), "step": torch.tensor(2.0)}}}
    rng = {"torch": torch.zeros(8, dtype=torch.uint8)}
    a = {"model": {"w": weight}, "optimizer": moments, "rng": rng}
    b = {"model": {"w": weight}, "optimizer": later, "rng": rng}
    assert measured(tmp_path, a, b).identical
    found = measured(tmp_path, a, b, wanted=["all"])
    assert found.sections == ["model", "optimizer"]  # random states are no numbers that drift
    assert [layer.name for layer in found.layers] == ["state.0", "w"]
    assert measured(tmp_path, a, b, wanted=["rng"]).sections == ["rng"]
    with pytest.raises(HoldfastError, match=r"section ema.*model, optimizer, rng"):
        measured(tmp_path, a, b, wanted=["ema"])
    # Another loop calls its model as it likes.
    a, b = ({"net": {"w": weight}}, {"net": {"w": weight + 1}})
    assert measured(tmp_path, a, b).sections == ["net"]


def test_a_terminal_gets_the_layers_that_changed_most_and_a_pipe_all(tmp_path: Path) -> None:
    weights = {f"h.{i}.w": torch.ones(5) for i in range(30)}
    moved = {name: value + i for i, (name, value) in enumerate(weights.items())}
    found = measured(tmp_path, {"model": weights}, {"model": moved})
    assert len(drift_table.lines(found, Screen())) == 1 + 1 + 30 + 1
    shown = drift_table.lines(found, Screen(80))
    assert len(shown) == 1 + 1 + 20 + 1 + 1 and shown[2].startswith("h.29")
    assert any("10 more" in line for line in shown)


# ----------------------------------------------------------------------------------------- damage


def test_damage_is_told_on_the_way_and_nothing_is_made_of_the_numbers(tmp_path: Path) -> None:
    torch.manual_seed(10)
    weight, wide = torch.randn(600, 700), torch.randn(700, 600)
    a = write_state(tmp_path / "a.pt", {"model": {"w": weight}}, **identity(1))
    for state in (weight, wide.t(), torch.randn(700, 700)[:600]):
        b = write_state(tmp_path / "b.pt", {"model": {"w": state}}, **identity(1))
        with Reader(b) as reader:
            place = reader.records[0].end - 100
        with b.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 4]))
        for pair in ((("A", a), ("B", b)), (("B", b), ("A", a))):
            with pytest.raises(DamagedCheckpoint, match=r"b\.pt is damaged.*checkpoint/data/0"):
                drift(*pair)
        b.unlink()


def test_a_file_that_became_shorter_and_a_wrong_header_are_damage(tmp_path: Path) -> None:
    state = {"model": {"w": torch.randn(600, 700)}}
    a = write_state(tmp_path / "a.pt", state, **identity(1))
    b = write_state(tmp_path / "b.pt", state, **identity(1))
    with b.open("r+b") as file:
        file.seek(8)
        file.write(b"\xff")
    with pytest.raises(DamagedCheckpoint, match="header"):
        drift(("A", a), ("B", b))


def test_a_manifest_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    good = write_state(tmp_path / "a.pt", {"model": {"w": torch.ones(2)}}, **identity(1))
    entry = {"path": "model/w", "storage": 0, "dtype": "float32", "shape": [2], "stride": [1],
             "offset": 0}  # fmt: skip
    for i, change in enumerate((
        {"offset": 1}, {"stride": [-1]}, {"stride": [5]}, {"storage": 7},
        {"shape": [True]}, {"shape": "2"}, {"stride": []},
    )):  # fmt: skip
        manifest = {
            **identity(1), "tensors": [{**entry, **change}],
            "tree": {"dict": [["model", {"dict": [["w", {"tensor": 0}]]}]]},
        }  # fmt: skip
        bad = craft(tmp_path / f"{i}.pt", manifest, [("checkpoint/data/0", bytes(8))])
        with pytest.raises(ForeignCheckpoint, match="makes no sense"):
            drift(("A", good), ("B", bad))


# ----------------------------------------------------------------------------------------- memory

_PEAK = """
import re, sys
from pathlib import Path
from holdfast.manage.compare.drift import drift
status = Path("/proc/self/status")
before = int(re.search(r"VmRSS:\\s+(\\d+) kB", status.read_text())[1])
found = drift(("A", Path(sys.argv[1])), ("B", Path(sys.argv[2])))
# Not getrusage: a child begins with the peak of its parent there.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1])
print((peak - before) * 1024, found.total.elements, found.total.changed)
"""


@pytest.mark.skipif(not LINUX, reason="asks /proc")
def test_one_tensor_of_each_file_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """320 MB a file, in ten tensors; what is held are two of them and the blocks of the sums."""
    block = torch.arange(8 << 20, dtype=torch.float32)
    paths = [
        write_state(
            tmp_path / f"{name}.pt",
            {"model": {f"{i}": block + i + more for i in range(10)}},
            **identity(1),
        )
        for name, more in (("a", 0), ("b", 1))
    ]
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *map(str, paths)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    peak, elements, changed = map(int, done.stdout.split())
    assert elements == changed == 10 * (8 << 20)
    assert peak < 250 << 20
