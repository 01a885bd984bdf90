"""What the engine has to reach with GPT-2 small and AdamW, and whether this run shows that it does.

A bar is judged by the ratio of medians; its interval is shown beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.engine import training_loss
from benchmarks.engine.frameworks import DcpProcess, DcpThread, Orbax
from benchmarks.engine.measure import Ratio
from benchmarks.engine.peers import Ours, OursOverlapped, Peer, TorchSave, TorchSaveThread
from benchmarks.engine.run import DISK, MEMORY, Result
from holdfast.i18n import _

SIZE = "124m"  # that the bars were set for
_OURS, _OVERLAPPED = Ours.name, OursOverlapped.name
_ASYNC: list[type[Peer]] = [DcpThread, DcpProcess, Orbax]


@dataclass(frozen=True, slots=True)
class Bar:
    """`value` must be at most (or, with `least`, at least) `limit`; in `unit`, "" for a ratio."""

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
    """The bars for which there are measurements; the first result is the one with all parts."""
    whole = next((result for result in results if result.size == SIZE), None)
    found = list(_growth(results))
    if whole is not None:
        found = [*_saves(whole), *_training(whole), *_loads(whole), *found]
    return found


def _saves(result: Result) -> Iterator[Bar]:
    saves = result.part("save")
    ours = _OURS, "durable"
    yield from _bar(_("time to durable / limit of the disk"), 1.15,
                    saves.ratio(ours, (DISK, "durable")))  # fmt: skip
    yield from _bar(_("time to durable: torch.save + fsync / ours"), 4,
                    saves.ratio((TorchSave.name, "durable"), ours), least=True)  # fmt: skip
    for peer in _ASYNC:
        yield from _bar(_("time to durable: {name} / ours", name=peer.name), 5,
                        saves.ratio((peer.name, "durable"), ours), least=True)  # fmt: skip
    yield from _bar(_("stall, eager / limit of memory"), 1.2,
                    saves.ratio((_OURS, "stall"), (MEMORY, "stall")))  # fmt: skip
    stall = saves.median(_OVERLAPPED, "stall")
    if stall is not None:
        yield Bar(_("stall, overlapped"), 0.010, stall, "s")
    share = saves.ratio((_OVERLAPPED, "stall"), (_OVERLAPPED, "step"))
    yield from _bar(_("stall, overlapped / step"), 0.01, share)


def _training(result: Result) -> Iterator[Bar]:
    lost = training_loss.lost(result.part("training"))
    for name in (_OURS, _OVERLAPPED):
        seconds = lost.median(name, "lost")
        if seconds is not None:
            yield Bar(_("training lost for a save, {name}", name=name), 0.35, seconds, "s")
        for peer in (TorchSaveThread, DcpThread):
            theirs = lost.median(peer.name, "lost")
            if seconds is not None and theirs:
                figure = _("training lost: {name} / {peer}", name=name, peer=peer.name)
                yield Bar(figure, 0.2, seconds / theirs)
    regular = result.part("regular")
    for name in (_OURS, _OVERLAPPED):
        share = regular.ratio((name, "rate"), (training_loss.WITHOUT, "rate"))
        figure = _("throughput, a save every 30 s, {name}", name=name)
        yield from _bar(figure, 0.98, share, least=True)


def _loads(result: Result) -> Iterator[Bar]:
    loads = result.part("load")
    yield from _bar(_("load and verify, cold / direct read"), 1.2,
                    loads.ratio((_OURS, "cold"), (DISK, "cold")))  # fmt: skip
    yield from _bar(_("load and verify, warm / torch.load"), 1.0,
                    loads.ratio((_OURS, "warm"), (TorchSave.name, "warm")))  # fmt: skip


def _growth(results: Sequence[Result]) -> Iterator[Bar]:
    found = [(r.part("save").median(_OURS, "durable"), r.nbytes) for r in results]
    each = [seconds / nbytes for seconds, nbytes in found if seconds is not None]
    if len(each) > 1:
        yield Bar(_("time to durable per byte, largest / smallest of the sizes"), 1.2,
                  max(each) / min(each))  # fmt: skip


def _bar(figure: str, limit: float, found: Ratio | None, *, least: bool = False) -> Iterator[Bar]:
    if found is not None:
        yield Bar(figure, limit, found.value, "", least, found.low, found.high)
