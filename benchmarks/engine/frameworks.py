"""The peers with a protocol or a trainer of their own: DCP, Orbax, Lightning, transformers.

Each is used in its fastest documented form. A state that it needs in another form is converted
outside the timed stretch, and its note says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.peers import (
    Finish,
    Ours,
    OursOverlapped,
    Peer,
    Safetensors,
    Timing,
    TorchSave,
    TorchSaveThread,
)
from benchmarks.engine.workload import Workload, flat


class Dcp(Peer):
    """torch.distributed.checkpoint.save, one process."""

    name = "DCP"
    syncs = "files only"
    note = "syncs a file before its last buffer is written"

    def __init__(self, work: Workload, directory: Path) -> None:
        super().__init__(work, directory)
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        logging.getLogger("torch.distributed").setLevel(logging.ERROR)

    def begin(self, target: Path) -> Finish:
        from torch.distributed.checkpoint.state_dict_saver import save

        save(self.work.state(), checkpoint_id=target, no_dist=True)
        return _nothing

    def load(self, number: int) -> dict[str, torch.Tensor]:
        from torch.distributed.checkpoint.state_dict_loader import load

        template = _empty_like(self.work.state())
        load(template, checkpoint_id=self.target(number), no_dist=True)
        return dict(flat(template))


class DcpThread(Dcp):
    """async_save in a thread, staged in (on a GPU: pinned) memory that stays from save to save."""

    name = "DCP async thread"
    shared = False

    def __init__(self, work: Workload, directory: Path) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().__init__(work, directory)
        gpu = work.device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=gpu,
                use_shared_memory=self.shared,
                use_async_staging=gpu,
                use_non_blocking_copy=gpu,
            )
        )

    def ask(self, target: Path) -> Any:
        from torch.distributed.checkpoint.state_dict_saver import async_save

        return async_save(
            self.work.state(), checkpoint_id=target, async_stager=self._stager, no_dist=True
        )

    def begin(self, target: Path) -> Finish:
        answer = self.ask(target)
        if hasattr(answer, "upload_completion"):
            answer.staging_completion.result()
            answer = answer.upload_completion
        finish: Finish = answer.result
        return finish

    def close(self) -> None:
        self._stager.close()


class DcpProcess(DcpThread):
    """async_save in a process, staged in shared (on a GPU: pinned) memory that stays."""

    name = "DCP async process"
    shared = True

    def __init__(self, work: Workload, directory: Path) -> None:
        from torch import distributed

        super().__init__(work, directory)
        self._started = False
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # The process it starts connects to this one here; the host's name may not resolve.
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DCP_USE_PREFIX_STORE="1")
        distributed.init_process_group("gloo", rank=0, world_size=1)

    def ask(self, target: Path) -> Any:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

        return async_save(
            self.work.state(),
            checkpoint_id=target,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            async_stager=self._stager,
        )

    def save(self, number: int) -> Timing:
        if self._started:
            return super().save(number)
        self._started = True  # the first one starts the process
        with _quiet_child():
            return super().save(number)

    def close(self) -> None:
        from torch import distributed

        super().close()
        distributed.destroy_process_group()


class Orbax(Peer):
    """Orbax's AsyncCheckpointer with the standard handler."""

    name = "Orbax async"
    needs = ("orbax", "jax")
    note = "given jax arrays, converted outside the time"

    def __init__(self, work: Workload, directory: Path) -> None:
        logging.getLogger("absl").setLevel(logging.ERROR)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import orbax.checkpoint as ocp

        super().__init__(work, directory)
        self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._tree: dict[str, Any] = {}

    def prepare(self) -> None:
        import jax.numpy as jnp

        self._tree = {
            name: jnp.array(tensor.detach().cpu().numpy(), copy=True)
            for name, tensor in self.work.tensors().items()
        }

    def begin(self, target: Path) -> Finish:
        import orbax.checkpoint as ocp

        self._orbax.save(target.absolute(), args=ocp.args.StandardSave(self._tree))
        return self._orbax.wait_until_finished  # type: ignore[no-any-return]

    def settle(self) -> None:
        self._tree = {}

    def load(self, number: int) -> dict[str, torch.Tensor]:
        import numpy as np

        tree = self._orbax.restore(self.target(number).absolute())
        return {name: torch.from_numpy(np.array(array)) for name, array in tree.items()}

    def close(self) -> None:
        self._orbax.close()


class Lightning(Peer):
    """Lightning's Trainer.save_checkpoint, after a fit of one step with this model."""

    name = "Lightning"
    needs = ("lightning",)

    def __init__(self, work: Workload, directory: Path) -> None:
        import lightning

        super().__init__(work, directory)
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="lightning")

        class Module(lightning.LightningModule):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.model = work.model

            def training_step(self, batch: torch.Tensor, _index: int) -> Any:
                return self.model(batch)

            def configure_optimizers(self) -> Any:
                return work.optimizer

        self._trainer = lightning.Trainer(
            max_steps=1,
            accelerator="gpu" if work.device.type == "cuda" else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=directory,
        )
        self._trainer.fit(Module(), torch.utils.data.DataLoader(list(work.tokens)))  # type: ignore[arg-type]
        work.model.to(work.device)

    def begin(self, target: Path) -> Finish:
        self._trainer.save_checkpoint(target)
        return _nothing

    def load(self, number: int) -> dict[str, torch.Tensor]:
        found = torch.load(self.target(number), weights_only=True, map_location="cpu")
        model = {name.removeprefix("model."): t for name, t in found["state_dict"].items()}
        return dict(flat({"model": model, "optimizer": found["optimizer_states"][0]}))


class Transformers(Peer):
    """The checkpoint of transformers.Trainer, as its training loop writes it."""

    name = "transformers.Trainer"
    needs = ("transformers", "accelerate")

    def __init__(self, work: Workload, directory: Path) -> None:
        import transformers

        super().__init__(work, directory)
        transformers.logging.set_verbosity_error()
        arguments = transformers.TrainingArguments(
            output_dir=str(directory), report_to=[], use_cpu=work.device.type == "cpu"
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(work.optimizer, lambda _step: 1.0)
        self._trainer = transformers.Trainer(
            model=work.model, args=arguments, optimizers=(work.optimizer, schedule)
        )

    def target(self, number: int) -> Path:
        return self.directory / f"checkpoint-{number}"

    def begin(self, target: Path) -> Finish:
        self._trainer.state.global_step = int(target.name.rpartition("-")[2])
        self._trainer._save_checkpoint(self.work.model, trial=None)
        return _nothing

    def load(self, number: int) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        folder = self.target(number)
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
        model = load_file(folder / "model.safetensors")
        return dict(flat({"model": model, "optimizer": optimizer}))


_IN_ORDER: tuple[type[Peer], ...] = (
    Ours,
    OursOverlapped,
    TorchSave,
    TorchSaveThread,
    Safetensors,
    Dcp,
    DcpThread,
    DcpProcess,
    Orbax,
    Lightning,
    Transformers,
)
PEERS = {peer.name: peer for peer in _IN_ORDER}


@contextlib.contextmanager
def _quiet_child() -> Iterator[None]:
    """Let a process that is started meanwhile ignore Ctrl-C and write no log.

    It inherits both. Its failures come back as exceptions, not on stderr.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
        signal.signal(signal.SIGINT, before)


def _nothing() -> None:
    """Do nothing: the save has ended already."""


def _empty_like(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device="cpu")
    if isinstance(value, dict):
        return {key: _empty_like(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_empty_like(inner) for inner in value]
    return value
