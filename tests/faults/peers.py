"""The libraries that people use, each in the way that its own documentation shows."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import warnings
from contextlib import redirect_stdout
from typing import Any, ClassVar

import torch

from tests.faults.savers import Announce, Saver


class _Library(Saver):
    packages: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def missing(cls) -> str:
        absent = [name for name in cls.packages if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else ""


class Dcp(_Library):
    """torch.distributed.checkpoint: a directory a save, the newest kept."""

    name = "torch.distributed.checkpoint"

    def start(self) -> None:
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)

    def save(self, step: int, announce: Announce) -> None:
        import torch.distributed.checkpoint as dcp

        place = self.directory / f"step_{step}"
        dcp.save(self._state(), checkpoint_id=place)
        announce(step)
        for old in self.directory.iterdir():
            if old != place:
                for path in sorted(old.rglob("*"), reverse=True):
                    path.unlink()
                old.rmdir()

    def resume(self) -> int:
        import torch.distributed.checkpoint as dcp

        self.start()
        # A save that was never finished has no .metadata: that is written last.
        whole = [path for path in self.directory.iterdir() if (path / ".metadata").exists()]
        found = sorted(whole, key=lambda path: int(path.name.split("_")[1]))
        if not found:
            return 0
        training, state = self.training, self._state()
        # Moments exist only after a step; the documentation makes them with a step of zeros.
        before = training.losses.copy()
        training.step()
        training.losses[:] = before
        state = self._state()
        dcp.load(state, checkpoint_id=found[-1])
        training.load_state_dict({**state, "losses": state["losses"]})
        return training.now

    def _state(self) -> dict[str, Any]:
        training = self.training
        return {
            "model": training.model.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "losses": list(training.losses),
            "rng": torch.get_rng_state(),
        }


class Lightning(_Library):
    """Lightning's Trainer.save_checkpoint over one file, as ModelCheckpoint(save_last) does."""

    name = "Lightning, last.ckpt"
    packages = ("lightning",)

    def start(self) -> None:
        import lightning

        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        training = self.training

        class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.net = training.model

            def configure_optimizers(self) -> Any:
                return training.optimizer

            def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["mine"] = training.state_dict()

        with redirect_stdout(io.StringIO()):
            self.trainer = lightning.Trainer(
                accelerator="cpu", logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, max_steps=1,
                default_root_dir=str(self.directory),
            )  # fmt: skip
            self.trainer.strategy.connect(Module())
            self.trainer.strategy.optimizers = [training.optimizer]

    def save(self, step: int, announce: Announce) -> None:
        self.trainer.save_checkpoint(self.directory / "last.ckpt")
        announce(step)

    def resume(self) -> int:
        file = self.directory / "last.ckpt"
        self.start()
        if not file.exists():
            return 0
        found = torch.load(file, weights_only=True)
        self.training.load_state_dict(found["mine"])
        return self.training.now


class Transformers(_Library):
    """transformers.Trainer: its own checkpoints, limit 1, found by get_last_checkpoint."""

    name = "transformers.Trainer, limit 1"
    packages = ("transformers", "accelerate")

    def start(self) -> None:
        import transformers

        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        training = self.training
        arguments = transformers.TrainingArguments(
            output_dir=str(self.directory), save_total_limit=1, report_to=[], use_cpu=True,
            disable_tqdm=True, save_steps=1, max_steps=10,
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda _step: 1.0)
        with torch.random.fork_rng():  # it seeds the global stream
            self.trainer = transformers.Trainer(
                model=training.model, args=arguments, optimizers=(training.optimizer, schedule)
            )

    def save(self, step: int, announce: Announce) -> None:
        self.trainer.state.global_step = step
        self.trainer.state.log_history = [{"losses": list(self.training.losses)}]
        self.trainer._save_checkpoint(self.training.model, trial=None)
        announce(step)

    def resume(self) -> int:
        import transformers
        from transformers.trainer_utils import get_last_checkpoint

        found = get_last_checkpoint(str(self.directory))
        self.start()
        if found is None:
            return 0
        trainer = self.trainer
        state = transformers.TrainerState.load_from_json(os.path.join(found, "trainer_state.json"))  # noqa: PTH118
        trainer._load_from_checkpoint(found)
        trainer._load_optimizer_and_scheduler(found)
        trainer._load_rng_state(found)
        self.training.losses[:] = state.log_history[-1]["losses"]
        return int(state.global_step)


PEERS: list[type[Saver]] = [Dcp, Transformers, Lightning]
