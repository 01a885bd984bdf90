"""Power cuts on paper: a cycle of saves is recorded call by call, every state that a cut may leave
behind any of the calls is built in a directory, and recovery judges it.

What a cut may leave is `disk.py`. The same state after several cuts is built and recovered once,
and judged for each of them by what had been announced until then.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.prove.disk import Disk, State
from tests.faults import cycle
from tests.faults.inject import Call, Fault, How
from tests.faults.savers import Saver
from tests.faults.tally import Tally

NAME = "power loss"
_RANDOM = 40  # random states of each cut, behind those that are chosen by rule


class Unexplained(RuntimeError):
    """A saver writes in ways that are not recorded (a mapped file, one moved in from elsewhere)."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A recorded cycle."""

    root: str  # where it ran
    base: Disk  # what lay there, finished, before the first call
    announced: int  # before the first call
    calls: Sequence[Call]


@dataclass(frozen=True, slots=True)
class Cut:
    """The power fails behind this many calls."""

    calls: int
    after: str  # the last of them
    announced: int  # the step that was announced last


@dataclass(slots=True)
class Left:
    """A state, and the cuts that may leave it."""

    state: State
    cuts: list[Cut]


def power_loss(
    saver: type[Saver], *, budget: int | None, seed: int, until_failed: bool = False
) -> Tally:
    """Recover from at most `budget` (None: all) of the states that a power cut may leave.

    The points are pairs of a cut and a state. Raises `Unexplained` where the recording does not
    explain what lies on the disk.
    """
    tally, began = Tally(NAME, saver.name, until_failed), time.monotonic()
    trace = record(saver)
    lefts = choose(trace, budget, seed)
    for left in lefts:
        with cycle.scratch() as directory:
            left.state.build(directory)
            verdict = cycle.recover(saver, directory, 0)
        for cut in left.cuts:
            reached = min(cut.announced + 1, cycle.STEPS)
            what = f"cut behind call {cut.calls} ({cut.after}), seed {seed}"
            tally.judge(replace(verdict, announced=cut.announced, reached=reached), what)
        if tally.decided:
            break
    tally.states = len(lefts)
    tally.seconds = time.monotonic() - began
    return tally


def record(saver: type[Saver]) -> Trace:
    """Save one cycle on a real disk, and check that its calls explain what lies there."""
    with cycle.scratch(Path(tempfile.gettempdir())) as place:  # /dev/shm is where mutants go
        directory, log, base = place / "run", place / "log", place / "base"
        directory.mkdir()

        def before() -> None:
            base.mkdir()
            Disk.read(directory).now().build(base)

        outcome = cycle.save_under(saver, directory, Fault(How.RECORD), log, before=before)
        if outcome.status:
            raise RuntimeError(f"{saver.name}: the recorded cycle failed: {outcome.error}")
        marks = sum(call.name == "said" for call in outcome.log)
        steps = [int(line.split()[1]) for line in outcome.said if line.startswith("durable ")]
        earlier = [0, *steps[: len(steps) - marks]]
        trace = Trace(str(directory.resolve()), Disk.read(base), earlier[-1], outcome.log)
        if not _explains(trace, directory):
            raise Unexplained(f"{saver.name}: its calls do not explain what it has written")
        return trace


def cuts(trace: Trace) -> Iterator[tuple[Cut, Disk]]:
    """The moments between calls (a cut inside a call leaves nothing that one behind it may not),
    and the disk then. The disk is the same object that goes on."""
    disk, newest, number, last = copy.deepcopy(trace.base), trace.announced, 0, "none"
    yield Cut(0, last, newest), disk
    for call in trace.calls:
        if call.name == "said":
            newest = int(call.path.split()[1])
        else:
            disk.apply(call, trace.root)
            number += 1
            last = f"{call.name} {os.path.relpath(call.other or call.path, trace.root)}"
        yield Cut(number, last, newest), disk


def choose(trace: Trace, budget: int | None, seed: int) -> list[Left]:
    """States and all the cuts that leave them: in turn one of the most telling, and any one."""
    rng = random.Random(seed)
    offered = [
        (cut, {state.digest: state for state in disk.states(rng, _RANDOM)})
        for cut, disk in cuts(trace)
    ]
    by_cut = [list(states.items()) for _cut, states in offered]
    rng.shuffle(by_cut)
    ranks = itertools.zip_longest(*by_cut)
    telling = [found for rank in ranks for found in rank if found is not None]
    anyone = rng.sample(telling, len(telling))
    chosen: dict[bytes, Left] = {}
    for digest, state in itertools.chain.from_iterable(zip(telling, anyone, strict=True)):
        if len(chosen) == budget:
            break
        chosen.setdefault(digest, Left(state, []))
    for cut, states in offered:
        for digest in states.keys() & chosen.keys():
            chosen[digest].cuts.append(cut)
    return list(chosen.values())


def _explains(trace: Trace, directory: Path) -> bool:
    """Whether the recorded calls make of the base what lies in `directory`."""
    try:
        *_before, (_cut, disk) = cuts(trace)
    except (KeyError, ValueError):  # a file from elsewhere, or a call that is not known
        return False
    return disk.now().digest == Disk.read(directory).now().digest
