"""One run of the benchmark: what is measured, in which order, into which series.

The report is filled as it goes, so that Ctrl-C leaves what there is so far.
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
from holdfast.errors import ResourceError
from holdfast.formatting import format_bytes
from holdfast.i18n import N_, _

PARTS = {
    "save": N_("saves"),
    "load": N_("loads"),
    "fresh": N_("new processes"),
    "training": N_("training with a save"),
    "regular": N_("training with regular saves"),
    "growth": N_("other sizes"),
}
QUICK_PARTS = ("save", "load")
DISK, MEMORY = "limit: disk", "limit: memory"
_GROWTH: list[type[Peer]] = [Ours, TorchSave]
_LOADS: list[type[Peer]] = [Ours, TorchSave, Safetensors, Dcp, Orbax]
_FRESH_ROUNDS = 3
_REGULAR_ROUNDS = 5
_LEAST_SECONDS = 8.0  # of a block of training steps


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure: sizes of workload.SHAPES, the first of which gets the whole table."""

    sizes: tuple[str, ...]
    rounds: int
    parts: tuple[str, ...]
    only: tuple[str, ...] = ()  # names of peers; empty for all
    seed: int = 0
    interval: float = training_loss.INTERVAL

    def wants(self, name: str) -> bool:
        return not self.only or name in self.only


@dataclass(slots=True)
class Result:
    """What was measured for one size."""

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
    """What there is to tell, complete or not."""

    options: Options
    machine: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    complete: bool = False


def machine(directory: Path) -> dict[str, Any]:
    """What this machine is, without naming it."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor that has no name
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
    try:
        import psutil
    except ModuleNotFoundError:
        return None
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    place = directory.resolve()
    return next((mounts[path] for path in (place, *place.parents) if path in mounts), None)


def run(report: Report, directory: Path, progress: Progress) -> None:
    """Measure everything that `report.options` asks for, with files below `directory`.

    Raises:
        ResourceError: the disk has no room for what is kept there at the same time.
    """
    options = report.options
    rng = random.Random(options.seed)
    sizes = options.sizes if "growth" in options.parts else options.sizes[:1]
    for i, size in enumerate(sizes):
        work = Workload(size, options.seed)
        tensors = len(work.tensors())
        result = Result(size, work.parameters, work.nbytes, tensors)
        if i == 0:
            _check_room(directory, 12 * work.nbytes)  # two managers with four files each, peers
        else:
            _check_room(directory, 7 * work.nbytes)
        report.results.append(result)
        Once(work, result, options, directory / size, rng, progress).run(whole=i == 0)
    report.complete = True


def _check_room(directory: Path, need: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < need:
        raise ResourceError(
            _("The benchmark needs {need} free on the disk and finds {free}: use a smaller --size "
              "or another --dir.", need=format_bytes(need), free=format_bytes(free))
        )  # fmt: skip


def _missing(peer: type[Peer], series: Series) -> bool:
    absent = peer.missing()
    if absent:
        series.failed[peer.name] = _("not installed: {packages}", packages=", ".join(absent))
    return bool(absent)


@dataclass(slots=True)
class Once:
    """The parts of the measurement for one size."""

    work: Workload
    result: Result
    options: Options
    directory: Path
    rng: random.Random
    progress: Progress

    def run(self, *, whole: bool) -> None:
        """All parts that are wanted; for growth over sizes, the saves of a few."""
        parts = self.options.parts if whole else ("save",)
        peers = list(PEERS.values()) if whole else _GROWTH
        peers = [peer for peer in peers if self.options.wants(peer.name)]
        for name, act in {
            "save": self.saves, "load": self.loads, "fresh": self.fresh,
            "training": self.training, "regular": self.regular,
        }.items():  # fmt: skip
            if name in parts:
                series = self.result.part(name)
                act([peer for peer in peers if not _missing(peer, series)])
                shutil.rmtree(self.directory, ignore_errors=True)

    def saves(self, peers: list[type[Peer]]) -> None:
        """Everybody's stall and time to durable, with the limits of disk and memory."""
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
        """A save comes after a step: threads are awake, caches hold what training left there."""
        self.work.step()
        return measure(number)

    def loads(self, peers: list[type[Peer]]) -> None:
        """Loading cold and warm; whether what is loaded is what was saved is checked first."""
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
        """The first save of a process and, once, the memory that a save takes."""

        def contender(peer: type[Peer]) -> Measure:
            def measure(number: int) -> dict[str, float]:
                known = peer.name, self.result.size, self.directory
                found = fresh.in_process("first", *known)
                if number == 1 and Path("/proc/self/smaps_rollup").exists():
                    found |= fresh.in_process("memory", *known)
                return found

            return measure

        wanted = {peer.name: contender(peer) for peer in peers if peer is not OursOverlapped}
        self._interleave("fresh", wanted, rounds=min(self.options.rounds, _FRESH_ROUNDS))

    def training(self, peers: list[type[Peer]]) -> None:
        """Seconds of training lost for one save in flight."""
        self.work.step()
        began = time.monotonic()
        self.work.step()
        least = max(3, round(_LEAST_SECONDS / (time.monotonic() - began)))
        self._train("training", peers, lambda peer: training_loss.block(self.work, peer, least))

    def regular(self, peers: list[type[Peer]]) -> None:
        """The throughput of a training that saves every so many seconds."""
        self._train(
            "regular",
            [peer for peer in peers if issubclass(peer, Ours)],
            lambda peer: training_loss.regular(self.work, peer, self.options.interval),
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
        self.progress.start(f"{self.result.size}, {_(PARTS[part])}", len(numbers) * len(contenders))
        interleave(contenders, numbers, self.rng, self.result.part(part), self.progress)
        self.progress.clear()

    @contextmanager
    def _open(self, peers: list[type[Peer]], series: Series) -> Iterator[dict[str, Peer]]:
        """Set everybody up with one save that does not count: the first has its own row."""
        opened: dict[str, Peer] = {}
        self.progress.start(_("{size}, setting up", size=self.result.size), len(peers))
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
            self.result.disk = {"direct": disk.direct, "write": disk.write_way,
                                "read": disk.read_way}  # fmt: skip
            yield disk, memory


def _saving(peer: Peer, watchers: set[int]) -> Measure:
    def measure(number: int) -> dict[str, float]:
        peer.prepare()
        before = cpu_seconds(watchers)
        timing = peer.save(number)
        peer.settle()
        found = {"stall": timing.stall, "durable": timing.durable, "announced": timing.announced}
        if timing.step is None:
            found["core_seconds"] = cpu_seconds(watchers) - before
        else:
            found["step"] = timing.step
        peer.remove(number)
        return found

    return measure


def _check(peer: Peer) -> None:
    """Save what is loaded later, and prove that it comes back equal."""
    peer.prepare()
    peer.save(2)
    peer.settle()
    loaded = peer.load(2)
    for name, tensor in peer.work.tensors().items():
        if name not in loaded or not torch.equal(loaded[name], tensor.cpu()):
            raise ValueError(_("{name} was not loaded as it was saved", name=name))


def _loading(peer: Peer) -> Measure:
    def seconds() -> float:
        began = time.monotonic()
        for tensor in peer.load(2).values():
            tensor.reshape(-1)[::512].sum()  # who only maps the file reads it here, page by page
        return time.monotonic() - began

    def measure(_number: int) -> dict[str, float]:
        drop_cache(peer.target(2))
        cold = seconds()
        _warm(peer.target(2))
        return {"cold": cold, "warm": seconds()}

    return measure


def _warm(target: Path) -> None:
    """Bring the files of `target` into the page cache, however they were read before."""
    for path in [target] if target.is_file() else target.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
