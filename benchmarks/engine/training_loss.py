"""The cost of a save in flight to a real training, in seconds of training lost.

A block of steps with one save is compared with a block without, in the same round: the clock stops
when the save has left nothing to do, verification and pruning included, and at least `least` steps
are done. lost = elapsed - steps × (seconds a step without saving).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from benchmarks.engine.frameworks import DcpThread
from benchmarks.engine.measure import Measure, Series
from benchmarks.engine.peers import Finish, Ours, OursOverlapped, Peer, TorchSaveThread
from benchmarks.engine.watch import sync_tree
from benchmarks.engine.workload import Workload

WITHOUT = "no save"
SAVERS: list[type[Peer]] = [Ours, OursOverlapped, TorchSaveThread, DcpThread]
INTERVAL = 30.0  # s between two saves of a training that saves regularly
_SAVES = 3  # of one window


def block(work: Workload, peer: Peer | None, least: int) -> Measure:
    """Return a measurement of at least `least` steps, with one save at their beginning."""

    def measure(number: int) -> dict[str, float]:
        steps = 0
        with ThreadPoolExecutor(1) as pool:
            work.wait()
            began = time.monotonic()
            saving = _begin(peer, number, pool) if peer is not None else None
            while steps < least or not (saving is None or saving.done()):
                work.step()
                steps += 1
            elapsed = time.monotonic() - began
            _end(peer, number, saving)
        return {"elapsed": elapsed, "steps": steps}

    return measure


def regular(work: Workload, peer: Peer | None) -> Measure:
    """Return a measurement of training with a save in the middle of each `INTERVAL`."""

    def measure(number: int) -> dict[str, float]:
        steps, saves = 0, 0
        saving: Future[object] | None = None
        with ThreadPoolExecutor(1) as pool:
            began = time.monotonic()
            while (elapsed := time.monotonic() - began) < _SAVES * INTERVAL:
                if peer is not None and elapsed >= (saves + 0.5) * INTERVAL:
                    _end(peer, number * _SAVES + saves - 1, saving)
                    saving = _begin(peer, number * _SAVES + saves, pool)
                    saves += 1
                work.step()
                steps += 1
            _end(peer, number * _SAVES + saves - 1, saving)
        return {"elapsed": elapsed, "steps": steps, "rate": steps / elapsed, "saves": saves}

    return measure


def _begin(peer: Peer, number: int, pool: ThreadPoolExecutor) -> Future[object]:
    target = peer.target(number)
    finish: Finish = peer.begin(target)
    return pool.submit(_finish, finish, target)


def _finish(finish: Callable[[], object], target: Path) -> None:
    finish()
    sync_tree(target)


def _end(peer: Peer | None, number: int, saving: Future[object] | None) -> None:
    if peer is not None and saving is not None:
        saving.result()
        peer.remove(number)


def lost(series: Series) -> Series:
    """Return the seconds of training lost for one save, round by round, as `block` measured."""
    found = Series(failed=series.failed)
    for row in series.rounds:
        if WITHOUT in row:
            plain = row[WITHOUT]["elapsed"] / row[WITHOUT]["steps"]
            found.rounds.append(
                {
                    name: {"lost": seen["elapsed"] - seen["steps"] * plain, "step": plain}
                    for name, seen in row.items()
                    if name != WITHOUT
                }
            )
    return found
