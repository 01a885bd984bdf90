"""One cycle of saving under a fault, and the recovery that judges it. Each runs in a process of its
own, forked from one that has imported everything."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from holdfast.checkpoint.rundir import shared_memory
from tests.faults import inject
from tests.faults.inject import Fault, How, Outcome
from tests.faults.savers import Ours, Saver, Training
from tests.faults.tally import Verdict

STEPS = 6  # of a cycle
ARMED = 3  # the first step that is saved under faults
FURTHER = 2  # steps that a recovered training goes on


@contextmanager
def scratch(place: Path | None = None) -> Iterator[Path]:
    """A directory for one point, gone afterwards."""
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None  # fsync costs nothing
    path = Path(tempfile.mkdtemp(prefix="faults-", dir=place or memory))
    try:
        yield path
    finally:
        _unlock(path)
        shutil.rmtree(path, ignore_errors=True)


def forget(directory: Path) -> None:
    """Give back what is left in shared memory of a run."""
    for remains in shared_memory.remains():
        if remains.belongs_to(directory):
            remains.remove()


@functools.cache
def digests(steps: int = STEPS + FURTHER) -> dict[int, str]:
    """What the undisturbed training is after each of its first `steps` steps."""
    _import_everything()

    def body(_arm: object, _say: object) -> dict[str, str]:
        training = Training()
        found = {"0": training.digest()}
        for step in range(1, steps + 1):
            training.step()
            found[str(step)] = training.digest()
        return found

    with scratch() as directory:
        found = inject.answer(inject.run(body, directory, Fault()))
    return {int(step): digest for step, digest in found.items()}


def save_under(
    saver: type[Saver],
    directory: Path,
    fault: Fault,
    log: Path | None = None,
    *,
    before: Callable[[], object] | None = None,
    then: Callable[[], object] = lambda: None,
) -> Outcome:
    """Train and save STEPS steps; the fault is armed before the ARMED-th, after a call of `before`.
    What was announced are the lines "durable STEP"; after each `then` is called."""

    def body(arm: object, say: object) -> None:
        training = Training()
        it = saver(directory, training)
        it.start()

        def announce(step: int) -> None:
            say(f"durable {step}")  # type: ignore[operator]
            then()

        for step in range(1, STEPS + 1):
            training.step()
            if step == ARMED:
                if before is not None:
                    before()
                arm()  # type: ignore[operator]
            it.save(step, announce)
        it.finish()

    return inject.run(body, directory, fault, log)


def announced(outcome: Outcome) -> int:
    """The newest step that the parent has read to be durable."""
    steps = [int(line.split()[1]) for line in outcome.said if line.startswith("durable ")]
    return max(steps, default=0)


def recover(
    saver: type[Saver],
    directory: Path,
    newest: int,
    reached: int = STEPS,
    expected: dict[int, str] | None = None,
) -> Verdict:
    """Start anew in `directory`: what is found, is it right, and can one go on from it? `expected`
    are the digests of as many steps as there may be."""

    def body(_arm: object, _say: object) -> list[object]:
        training = Training()
        it = saver(directory, training)
        step = it.resume()
        found = training.digest()
        for more in range(step + 1, step + FURTHER + 1):
            training.step()
            it.save(more, lambda _done: None)
        it.finish()
        again = Training()
        second = saver(directory, again)
        last = second.resume()
        second.finish()
        return [step, found, last, again.digest()]

    expected = expected or digests()
    outcome = inject.run(body, directory, Fault())
    try:
        step, found, last, final = inject.answer(outcome)
    except RuntimeError:
        why = outcome.error.strip().splitlines()[-1:] or [f"status {outcome.status}"]
        return Verdict(newest, reached, error=why[0][:300])
    same = found == expected.get(step, "")
    goes_on = last == step + FURTHER and final == expected.get(last, "")
    return Verdict(newest, reached, step, same, goes_on)


def clean_calls(saver: type[Saver]) -> list[str]:
    """The names of the write-side calls that a cycle makes when nothing goes wrong.

    Raises RuntimeError where it does not recover from that either: then the harness is wrong.
    """
    with scratch() as directory:
        outcome = save_under(saver, directory, Fault(How.COUNT))
        verdict = recover(saver, directory, STEPS)
    if outcome.status or announced(outcome) != STEPS or verdict.problem:
        raise RuntimeError(f"{saver.name}: the clean cycle failed: {outcome} {verdict}")
    return ["write" if "write" in call.name else call.name for call in outcome.log]


def _import_everything() -> None:
    """What torch imports when it is first needed, once here and not in every forked process."""
    training = Training()
    for parameter in training.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.optimizer.step()  # no backward: autograd's threads do not survive a fork
    with scratch() as directory:
        it = Ours(directory, training)
        it.start()
        it.finish()


def _unlock(path: Path) -> None:
    for base, directories, _files in os.walk(path):
        for name in directories:
            os.chmod(Path(base) / name, 0o700)  # noqa: PTH101 - symlinks stay as they are
