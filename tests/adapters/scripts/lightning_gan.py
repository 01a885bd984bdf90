"""Two optimizers by hand, one of them every second batch: OUT WORKERS EPOCHS END."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import lightning
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import holdfast
import holdfast.adapters.lightning
from tests.adapters.scripts.small import end_at, finish, loader, tell

out, workers, epochs, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Pair(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.made, self.judged = torch.nn.Linear(4, 6), torch.nn.Linear(6, 1)

    def loss(self, points: torch.Tensor, real: float) -> torch.Tensor:
        found = self.judged(points)
        return binary_cross_entropy_with_logits(found, torch.full_like(found, real))

    def training_step(self, batch: Any, index: int) -> None:
        points, _classes = batch
        maker, judge = self.optimizers()
        of_maker, of_judge = self.lr_schedulers()
        self.toggle_optimizer(judge)
        false = self.made(torch.randn(len(points), 4)).detach()
        judging = self.loss(points, 1.0) + self.loss(false, 0.0)
        judge.zero_grad()
        self.manual_backward(judging)
        judge.step()
        of_judge.step()
        self.untoggle_optimizer(judge)
        self.toggle_optimizer(maker)
        making = self.loss(self.made(torch.randn(len(points), 4)), 1.0)
        self.manual_backward(making)  # two batches come together before a step
        if index % 2:
            maker.step()
            maker.zero_grad()
            of_maker.step()
        self.untoggle_optimizer(maker)
        self.log_dict({"making": making, "judging": judging}, on_step=False, on_epoch=True)
        place = f"batch {self.trainer.fit_loop.total_batch_idx}"
        tell(f"{place}, {index} of epoch {self.current_epoch}", points.sum(), making, judging)
        end_at(place, end)

    def on_train_epoch_end(self) -> None:
        tell(f"end of {self.current_epoch}", *self.trainer.callback_metrics.values())
        end_at(f"epoch {self.current_epoch}", end)

    def configure_optimizers(self) -> Any:
        both = [
            torch.optim.Adam(self.made.parameters(), lr=0.05, betas=(0.5, 0.9)),
            torch.optim.SGD(self.judged.parameters(), lr=0.1, momentum=0.9),
        ]
        return both, [torch.optim.lr_scheduler.ExponentialLR(one, 0.99) for one in both]


lightning.seed_everything(1)
model = Pair()
protect = holdfast.adapters.lightning.Protect(f"{out}/run", save_when=[holdfast.EverySteps(1)])
trainer = lightning.Trainer(
    max_epochs=epochs,
    callbacks=[protect],
    logger=False,
    accelerator="cpu",
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, loader(workers))
finish(
    f"{out}/end.pt",
    model=model,
    optimizers=[optimizer.state_dict() for optimizer in trainer.optimizers],
    schedules=[config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
    counted=[trainer.global_step, trainer.current_epoch, trainer.fit_loop.total_batch_idx],
)
