"""A step back that is killed at any of its calls to the disk: the next start goes on from the old
state or from the new one, never from neither. The steps back are those of tests/checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from holdfast.checkpoint.rundir import rollback
from tests.checkpoint.moves import MOVES, Move
from tests.faults import cycle, inject
from tests.faults.inject import Fault, How
from tests.faults.tally import Tally, Verdict
from tests.support import everything, make_run, twin

NAME = "killed between the moves of a step back"
OURS, MUTANT = "holdfast", "holdfast, mutant: files move before the history says so"


def sweep(saver: str, *, every: int, until_failed: bool = False) -> Tally:
    """Kill each step back at every `every`-th call, each beginning at another one."""
    tally, began = Tally(NAME, saver, until_failed), time.monotonic()
    cycle.digests()  # imports here what every forked process would import
    with cycle.scratch() as place:
        for first, move in enumerate(MOVES):
            template = place / str(first)
            inject.run(_making(template, move.steps), place, Fault())
            ids, number = everything(template), first % every + 1
            while not tally.decided and _one(
                move, template, number, ids, tally, mutant=saver == MUTANT
            ):
                number += every
    tally.seconds = time.monotonic() - began
    return tally


def _making(directory: Path, steps: int) -> Callable[..., None]:
    return lambda _arm, _say: void(make_run(directory, steps))


def void(_value: object) -> None: ...


def _one(
    move: Move, template: Path, number: int, ids: set[str], tally: Tally, *, mutant: bool
) -> bool:
    """Kill `move` at call `number`; False where it has come to its end before."""
    with cycle.scratch() as place:
        run = twin(template, place / "run")

        def body(arm: Callable[[], None], _say: object) -> None:
            if mutant:
                rollback.GoBack.commit = _move_first  # type: ignore[method-assign]
            arm()
            move.work(run)

        outcome = inject.run(body, run, Fault(How.KILL, number))
        if not outcome.fired:
            return False
        tally.note(run)
        judged = inject.run(lambda _arm, _say: list(move.judge(run, ids)), place, Fault())
        verdict = Verdict(0, move.steps, move.steps, same=True, goes_on=True)
        try:
            went, problem = inject.answer(judged)
            if problem:
                verdict = Verdict(move.steps, move.steps, 0, error=f"{problem}, {went}")
        except RuntimeError as error:
            verdict = Verdict(move.steps, move.steps, error=str(error)[-300:])
        tally.judge(verdict, f"{move.name}, call {number}")
    return True


_commit = rollback.GoBack.commit


def _move_first(self: rollback.GoBack) -> None:
    newer = [each for each in self.catalog.scan().entries if each.order > self.found.entry.order]
    for entry in newer:
        self.catalog.archive([entry], entry.generation)
    _commit(self)
