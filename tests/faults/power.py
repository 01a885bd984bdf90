"""Power cuts on paper: a cycle of saves is recorded call by call, every state that a cut may leave
behind any of the calls is built in a directory, and recovery judges it.

What a cut may leave is `disk.py`. The same state after several cuts is built and recovered once,
and judged for each of them by what had been announced until then.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.faults import cycle, inject, real_cut, savers
from tests.faults.disk import Disk, State
from tests.faults.inject import Call, Fault, How
from tests.faults.savers import Saver
from tests.faults.tally import Tally, Verdict, table

NAME = "power loss"
QUICK = 100  # states of a short form
_RANDOM = 40  # random states of each cut, behind those that are chosen by rule
_MEMORY = Path("/dev/shm")  # states are built there: what is judged is not the disk


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


def power_loss(saver: type[Saver], *, budget: int | None, seed: int) -> Tally:
    """Recover from at most `budget` (None: all) of the states that a power cut may leave.

    The points are pairs of a cut and a state. Raises RuntimeError where the recording does not
    explain what lies on the disk.
    """
    tally, began = Tally(NAME, saver.name), time.monotonic()
    trace = record(saver)
    lefts = choose(trace, budget, seed)
    verdicts = _in_workers(saver, lefts)
    for left, verdict in zip(lefts, verdicts, strict=True):
        for cut in left.cuts:
            reached = min(cut.announced + 1, cycle.STEPS)
            what = f"cut behind call {cut.calls} ({cut.after}), seed {seed}"
            tally.judge(replace(verdict, announced=cut.announced, reached=reached), what)
    tally.states = len(lefts)
    tally.seconds = time.monotonic() - began
    return tally


def record(saver: type[Saver]) -> Trace:
    """Save one cycle on a real disk, and check that its calls explain what lies there."""
    with cycle.scratch() as place:
        directory, log, base = place / "run", place / "log", place / "base"
        directory.mkdir()

        def before() -> None:
            base.mkdir()
            Disk.read(directory).now().build(base)

        outcome = cycle.save_under(saver, directory, Fault(How.RECORD), log, before)
        if outcome.status:
            raise RuntimeError(f"{saver.name}: the recorded cycle failed: {outcome.error}")
        marks = sum(call.name == "said" for call in outcome.log)
        steps = [int(line.split()[1]) for line in outcome.said if line.startswith("durable ")]
        earlier = [0, *steps[: len(steps) - marks]]
        trace = Trace(str(directory.resolve()), Disk.read(base), earlier[-1], outcome.log)
        replayed = _replay(trace)
        if replayed.now().digest != Disk.read(directory).now().digest:
            raise RuntimeError(f"{saver.name}: its calls do not explain what it has written")
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
    """States and the cuts that leave them: of each cut first the most telling, then the next."""
    rng = random.Random(seed)
    offered = [
        (cut, list({state.digest: state for state in disk.states(rng, _RANDOM)}.values()))
        for cut, disk in cuts(trace)
    ]
    rng.shuffle(offered)
    chosen: dict[bytes, Left] = {}
    for rank in range(max(len(states) for _cut, states in offered)):
        for cut, states in offered:
            if rank >= len(states):
                continue
            state = states[rank]
            left = chosen.get(state.digest)
            if left is not None:
                left.cuts.append(cut)
            elif budget is None or len(chosen) < budget:
                chosen[state.digest] = Left(state, [cut])
    return list(chosen.values())


def _replay(trace: Trace) -> Disk:
    *_before, (_cut, disk) = cuts(trace)
    return disk


# --------------------------------------------------------------------------------------- judgement


def _in_workers(saver: type[Saver], lefts: Sequence[Left]) -> list[Verdict]:
    """Recover from all of them, in a process for each processor."""
    cycle.digests()  # once, before the processes part
    count = min(len(os.sched_getaffinity(0)), len(lefts))
    verdicts: dict[int, Verdict] = {}
    with tempfile.TemporaryDirectory() as place:
        answers = [Path(place) / str(number) for number in range(count)]
        pids = [
            _fork(saver, range(number, len(lefts), count), lefts, answer)
            for number, answer in enumerate(answers)
        ]
        failed = [pid for pid in pids if os.waitpid(pid, 0)[1]]
        if failed:
            raise RuntimeError("a process that recovers states has failed; its error is above")
        for answer in answers:
            verdicts.update(pickle.loads(answer.read_bytes()))
    return [verdicts[number] for number in range(len(lefts))]


def _fork(saver: type[Saver], mine: range, lefts: Sequence[Left], answer: Path) -> int:
    """Start a process that recovers from its share; returns its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        verdicts = {number: _judge(saver, lefts[number].state) for number in mine}
        answer.write_bytes(pickle.dumps(verdicts))
        status = 0
    except BaseException:  # noqa: BLE001 - the parent sees the status
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _judge(saver: type[Saver], state: State) -> Verdict:
    with cycle.scratch(_MEMORY if _MEMORY.is_dir() else None) as directory:
        state.build(directory)
        return cycle.recover(saver, directory, 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.power", description=__doc__)
    parser.add_argument("--saver", action="append", help="class in savers.py; default: Ours")
    parser.add_argument("--budget", type=int, help="states at most; default: all")
    parser.add_argument("--quick", action="store_true", help=f"the same as --budget {QUICK}")
    parser.add_argument(
        "--real", type=int, metavar="N", help="cut the power of a real ext4 N times"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    budget = QUICK if args.quick else args.budget
    wanted = [getattr(savers, name) for name in args.saver or ["Ours"]]
    if args.real:
        rows = [real_cut.real_cut(saver, cuts=args.real, seed=args.seed) for saver in wanted]
    else:
        rows = [power_loss(saver, budget=budget, seed=args.seed) for saver in wanted]
    print(json.dumps([row.to_json() for row in rows]) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    inject.preloaded()
    raise SystemExit(main())
