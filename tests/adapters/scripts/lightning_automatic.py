"""A Trainer with much that a checkpoint may forget: OUT WORKERS EPOCHS END."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import holdfast
import holdfast.adapters.lightning
from tests.adapters.scripts.small import Data, end_at, finish, loader, tell

out, workers, epochs, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Model(lightning.LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers = torch.nn.Linear(6, width), torch.nn.BatchNorm1d(width), torch.nn.Dropout(0.2)
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(width, 3))
        self.accuracy = MulticlassAccuracy(num_classes=3)

    def on_train_start(self) -> None:
        torch.rand(3)  # drawn by every start, and no part of the training

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        points, classes = batch
        found = self.net(points + 0.1 * torch.randn_like(points))
        loss = cross_entropy(found, classes)
        self.accuracy(found, classes)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        place = f"batch {self.trainer.fit_loop.total_batch_idx}"
        tell(f"{place}, {index} of epoch {self.current_epoch}", points.sum(), loss)
        end_at(place, end)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        points, classes = batch
        loss = cross_entropy(self.net(points), classes) + 0.01 * torch.rand(())
        self.log("val_loss", loss)
        end_at(f"validation {self.trainer.fit_loop.total_batch_idx}", end)

    def on_train_epoch_end(self) -> None:
        logged = sorted(self.trainer.callback_metrics.items())
        tell(f"end of {self.current_epoch}, {[name for name, _ in logged]}", *dict(logged).values())
        end_at(f"epoch {self.current_epoch}", end)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7)
        cycle = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.05, 3, cycle_momentum=False)
        return [optimizer], [
            {"scheduler": plateau, "monitor": "loss_epoch"},
            {"scheduler": cycle, "interval": "step"},
        ]


lightning.seed_everything(1)
model = Model()
protect = holdfast.adapters.lightning.Protect(f"{out}/run", save_when=[holdfast.EverySteps(1)])
stopping = EarlyStopping("val_loss", patience=2 * epochs)
trainer = lightning.Trainer(
    max_epochs=epochs,
    callbacks=[protect, EMAWeightAveraging(decay=0.9), stopping, ModelCheckpoint(f"{out}/own")],
    accumulate_grad_batches=3,
    val_check_interval=5,
    logger=False,
    accelerator="cpu",
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, loader(workers), DataLoader(Data(8, noise=False), batch_size=4))
finish(
    f"{out}/end.pt",
    model=model,
    optimizer=trainer.optimizers[0],
    schedules=[config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
    stopping=stopping,
    logged={name: float(value) for name, value in trainer.callback_metrics.items()},
    counted=[trainer.global_step, trainer.current_epoch, trainer.fit_loop.total_batch_idx],
)
