"""Resuming is bit-exact: weights, optimizer, schedule, losses, history, and all random streams.

The mutants at the end break one thing each; the comparison must notice every one of them, or it
proves nothing.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint import Catalog
from holdfast.checkpoint.state.randomness import RandomState
from holdfast.checkpoint.state.transaction import LoadScheduler
from holdfast.checkpoint.system.lock import run_lock
from holdfast.manage import rollback
from holdfast.training.options.config_files import save_config
from holdfast.training.trainer import Trainer
from tests import processes
from tests.support import archived
from tests.training.runs import (
    Killed,
    config_for,
    difference,
    final_state,
    kill_after,
    train,
    write_corpus,
)

SAVE_EVERY = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Any]:
    """The final state of the run that nothing disturbs."""
    directory = tmp_path_factory.mktemp("straight")
    train(config_for(directory, corpus))
    return final_state(directory)


def interrupted(
    directory: Path, corpus: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> dict[str, Any]:
    """The final state of a run that is ended without a word after each of `steps`."""
    options = {"temp_every_steps": SAVE_EVERY, **options}
    for step in steps:
        with monkeypatch.context() as patch:
            kill_after(step, patch)
            with pytest.raises(Killed):
                train(config_for(directory, corpus, **options))
    train(config_for(directory, corpus, **options))
    return final_state(directory)


def test_the_hard_run_is_long_enough_to_prove_something(straight: dict[str, Any]) -> None:
    assert straight["global_step"] >= 30
    assert straight["history"]["epochs"] == [1, 2]
    assert straight["progress"]["epoch"] == 3


def test_killed_in_each_epoch_and_resumed_is_bit_identical(
    tmp_path: Path, corpus: Path, straight: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    per_epoch = straight["global_step"] // 2
    killed_at = [per_epoch // 2 + 1, per_epoch + 1, per_epoch + 7]
    again = interrupted(tmp_path, corpus, killed_at, monkeypatch)
    assert difference(straight, again) is None


def test_gone_back_and_trained_again_is_bit_identical(
    tmp_path: Path, corpus: Path, straight: dict[str, Any]
) -> None:
    options = {"temp_every_steps": SAVE_EVERY, "save_every": 7}
    train(config_for(tmp_path, corpus, **options))
    with run_lock(tmp_path):
        rollback.execute(rollback.plan(tmp_path, "21"))
    said = train(config_for(tmp_path, corpus, **options))
    assert "21" in said and "lost" not in said
    assert difference(straight, final_state(tmp_path)) is None
    newest = Catalog(tmp_path).scan().newest
    assert newest is not None
    assert (newest.generation, newest.step) == (2, straight["global_step"])
    assert (archived(tmp_path) / "latest.pt").exists()


def test_killed_at_random_steps_is_bit_identical(
    tmp_path: Path, corpus: Path, straight: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    steps = sorted(random.Random(seed).sample(range(5, straight["global_step"]), 4))
    assert difference(straight, interrupted(tmp_path, corpus, steps, monkeypatch)) is None


@pytest.mark.usefixtures("shape_as_shipped")
def test_killed_by_a_real_signal_right_after_an_announcement(tmp_path: Path, corpus: Path) -> None:
    """SIGKILL of a real process; the line it had just printed is the promise."""
    train(config_for(tmp_path / "straight", corpus, epochs=1))
    config = config_for(tmp_path / "run", corpus, epochs=1, temp_every_steps=SAVE_EVERY)
    file = tmp_path / "config.json"
    save_config(config, file)
    words = ["train", "--config", file, "--lang", "en"]
    process = processes.start(*words)
    assert process.stdout is not None
    for line in process.stdout:
        if "step 12 is durable" in line:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    done = processes.run(*words)
    assert done.returncode == 0, done.stderr
    assert "Going on from" in done.stdout
    straight, again = final_state(tmp_path / "straight"), final_state(tmp_path / "run")
    assert difference(straight, again) is None


def test_evaluations_and_samples_do_not_change_the_run(
    tmp_path: Path, corpus: Path, straight: dict[str, Any]
) -> None:
    train(config_for(tmp_path, corpus, eval_every=5, sample_tokens=0, save_every=9))
    other = final_state(tmp_path)
    for name in ("model", "optimizer", "scheduler", "rng", "history"):
        assert difference(straight[name], other[name], name) is None


def test_a_run_of_steps_is_bit_identical_too(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"num_steps": 25, "epochs": "none", "eval_every": 10}
    train(config_for(tmp_path / "a", corpus, **options))
    again = interrupted(tmp_path / "b", corpus, [13, 22], monkeypatch, **options)
    assert difference(final_state(tmp_path / "a"), again) is None


def test_a_moved_run_directory_goes_on_bit_identically(
    tmp_path: Path, corpus: Path, straight: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied without its hard links, to another place, with the data under another name."""
    import shutil

    with monkeypatch.context() as patch:
        kill_after(13, patch)
        with pytest.raises(Killed):
            train(config_for(tmp_path / "old", corpus, temp_every_steps=SAVE_EVERY))
    shutil.copytree(tmp_path / "old", tmp_path / "new place")
    shutil.rmtree(tmp_path / "old")
    renamed = tmp_path / "文本.txt"
    shutil.copy(corpus, renamed)
    train(config_for(tmp_path / "new place", renamed, temp_every_steps=SAVE_EVERY))
    assert difference(straight, final_state(tmp_path / "new place")) is None


# ------------------------------------------------------------------------------------- mutants


def rng_not_restored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RandomState, "load_state_dict", lambda self, state: None)


def position_off_by_one(patch: pytest.MonkeyPatch) -> None:
    original = Trainer.settle

    def settle(self: Trainer, saved: dict[str, Any]) -> list[str]:
        self.progress.position += 1
        return original(self, saved)

    patch.setattr(Trainer, "settle", settle)


def scheduler_not_restored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LoadScheduler, "commit", lambda self: None)


def optimizer_not_restored(patch: pytest.MonkeyPatch) -> None:
    from holdfast.checkpoint.state.transaction import LoadOptimizer

    patch.setattr(LoadOptimizer, "commit", lambda self: None)


def accumulation_cut_in_the_middle(patch: pytest.MonkeyPatch) -> None:
    """Save between two micro-batches: the gradients so far are in nobody's state."""
    original = Trainer.loss

    def loss(self: Trainer, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        result = original(self, inputs, targets)
        if self.model.training and self.progress.step == 12:
            self.manager.save(step=self.progress.step, epoch=self.progress.epoch, kind="temp")
        return result

    patch.setattr(Trainer, "loss", loss)


def epoch_loss_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = Trainer.settle

    def settle(self: Trainer, saved: dict[str, Any]) -> list[str]:
        self.progress.loss_sum = 0.0
        return original(self, saved)

    patch.setattr(Trainer, "settle", settle)


MUTANTS = [
    rng_not_restored,
    position_off_by_one,
    scheduler_not_restored,
    optimizer_not_restored,
    accumulation_cut_in_the_middle,
    epoch_loss_forgotten,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_comparison_catches(
    mutant: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    corpus: Path,
    straight: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutant(monkeypatch)
    again = interrupted(tmp_path, corpus, [13], monkeypatch)
    assert difference(straight, again) is not None


@pytest.mark.parametrize("option", ["fresh", "checkpoint", "resume"])
@pytest.mark.parametrize("killed_at", [1, 6])
def test_killed_before_the_first_save_of_a_new_run_the_old_one_is_as_it_was(
    tmp_path: Path,
    corpus: Path,
    straight: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    *,
    option: str,
    killed_at: int,
) -> None:
    other, run = tmp_path / "other", tmp_path / "run"
    train(config_for(other, corpus, num_steps=2, epochs="none", seed=7))
    with monkeypatch.context() as patch:
        kill_after(9, patch)
        with pytest.raises(Killed):
            train(config_for(run, corpus, temp_every_steps=SAVE_EVERY))
    kept = ("config.json", "metrics.jsonl", "tokenizer/tokenizer.json", "temp/temp_epoch1_step8.pt")
    before = {name: (run / name).read_bytes() for name in kept}
    options = {option: True if option == "fresh" else str(other / "latest.pt")}
    with monkeypatch.context() as patch:
        kill_after(killed_at + (2 if option == "resume" else 0), patch)
        with pytest.raises(Killed):
            train(config_for(run, corpus, num_steps=20, epochs="none", **options))
    assert {name: (run / name).read_bytes() for name in kept} == before
    assert not (run / "archive").exists()
    twin = tmp_path / "twin"
    shutil.copytree(run, twin)
    train(config_for(twin, corpus, temp_every_steps=SAVE_EVERY))
    assert difference(straight, final_state(twin)) is None
    said = train(config_for(run, corpus, num_steps=20, epochs="none", **options))
    assert "these go to archive/" in said and "checkpoints were moved to" in said
    (place,) = run.glob("archive/*/generation_1")
    assert {name: (place / name).read_bytes() for name in kept} == before
    assert {entry.run_id for entry in Catalog(run).scan().entries} == {
        Catalog(run).history.known.run[0]  # type: ignore[index]
    }
    first = (run / "metrics.jsonl").read_text().splitlines()[0]
    assert '"started"' in first and (run / "config.json").exists()
