"""The engine's goals for GPT-2 small with AdamW, and whether a run of the benchmark reaches them.

A bar is judged by the ratio of medians; the interval is only shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.engine import training_loss
from benchmarks.engine.frameworks import DcpProcess, DcpThread, Orbax
from benchmarks.engine.measure import Ratio
from benchmarks.engine.peers import Ours, OursOverlapped, Peer, TorchSave, TorchSaveThread
from benchmarks.engine.run import DISK, MEMORY, Result

SIZE = "124m"  # the size that the bars were set for
_OURS, _OVERLAPPED = Ours.name, OursOverlapped.name
_ASYNC: list[type[Peer]] = [DcpThread, DcpProcess, Orbax]


@dataclass(frozen=True, slots=True)
class Bar:
    """A limit for one figure: a maximum, or with `least` a minimum. `unit` is "" for a ratio."""

    figure: str
    limit: float
    value: float
    unit: str = ""
    least: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit


def bars(results: Sequence[Result]) -> list[Bar]:
    """Return the bars for which there are measurements."""
    found: list[Bar] = []
    for result in results:
        if result.size == SIZE:
            found += [*_saves(result), *_training(result), *_loads(result)]
    return [*found, *_growth(results)]


def _saves(result: Result) -> Iterator[Bar]:
    saves = result.part("save")
    ours, theirs = (_OURS, "durable"), (TorchSave.name, "durable")
    yield from _bar("time to durable / limit of the disk", 1.15, saves.ratio(ours, (DISK, ours[1])))
    figure = "time to durable: torch.save + fsync / ours"
    yield from _bar(figure, 4, saves.ratio(theirs, ours), least=True)
    for peer in _ASYNC:
        figure = f"time to durable: {peer.name} / ours"
        yield from _bar(figure, 5, saves.ratio((peer.name, "durable"), ours), least=True)
    share = saves.ratio((_OURS, "stall"), (MEMORY, "stall"))
    yield from _bar("stall, eager / limit of memory", 1.2, share)
    stall = saves.median(_OVERLAPPED, "stall")
    if stall is not None:
        yield Bar("stall, overlapped", 0.010, stall, "s")
    share = saves.ratio((_OVERLAPPED, "stall"), (_OVERLAPPED, "step"))
    yield from _bar("stall, overlapped / step", 0.01, share)


def _training(result: Result) -> Iterator[Bar]:
    lost = training_loss.lost(result.part("training"))
    regular = result.part("regular")
    for name in (_OURS, _OVERLAPPED):
        seconds = lost.median(name, "lost")
        if seconds is not None:
            yield Bar(f"training lost for a save, {name}", 0.35, seconds, "s")
        for peer in (TorchSaveThread, DcpThread):
            theirs = lost.median(peer.name, "lost")
            if seconds is not None and theirs:
                yield Bar(f"training lost: {name} / {peer.name}", 0.2, seconds / theirs)
        share = regular.ratio((name, "rate"), (training_loss.WITHOUT, "rate"))
        yield from _bar(f"throughput, a save every 30 s, {name}", 0.98, share, least=True)


def _loads(result: Result) -> Iterator[Bar]:
    loads = result.part("load")
    cold = loads.ratio((_OURS, "cold"), (DISK, "cold"))
    warm = loads.ratio((_OURS, "warm"), (TorchSave.name, "warm"))
    yield from _bar("load and verify, cold / direct read", 1.2, cold)
    yield from _bar("load and verify, warm / torch.load", 1.0, warm)


def _growth(results: Sequence[Result]) -> Iterator[Bar]:
    found = [(r.part("save").median(_OURS, "durable"), r.nbytes) for r in results]
    each = [seconds / nbytes for seconds, nbytes in found if seconds is not None]
    if len(each) > 1:
        figure = "time to durable per byte, largest / smallest of the sizes"
        yield Bar(figure, 1.2, max(each) / min(each))


def _bar(figure: str, limit: float, found: Ratio | None, *, least: bool = False) -> Iterator[Bar]:
    if found is not None:
        yield Bar(figure, limit, found.value, "", least, found.low, found.high)
