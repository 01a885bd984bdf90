"""One run of the benchmark: its parts, their order and their series.

The report is filled step by step, so that Ctrl-C keeps the measurements made before it.
"""

from __future__ import annotations

import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.engine import fresh, training_loss
from benchmarks.engine.frameworks import PEERS, Dcp, Orbax
from benchmarks.engine.limits import Disk, Memory, drop_cache
from benchmarks.engine.measure import (
    Measure,
    Progress,
    Series,
    attempt,
    cpu_seconds,
    interleave,
    settle,
)
from benchmarks.engine.peers import (
    Ours,
    OursOverlapped,
    Peer,
    Safetensors,
    TorchSave,
    TorchSaveThread,
)
from benchmarks.engine.workload import Workload
from holdfast.formatting import format_bytes

PARTS = ("save", "load", "fresh", "training", "regular", "growth")
DISK, MEMORY = "limit: disk", "limit: memory"
_GROWTH: list[type[Peer]] = [Ours, TorchSave]
_LOADS: list[type[Peer]] = [Ours, TorchSave, Safetensors, Dcp, Orbax]
_FRESH_ROUNDS = 3
_REGULAR_ROUNDS = 5
LEAST_SECONDS = 8.0  # of a block of training steps


@dataclass(frozen=True, slots=True)
class Options:
    """The measurements of a run. The first of `sizes` (of workload.SHAPES) gets all tables."""

    sizes: tuple[str, ...]
    rounds: int
    parts: tuple[str, ...]
    only: tuple[str, ...]  # names of peers


@dataclass(slots=True)
class Result:
    """The measurements for one size."""

    size: str
    parameters: int
    nbytes: int
    tensors: int
    disk: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)  # by part

    def part(self, name: str) -> Series:
        return self.series.setdefault(name, Series())


@dataclass(slots=True)
class Report:
    """All measurements, with the machine and the options they belong to."""

    options: Options
    machine: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    complete: bool = False


def machine(directory: Path) -> dict[str, Any]:
    """Describe this machine without naming it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.machine()  # ARM processors give no name
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
        "filesystem": _filesystem(directory),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def _filesystem(directory: Path) -> str | None:
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    place = directory.resolve()
    return next((mounts[path] for path in (place, *place.parents) if path in mounts), None)


def run(report: Report, directory: Path, progress: Progress) -> None:
    """Measure everything that `report.options` asks for, with files below `directory`."""
    options = report.options
    sizes = options.sizes if "growth" in options.parts else options.sizes[:1]
    for i, size in enumerate(sizes):
        work = Workload(size)
        tensors = len(work.tensors())
        result = Result(size, work.parameters, work.nbytes, tensors)
        if i == 0:
            _check_room(directory, 12 * work.nbytes)  # two managers with four files each, peers
        else:
            _check_room(directory, 7 * work.nbytes)
        report.results.append(result)
        Once(work, result, options, directory / size, progress).run(whole=i == 0)
    report.complete = True


def _check_room(directory: Path, need: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < need:
        raise SystemExit(
            f"The benchmark needs {format_bytes(need)} free on the disk and finds "
            f"{format_bytes(free)}: use a smaller --size or another --dir."
        )


def _missing(peer: type[Peer], series: Series) -> bool:
    absent = peer.missing()
    if absent:
        series.failed[peer.name] = f"not installed: {', '.join(absent)}"
    return bool(absent)


@dataclass(slots=True)
class Once:
    """The parts of the measurement for one size."""

    work: Workload
    result: Result
    options: Options
    directory: Path
    progress: Progress

    def run(self, *, whole: bool) -> None:
        """Measure the parts that are wanted; for growth over sizes, only the saves of a few."""
        parts = self.options.parts if whole else ("save",)
        peers = list(PEERS.values()) if whole else _GROWTH
        peers = [peer for peer in peers if peer.name in self.options.only]
        acts = (self.saves, self.loads, self.fresh, self.training, self.regular)
        for name, act in zip(PARTS, acts, strict=False):
            if name in parts:
                series = self.result.part(name)
                act([peer for peer in peers if not _missing(peer, series)])
                shutil.rmtree(self.directory, ignore_errors=True)

    def saves(self, peers: list[type[Peer]]) -> None:
        """Measure stall and time to durable, with the limits of disk and memory."""
        series = self.result.part("save")
        wanted = [peer for peer in peers if peer is not TorchSaveThread]
        with self._open(wanted, series) as opened, self._limits() as (disk, memory):
            contenders: dict[str, Measure] = {
                DISK: lambda _number: {"durable": disk.write()},
                MEMORY: lambda _number: {"stall": memory.copy()},
            }
            watchers = {
                peer.watcher.pid
                for peer in opened.values()
                if isinstance(peer, Ours) and peer.watcher is not None
            }
            contenders |= {name: _saving(peer, watchers) for name, peer in opened.items()}
            trained = {name: partial(self._after_a_step, act) for name, act in contenders.items()}
            self._interleave("save", trained, first=2)

    def _after_a_step(self, measure: Measure, number: int) -> dict[str, float]:
        """Measure after a step, as a save of a training: threads are awake, caches are in use."""
        self.work.step()
        return measure(number)

    def loads(self, peers: list[type[Peer]]) -> None:
        """Check that the loaded state is the saved one, then measure loading cold and warm."""
        series = self.result.part("load")
        with (
            self._open([peer for peer in peers if peer in _LOADS], series) as opened,
            self._limits() as (disk, _memory),
        ):
            contenders = {DISK: lambda _number: {"cold": disk.read()}}
            for name, peer in opened.items():
                attempt(name, series, partial(_check, peer))
                contenders[name] = _loading(peer)
            self._interleave("load", contenders)

    def fresh(self, peers: list[type[Peer]]) -> None:
        """Measure the first save of a process and, once, the memory that a save takes."""

        def contender(peer: type[Peer]) -> Measure:
            def measure(number: int) -> dict[str, float]:
                known = peer.name, self.result.size, self.directory
                found = fresh.in_process("first", *known)
                if number == 1:
                    found |= fresh.in_process("memory", *known)
                return found

            return measure

        wanted = {peer.name: contender(peer) for peer in peers if peer is not OursOverlapped}
        self._interleave("fresh", wanted, rounds=min(self.options.rounds, _FRESH_ROUNDS))

    def training(self, peers: list[type[Peer]]) -> None:
        """Measure the seconds of training lost for one save in flight."""
        self.work.step()
        began = time.monotonic()
        self.work.step()
        least = max(3, round(LEAST_SECONDS / (time.monotonic() - began)))
        self._train("training", peers, lambda peer: training_loss.block(self.work, peer, least))

    def regular(self, peers: list[type[Peer]]) -> None:
        """Measure the throughput of a training that saves every 30 seconds."""
        self._train(
            "regular",
            [peer for peer in peers if issubclass(peer, Ours)],
            lambda peer: training_loss.regular(self.work, peer),
            min(self.options.rounds, _REGULAR_ROUNDS),
        )

    def _train(
        self,
        part: str,
        peers: Sequence[type[Peer]],
        make: Callable[[Peer | None], Measure],
        rounds: int = 0,
    ) -> None:
        wanted = [peer for peer in peers if peer in training_loss.SAVERS]
        with self._open(wanted, self.result.part(part)) as opened:
            contenders = {training_loss.WITHOUT: make(None)}
            contenders |= {name: make(peer) for name, peer in opened.items()}
            self._interleave(part, contenders, rounds, first=2)

    def _interleave(
        self, part: str, contenders: Mapping[str, Measure], rounds: int = 0, first: int = 1
    ) -> None:
        numbers = range(first, first + (rounds or self.options.rounds))
        self.progress.start(f"{self.result.size}, {part}", len(numbers) * len(contenders))
        series = self.result.part(part)
        interleave(contenders, numbers, random.Random(), series, self.progress)
        self.progress.clear()

    @contextmanager
    def _open(self, peers: list[type[Peer]], series: Series) -> Iterator[dict[str, Peer]]:
        """Set up each peer with one save that does not count: `fresh` measures the first one."""
        opened: dict[str, Peer] = {}
        self.progress.start(f"{self.result.size}, setting up", len(peers))
        try:
            for kind in peers:
                self.progress.next(kind.name)
                settle()
                attempt(kind.name, series, partial(self._set_up, kind, opened))
            yield {name: peer for name, peer in opened.items() if name not in series.failed}
        finally:
            for name, peer in opened.items():
                attempt(name, series, peer.close)

    def _set_up(self, kind: type[Peer], opened: dict[str, Peer]) -> None:
        place = self.directory / str(list(PEERS).index(kind.name))
        peer = opened[kind.name] = kind(self.work, place)
        peer.prepare()
        peer.save(1)
        peer.settle()
        peer.remove(1)

    @contextmanager
    def _limits(self) -> Iterator[tuple[Disk, Memory]]:
        place = self.directory / "limit"
        place.mkdir(parents=True)
        with ExitStack() as stack:
            memory = Memory(self.work)
            stack.callback(memory.close)
            disk = Disk(place, memory.buffer)
            stack.callback(disk.close)
            self.result.disk = {"direct": disk.direct, "write": disk.write_way}
            yield disk, memory


def _saving(peer: Peer, watchers: set[int]) -> Measure:
    def measure(number: int) -> dict[str, float]:
        peer.prepare()
        before = cpu_seconds(watchers)
        timing = peer.save(number)
        peer.settle()
        found = {"stall": timing.stall, "durable": timing.durable}
        if timing.step is None:
            found["core_seconds"] = cpu_seconds(watchers) - before
        else:
            found["step"] = timing.step
        peer.remove(number)
        return found

    return measure


def _check(peer: Peer) -> None:
    """Make the save that is loaded later, and check that it comes back equal."""
    peer.prepare()
    peer.save(2)
    peer.settle()
    loaded = peer.load(2)
    for name, tensor in peer.work.tensors().items():
        if name not in loaded or not torch.equal(loaded[name], tensor.cpu()):
            raise ValueError(f"{name} was not loaded as it was saved")


def _loading(peer: Peer) -> Measure:
    def seconds() -> float:
        began = time.monotonic()
        for tensor in peer.load(2).values():
            tensor.reshape(-1)[::512].sum()  # a loader that only maps the file reads it here
        return time.monotonic() - began

    def measure(_number: int) -> dict[str, float]:
        drop_cache(peer.target(2))
        cold = seconds()
        _warm(peer.target(2))
        return {"cold": cold, "warm": seconds()}

    return measure


def _warm(target: Path) -> None:
    """Read the files of `target` into the page cache."""
    for path in [target] if target.is_file() else target.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
