"""What the original guides show runs as it stands, over the engine; their old files are read."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import load, verify
from holdfast.adapters.classic import CheckpointManager
from holdfast.errors import CheckpointError, ConfigError, DamagedCheckpoint, RunLocked
from tests.protection.loops import start
from tests.support import assert_same, damage, in_child, snapshot


def make(seed: int = 0) -> tuple[Any, Any, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)


def step(model: Any, optimizer: Any, scheduler: Any) -> float:
    loss = model(torch.randn(4, 3)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    return loss.item()


class Tokenizer:
    def save_pretrained(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "vocab.json").write_text("{}")


def epochs(manager: CheckpointManager, parts: Any, first: int, last: int) -> list[str | None]:
    """As the guides' loop: two steps an epoch, the second epoch is the best."""
    losses: list[float] = []
    paths = []
    for epoch in range(first, last + 1):
        losses += [step(*parts), step(*parts)]
        paths.append(
            manager.save_checkpoint(
                model=parts[0], optimizer=parts[1], scheduler=parts[2], epoch=epoch,
                global_step=2 * epoch, loss_history=losses,
                metrics={"avg_loss": 1.0 + abs(epoch - 2)}, tokenizer=Tokenizer(),
                config={"width": 3}, is_best=epoch == 2,
            )
        )  # fmt: skip
    return paths


def test_the_guides_example_gives_their_names_and_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    parts = make()
    manager = CheckpointManager(
        save_dir="./outputs", model_name="apt_model", save_freq=1, logger=logging.getLogger("mine")
    )
    assert not manager.has_checkpoints()
    paths = epochs(manager, parts, 1, 3)
    assert paths[1] == "./outputs/checkpoints/apt_model_epoch2_step4_best.pt"
    assert [Path(str(path)).exists() for path in paths] == [True] * 3
    found = torch.load(str(paths[2]), weights_only=True)
    assert {"epoch", "global_step", "config", "metrics", "loss_history"} < found.keys()
    assert_same(found["model_state_dict"], parts[0].state_dict())
    assert_same(found["optimizer_state_dict"], parts[1].state_dict())
    assert found["scheduler_state_dict"]["last_epoch"] == 6
    assert (found["epoch"], found["global_step"], found["config"]) == (3, 6, {"width": 3})
    metadata = json.loads(Path("outputs/metadata.json").read_text())
    assert metadata.keys() == {"model_name", "created_at", "last_updated", "checkpoints"}
    second = metadata["checkpoints"][1]
    assert second.pop("created_at") <= metadata["last_updated"]
    assert second == {
        "path": "checkpoints/apt_model_epoch2_step4_best.pt",
        "epoch": 2,
        "global_step": 4,
        "is_best": True,
        "metrics": {"avg_loss": 1.0},
    }
    assert Path("outputs/tokenizer/vocab.json").exists()
    assert verify(str(paths[0])) is None
    assert "avg_loss" not in caplog.text


@pytest.mark.parametrize("how", ["latest", "best", "path", "path of metadata"])
def test_what_is_loaded_goes_on_exactly(tmp_path: Path, how: str) -> None:
    parts = make()
    epochs(CheckpointManager(tmp_path / "outputs"), parts, 1, 3)
    straight = snapshot({"m": parts[0], "o": parts[1], "s": parts[2]})
    parts = make(seed=5)
    manager = CheckpointManager(tmp_path / "outputs")  # takes over, as a notebook's cell
    path = tmp_path / "outputs" / "checkpoints" / "apt_model_epoch2_step4_best.pt"
    asked = {
        "latest": {"latest": True},
        "best": {"best": True},
        "path": {"checkpoint_path": path},
        "path of metadata": {"checkpoint_path": "checkpoints/apt_model_epoch2_step4_best.pt"},
    }[how]
    epoch, global_step, losses, metrics = manager.load_checkpoint(*parts, **asked)  # type: ignore[arg-type]
    expected = 3 if how == "latest" else 2
    assert (epoch, global_step, len(losses)) == (expected, 2 * expected, 2 * expected)
    assert metrics == {"avg_loss": 1.0 + expected - 2}
    if expected == 2:
        epochs(manager, parts, 3, 3)  # with the same random draws
    assert_same(snapshot({"m": parts[0], "o": parts[1], "s": parts[2]}), straight)


def test_a_model_alone_is_loaded_and_nothing_moves(tmp_path: Path) -> None:
    parts = make()
    manager = CheckpointManager(tmp_path / "outputs")
    epochs(manager, parts, 1, 3)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    model = make(seed=5)[0]
    assert CheckpointManager(tmp_path / "outputs").load_checkpoint(model, best=True)[:2] == (2, 4)
    damage(tmp_path / "outputs/checkpoints/apt_model_epoch3_step6.pt")
    assert CheckpointManager(tmp_path / "outputs").load_checkpoint(model, latest=True)[0] == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "outputs")
    epochs(manager, make(), 1, 3)
    manager.close()
    damage(tmp_path / "outputs/checkpoints/apt_model_epoch3_step6.pt")
    again = CheckpointManager(tmp_path / "outputs")
    assert again.load_checkpoint(*make(), latest=True)[0] == 2
    path = tmp_path / "outputs/checkpoints/quarantine/apt_model_epoch3_step6.pt"
    with pytest.raises(DamagedCheckpoint, match="epoch3"):
        again.load_checkpoint(make()[0], checkpoint_path=path)


def test_epochs_between_those_of_save_freq_are_temporary(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "outputs", save_freq=3)
    epochs(manager, make(), 1, 6)
    kept = sorted(path.name for path in (tmp_path / "outputs/checkpoints").glob("apt_*"))
    best = "apt_model_epoch2_step4_best.pt"
    # The two newest stay in any case.
    assert kept == [best, *(f"apt_model_epoch{n}_step{2 * n}.pt" for n in (3, 5, 6))]


def test_a_temporary_one_is_seen_in_cache_and_recovered_from(tmp_path: Path) -> None:
    def run() -> None:
        parts = make()
        manager = CheckpointManager(tmp_path / "outputs")
        epochs(manager, parts, 1, 2)
        step(*parts)
        manager.save_temp(*parts, 3, 5, [1.0], batch_idx=1)
        manager.close()

    in_child(run)
    assert (tmp_path / ".cache/temp/temp_epoch3_step5.pt").exists()
    moved = tmp_path.with_name("elsewhere")
    tmp_path.rename(moved)  # both folders go together
    assert (moved / ".cache/temp/temp_epoch3_step5.pt").exists()
    parts = make(seed=5)
    manager = CheckpointManager(moved / "outputs")
    assert manager.load_checkpoint(*parts, latest=True)[:3] == (3, 5, [1.0])
    assert manager.batch_idx == 1
    step(*parts)
    manager.save_checkpoint(*parts, 3, 6, [], {})
    assert not list((moved / ".cache").iterdir())
    straight = make()
    for _step in range(6):
        step(*straight)
    assert_same(dict(parts[0].state_dict()), dict(straight[0].state_dict()))
    manager.close()
    moved.rename(tmp_path)


def old(path: Path, parts: Any, epoch: int, global_step: int, **more: Any) -> None:
    """Write a file as the guides' own code did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict")
    states = {key: part.state_dict() for key, part in zip(keys, parts, strict=True)}
    torch.save({"epoch": epoch, "global_step": global_step, **states, **more}, path)


def test_files_of_the_guides_own_code_are_resumed_from(tmp_path: Path) -> None:
    parts, place = make(), tmp_path / "outputs" / "checkpoints"
    history = {"loss_history": [2.0], "metrics": {"avg_loss": 2.0}, "config": None}
    old(place / "apt_model_epoch1_step2_best.pt", parts, 1, 2, **history)
    old(place / "apt_model_epoch2_step4.pt", parts, 2, 4, **history)
    step(*parts)
    temp = tmp_path / ".cache/temp/temp_epoch3_step5.pt"
    old(temp, parts, 3, 5, batch_idx=0, train_losses=[2.0, 1.5])
    manager = CheckpointManager(tmp_path / "outputs")
    assert manager.has_checkpoints()
    assert [each["global_step"] for each in manager.metadata["checkpoints"]] == [2, 4]
    again = make(seed=5)
    assert manager.load_checkpoint(*again, best=True)[:2] == (1, 2)
    assert manager.load_checkpoint(*again, latest=True) == (3, 5, [2.0, 1.5], {})
    assert_same(snapshot({"m": again[0], "o": again[1]}), snapshot({"m": parts[0], "o": parts[1]}))
    path = manager.save_checkpoint(*again, 3, 6, [1.0], {"avg_loss": 1.0})
    assert verify(str(path)) is None
    assert not temp.exists(), "an epoch ends them"
    assert (place / "apt_model_epoch2_step4.pt").exists()
    assert manager.load_checkpoint(*again, latest=True)[:2] == (3, 6), "ours is newer"


def test_a_file_of_theirs_is_not_overwritten(tmp_path: Path) -> None:
    parts, place = make(), tmp_path / "outputs" / "checkpoints"
    old(place / "apt_model_epoch1_step2.pt", parts, 1, 2)
    theirs = (place / "apt_model_epoch1_step2.pt").read_bytes()
    manager = CheckpointManager(tmp_path / "outputs")
    path = manager.save_checkpoint(*parts, 1, 2, [])
    assert load(str(path))["global_step"] == 2
    assert theirs in [each.read_bytes() for each in (place / "archive").rglob("*.pt")]


def test_the_form_by_steps_has_a_json_beside_it(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "outputs", step_names=True)
    path = Path(str(manager.save_checkpoint(*make(), 1, 500, [1.0], {"avg_loss": 1.0})))
    assert path.name.startswith("checkpoint_step_500_ts_")
    about = json.loads(path.with_suffix(".json").read_text())
    assert (about["global_step"], about["path"]) == (500, f"checkpoints/{path.name}")
    old(path.with_name("checkpoint_step_600_ts_1234567894.pt"), make(), 1, 600)
    named = {"checkpoint_path": path.with_name("checkpoint_step_600_ts_1234567894.pt")}
    assert manager.load_checkpoint(*make(), **named)[:2] == (1, 600)


def test_what_a_call_has_wrong_is_said(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "outputs")
    with pytest.raises(ConfigError, match="latest=True"):
        manager.load_checkpoint(*make())
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        manager.load_checkpoint(*make(), latest=True)
    with pytest.raises(ConfigError, match="save_freq=0"):
        CheckpointManager(tmp_path, save_freq=0)
    with pytest.raises(ConfigError, match="model_name"):
        CheckpointManager(tmp_path, model_name="a/b")
    with pytest.raises(ConfigError, match="epoch='one'"):
        manager.save_checkpoint(*make(), "one", 1, [])  # type: ignore[arg-type]
    manager.save_checkpoint(*make(), 1, 1, [])

    def second() -> None:
        with pytest.raises(RunLocked):
            CheckpointManager(tmp_path / "outputs").load_checkpoint(*make(), latest=True)

    assert in_child(second) == 0


# -------------------------------------------------------------------------------------- train_model

TRAIN = """
import os, random, sys
import torch
from holdfast.adapters.classic import train_model
from holdfast.training import models
from torch.optim.optimizer import register_optimizer_step_post_hook

models.SHAPES["tiny"] = models.Shape("llama", 1, 32, 2, 128, 300, inner=64, kv_heads=2)
characters = "天地玄黄宇宙洪荒日月盈昃辰宿列张"
texts = ["".join(random.Random(i).choices(characters, k=80)) for i in range(150)]
left = int(sys.argv[2])

def count(*_arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), int(sys.argv[3]))

register_optimizer_step_post_hook(count)
train_model(
    epochs=2, batch_size=4, learning_rate=1e-3, checkpoint_dir=sys.argv[1] + "/outputs",
    temp_checkpoint_freq=3, texts=texts,
)
"""


def trained(script: Path, directory: Path, ends: list[tuple[int, int]]) -> dict[str, Any]:
    for after, number in [*ends, (0, 0)]:
        run = start(script, directory, str(after), str(number))
        killed = number == signal.SIGKILL
        assert run.end() == (-number if killed else number and 128 + number), run.stderr
        if killed:
            assert list((directory / ".cache" / "temp").glob("temp_epoch*.pt"))
    return dict(load(directory / "outputs" / "checkpoints" / "latest.pt"))


def test_train_model_that_is_killed_and_stopped_is_bit_identical(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN, "utf-8")
    straight = trained(script, tmp_path / "straight", [])
    names = sorted(p.name for p in (tmp_path / "straight/outputs/checkpoints").glob("apt_*"))
    assert len(names) == 2
    ends = [(7, signal.SIGKILL), (3, signal.SIGTERM), (4, signal.SIGKILL), (2, signal.SIGINT)]
    assert_same(trained(script, tmp_path / "run", ends), straight)


@pytest.mark.parametrize("mutant", ["epoch_order", "batch_idx"])
def test_a_train_model_that_forgets_its_place_goes_another_way(tmp_path: Path, mutant: str) -> None:
    broken = {
        "epoch_order": "perm = torch.randperm\ntorch.randperm = lambda n, generator: perm(n)\n",
        "batch_idx": "from holdfast.adapters.classic import CheckpointManager\n"
        "CheckpointManager.batch_idx = 0\n",
    }[mutant]
    script = tmp_path / "train.py"
    script.write_text(TRAIN.replace("left = int", broken + "left = int"), "utf-8")
    straight = trained(script, tmp_path / "straight", [])
    other = trained(script, tmp_path / "run", [(7, signal.SIGKILL)])
    with pytest.raises(AssertionError):
        assert_same(other, straight)
