"""What people have complained of in Trainer, each shown not to happen to a protected one.

https://github.com/huggingface/transformers: issues/35782, pull/40691, issues/48315, issues/10290.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import verify
from holdfast.adapters.transformers import protect
from tests.adapters.test_transformers import stop_early
from tests.adapters.trainings import FINAL, causal, run
from tests.support import assert_same


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("straight")
    assert run(causal, out)[0] == 0
    return final(out)


def final(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / FINAL, weights_only=False)
    return state


def auto_resumed(trainer: Any, out: Path) -> None:
    protect(trainer, out)
    train = trainer.train
    trainer.train = lambda: train(resume_from_checkpoint=True)


def test_35782_incomplete_checkpoint_of_a_kill_while_saving_does_not_stop_the_next_start(
    straight: dict[str, Any], tmp_path: Path
) -> None:
    """Killed while it wrote a checkpoint, Trainer chose that one at the next start, and failed."""
    assert run(causal, tmp_path, kill=("save", 8), guard=auto_resumed)[0] == -signal.SIGKILL
    folder = tmp_path / "checkpoint-8"
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:7])
    newest = (tmp_path / "latest.pt").resolve()
    newest.chmod(0o644)
    newest.write_bytes(newest.read_bytes()[:-100])
    assert verify(newest) is not None
    status, said = run(causal, tmp_path, guard=auto_resumed)
    assert status == 0, said
    assert_same(final(tmp_path), straight)


def test_40691_resume_in_a_later_epoch_has_the_order_of_that_epoch(
    straight: dict[str, Any], tmp_path: Path
) -> None:
    """A resume in the second epoch went on in the order of the first."""
    assert run(causal, tmp_path, kill=("substep_end", 8))[0] == -signal.SIGKILL
    assert run(causal, tmp_path)[0] == 0
    assert final(tmp_path)["batches"] == straight["batches"]


BEST = {"load_best_model_at_end": True, "save_total_limit": 1}


def test_48315_run_that_was_moved_without_its_best_checkpoint_ends_well(tmp_path: Path) -> None:
    """The folder of the best model was gone, and Trainer failed when all was trained."""
    there, here = tmp_path / "there", tmp_path / "here"
    assert run(causal, there, kill=("substep_end", 6), **BEST)[0] == -signal.SIGKILL
    shutil.move(there, here)
    (best,) = here.glob("checkpoint-*")
    shutil.rmtree(best)
    status, said = run(causal, here, **BEST)
    assert status == 0, said


def test_48315_run_that_was_moved_with_its_best_checkpoint_loads_it(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    settings = {**BEST, "learning_rate": 0.5, "eval_steps": 2, "save_steps": 2}
    assert run(causal, tmp_path / "straight", **settings)[0] == 0
    assert run(causal, there, kill=("substep_end", 8), **settings)[0] == -signal.SIGKILL
    shutil.move(there, here)
    status, said = run(causal, here, **settings)
    assert status == 0, said
    assert_same(final(here), final(tmp_path / "straight"))


def test_10290_training_that_was_stopped_early_is_not_gone_on_with(tmp_path: Path) -> None:
    """The next start trained on, and counted the patience from zero."""
    settings = {"num_train_epochs": 6, "eval_strategy": "epoch", "save_strategy": "epoch"}
    settings |= {"load_best_model_at_end": True}
    ends = []
    for _start in range(2):
        assert run(causal, tmp_path, guard=stop_early, **settings)[0] == 0
        ends.append(final(tmp_path)["logs"][-1]["step"])
    assert ends == [15, 15]
