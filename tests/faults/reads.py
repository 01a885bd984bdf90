"""The system refuses to read: when a save is read back, and when a start reads what is there.

Such an error says nothing about a file. What was announced stays where it is, nothing older goes
before it is verified, and a start ends at the newest state or with an error, never at an older one.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.checkpoint.format import container, reading
from holdfast.errors import HoldfastError
from tests.faults import cycle, inject
from tests.faults.inject import Call, Fault, How, Outcome
from tests.faults.restarts import intact
from tests.faults.savers import Ours, Training
from tests.faults.tally import Tally
from tests.support import tree_of

ERRORS = (errno.EIO, errno.EMFILE, errno.ENOMEM, errno.EINTR, errno.EACCES, errno.ESTALE)
BACK, START = "an error while a save is read back", "an error while a start reads"
_FLOOR = 2  # verified states that are always there
_REFUSED = 3  # exit status of a start that ends in words
_KEPT = ("quarantine", "archive")

Arm = Callable[[], None]
Say = Callable[[str], None]


def read_back(
    saver: type[Ours], *, points: int | None, seed: int, until_failed: bool = False
) -> Tally:
    """Fail each call that reads while three steps are saved, or `points` of them."""
    tally, began = Tally(BACK, saver.name, until_failed), time.monotonic()
    cycle.digests()  # imports here what every forked process would import
    with cycle.scratch() as directory:
        calls = _save(saver, directory, Fault(How.COUNT_READ)).log
    for fault in _faults(calls, points, seed):
        with cycle.scratch() as directory:
            outcome = _save(saver, directory, fault)
            if not outcome.fired:
                continue
            tally.note(directory)
            condemned = [name for name in tree_of(directory) if name.startswith("quarantine/")]
            newest = cycle.announced(outcome)
            verdict = cycle.recover(saver, directory, newest)
            if condemned and not verdict.problem:
                verdict = replace(verdict, step=-1, error=f"set aside: {condemned}")
            if inject.answer(outcome) < _FLOOR:
                verdict = replace(verdict, step=0, error="older ones went before it was verified")
            tally.judge(verdict, f"{fault}, seed {seed}")
            if tally.decided:
                break
    tally.seconds = time.monotonic() - began
    return tally


def at_a_start(
    saver: type[Ours], *, points: int | None, seed: int, until_failed: bool = False
) -> Tally:
    """Fail each call that reads while a start looks for the newest state, or `points` of them."""
    tally, began = Tally(START, saver.name, until_failed), time.monotonic()
    cycle.digests()
    with cycle.scratch() as template, cycle.scratch() as work:
        cycle.save_under(Ours, template / "run", Fault())
        before, states = tree_of(template / "run"), intact(template / "run")
        directory = _twin(template / "run", work)
        calls = _start(saver, directory, Fault(How.COUNT_READ)).log
        for fault in _faults(calls, points, seed):
            directory = _twin(template / "run", work)
            outcome = _start(saver, directory, fault)
            if not outcome.fired:
                continue
            tally.note(directory)
            gone = before - tree_of(directory) or states - intact(directory, but=_KEPT)
            verdict = cycle.recover(saver, directory, cycle.STEPS)
            resumed = [int(line.split()[1]) for line in outcome.said if line.startswith("resumed")]
            if not resumed and (fault.how is How.FAIL_READ or outcome.status != _REFUSED):
                why = f"status {outcome.status}: {outcome.said} {outcome.error[-300:]}"
                verdict = replace(verdict, step=-1, error=why)
            elif resumed and resumed[0] < cycle.STEPS:
                verdict = replace(verdict, step=resumed[0], same=True, goes_on=True)
            elif gone:
                verdict = replace(verdict, step=-1, error=f"moved: {gone}")
            tally.judge(verdict, f"{fault}, seed {seed}")
            if tally.decided:
                break
    tally.seconds = time.monotonic() - began
    return tally


def _faults(calls: Sequence[Call], points: int | None, seed: int) -> list[Fault]:
    """Every error at every call, passing and lasting; or `points` of them, half of these where
    checkpoints are read. (The history is read far more often.)"""
    every = [
        (call, Fault(how, call.number, error))
        for call in calls
        for error in ERRORS
        for how in (How.FAIL_READ, How.FAIL_READ_FROM)
    ]
    rng = random.Random(seed)
    rng.shuffle(every)
    groups = [[fault for call, fault in every if call.path.endswith(".pt") is wanted]
              for wanted in (True, False)]  # fmt: skip
    in_turn = (fault for pair in itertools.zip_longest(*groups) for fault in pair)
    return list(itertools.islice((fault for fault in in_turn if fault is not None), points))


def _save(saver: type[Ours], directory: Path, fault: Fault) -> Outcome:
    """The cycle of saves under a fault; it answers with the least number of states that were there
    after one of them and had been read back whole."""
    verified: dict[str, Path] = {}  # by id
    real = container.Reader.verify

    def verify(reader: Any, *args: Any, **keywords: Any) -> None:
        real(reader, *args, **keywords)
        verified.setdefault(reader.manifest["identity"]["id"], reader.path)

    def body(arm: Arm, say: Say) -> int:
        container.Reader.verify = verify  # type: ignore[method-assign]
        reading.PAUSES = (0.001, 0.001, 0.001)  # a mutant has none
        training = Training()
        it = saver(directory, training)
        it.start()
        least = _FLOOR
        for step in range(1, cycle.STEPS + 1):
            training.step()
            if step == cycle.ARMED:
                arm()
            it.save(step, lambda done: say(f"durable {done}"))
            if step >= cycle.ARMED:
                least = min(least, sum(path.exists() for path in verified.values()))
        it.finish()
        return least

    return inject.run(body, directory, fault)


def _start(saver: type[Ours], directory: Path, fault: Fault) -> Outcome:
    def body(arm: Arm, say: Say) -> None:
        reading.PAUSES = (0.001, 0.001, 0.001)
        it = saver(directory, Training())
        arm()
        try:
            say(f"resumed {it.resume()}")
            it.finish()
        except (HoldfastError, OSError) as error:
            say(f"refused {error}".replace("\n", " "))
            os._exit(_REFUSED)

    return inject.run(body, directory, fault)


def _twin(template: Path, work: Path) -> Path:
    shutil.rmtree(work / "run", ignore_errors=True)
    subprocess.run(["cp", "-a", template, work / "run"], check=True)
    return work / "run"
