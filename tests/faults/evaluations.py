"""Signals inside the duties of a step: in a validation, in the sample, in the last step of a run.

What was interrupted is owed and made up for: after the next start the history, the best, the early
stop, the kept checkpoints and the final state are those of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.training import loop, models
from holdfast.training.trainer import Trainer
from tests.faults import cycle, inject
from tests.faults.inject import Fault, Outcome
from tests.faults.tally import Tally, Verdict
from tests.support import die
from tests.training.duties import KINDS, Lines, Run
from tests.training.runs import SMALL, difference, write_corpus

NAME = "a signal inside an evaluation, a sample, the last step"
OURS, MUTANT = "holdfast", "holdfast, mutant: what a signal interrupts is done with"
STRIKES: list[Callable[[], Any]] = [
    lambda: signal.raise_signal(signal.SIGTERM),
    lambda: signal.raise_signal(signal.SIGINT),
    die,
]
_WITHIN = {"evaluate", "sample", "sample_text", "_drawn"}  # functions


def strike_duties(saver: str, *, points: int, seed: int) -> Tally:
    """Strike so many times, at lines that `seed` chooses, in every kind of run in turn."""
    models.SHAPES["tiny"] = SMALL
    tally, began, rng = Tally(NAME, saver), time.monotonic(), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        corpus = write_corpus(place, passages=2)
        kinds = {}
        for kind in KINDS if saver == OURS else ["steps"]:
            run = Run(place / kind, corpus, kind)
            seen, modules = inject.answer(_live(run, Lines()))
            _import(modules)
            kinds[kind] = (_moments(seen, ends=saver == OURS), run.comes_to())
        for number in range(points):
            kind = [*kinds][number % len(kinds)]
            moments, expected = kinds[kind]
            turn = number + number // len(kinds)  # three points are all kinds and all strikes
            which = turn % len(STRIKES) if saver == OURS else 0
            moment = rng.choice(moments)
            run = Run(place / "run", corpus, kind, memory_every=1)
            struck = _live(run, Lines(moment, STRIKES[which]), mutant=saver == MUTANT)
            tally.note(run.directory)
            again = _live(run, Lines(), mutant=saver == MUTANT)
            verdict = Verdict(0, 0, 1, same=True, goes_on=True)
            if again.status:
                verdict = Verdict(0, 0, error=again.error[-300:])
            elif (wrong := _differs(expected, run)) is not None:
                verdict = Verdict(0, 0, 1, error=wrong)
            tally.judge(verdict, f"strike {which} at line {moment}, {kind}, {struck.status}, "
                        f"seed {seed}")  # fmt: skip
            cycle.forget(run.directory)
            shutil.rmtree(run.directory)
    tally.seconds = time.monotonic() - began
    return tally


def _differs(expected: dict[str, Any], run: Run) -> str | None:
    try:
        return difference(expected, run.comes_to())
    except FileNotFoundError as error:  # of a run that has never evaluated
        return str(error)


def _live(run: Run, lines: Lines, *, mutant: bool = False) -> Outcome:
    """Train in a process of its own until the end, or until it is struck."""

    def body(_arm: object, _say: object) -> list[Any]:
        if mutant:
            _forget_what_is_owed()
        with lines:
            run.start()
        return [lines.seen, sorted(sys.modules)]

    return inject.run(body, run.directory, Fault())


def _moments(seen: list[tuple[str, int, str]], *, ends: bool) -> list[int]:
    """The lines, from 1, within what a signal interrupts, and all after the last update.

    Without `ends`, for the control: where the last evaluation of the run begins. It is owed there
    for certain, and nothing that comes later would make up for it.
    """
    if not ends:
        names = [name for _file, _line, name in seen]
        called = itertools.pairwise(names)
        return [2 + max(i for i, two in enumerate(called) if two == ("after_step", "evaluate"))]
    last = max(number for number, (_file, _line, name) in enumerate(seen) if name == "one_step")
    return [
        number
        for number, (_file, _line, name) in enumerate(seen, 1)
        if name in _WITHIN or number > last
    ]


def _forget_what_is_owed() -> None:
    real = loop.after_step

    def after_step(self: Trainer) -> None:
        real(self)
        self.progress.owed = False

    loop.after_step = after_step


def _import(modules: list[str]) -> None:
    """What a training imports, once here and not in every life of one."""
    for name in modules:
        with contextlib.suppress(Exception):  # what only works where it was first imported
            importlib.import_module(name)
