"""A Lightning training that is killed and started again is to the bit what it would have been."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torchmetrics.classification  # noqa: F401 - imported once: each training is a fork of us
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch.utils.data import DataLoader

from holdfast.adapters.lightning import Protect
from holdfast.errors import ConfigError
from tests.adapters.exactness import SCRIPTS, Outcome, mutant, same, trained
from tests.adapters.scripts.small import Data, loader

AUTOMATIC, GAN = SCRIPTS / "lightning_automatic.py", SCRIPTS / "lightning_gan.py"
FABRIC = SCRIPTS / "fabric_loop.py"
# Steps are made at the batches 2, 5, 8, 9 of an epoch of ten, and validated after 4 and 9.
ENDS = ["SIGKILL batch 7", "SIGKILL batch 13", "SIGKILL epoch 1"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return trained(AUTOMATIC, tmp_path_factory.mktemp("straight"))


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_it_is_bit_identical(tmp_path: Path, straight: Outcome, workers: int) -> None:
    """In an accumulation, after a save, at an epoch's end; with workers and without."""
    same(trained(AUTOMATIC, tmp_path, workers=workers, ends=ENDS), straight)


def test_two_optimizers_by_hand_are_bit_identical(tmp_path: Path) -> None:
    straight = trained(GAN, tmp_path / "straight")
    same(trained(GAN, tmp_path / "killed", workers=2, ends=ENDS), straight)


def test_a_loop_with_fabric_is_bit_identical(tmp_path: Path) -> None:
    straight = trained(FABRIC, tmp_path / "straight")
    same(trained(FABRIC, tmp_path / "killed", workers=2, ends=ENDS), straight)
    script = mutant(FABRIC, tmp_path, ("    loader=resumable,\n", ""))
    with pytest.raises(AssertionError):
        same(trained(script, tmp_path / "mutant", ends=ENDS[:1]), straight)


@pytest.mark.slow
@pytest.mark.parametrize("script", [AUTOMATIC, GAN, FABRIC], ids=["automatic", "by hand", "fabric"])
def test_killed_fifty_times_it_is_bit_identical(tmp_path: Path, script: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    places = sorted(random.Random(seed).sample(range(5, 195), 50))
    ends = [f"SIGKILL batch {place}" for place in places]
    straight = trained(script, tmp_path / "straight", epochs=20)
    same(trained(script, tmp_path / "killed", epochs=20, workers=seed % 3, ends=ends), straight)


def test_a_signal_saves_this_step_and_the_exit_status_is_its_own(
    tmp_path: Path, straight: Outcome
) -> None:
    """In an accumulation, and in a validation, which Lightning itself would break off."""
    ends = ["SIGTERM batch 7", "SIGINT batch 14", "SIGUSR1 validation 24"]
    same(trained(AUTOMATIC, tmp_path, ends=ends), straight)


def test_resuming_with_lightnings_own_checkpoints_is_found_to_be_inexact(
    tmp_path: Path, straight: Outcome
) -> None:
    script = mutant(
        AUTOMATIC,
        tmp_path,
        ('Protect(f"{out}/run", save_when=[holdfast.EverySteps(1)])',
         'ModelCheckpoint(f"{out}/run", save_last=True, every_n_train_steps=1)'),
        ("batch_size=4))\nfinish", 'batch_size=4), ckpt_path="last")\nfinish'),
        ("holdfast.adapters.lightning.ModelC", "ModelC"),
    )  # fmt: skip
    with pytest.raises(AssertionError, match=r"batch 6, .* was .* and is"):
        same(trained(script, tmp_path, ends=["SIGKILL batch 7"]), straight)


def test_a_state_of_the_module_that_is_in_no_state_dict_is_found(tmp_path: Path) -> None:
    script = mutant(
        GAN,
        tmp_path,
        ("        self.automatic_optimization = False",
         "        self.automatic_optimization = False\n        self.seen = 0"),
        ("self.loss(points, 1.0) + ", "(self.seen + 1) * self.loss(points, 1.0) + "),
        ("        making = ", "        self.seen += 1\n        making = "),
    )  # fmt: skip
    straight = trained(script, tmp_path / "straight")
    with pytest.raises(AssertionError, match=r"batch 7, .* was .* and is"):
        same(trained(script, tmp_path / "killed", ends=["SIGKILL batch 7"]), straight)


# ------------------------------------------------------------------------------- in this process


class Small(lightning.LightningModule):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(6, width)
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    directory: Path,
    *callbacks: Any,
    data: Any = None,
    ckpt_path: Any = None,
    also: Any = (),
    **settings: Any,
) -> tuple[Small, lightning.Trainer]:
    lightning.seed_everything(1)
    model = Small()
    trainer = lightning.Trainer(
        default_root_dir=directory,
        callbacks=[Protect(directory / "run", quiet=True, also=also), *callbacks],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, "enable_checkpointing": False, **settings},
    )
    trainer.fit(model, data or loader(0), ckpt_path=ckpt_path)
    return model, trainer


def test_more_epochs_go_on_where_the_finished_run_ended(tmp_path: Path) -> None:
    straight, _ = fit(tmp_path / "straight", max_epochs=3)
    first, _ = fit(tmp_path / "both")
    again, trainer = fit(tmp_path / "both")
    assert not again.losses
    more, trainer = fit(tmp_path / "both", max_epochs=3)
    assert first.losses + more.losses == straight.losses
    assert trainer.current_epoch == 3
    assert torch.equal(more.layer.weight, straight.layer.weight)


def test_a_run_by_steps_goes_on_at_the_step(tmp_path: Path) -> None:
    straight, _ = fit(tmp_path / "straight", max_steps=20, max_epochs=-1)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "both", Breaking(13, []), max_steps=20, max_epochs=-1)
    rest, trainer = fit(tmp_path / "both", max_steps=20, max_epochs=-1)
    assert rest.losses == straight.losses[13:]  # the snapshot in memory was made durable
    assert trainer.global_step == 20


def test_more_steps_begin_with_the_rest_of_the_epoch(tmp_path: Path) -> None:
    straight, _ = fit(tmp_path / "straight", max_steps=25, max_epochs=-1)
    losses = []
    for steps in (13, 17, 25):
        part, _ = fit(tmp_path / "parts", max_steps=steps, max_epochs=-1)
        losses += part.losses
    assert losses == straight.losses


class Breaking(Callback):
    """Fails in a batch, in the middle of what Lightning does for it."""

    def __init__(self, batch: int, losses: list[float]) -> None:
        self.batch, self.losses = batch, losses  # what was trained before it is added to these

    def on_train_batch_start(self, trainer: Any, module: Any, *_more: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            self.losses += module.losses
            raise ZeroDivisionError


def test_epochs_that_are_cut_short_go_on_with_the_next_one(tmp_path: Path) -> None:
    straight, _ = fit(tmp_path / "straight", limit_train_batches=4, max_epochs=4)
    first, _ = fit(tmp_path / "both", limit_train_batches=4)
    rest, _ = fit(tmp_path / "both", limit_train_batches=4, max_epochs=4)
    assert len(first.losses) == 8
    assert first.losses + rest.losses == straight.losses


class Average(Callback):
    """Keeps an average of the weights, as they are often written: without a state_dict."""

    kept: torch.Tensor | None = None

    def on_train_batch_end(self, trainer: Any, module: Any, *_more: Any) -> None:
        now = module.layer.weight.detach()
        self.kept = now.clone() if self.kept is None else 0.9 * self.kept + 0.1 * now


def test_a_callback_without_a_state_dict_is_named_and_saved_where_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight = Average()
    fit(tmp_path / "straight", straight, max_epochs=3)
    (named,) = [line for line in caplog.messages if "no state_dict has" in line]
    assert named.count("kept") == named.count("state_dict._trainer") == 1
    caplog.clear()
    for epochs in (2, 3):
        average = Average()
        fit(tmp_path / "both", average, also=[average], max_epochs=epochs)
    assert not [line for line in caplog.messages if "no state_dict has" in line]
    assert straight.kept is not None and torch.equal(average.kept, straight.kept)  # type: ignore[arg-type]


def test_lightning_reads_the_files_by_itself(tmp_path: Path) -> None:
    model, _trainer = fit(tmp_path)
    there = Small.load_from_checkpoint(tmp_path / "run" / "latest.pt")
    assert torch.equal(there.layer.weight, model.layer.weight)
    assert there.hparams["width"] == 2


def test_its_model_checkpoint_works_beside_it(tmp_path: Path) -> None:
    own = ModelCheckpoint(tmp_path / "own", every_n_train_steps=5, save_top_k=-1)
    fit(tmp_path, own, enable_checkpointing=True)
    steps = [torch.load(path)["global_step"] for path in (tmp_path / "own").iterdir()]
    assert sorted(steps) == [5, 10, 15, 20]


def test_a_first_start_begins_with_ckpt_path_and_the_next_ones_go_on(tmp_path: Path) -> None:
    _, trainer = fit(tmp_path / "before", max_epochs=1)
    trainer.save_checkpoint(tmp_path / "given.ckpt")
    first, _ = fit(tmp_path / "run", ckpt_path=tmp_path / "given.ckpt", max_epochs=2)
    assert len(first.losses) == 10
    rest, _ = fit(tmp_path / "run", ckpt_path=tmp_path / "given.ckpt", max_epochs=3)
    assert len(rest.losses) == 10


def test_what_cannot_be_exact_is_refused_before_the_first_step(tmp_path: Path) -> None:
    plain = DataLoader(Data(), batch_size=4)
    with pytest.raises(ConfigError, match=r"ResumableLoader\(loader\)"):
        fit(tmp_path, data=plain)
    with pytest.raises(ConfigError, match="StochasticWeightAveraging changes"):
        fit(tmp_path, StochasticWeightAveraging(0.1))
    assert not (tmp_path / "run").exists()
    fit(tmp_path)
    with pytest.raises(ConfigError, match="holdfast rollback"):
        fit(tmp_path, ckpt_path=tmp_path / "run" / "model_epoch_1.pt")


def test_a_fast_dev_run_saves_nothing(tmp_path: Path) -> None:
    fit(tmp_path, fast_dev_run=True)
    assert not (tmp_path / "run").exists()
