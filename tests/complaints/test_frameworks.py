"""What people have complained of in trainings with frameworks, each shown not to happen to ours."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

import holdfast
from holdfast.adapters.lightning import Protect
from tests.adapters.scripts.small import Data, loader
from tests.adapters.test_lightning import Breaking, Small, fit


class Validated(Small):
    """Is told to end by SIGTERM in the validation after batch 14."""

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.layer(batch[0]).square().mean())
        if self.trainer.fit_loop.total_batch_idx == 14 and index == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def test_spd_741_a_signal_in_a_validation_saves_the_step(tmp_path: Path) -> None:
    """The flag was read between steps only: none of six signals in an evaluation led to a save.

    https://github.com/goodfire-ai/spd/issues/741
    """
    seed_everything(1)
    never = [holdfast.EverySteps(1000)]
    trainer = Trainer(
        max_epochs=2,
        val_check_interval=5,
        callbacks=[Protect(tmp_path, save_when=never, quiet=True)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    with pytest.raises(SystemExit, match="143"):
        trainer.fit(Validated(), loader(0), DataLoader(Data(8, noise=False), batch_size=4))
    assert holdfast.load(tmp_path / "latest.pt")["global_step"] == 15


def test_prime_rl_1036_the_position_in_the_data_is_restored_with_workers_and_goes_on_being_saved(
    tmp_path: Path,
) -> None:
    """Resumed runs read their data from the beginning: `iter()` had begun before the state was
    loaded, as it has in a Trainer, and what was saved from then on was the old position.

    https://github.com/PrimeIntellect-ai/prime-rl/issues/1036
    https://github.com/PrimeIntellect-ai/prime-rl/pull/3332
    """
    straight, _ = fit(tmp_path / "straight", data=loader(2))
    losses = []
    for batch in (7, 13):
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path / "broken", Breaking(batch, losses), data=loader(2))
    rest, _ = fit(tmp_path / "broken", data=loader(2))
    assert losses + rest.losses == straight.losses


class Weights(Callback):
    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.last = torch.clone(module.layer.weight.detach())


def test_speculators_708_a_failure_in_mid_epoch_costs_no_part_of_the_epoch(tmp_path: Path) -> None:
    """An epoch took tens of hours, and a run that failed in it could not go on exactly there.

    https://github.com/vllm-project/speculators/issues/708
    """
    straight, resumed = Weights(), Weights()
    fit(tmp_path / "straight", straight, max_epochs=1)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "broken", Breaking(6, []), max_epochs=1)
    rest, _ = fit(tmp_path / "broken", resumed, max_epochs=1)
    assert len(rest.losses) == 4
    assert torch.equal(resumed.last, straight.last)
