"""Our reader, which never unpickles, gives exactly what torch.load gives."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import random
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast import load
from holdfast.checkpoint.format.container import Reader
from holdfast.checkpoint.format.layout import MANIFEST
from holdfast.checkpoint.format.reading import OWN_PAGES, File
from holdfast.checkpoint.state import codec
from holdfast.checkpoint.state.tree import DTYPES, normalise
from holdfast.checkpoint.system.pages import PAGE
from holdfast.errors import CheckpointError, DamagedCheckpoint, ForeignCheckpoint
from tests.support import assert_same, craft, flip, write_state

ANY_FLOAT = st.integers(0, 2**64 - 1).map(lambda n: struct.unpack("<d", struct.pack("<Q", n))[0])
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # lone surrogates, too
KEYS = st.one_of(
    st.none(), st.booleans(), st.integers(), ANY_TEXT, st.binary(max_size=4),
    st.floats(allow_nan=False), st.tuples(st.integers(), ANY_TEXT), st.just(()),
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**2000), 2**2000), ANY_FLOAT,
    st.tuples(ANY_FLOAT, ANY_FLOAT).map(lambda p: complex(*p)), ANY_TEXT, st.binary(max_size=20),
    st.binary(max_size=5).map(bytearray), st.sampled_from(sorted(DTYPES)).map(DTYPES.__getitem__),
    st.sampled_from(["cpu", "cuda:1", "meta"]).map(torch.device),
    st.lists(st.integers(0, 2**40), max_size=3).map(torch.Size), st.sets(KEYS, max_size=3),
)  # fmt: skip


@st.composite
def memories(draw: st.DrawFn) -> torch.Tensor:
    """A flat tensor of any dtype over random bytes, all of it in use."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    count = draw(st.integers(0, 12))
    raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    return torch.frombuffer(bytearray(raw or b"\0"), dtype=torch.uint8)[: len(raw)].view(dtype)


@st.composite
def views(draw: st.DrawFn, base: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a slice, a transpose, an expansion, a scalar or nothing of it."""
    n = base.numel()
    if n == 0:
        return base.view(draw(st.sampled_from([(0,), (0, 3), (2, 0)])))
    start = draw(st.integers(0, n - 1))
    length = draw(st.integers(0, n - start))
    kind = draw(st.sampled_from(["itself", "slice", "step", "transpose", "expand", "scalar"]))
    if kind == "slice":
        return base[start : start + length]
    if kind == "step":
        return base[start:: draw(st.integers(1, 3))]  # fmt: skip
    if kind == "transpose":
        return base[: n // 2 * 2].view(2, -1).t()
    if kind == "expand":
        return base[start].expand(draw(st.integers(0, 3)), 2)
    return base[start] if kind == "scalar" else base


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    """A state whose containers and tensors stand in several places and share memory."""
    pool: list[Any] = draw(st.lists(SCALARS, min_size=1, max_size=4))
    bases = draw(st.lists(memories(), max_size=3))
    for base in bases:
        pool += draw(st.lists(views(base), min_size=1, max_size=3))

    def some() -> list[Any]:
        chosen = draw(st.lists(st.integers(0, len(pool) - 1), max_size=4))
        return [pool[i] for i in chosen]

    for _i in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(["list", "tuple", "dict", "odict"]))
        if kind in ("list", "tuple"):
            pool.append(some() if kind == "list" else tuple(some()))
            continue
        values = some()
        keys = draw(st.lists(KEYS, min_size=len(values), max_size=len(values)))
        made: Any = (dict if kind == "dict" else OrderedDict)(zip(keys, values, strict=True))
        if kind == "odict" and draw(st.booleans()):
            made._metadata = OrderedDict(zip(keys, values, strict=True))
            made.other = some()
        pool.append(made)
    return {str(i): value for i, value in enumerate(pool)}


@given(states())
@settings(
    max_examples=150, deadline=None, print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_our_reader_gives_what_torch_load_gives(tmp_path: Path, state: dict[str, Any]) -> None:
    path = write_state(tmp_path / "a.pt", state)
    ours, theirs = load(path), torch.load(path, weights_only=True)
    assert_same(ours, theirs)
    assert_same(ours, torch.load(path, weights_only=True, mmap=True))


@given(states())
@settings(
    max_examples=60, deadline=None, print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_what_was_read_can_be_saved_again(tmp_path: Path, state: dict[str, Any]) -> None:
    """A fixed point: reading loses nothing that saving had kept."""
    once = load(write_state(tmp_path / "a.pt", state))
    assert_same(once, load(write_state(tmp_path / "b.pt", once)))


def test_bits_of_nan_survive_in_values_and_tensors(tmp_path: Path) -> None:
    odd = struct.unpack("<d", struct.pack("<Q", 0xFFF8_0000_DEAD_BEEF))[0]
    state = {"f": odd, "c": complex(odd, -0.0), "t": torch.tensor([odd], dtype=torch.float64)}
    read = load(write_state(tmp_path / "a.pt", state))
    assert struct.pack("<d", read["f"]) == struct.pack("<d", odd)
    assert_same(read, state)


# ------------------------------------------------------------------------------------ one key only


def test_one_key_reads_no_other_tensor(tmp_path: Path) -> None:
    state = {"big": torch.zeros(10_000), "small": torch.ones(3), "n": {"k": (1, 2)}}
    path = write_state(tmp_path / "a.pt", state)
    with Reader(path) as reader:
        flip(path, reader.records[0].offset + 99)
    assert load(path, only="small").tolist() == [1, 1, 1]
    assert load(path, only="n") == {"k": (1, 2)}
    with pytest.raises(DamagedCheckpoint):
        load(path, only="big")
    with pytest.raises(DamagedCheckpoint):
        load(path)


def test_one_key_that_refers_to_another_one(tmp_path: Path) -> None:
    """Containers that stand in several places are written where they stand first."""
    inner = {"deep": [1, 2]}
    shared = {"a": inner, "t": torch.ones(2)}
    path = write_state(tmp_path / "a.pt", {"x": shared, "y": [shared], "z": inner["deep"]})
    assert load(path, only="z") == [1, 2]
    assert load(path, only="y")[0]["a"] == inner
    assert load(path, only="y")[0]["t"].tolist() == [1, 1]


def test_a_key_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = write_state(tmp_path / "a.pt", {"model": 1})
    with pytest.raises(ForeignCheckpoint, match="holds no optimizer"):
        load(path, only="optimizer")


def test_references_that_go_in_circles_end(tmp_path: Path) -> None:
    loop = {"shared": 0, "value": [{"ref": 1}]}
    back = {"shared": 1, "value": [{"ref": 0}]}
    path = craft(tmp_path / "a.pt", {"tensors": [], "tree": {"dict": [["a", loop], ["b", back]]}})
    for only in (None, "a", "b"):
        with pytest.raises(CheckpointError):
            load(path, only=only)


def test_one_key_reads_the_bytes_of_its_own_tensors_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 3 << 20
    state = {name: torch.full((size,), i, dtype=torch.uint8) for i, name in enumerate("abc")}
    path = write_state(tmp_path / "a.pt", state)
    read: list[tuple[int, int]] = []
    real = File.read

    def spy(file: File, offset: int, *buffers: memoryview, **kwargs: Any) -> int:
        read.append((offset, offset + sum(buffer.nbytes for buffer in buffers)))
        return real(file, offset, *buffers, **kwargs)

    monkeypatch.setattr(File, "read", spy)
    assert load(path, only="b").unique().tolist() == [1]
    with Reader(path) as reader:
        a, b, c = (reader.record(f"checkpoint/data/{i}") for i in range(3))
    pages = 2 * PAGE  # headers stand on their own pages, beside the ends of payloads
    for start, stop in read:
        assert stop <= a.offset + pages or start >= a.end - pages
        assert stop <= c.offset + pages or start >= c.end - pages
    assert sum(min(stop, b.end) - max(start, b.offset) for start, stop in read
               if start < b.end and stop > b.offset) >= size  # fmt: skip


# -------------------------------------------------------------------- tensors in pages of their own


@pytest.fixture
def loaded(tmp_path: Path) -> torch.Tensor:
    """A tensor so large that reading gives it pages of its own, not the allocator's."""
    tensor = torch.arange(OWN_PAGES, dtype=torch.float32)
    read: torch.Tensor = load(write_state(tmp_path / "a.pt", {"w": tensor}))["w"]
    assert read.data_ptr() % PAGE == 0
    return read


def test_a_loaded_tensor_can_be_changed_copied_pickled_and_shared(loaded: torch.Tensor) -> None:
    expected = torch.arange(OWN_PAGES, dtype=torch.float32)
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)), loaded.clone()):
        assert torch.equal(twin, expected)
        twin.zero_()
    assert torch.equal(loaded, expected)
    loaded.add_(1).mul_(2)
    loaded[7] = -1
    loaded.view(2, -1).t()[0].fill_(0)
    loaded.numpy()[3] = 5
    assert loaded[3] == 5
    assert loaded.share_memory_().is_shared()
    loaded[3] = 6
    assert loaded[3] == 6


def test_a_loaded_tensor_outlives_the_reader_and_everything_else(tmp_path: Path) -> None:
    path = write_state(tmp_path / "a.pt", {"w": torch.arange(OWN_PAGES), "v": torch.ones(9)})
    view = load(path)["w"][-3:]
    gc.collect()
    path.unlink()
    assert view.tolist() == [OWN_PAGES - 3, OWN_PAGES - 2, OWN_PAGES - 1]
    torch.save(view, path)
    assert torch.equal(torch.load(path, weights_only=True), view)


def test_an_optimizer_goes_on_over_loaded_tensors(loaded: torch.Tensor) -> None:
    def train(weights: torch.Tensor) -> torch.Tensor:
        parameter = torch.nn.Parameter(weights)
        optimizer = torch.optim.AdamW([parameter], fused=True)
        for _step in range(3):
            parameter.square().mean().backward()
            optimizer.step()
        return parameter.detach()

    assert torch.equal(train(loaded.clone()), train(loaded))


# ----------------------------------------------------------------------------------- any nonsense


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    items: list[Any] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [(value, key) for key, _item in items] + [
        place for _key, item in items for place in nodes(item)
    ]


JUNK = [None, True, False, 0, -1, 1, 2**40, 2**63, 2**70, -(2**70), 1.5, float("inf"), float("nan"),
        1e308, "", "x", "0", "\ud800", "a" * 5000, [], [[]], {}, {"ref": 0}, {"tensor": 0},
        {"shared": 0, "value": {"ref": 0}}, {"dict": [[{"tensor": 0}, 1]]}, {"device": "x"},
        {"set": [{"tensor": 0}]}, {"odict": [], "attributes": {"keys": 1}}]  # fmt: skip


def test_a_manifest_with_anything_changed_loads_or_is_refused(tmp_path: Path) -> None:
    """Whatever a hostile manifest with right hashes says, nothing but our own errors comes out."""
    from holdfast.checkpoint import CheckpointManager  # noqa: F401 - all of the engine is loaded

    state = {
        "t": torch.arange(6.0).view(2, 3), "e": torch.empty(0), "n": [1, 2**60, 1.5, float("nan")],
        "o": OrderedDict(a=(1, {2})), "b": b"ab", "d": torch.float32, "s": torch.Size([1]),
    }  # fmt: skip
    state["o"]._metadata = {"v": 1j}
    tree = normalise(state)
    manifest = json.loads(json.dumps(codec.to_json(tree)))
    payloads = [(name, bytes(data)) for name, data in tree.payloads() if "/data/" in name]
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    refused = 0
    for _round in range(600):
        changed = copy.deepcopy(manifest)
        for _change in range(rng.choice([1, 1, 1, 2, 5])):
            places = nodes(changed)
            if not places:  # everything has been taken out of it already
                break
            container, key = rng.choice(places)
            what = rng.random()
            if what < 0.7:
                container[key] = copy.deepcopy(rng.choice(JUNK))
            elif what < 0.85:
                source, other = rng.choice(places)
                container[key] = copy.deepcopy(source[other])
            elif isinstance(container, list):
                container.pop(key)
            else:
                del container[key]
        try:
            load(craft(tmp_path / "a.pt", changed, payloads))
        except CheckpointError:
            refused += 1
    assert 300 < refused < 600, "some changes are harmless, most are not"


def test_the_manifest_is_read_from_the_file_and_not_from_the_pickle(tmp_path: Path) -> None:
    path = write_state(tmp_path / "a.pt", {"n": 1})
    with Reader(path) as reader:
        assert reader.manifest["tree"] == {"dict": [["n", 1]]}
        assert reader.records[-1].name == MANIFEST
