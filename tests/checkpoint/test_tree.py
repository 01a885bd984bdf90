"""The tree of a state: what can be saved, what it becomes, and the pickle made from it."""

from __future__ import annotations

import enum
import io
import pickletools
import types
import warnings
import zipfile
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdfast import load
from holdfast.checkpoint.state.tree import DTYPES, MAX_DEPTH, normalise
from holdfast.errors import UnsupportedValue
from tests.support import assert_same, bits, image_of, write_state

Point = namedtuple("Point", "x y")


class Colour(enum.IntEnum):
    RED = 3


class Word(str, enum.Enum):
    HELLO = "hello"


class Labelled(int, enum.Enum):
    """Its `value` is not the number that it is."""

    ONE = (1, "one")

    def __new__(cls, number: int, label: str) -> Labelled:
        made = int.__new__(cls, number)
        made._value_ = label
        return made


class Liar(str):
    def __str__(self) -> str:
        return "a lie"


def torch_pickle(state: Any) -> bytes:
    """The `data.pkl` that torch.save itself writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


# ----------------------------------------------------------------- byte for byte what torch writes


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_the_pickle_is_torchs_own_for_every_dtype(name: str, tmp_path: Path) -> None:
    dtype = DTYPES[name]
    raw = torch.arange(4 * dtype.itemsize, dtype=torch.uint8) % 2
    state = {"t": raw.view(dtype), "empty": torch.empty(0, dtype=dtype), "dtype": dtype}
    assert normalise(state).pickled() == torch_pickle(state)
    path = write_state(tmp_path / "a.pt", state)
    for read in (load(path), torch.load(path, weights_only=True)):
        assert read["t"].dtype is dtype
        assert bits(read["t"]) == bits(state["t"])
        assert read["dtype"] is dtype


def training() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}


def aliased() -> dict[str, Any]:
    base = torch.arange(24, dtype=torch.float32)
    inner = {"k": [1, 2]}
    return {
        "whole": base,
        "same": base,
        "view": base[4:8],
        "matrix": base.view(4, 6).t(),
        "expanded": base[:1].expand(5),
        "scalar": base[3],
        "inner": inner,
        "again": [inner, inner],
        "tuple": (inner, base),
    }


def values() -> dict[Any, Any]:
    return {
        "none": None,
        "bools": [True, False],
        "ints": [0, -1, 255, 256, 65535, 65536, 2**31, -(2**31), 2**63, -(2**100), 2**2038],
        "floats": [0.0, -0.0, 1.5, 1e300, float("inf"), float("nan")],
        "complex": 1 + 2j,
        "text": ["", "a", "汉字", "\ud800", "x" * 300],
        "bytes": [b"a", b"\0\xff" * 200],
        "bytearray": bytearray(b"abc"),
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "set": {7},
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        3: "int key",
        (1, "a"): "tuple key",
        None: "none key",
        2.5: "float key",
        b"k": "bytes key",
    }


@pytest.mark.parametrize("make", [training, aliased, values])
def test_the_pickle_is_torchs_own_for_whole_states(make: Any) -> None:
    state = make()
    assert normalise(state).pickled() == torch_pickle(state)


def test_metadata_of_a_model_survives(tmp_path: Path) -> None:
    state = training()["model"]
    assert state._metadata["1"] == {"version": 2}
    path = write_state(tmp_path / "a.pt", {"model": state})
    for read in (load(path), torch.load(path, weights_only=True)):
        assert type(read["model"]) is OrderedDict
        assert read["model"]._metadata == state._metadata
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    model.load_state_dict(load(path)["model"])


def test_every_storage_is_tagged_cpu() -> None:
    pickled = normalise(training()).pickled()
    strings = [arg for op, arg, _at in pickletools.genops(pickled) if op.name == "BINUNICODE"]
    assert strings.count("cpu") == 1, "memoised: torch writes it once"
    assert not [text for text in strings if str(text).startswith(("cuda", "mps"))]


# ---------------------------------------------------------------------------------------- becoming


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float64(1.5), 1.5),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.float16(2), 2.0),
        (np.int64(7), 7),
        (np.uint8(7), 7),
        (np.bool_(True), True),
        (np.complex64(1j), 1j),
        (np.str_("a"), "a"),
        (np.bytes_(b"a"), b"a"),
        (Colour.RED, 3),
        (Word.HELLO, "hello"),
        (Labelled.ONE, 1),
        (Liar("truth"), "truth"),
        (torch.__version__, str.__str__(torch.__version__)),
        (defaultdict(int, a=1), {"a": 1}),
        (Counter("aab"), {"a": 2, "b": 1}),
        (UserDict(a=1), {"a": 1}),
        (types.MappingProxyType({"a": 1}), {"a": 1}),
        (Point(1, 2), (1, 2)),
        (deque([1, 2], maxlen=3), [1, 2]),
        (frozenset({1}), {1}),
        ({1, 2}, {1, 2}),
        (b"", b""),
        (range(0), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_become_plain(value: Any, plain: Any, tmp_path: Path) -> None:
    if plain is None:
        with pytest.raises(UnsupportedValue, match=r"here is a builtins\.range"):
            normalise({"here": value})
        return
    path = write_state(tmp_path / "a.pt", {"v": value})
    for read in (load(path)["v"], torch.load(path, weights_only=True)["v"]):
        assert read == plain
        assert type(read) is type(plain)


def test_numpy_arrays_become_tensors(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.int16).reshape(3, 4)[:, ::-2]
    state = {"a": array, "again": array, "scalar": np.array(3.5), "empty": np.zeros((0, 3))}
    read = load(write_state(tmp_path / "a.pt", state))
    assert read["a"].numpy().tolist() == array.tolist()
    assert read["a"].dtype is torch.int16
    assert read["a"] is read["again"]
    assert (read["scalar"].shape, read["empty"].shape) == ((), (0, 3))


def test_conjugated_and_negated_views_are_resolved(tmp_path: Path) -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    read = load(write_state(tmp_path / "a.pt", {"conj": z.conj(), "neg": z.conj().imag}))
    assert read["conj"].tolist() == [1 - 2j, 3 + 4j]
    assert read["neg"].tolist() == [-2.0, 4.0]


def test_parameters_and_buffers_become_tensors_without_gradients(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    buffer = torch.nn.Buffer(torch.zeros(2))
    path = write_state(tmp_path / "a.pt", {"p": parameter, "b": buffer})
    for read in (load(path), torch.load(path, weights_only=True)):
        assert [type(read[k]) for k in "pb"] == [torch.Tensor, torch.Tensor]
        assert not read["p"].requires_grad


def test_objects_are_asked_for_their_state() -> None:
    class Custom:
        def state_dict(self) -> dict[str, Any]:
            return {"inner": [Inner()]}

    class Inner:
        def state_dict(self) -> dict[str, Any]:
            return {"n": 3}

    assert normalise({"c": Custom()}).root == {"c": {"inner": [{"n": 3}]}}


# ------------------------------------------------------------------------------------------- spans


def test_a_view_of_one_element_of_a_large_tensor_saves_four_bytes(tmp_path: Path) -> None:
    large = torch.arange(1_000_000, dtype=torch.float32)
    tree = normalise({"v": large[123_456:123_457]})
    assert tree.nbytes == 4
    path = write_state(tmp_path / "a.pt", {"v": large[123_456:123_457]})
    assert path.stat().st_size < 20_000
    for read in (load(path), torch.load(path, weights_only=True)):
        assert read["v"].tolist() == [123_456.0]


def test_views_of_one_memory_save_its_span_once(tmp_path: Path) -> None:
    base = torch.arange(100)
    state = {"a": base[10:20], "b": base[15:30], "c": base[12]}
    assert normalise(state).nbytes == 20 * 8
    read = load(write_state(tmp_path / "a.pt", state))
    read["b"][0] = -1
    assert read["a"][5] == -1, "still one memory"


@pytest.mark.parametrize("first", ["empty", "full"])
def test_empty_views_beside_others_of_the_same_memory(first: str, tmp_path: Path) -> None:
    """An empty view points anywhere in its storage, also at what is not saved."""
    base = torch.arange(100)
    empty = {"start": base[:0], "end": base[100:], "middle": base[50:50]}
    full = {"a": base[10:20]}
    state = {**empty, **full} if first == "empty" else {**full, **empty}
    path = write_state(tmp_path / "a.pt", state)
    for read in (load(path), torch.load(path, weights_only=True)):
        assert read["a"].tolist() == list(range(10, 20))
        assert all(read[name].shape == (0,) for name in empty)


def test_two_tensors_over_one_address_with_different_lengths(tmp_path: Path) -> None:
    """torch.from_numpy makes a storage for each, and the first may be the shorter one."""
    array = np.arange(10.0)
    state = {"short": torch.from_numpy(array[:3]), "long": torch.from_numpy(array)}
    read = load(write_state(tmp_path / "a.pt", state))
    assert (read["short"].tolist(), read["long"].tolist()) == ([0, 1, 2], list(range(10)))


def test_saving_copies_nothing_that_lies_in_host_memory() -> None:
    weights = torch.zeros(1000)
    payload = normalise({"w": weights}).payloads()[0][1]
    weights[0] = 1.0
    assert memoryview(payload).cast("B").cast("f")[0] == 1.0


# ---------------------------------------------------------------------------------------- refusing


class Subclass(torch.Tensor):
    pass


def recursive() -> list[Any]:
    value: list[Any] = []
    value.append({"inner": value})
    return value


def deep(depth: int) -> Any:
    value: Any = 1
    for _level in range(depth):
        value = [value]
    return value


def dtype_views() -> dict[str, Any]:
    base = torch.zeros(4)
    return {"a": base, "b": base.view(torch.int32)}


def complex_views() -> dict[str, Any]:
    base = torch.zeros(4, dtype=torch.complex64)
    return {"a": base, "b": torch.view_as_real(base)}


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)


def nested(layout: torch.layout) -> torch.Tensor:
    parts = [torch.zeros(2), torch.zeros(3)]
    return torch.nested.nested_tensor(parts, layout=layout)


REFUSED: dict[str, tuple[Any, str]] = {
    "meta": (lambda: torch.zeros(3, device="meta"), "outer/0/x is a Tensor"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "outer/0/x is a Tensor"),
    "sparse csr": (lambda: torch.eye(3).to_sparse_csr(), "outer/0/x is a Tensor"),
    "quantised": (quantised, "outer/0/x is a Tensor"),
    "nested, strided": (lambda: nested(torch.strided), "outer/0/x is a "),
    "nested, jagged": (lambda: nested(torch.jagged), "outer/0/x is a "),
    "tensor subclass": (lambda: torch.zeros(3).as_subclass(Subclass), "outer/0/x is a Subclass"),
    "parameter of a subclass": (
        lambda: torch.nn.Parameter(torch.zeros(3).as_subclass(Subclass)),
        "outer/0/x is a ",
    ),
    "uninitialised parameter": (torch.nn.UninitializedParameter, "outer/0/x is a Uninit"),
    "lazy module": (lambda: torch.nn.LazyLinear(3), "outer/0/x/weight is a Uninit"),
    "function": (lambda: print, "outer/0/x is a builtins.builtin_function"),
    "lambda": (lambda: lambda: 0, "outer/0/x is a builtins.function"),
    "object": (object, "outer/0/x is a builtins.object"),
    "class": (lambda: Subclass, "outer/0/x is a "),
    "self-containing list": (recursive, "outer/0/x/0/inner contains itself"),
    "too deep": (lambda: deep(MAX_DEPTH), "lies more than 100 containers deep"),
    "views as other dtypes": (dtype_views, "outer/0/x/b views the memory of another tensor"),
    "real view of complex": (complex_views, "outer/0/x/b views the memory of another tensor"),
    "array of objects": (lambda: np.array([object()]), "outer/0/x is a NumPy array of object"),
    "array of text": (lambda: np.array(["a"]), "outer/0/x is a NumPy array of <U1"),
    "big-endian array": (lambda: np.zeros(3, ">f8"), "outer/0/x is a NumPy array of >f8"),
    "structured array": (lambda: np.zeros(3, "f4,i4"), "outer/0/x is a NumPy array of"),
    "NumPy date": (lambda: np.datetime64("2026-01-01", "ns"), "outer/0/x is a numpy.datetime64"),
    "integer beyond the pickle": (lambda: 1 << 2039, "outer/0/x is an integer of 2040 bits"),
    "quantised dtype": (lambda: torch.qint8, "outer/0/x is a torch.dtype"),
    "set of tensors": (lambda: {torch.zeros(1)}, "outer/0/x is a set of tensors"),
    "set of frozen sets": (lambda: {frozenset({1})}, "outer/0/x is a set of sets"),
    "set of tuples of sets": (lambda: {(frozenset(),)}, "outer/0/x is a set of sets"),
    "tensor as a key": (lambda: {torch.zeros(1): 1}, "outer/0/x has a key that is no plain"),
    "frozen set as a key": (lambda: {frozenset(): 1}, "outer/0/x has a key that is no plain"),
    "nested frozen set as a key": (lambda: {(1, frozenset()): 1}, "outer/0/x has a key that is no"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_is_refused_with_its_path(name: str) -> None:
    make, words = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = make()
    with pytest.raises(UnsupportedValue) as error:
        normalise({"outer": [{"x": value}]})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_deepest_state_that_is_saved_is_also_read(tmp_path: Path) -> None:
    state = {"x": deep(MAX_DEPTH - 1)}
    path = write_state(tmp_path / "a.pt", state)
    assert load(path) == state == torch.load(path, weights_only=True)
    pairs: Any = 1
    for _level in range(MAX_DEPTH - 1):
        pairs = OrderedDict(k=pairs)
    path = write_state(tmp_path / "b.pt", {"x": pairs})
    assert load(path)["x"] == pairs


def test_the_largest_integer_that_is_saved_is_also_read(tmp_path: Path) -> None:
    state = {"n": (1 << 2039) - 1, "m": -(1 << 2038)}
    path = write_state(tmp_path / "a.pt", state)
    assert load(path) == state == torch.load(path, weights_only=True)


def test_normalising_leaves_the_state_alone() -> None:
    state = {"d": defaultdict(list, a=[1]), "t": torch.ones(3, requires_grad=True)}
    normalise(state)
    assert type(state["d"]) is defaultdict
    assert state["t"].requires_grad


def test_aliasing_of_containers_survives(tmp_path: Path) -> None:
    shared = {"k": [1]}
    twice = bytearray(b"x")
    state = {"a": shared, "b": [shared, (shared,)], "l": shared["k"], "x": twice, "y": twice}
    path = write_state(tmp_path / "a.pt", state)
    read = load(path)
    assert read["a"] is read["b"][0] is read["b"][1][0]
    assert read["l"] is read["a"]["k"]
    assert read["x"] is read["y"]
    assert_same(read, torch.load(path, weights_only=True))


def test_state_of_thousands_of_scalars_stays_small() -> None:
    state = {str(i): torch.tensor(float(i)) for i in range(2000)}
    assert image_of(state).size < 2000 * 900
