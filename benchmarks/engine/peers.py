"""Everybody who can save this state: a small class each, and ours among them.

A saver begins (the training thread stands still), is finished (its own work is done) and is made
durable: where it does not sync what it wrote, files and directories, that is done for it and is
part of its time. Frameworks that bring a trainer or a protocol of their own are in frameworks.py.
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

from benchmarks.engine.watch import Watcher, sync_tree
from benchmarks.engine.workload import Workload, flat
from holdfast.i18n import N_

Finish = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """One save, in seconds since it was asked for.

    `stall`: how long the training thread stood still. `durable`: the return of the last
    fsync(directory) as somebody outside sees it. `announced`: when the saver itself said so.
    `step`: how long the training step took during which it was saved, where it was.
    """

    stall: float
    durable: float
    announced: float
    step: float | None = None


class Peer(ABC):
    """Somebody who saves the state of `work` below `directory`, save after save."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # packages
    syncs: ClassVar[str] = N_("no")  # whether it makes durable what it wrote
    note: ClassVar[str] = ""

    def __init__(self, work: Workload, directory: Path) -> None:
        self.work, self.directory = work, directory
        directory.mkdir(parents=True, exist_ok=True)

    @classmethod
    def missing(cls) -> list[str]:
        """The packages it needs that are not installed."""
        return [name for name in cls.needs if importlib.util.find_spec(name) is None]

    def target(self, number: int) -> Path:
        return self.directory / f"save_{number}"

    def prepare(self) -> None:  # noqa: B027 - most have nothing to do
        """Bring the state into the form it wants; not timed."""

    @abstractmethod
    def begin(self, target: Path) -> Finish:
        """Start a save; the training may go on when this returns. The answer ends the save."""

    def save(self, number: int) -> Timing:
        """Save once and wait until it is durable; `prepare` comes before."""
        self.work.wait()
        began = time.monotonic()
        finish = self.begin(self.target(number))
        self.work.wait()  # a GPU may have to wait where the thread that drives it does not
        stall = time.monotonic() - began
        finish()
        announced = time.monotonic() - began
        sync_tree(self.target(number))
        return Timing(stall, time.monotonic() - began, announced)

    def settle(self) -> None:  # noqa: B027
        """Return when nothing of it goes on in the background."""

    @abstractmethod
    def load(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of a save by their dotted names."""

    def remove(self, number: int) -> None:
        target = self.target(number)
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def close(self) -> None:  # noqa: B027
        """Give back what it holds; its files go with the benchmark's directory."""


class Ours(Peer):
    """CheckpointManager.save_async, seen by an observer in another process."""

    name = "holdfast"
    syncs = N_("yes")
    overlap = False

    def __init__(self, work: Workload, directory: Path) -> None:
        import holdfast

        super().__init__(work, directory)
        state = {"model": work.model, "optimizer": work.optimizer}
        self.manager = holdfast.CheckpointManager(
            directory, state, keep_last=2, overlap="always" if self.overlap else False
        )
        self.manager.prepare()  # as `after_step` does in a training
        self.watcher: Watcher | None = None

    def target(self, number: int) -> Path:
        return self.directory / f"checkpoint_step_{number}.pt"

    def ask(self, target: Path) -> Any:
        """Ask for a save; a Pending."""
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
        # The later of the two: nobody is told before it is durable, nor counts before being told.
        durable = max(watcher.seen() - began, announced)
        step = trained - asked if self.overlap else None
        return Timing(asked - began + in_hooks, durable, announced, step)

    def _train_on(self) -> float:
        """What training does until the snapshot is complete; the seconds it stood still in it."""
        return 0.0

    def settle(self) -> None:
        self.manager.wait()

    def load(self, number: int) -> dict[str, torch.Tensor]:
        import holdfast

        return dict(flat(holdfast.load(self.target(number))))

    def remove(self, number: int) -> None:
        """The manager keeps the last two and prunes the others itself."""

    def close(self) -> None:
        self.manager.close()
        if self.watcher is not None:
            self.watcher.close()


class OursOverlapped(Ours):
    """The same, copied during a real forward and backward; time in the optimizer's hooks counts."""

    name = "holdfast overlapped"
    note = N_("saves during a training step, which takes its share of the processor")
    overlap = True

    def __init__(self, work: Workload, directory: Path) -> None:
        # Hooks run in the order of registration, those for all optimizers first: ours brackets
        # whatever the manager registers from here on.
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
    """torch.save of a copy (into buffers that stay) in a thread: what people write themselves."""

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
    """safetensors' save_file, and the same protocol; plain values as JSON in its metadata."""

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
