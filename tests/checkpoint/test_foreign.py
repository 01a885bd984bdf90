"""Weights from files that others wrote: found where they usually are, and nothing is ever run."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdfast.checkpoint.state.files import load_foreign, load_weights
from holdfast.errors import CheckpointError, DamagedCheckpoint, ForeignCheckpoint
from tests.support import damage, make_run

WEIGHTS = OrderedDict(weight=torch.arange(6.0).view(2, 3), bias=torch.ones(2))


@pytest.mark.parametrize("key", [None, "model", "model_state_dict", "state_dict"])
def test_weights_of_anybodys_file(tmp_path: Path, key: str | None) -> None:
    path = tmp_path / "theirs.pt"
    torch.save(WEIGHTS if key is None else {key: WEIGHTS, "epoch": 3}, path)
    found = load_weights(path)
    assert list(found) == ["weight", "bias"]
    assert torch.equal(found["weight"], WEIGHTS["weight"])


def test_weights_of_a_checkpoint_of_ours(tmp_path: Path) -> None:
    toy = make_run(tmp_path, 1)
    assert torch.equal(load_weights(tmp_path / "latest.pt")["weight"], toy.model.weight)
    damage(tmp_path / "latest.pt")
    with pytest.raises(DamagedCheckpoint):
        load_weights(tmp_path / "latest.pt")


class Evil:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._marker),)


def test_code_is_refused_and_never_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    torch.save({"model": WEIGHTS, "x": Evil(marker)}, path)
    with pytest.raises(ForeignCheckpoint, match="run code"):
        load_weights(path)
    bare = tmp_path / "bare.pt"
    bare.write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(ForeignCheckpoint):
        load_weights(bare)
    assert not marker.exists()


def test_a_file_that_would_inflate_is_refused(tmp_path: Path) -> None:
    good, path = tmp_path / "good.pt", tmp_path / "bomb.pt"
    torch.save({"w": torch.zeros(1 << 22)}, good)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for info in source.infolist():
            bomb.writestr(info.filename, source.read(info))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ForeignCheckpoint, match="claims more bytes"):
        load_weights(path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", bytes(5000)])
def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_weights(path)


@pytest.mark.parametrize("state", [{}, {"epoch": 3}, [1, 2], {"model": {}}, 7])
def test_a_file_without_weights_is_said_to_have_none(tmp_path: Path, state: Any) -> None:
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ForeignCheckpoint, match="no weights"):
        load_weights(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damage_ends_in_our_own_errors(tmp_path: Path) -> None:
    """torch checks no sum: a flip in a payload loads. All else is refused in our words."""
    path = tmp_path / "x.pt"
    torch.save(WEIGHTS, path)
    good = path.read_bytes()
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    for _round in range(300):
        data = bytearray(good)
        for _change in range(rng.choice([1, 5, 50])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        path.write_bytes(data)
        try:
            load_weights(path)
        except CheckpointError as error:
            assert "\n" not in str(error)


# ------------------------------------------------------------------------------------------- NumPy


@pytest.mark.parametrize("value", [
    np.float64(1.5), np.float32(-0.25), np.float16(2), np.int64(3), np.uint8(200), np.bool_(True),
    np.complex64(1 + 2j), np.dtype(">i4").type(7),
])  # fmt: skip
def test_numbers_of_numpy_are_plain_data(value: Any, tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "best": value, "all": [value]}, tmp_path / "their.pt")
    state = load_foreign(tmp_path / "their.pt")
    assert state["best"] == value.item() == state["all"][0]
    assert type(state["best"]) is type(value.item())


@pytest.mark.parametrize("array", [
    np.arange(3.0), np.zeros((0, 2)), np.array(5), np.arange(6, dtype=">i2").reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array([True, False]),
    np.array([1j], np.complex128),
])  # fmt: skip
def test_arrays_of_numpy_are_plain_data(array: Any, tmp_path: Path) -> None:
    state = {"model": WEIGHTS, "history": {"loss": [array, (array,)]}}
    torch.save(state, tmp_path / "their.pt")
    first, (second,) = load_foreign(tmp_path / "their.pt")["history"]["loss"]
    assert first is second
    assert first.dtype.kind == array.dtype.kind
    assert np.array_equal(first, array)
    assert first.flags.writeable


def test_the_names_of_older_numpy_are_known(tmp_path: Path) -> None:
    torch.save({"best": np.float64(1.5), "mean": np.arange(2.0)}, tmp_path / "their.pt")
    with zipfile.ZipFile(tmp_path / "their.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "older.pt", "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data.replace(b"numpy._core.", b"numpy.core."))
    state = load_foreign(tmp_path / "older.pt")
    assert state["best"] == 1.5
    assert state["mean"].tolist() == [0, 1]


class Runs:
    """Pickles as a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call = call, arguments

    def __reduce__(self) -> Any:
        return self.call


class Built(Runs):
    """Pickles as a call and a state for what it gives."""

    def __init__(self, state: Any, call: Any, *arguments: Any) -> None:
        super().__init__(call, *arguments)
        self.state = state

    def __reduce__(self) -> Any:
        return (*self.call, self.state)


POINTER = (3, "<", None, None, None, -1, -1, 0)  # flags that say that an object is no object
MADE: Any = np._core.multiarray  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [
    np.array([{}], object), np.array(["text"]), np.array([b"x"]), np.datetime64(0, "s"),
    np.zeros(1, [("a", "f4")]), np.zeros(1, np.dtype((np.int32, (2,)))).view("V8"),
    Runs(np.load, "secret.npy"), Runs(np.fromfile, "secret"), Runs(np.memmap, "secret"),
    Runs(MADE.scalar, Built(POINTER, np.dtype, "O8", False, True), b"\0" * 8),
    Built((1, (1,), Built(POINTER, np.dtype, "O8", False, True), False, b"\1" * 8),
          MADE._reconstruct, np.ndarray, (0,), b"b"),
    Built((1, (10**12,), np.dtype("f8"), False, b"\0" * 8),
          MADE._reconstruct, np.ndarray, (0,), b"b"),
    Runs(MADE._reconstruct, np.ndarray, (0,), b"b"),
    Runs(np.dtype, {"names": ["a"], "formats": ["O"]}),
])  # fmt: skip
def test_whatever_else_numpy_can_make_is_refused(
    value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": WEIGHTS, "x": value}, tmp_path / "their.pt")
    with pytest.raises((ForeignCheckpoint, DamagedCheckpoint)):
        load_foreign(tmp_path / "their.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["their.pt"]


def test_what_is_safe_for_others_stays_as_it_was(tmp_path: Path) -> None:
    def safe() -> list[str]:
        return sorted(map(repr, torch.serialization.get_safe_globals()))  # torch keeps a set

    before = safe()
    torch.save({"best": np.float64(1)}, tmp_path / "their.pt")
    load_foreign(tmp_path / "their.pt")
    assert safe() == before
