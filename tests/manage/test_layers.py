"""Layers in a few rows: numbered ones together, shared bytes once, and never more than a screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import CheckpointManager
from holdfast.checkpoint.format import plain_state, read_manifest
from holdfast.errors import ForeignCheckpoint
from holdfast.manage.showing.layers import (
    MODEL,
    OPTIMIZER,
    OTHER,
    ROWS,
    rows_of,
    sections_of,
)
from holdfast.manage.tensors import tensors_of


def saved(directory: Path, state: dict[str, Any]) -> Path:
    with CheckpointManager(directory, state) as manager:
        manager.save(step=1)
    return directory / "latest.pt"


def twelve_layers() -> torch.nn.Module:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = torch.nn.Linear(4, 4)
            self.mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))

    model = torch.nn.Module()
    model.embed = torch.nn.Embedding(16, 4)
    model.layers = torch.nn.ModuleList([Block() for _ in range(12)])
    model.head = torch.nn.Linear(4, 16, bias=False)
    model.head.weight = model.embed.weight
    return model


def test_twelve_layers_are_a_row_for_each_kind_of_tensor(tmp_path: Path) -> None:
    model = twelve_layers()
    manifest = read_manifest(saved(tmp_path / "run", {"model": model}))
    tensors = [t for t in tensors_of(manifest, Path("a.pt")) if t.section == "model"]
    rows = rows_of(tensors)
    assert [row.name for row in rows] == [
        "embed.weight", "layers.{0..11}.attention.weight", "layers.{0..11}.attention.bias",
        "layers.{0..11}.mlp.0.weight", "layers.{0..11}.mlp.0.bias", "layers.{0..11}.mlp.1.weight",
        "layers.{0..11}.mlp.1.bias", "head.weight",
    ]  # fmt: skip
    assert rows[3].to_json() == {
        "name": "layers.{0..11}.mlp.0.weight", "tensors": 12, "shape": [8, 4],
        "dtypes": ["float32"],
        "parameters": 12 * 32, "bytes": 12 * 128,
    }  # fmt: skip
    assert sum(row.numel for row in rows) == sum(p.numel() for p in model.parameters())
    assert tensors[-1].same_as == "embed.weight" and rows[-1].nbytes == 0


def test_what_fills_more_than_a_screen_is_drawn_together_by_its_beginning(tmp_path: Path) -> None:
    model = torch.nn.Sequential(
        *(torch.nn.Sequential(torch.nn.Linear(i + 1, 2), torch.nn.Linear(2, i + 2))
          for i in range(20))
    )  # fmt: skip
    manifest = read_manifest(saved(tmp_path / "run", {"model": model}))
    rows = rows_of([t for t in tensors_of(manifest, Path("a.pt")) if t.section == "model"])
    assert 1 < len(rows) <= ROWS
    assert [row.name for row in rows] == ["{0..19}.{0..1}.weight", "{0..19}.{0..1}.bias"]
    assert rows[0].to_json()["shape"] is None and rows[0].tensors == 40
    wide = torch.nn.ParameterDict({f"part_{i}": torch.zeros(i + 1) for i in range(40)})
    manifest = read_manifest(saved(tmp_path / "wide", {"model": wide}))
    assert len(rows_of(tensors_of(manifest, Path("a.pt")))) >= 40


def test_numbers_with_gaps_are_listed(tmp_path: Path) -> None:
    state = {"model": {f"layers.{i}.weight": torch.zeros(2) for i in (0, 3, 7)}}
    manifest = read_manifest(saved(tmp_path / "run", state))
    (row,) = rows_of([t for t in tensors_of(manifest, Path("a.pt")) if t.section == "model"])
    assert row.name == "layers.{0,3,7}.weight"


def test_sections_are_known_by_what_they_hold(tmp_path: Path) -> None:
    net = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    path = saved(tmp_path / "run", {"net": net, "opt": optimizer, "extra": {"a": {"b": net.bias}}})
    manifest = read_manifest(path)
    sections = sections_of(tensors_of(manifest, Path("a.pt")), plain_state(manifest, path))
    assert [(s.name, s.kind) for s in sections] == [
        ("net", MODEL), ("opt", OPTIMIZER), ("extra", OTHER), ("rng", OTHER),
    ]  # fmt: skip
    assert [s.nbytes for s in sections][:3] == [80, 80, 0]  # the bias is counted where it is first
    assert sections[0].to_json()["elements"] == 20


def test_an_index_of_nonsense_is_an_error_of_ours(tmp_path: Path) -> None:
    manifest = read_manifest(saved(tmp_path / "run", {"model": torch.nn.Linear(2, 2)}))
    for wrong in ([{"path": "x"}], [7], None, [{**manifest["tensors"][0], "storage": 99}]):
        with pytest.raises(ForeignCheckpoint):
            tensors_of({**manifest, "tensors": wrong}, Path("a.pt"))
