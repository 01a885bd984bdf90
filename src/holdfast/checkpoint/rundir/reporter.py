"""What has happened: into events.jsonl at once, and to the caller in the thread he made us in.

Saving goes on in threads of its own. What they have to tell waits here until the training thread
comes by, so that nobody's console or callback has to bear being called from elsewhere.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.checkpoint.rundir.words import sentence

log = logging.getLogger("holdfast")

EventHandler = Callable[[str, dict[str, Any]], None]


class Reporter:
    """Records events and tells them to `on_event(event, fields)`; without one to the log, in words
    where they are warnings."""

    def __init__(self, catalog: Catalog, on_event: EventHandler | None = None) -> None:
        self._catalog, self._on_event = catalog, on_event
        self.recording = True  # not while the directory is another process's: its history is too
        self._owner = threading.get_ident()
        self._waiting: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()

    def report(self, event: str, **fields: Any) -> None:
        """Record an event and tell it."""
        self.record(event, **fields)
        self.tell(event, **fields)

    def record(self, event: str, **fields: Any) -> None:
        """Write an event into the history."""
        if not self.recording:
            return
        try:
            self._catalog.record(event, **fields)
        except OSError as error:  # a full disk: the checkpoint counts, its line in the log does not
            self.warn(error)

    def warn(self, error: Exception) -> None:
        """Something that costs no state could not be done."""
        log.warning("%s: %s", self._catalog.directory, error)

    def tell(self, event: str, **fields: Any) -> None:
        """Tell an event: now in the thread that made this object, from others with `deliver`."""
        if self._on_event is None:
            if warning := sentence(event, fields):
                log.warning("%s: %s", self._catalog.directory, warning)
            else:
                log.info("%s %s", event, fields)
            return
        self._waiting.put((event, fields))
        if threading.get_ident() == self._owner:
            self.deliver()

    def deliver(self) -> None:
        """Tell what has been waiting; called in the training thread."""
        while self._on_event is not None:
            try:
                event, fields = self._waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._on_event(event, fields)
            except Exception:  # a closed terminal must not end a training, nor undo a save
                log.exception("on_event(%r)", event)
