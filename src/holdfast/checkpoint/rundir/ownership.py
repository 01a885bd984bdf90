"""Record which manager of this process works in which run directory.

A manager that cannot be closed any more (a notebook cell that was interrupted and is run again, an
exception, garbage) must not keep its directory until the process ends: the next one in the same
thread takes over. At the end of the process what is under way is finished.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from holdfast.checkpoint.system import end_workers, filesystem
from holdfast.errors import RunLocked

log = logging.getLogger("holdfast")

PATIENCE = 60.0  # seconds for what a manager that became garbage has under way


class Manager(Protocol):
    """The part of a CheckpointManager that is called here."""

    def give_way(self) -> None:
        """Finish the work in progress and release the directory."""

    def end_threads(self) -> None:
        """Finish the work in progress and end the threads."""


class Tenure:
    """A manager's hold on `directory`. It does not keep the manager alive."""

    def __init__(self, directory: Path, manager: Manager) -> None:
        self.directory = directory.absolute()
        self.thread = threading.current_thread()
        self.manager = weakref.ref(manager)
        self.over = threading.Event()

    def begin(self) -> None:
        """Let another manager that wants the directory find this one."""
        _tenures.append(self)

    def end(self) -> None:
        """Note that everything has been given back."""
        with contextlib.suppress(ValueError):  # a forked child knows of none
            _tenures.remove(self)
        self.over.set()


_tenures: list[Tenure] = []


def give_back(held: list[Callable[[], None]]) -> None:
    """Call the functions in `held`, the last first, each of which gives something back. After an
    interrupt, call this again: it goes on where it was."""
    while held:
        try:
            held[-1]()
        except Exception:  # the others are to be given back all the same
            log.exception("giving a run directory back")
        held.pop()


def take_over(directory: Path) -> bool:
    """Have the manager of this thread that works in `directory`, if any, finish its saves and give
    the directory back. Return True if there was one.

    Raises `RunLocked` where it is the manager of another thread that is alive, or has become
    garbage and is still saving after a minute.
    """
    found = next((t for t in list(_tenures) if filesystem.same_data(t.directory, directory)), None)
    if found is None:
        return False
    manager = found.manager()
    if manager is not None:
        if found.thread is not threading.current_thread() and found.thread.is_alive():
            raise RunLocked(
                "Another thread of this process works in {directory}. Close its manager first, "
                "or choose another directory.",
                directory=directory,
            )
        manager.give_way()
    elif not found.over.wait(PATIENCE):  # garbage, which is given back in the background
        raise RunLocked(
            "An earlier manager of this process is still saving in {directory}. Try again when "
            "it is done, or choose another directory.",
            directory=directory,
        )
    return True


def _finish() -> None:
    """Finish all saves at the end of the process, while there are threads to do it."""
    for tenure in list(_tenures):
        manager = tenure.manager()
        try:
            if manager is None:
                tenure.over.wait()
            else:
                manager.end_threads()
        except Exception:  # one that cannot end properly must not keep the others from it
            log.exception("%s", tenure.directory)
    end_workers()


atexit.register(_finish)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tenures.clear)  # what its parent holds
