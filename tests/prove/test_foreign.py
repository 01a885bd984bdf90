"""What others have saved is opened as plain values, and nothing in it is run."""

from __future__ import annotations

import argparse
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from holdfast.prove.foreign import DCP, Unopened, is_state, opened

WEIGHTS = torch.arange(6.0).reshape(2, 3)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_every_form_is_opened_with_its_values(tmp_path: Path) -> None:
    streams = {"numpy": np.random.get_state(), "python": random.getstate()}
    state = {"w": WEIGHTS, "x": np.float64(3), "args": argparse.Namespace(lr=0.1), "rng": streams}
    torch.save(state, tmp_path / "a.pt")
    found = opened(tmp_path / "a.pt")
    assert found["x"] == 3
    assert found["args"] == {"lr": 0.1}
    assert torch.equal(found["w"], WEIGHTS)
    assert found["rng"]["python"][1] == list(random.getstate()[1])
    torch.save({"w": WEIGHTS}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    save_file({"w": WEIGHTS.bfloat16(), "none": torch.empty(0)}, tmp_path / "b.safetensors")
    np.savez(tmp_path / "c.npz", w=WEIGHTS.numpy())
    dcp.save({"m": {"w": WEIGHTS}, "step": 3}, checkpoint_id=tmp_path / "d")
    assert torch.equal(opened(tmp_path / "old.ckpt")["w"], WEIGHTS)
    assert torch.equal(opened(tmp_path / "b.safetensors")["w"], WEIGHTS.bfloat16())
    assert torch.equal(opened(tmp_path / "c.npz")["w"], WEIGHTS)
    assert torch.equal(opened(tmp_path / "d" / DCP)["m.w"], WEIGHTS)
    assert opened(tmp_path / "d" / DCP)["step"] == 3
    assert all(is_state(path) for path in tmp_path.glob("*.*"))
    assert not any(is_state(path) for path in (tmp_path / "d").glob("*.distcp"))


def test_torn_files_are_not_opened(tmp_path: Path) -> None:
    torch.save({"w": WEIGHTS}, tmp_path / "a.pt")
    save_file({"w": WEIGHTS}, tmp_path / "b.safetensors")
    np.savez(tmp_path / "c.npz", w=WEIGHTS.numpy())
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(Unopened):
            opened(path)


def test_a_pickle_that_names_anything_else_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"w": Evil(mark)}, tmp_path / "a.pt")
    torch.save(Evil(mark), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / DCP).write_bytes(pickle.dumps(Evil(mark)))
    for name in ("a.pt", "old.pt", DCP):
        with pytest.raises(Unopened, match="mkdir"):
            opened(tmp_path / name)
    dotted = b"\x80\x04\x8c\x27torch.distributed.checkpoint.metadata\x8c\x09os.system\x93."
    for evil in (dotted, pickle.dumps(os.getcwd), b"ctorch.serialization\nload\n."):
        (tmp_path / DCP).write_bytes(evil)
        with pytest.raises(Unopened):
            opened(tmp_path / DCP)
    assert not mark.exists()
