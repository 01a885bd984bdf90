"""Every write-side system call of a cycle of saves in turn: killed there, killed in the middle of a
write, failed there once or from there on, cut short, or lied to."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from pathlib import Path

from holdfast.checkpoint.rundir import shared_memory
from tests.faults import cycle, inject
from tests.faults.inject import Fault, How
from tests.faults.savers import Saver
from tests.faults.tally import Tally
from tests.support import die

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR)
ON_WRITES = (How.KILL_HALF, How.SHORT, How.LIE, How.DROP)
UNREAD = "a lying write, killed before it is read back"
KINDS: dict[str, list[Fault]] = {
    "killed at a call": [Fault(How.KILL), Fault(How.KILL_HALF)],
    "a call fails once": [Fault(How.FAIL, 0, number) for number in ERRORS],
    "calls fail from there on": [Fault(How.FAIL_FROM, 0, errno.ENOSPC),
                                 Fault(How.FAIL_FROM, 0, errno.EIO)],
    "a short write": [Fault(How.SHORT)],
    "a lying write": [Fault(How.LIE), Fault(How.DROP)],
    UNREAD: [Fault(How.LIE), Fault(How.DROP)],
}  # fmt: skip


def sweep(
    saver: type[Saver], kind: str, *, every: int = 1, reach: int = 2, until_failed: bool = False
) -> Tally:
    """All points of one kind of fault, or each `every`-th. RuntimeError where none fired.

    `until_failed`: from the last point back to the first one that fails. The latest saves have no
    successor that hides what was lost, so a control fails there soonest.
    """
    tally, began = Tally(kind, saver.name, until_failed), time.monotonic()
    found = list(points(saver, kind, every, reach))
    for fault in reversed(found) if until_failed else found:
        with cycle.scratch() as directory:
            then = _die_once_fired if kind == UNREAD else _nothing
            try:
                outcome = cycle.save_under(saver, directory, fault, then=then)
                if not outcome.fired:
                    continue
                tally.note(directory)
                newest = cycle.announced(outcome)
                if kind == UNREAD:  # its snapshot may not have been whole yet when it was announced
                    newest = min(newest, _in_memory(directory))
                tally.judge(cycle.recover(saver, directory, newest), fault)
            finally:
                cycle.forget(directory)
        if tally.decided:
            break
    tally.seconds = time.monotonic() - began
    if tally.points == 0:
        raise RuntimeError(f"{saver.name}, {kind}: no fault has fired")
    return tally


def _in_memory(directory: Path) -> int:
    """The newest step that lies whole in shared memory; 0 where none does."""
    here = [each for each in shared_memory.remains() if each.belongs_to(directory)]
    return max((left.step for each in here if (left := shared_memory.newest_in(each))), default=0)


def _die_once_fired() -> None:
    """After an announcement, before anything is read back."""
    if inject.fired():
        die()


def _nothing() -> None: ...


def points(saver: type[Saver], kind: str, every: int, reach: int) -> Iterator[Fault]:
    """The faults of a kind at every call of a clean cycle, in their order.

    Two threads may change places, so a write is looked for up to `reach` calls around where it was
    in the clean cycle. Of those points most do not fire.
    """
    names = cycle.clean_calls(saver)
    for number in range(1, len(names) + 1):
        near_write = "write" in names[max(0, number - 1 - reach) : number + reach]
        for i, fault in enumerate(KINDS[kind]):
            if (number + i) % every == 0 and (near_write or fault.how not in ON_WRITES):
                yield Fault(fault.how, number, fault.error)
