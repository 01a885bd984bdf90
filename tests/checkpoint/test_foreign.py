"""Weights from files that others wrote: found where they usually are, and nothing is ever run."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint.foreign import load_weights
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
