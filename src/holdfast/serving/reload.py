"""Watches run directories while training goes on, and has a better checkpoint loaded."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from holdfast.checkpoint.rundir import EVENTS
from holdfast.serving.library import Library

log = logging.getLogger("holdfast")


class Watcher:
    """Looks every `seconds` whether the history of a run has grown, and then what is the best."""

    def __init__(self, library: Library, seconds: float = 1.0) -> None:
        self._library, self._seconds = library, seconds
        self._stopped = threading.Event()
        # Nothing yet: what came while the first models were loaded is found by the first look.
        self._seen: list[tuple[int, int, int]] | None = None
        self._thread = threading.Thread(target=self._run, name="holdfast-watcher", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; a model that is being loaded is loaded to its end."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            signs = self._signs()
            if signs == self._seen:
                continue
            try:
                if self._library.look_again():
                    self._seen = signs
            except OSError as error:  # the disk is away: what is in memory is still served
                log.warning("%s", error)
            except RuntimeError:
                return  # the event loop is closed: the server has ended

    def _signs(self) -> list[tuple[int, int, int]]:
        """Return signs that change when a checkpoint comes or goes: of directory and history."""
        signs = []
        for source in self._library.sources:
            for path in (source, source / EVENTS):
                signs.append(_sign(path))
        return signs


def _sign(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_size, found.st_ino)
