"""What happens around a start is put to the same faults as a save: recovery from damage, going
back to an older state, and bringing home what a killed process has left in memory (FAULTS.md, 17
and 18)."""

from __future__ import annotations

import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from holdfast.checkpoint.format import container
from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.errors import CheckpointError
from tests.faults import cycle, inject
from tests.faults.inject import Fault, How
from tests.faults.savers import Ours, Remembering, Training
from tests.faults.syscalls import ERRORS
from tests.faults.tally import Tally, Verdict
from tests.support import damage

Say = Callable[[str], None]
Arm = Callable[[], None]


class Start(ABC):
    """A kind of start: how the directory comes about, and what is done in it under faults."""

    name: ClassVar[str]
    promised: ClassVar[int]  # the step that every later start must find, or a newer one

    @abstractmethod
    def prepare(self, directory: Path) -> None:
        """In a process of its own."""

    def act(self, it: Ours) -> None:
        """Start; under faults."""
        it.start()

    def clean(self, directory: Path) -> None:  # noqa: B027 - most have nothing to take away
        """Take away what lies outside of the directory."""


class AfterDamage(Start):
    """The newest two are damaged, a writer has died, a link has got lost."""

    name, promised = "killed or failed call while recovering from damage", 4

    def prepare(self, directory: Path) -> None:
        _saved(directory, cycle.STEPS)
        newest = [e for e in Catalog(directory).scan().entries if e.step > self.promised]
        for entry in newest:
            damage(directory / entry.names[0])
        (directory / ".holdfast-1-0.tmp").write_bytes(b"half")
        (directory / "best_model.pt").unlink()


class GoingBack(Start):
    """The user goes back to an older state: the newer ones make way."""

    name, promised = "killed or failed call while going back", 4

    def prepare(self, directory: Path) -> None:
        _saved(directory, cycle.STEPS)

    def act(self, it: Ours) -> None:
        it.manager = it.open()
        it.manager.resume(it.directory / "model_epoch_4.pt")


class FromMemory(Start):
    """A killed process has left a newer step in shared memory than lies on the disk."""

    name, promised = "killed or failed call while rescuing memory", cycle.STEPS

    def prepare(self, directory: Path) -> None:
        training = Training()
        it = Remembering(directory, training)
        it.start()
        for step in range(1, cycle.STEPS + 1):
            training.step()
            if step == 2:
                it.save(step, lambda _done: None)
            else:
                it.manager.after_step(step)
                it.manager.wait()
        os.kill(os.getpid(), signal.SIGKILL)

    def clean(self, directory: Path) -> None:
        cycle.forget(directory)


STARTS: list[type[Start]] = [AfterDamage, GoingBack, FromMemory]


def sweep(kind: type[Start], *, every: int = 1) -> Tally:
    """Kill at each write-side call of such a start, and fail there, each error in its turn."""
    tally, began, start = Tally(kind.name, Ours.name), time.monotonic(), kind()
    number, fired = 0, True
    while fired:
        number += 1
        faults = [Fault(How.KILL, number), Fault(How.FAIL, number, ERRORS[number % len(ERRORS)])]
        for i, fault in enumerate(faults):
            if (number + i) % every and number > 1:
                continue
            fired = _one(start, fault, tally)
    tally.seconds = time.monotonic() - began
    if tally.points == 0:
        raise RuntimeError(f"{kind.name}: no fault has fired")
    return tally


def _one(start: Start, fault: Fault, tally: Tally) -> bool:
    with cycle.scratch() as directory:
        inject.run(lambda _arm, _say: start.prepare(directory), directory, Fault())
        before = intact(directory)
        try:
            outcome = inject.run(lambda arm, _say: _act(start, directory, arm), directory, fault)
            if not outcome.fired:
                return False
            tally.note(directory)
            gone = before - intact(directory)
            verdict = cycle.recover(Ours, directory, start.promised)
            if gone:
                verdict = Verdict(start.promised, cycle.STEPS, 0, error=f"gone for good: {gone}")
            tally.judge(verdict, fault)
        finally:
            start.clean(directory)
    return True


def _act(start: Start, directory: Path, arm: Arm) -> None:
    it = Ours(directory, Training())
    arm()
    try:
        start.act(it)
        it.finish()
    except (OSError, CheckpointError):
        os._exit(1)  # a start may fail when a call fails; the next one must not


def _saved(directory: Path, steps: int) -> None:
    training = Training()
    it = Ours(directory, training)
    it.start()
    for step in range(1, steps + 1):
        training.step()
        it.save(step, lambda _done: None)
    it.finish()


def intact(directory: Path, *, but: tuple[str, ...] = ()) -> set[str]:
    """The ids of all intact states below the directory, but those in some of its folders."""
    found: set[str] = set()
    for path in directory.rglob("*.pt"):
        if path.relative_to(directory).parts[0] in but:
            continue
        try:
            with container.Reader(path) as reader:
                reader.verify()
                found.add(str(reader.manifest["identity"]["id"]))
        except (CheckpointError, OSError):
            continue
    return found
