"""The savers of the benchmark, a small class each: holdfast, torch.save and safetensors.

A save begins (training stands still), finishes (the saver's own work is done) and becomes durable:
files and directories that the saver does not sync are synced for it, and that counts as its time.
Frameworks with a trainer or a protocol of their own are in frameworks.py.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import holdfast
from benchmarks.engine.watch import Watcher, sync_tree
from benchmarks.engine.workload import Workload, flat

Finish = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """The times of one save, in seconds.

    `stall`: the training thread stood still. `durable`: from the request to the return of the last
    fsync(directory). `step`: the training step that overlapped the save, if one did.
    """

    stall: float
    durable: float
    step: float | None = None


class Peer(ABC):
    """A saver of the state of `work` below `directory`."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # packages
    syncs: ClassVar[str] = "no"  # whether it makes its files durable itself
    note: ClassVar[str] = ""

    def __init__(self, work: Workload, directory: Path) -> None:
        self.work, self.directory = work, directory
        directory.mkdir(parents=True, exist_ok=True)

    @classmethod
    def missing(cls) -> list[str]:
        """Return the packages it needs that are not installed."""
        return [name for name in cls.needs if importlib.util.find_spec(name) is None]

    def target(self, number: int) -> Path:
        return self.directory / f"save_{number}"

    def prepare(self) -> None:  # noqa: B027 - most have nothing to do
        """Convert the state into the form it needs; not timed."""

    @abstractmethod
    def begin(self, target: Path) -> Finish:
        """Start a save and return a function that ends it. Training may go on in between."""

    def save(self, number: int) -> Timing:
        """Save once and wait until it is durable; call `prepare` before."""
        self.work.wait()
        began = time.monotonic()
        finish = self.begin(self.target(number))
        self.work.wait()  # a GPU may have to wait where the thread that drives it does not
        stall = time.monotonic() - began
        finish()
        sync_tree(self.target(number))
        return Timing(stall, time.monotonic() - began)

    def settle(self) -> None:  # noqa: B027
        """Wait until nothing of a save goes on in the background."""

    @abstractmethod
    def load(self, number: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a save by their dotted names."""

    def remove(self, number: int) -> None:
        target = self.target(number)
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def close(self) -> None:  # noqa: B027
        """Release memory and processes; the files go with the benchmark's directory."""


class Ours(Peer):
    """CheckpointManager.save_async, timed by an observer in another process."""

    name = "holdfast"
    syncs = "yes"
    overlap = False

    def __init__(self, work: Workload, directory: Path) -> None:
        super().__init__(work, directory)
        state = {"model": work.model, "optimizer": work.optimizer}
        self.manager = holdfast.CheckpointManager(
            directory, state, keep_last=2, overlap="always" if self.overlap else False
        )
        self.manager.prepare()  # `after_step` does this in a training
        self.watcher: Watcher | None = None

    def target(self, number: int) -> Path:
        return self.directory / f"checkpoint_step_{number}.pt"

    def ask(self, target: Path) -> Any:
        """Request a save; return its promises."""
        step = int(target.stem.rpartition("_")[2])
        return self.manager.save_async(step=step, kind="step")

    def begin(self, target: Path) -> Finish:
        pending = self.ask(target)
        finish: Finish = pending.settled.result
        return finish

    def save(self, number: int) -> Timing:
        self.watcher = watcher = self.watcher or Watcher(self.directory)
        watcher.arm()
        self.work.wait()
        began = time.monotonic()
        pending = self.ask(self.target(number))
        if not self.overlap:
            self.work.wait()
        asked = time.monotonic()
        in_hooks = self._train_on()
        trained = time.monotonic()
        if pending.durable.result() is None:
            raise OSError(f"{self.name}: the save of step {number} failed")
        announced = time.monotonic() - began
        durable = max(watcher.seen() - began, announced)  # both must have happened
        step = trained - asked if self.overlap else None
        return Timing(asked - began + in_hooks, durable, step)

    def _train_on(self) -> float:
        """Train until the snapshot is complete. Return the seconds that training stood still."""
        return 0.0

    def settle(self) -> None:
        self.manager.wait()

    def load(self, number: int) -> dict[str, torch.Tensor]:
        return dict(flat(holdfast.load(self.target(number))))

    def remove(self, number: int) -> None:
        """Leave it to the manager, which keeps the last two and prunes the others."""

    def close(self) -> None:
        self.manager.close(save=False)
        if self.watcher is not None:
            self.watcher.close()


class OursOverlapped(Ours):
    """The same, copied during forward and backward; time in the optimizer's hooks is stall."""

    name = "holdfast overlapped"
    note = "saves during a training step, which takes its share of the processor"
    overlap = True

    def __init__(self, work: Workload, directory: Path) -> None:
        # Hooks run in the order of registration, those for all optimizers first. This one and that
        # of `_train_on` enclose the hooks that the manager registers from here on.
        self._entered = 0.0
        self._first = register_optimizer_step_pre_hook(self._enter)
        super().__init__(work, directory)

    def _enter(self, *_arguments: Any) -> None:
        self.work.wait()
        self._entered = time.monotonic()

    def _train_on(self) -> float:
        self.work.backward()
        left = 0.0

        def leave(*_arguments: Any) -> None:
            nonlocal left
            self.work.wait()
            left = time.monotonic()

        last = self.work.optimizer.register_step_pre_hook(leave)
        try:
            self.work.update()
        finally:
            last.remove()
        return left - self._entered

    def close(self) -> None:
        self._first.remove()
        super().close()


class TorchSave(Peer):
    """torch.save to a temporary file, fsync, rename, fsync of the directory."""

    name = "torch.save"

    def begin(self, target: Path) -> Finish:
        temporary = target.with_suffix(".tmp")
        torch.save(self.work.state(), temporary)
        return lambda: _publish(temporary, target)

    def load(self, number: int) -> dict[str, torch.Tensor]:
        return dict(flat(torch.load(self.target(number), weights_only=True, map_location="cpu")))


class TorchSaveThread(TorchSave):
    """torch.save of a copy (into buffers that stay) in a thread: the usual hand-written way."""

    name = "torch.save in a thread"

    def __init__(self, work: Workload, directory: Path) -> None:
        super().__init__(work, directory)
        self._copy: dict[str, torch.Tensor] = {}
        self._thread = ThreadPoolExecutor(1)

    def begin(self, target: Path) -> Finish:
        live = self.work.tensors()
        if not self._copy:
            self._copy = {name: torch.empty_like(t, device="cpu") for name, t in live.items()}
        torch._foreach_copy_(list(self._copy.values()), list(live.values()))
        temporary = target.with_suffix(".tmp")

        def write() -> None:
            torch.save(self._copy, temporary)
            _publish(temporary, target)

        return self._thread.submit(write).result

    def close(self) -> None:
        self._thread.shutdown()


class Safetensors(Peer):
    """save_file of safetensors and the same protocol; plain values as JSON in its metadata."""

    name = "safetensors"
    needs = ("safetensors",)

    def begin(self, target: Path) -> Finish:
        from safetensors.torch import save_file

        state = self.work.state()
        temporary = target.with_suffix(".tmp")
        groups = json.dumps(state["optimizer"]["param_groups"])
        save_file(dict(flat(state)), temporary, metadata={"param_groups": groups})
        return lambda: _publish(temporary, target)

    def load(self, number: int) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.target(number))


def _publish(temporary: Path, target: Path) -> None:
    sync_tree(temporary)
    temporary.rename(target)
