"""What a run writes for others: none of it may end a training, however full the disk is."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint.system import filesystem
from holdfast.training.records import HISTORY, METRICS, Records


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, as a reader takes them."""
    found = []
    for line in path.read_text("utf-8").split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def test_a_full_disk_costs_lines_and_one_warning(
    small_disk: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    disk = small_disk(1 << 20)
    records = Records(disk, tensorboard=False, resumed_step=0)
    records.step(1, loss=1.0)
    hog = disk / "hog"
    with hog.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, filesystem.free_bytes(disk))
    with caplog.at_level(logging.WARNING, "holdfast"):
        for step in range(2, 300):  # more than what is left of the file's last block
            records.step(step, loss=1.0, filler="x" * 100)
            records.history({"train_loss": [1.0], "val_loss": [None], "epochs": [1]})
    assert len([r for r in caplog.records if METRICS in r.getMessage()]) == 1
    assert len([r for r in caplog.records if HISTORY in r.getMessage()]) == 1
    hog.unlink()
    records.step(300, loss=0.5)
    records.history({"train_loss": [1.0], "val_loss": [None], "epochs": [1]})
    found = lines(disk / METRICS)
    assert found[0]["step"] == 1
    assert found[-1]["step"] == 300, "a torn line before it takes nothing with it"
    assert json.loads((disk / HISTORY).read_text())["epochs"] == [1]


def test_a_board_whose_writer_has_died_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead:
        calls = 0

        def add_scalar(self, *_args: Any) -> None:
            self.calls += 1
            raise RuntimeError("its thread met ENOSPC")

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    board = Dead()
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda *_args, **_named: board)
    records = Records(tmp_path, tensorboard=True, resumed_step=0)
    with caplog.at_level(logging.WARNING, "holdfast"):
        for step in range(1, 5):
            records.step(step, loss=1.0)
            records.event("evaluation", step, val_loss=2.0)
        records.close()
    assert board.calls == 1
    assert len(caplog.records) == 1
    assert len(lines(tmp_path / METRICS)) == 8
