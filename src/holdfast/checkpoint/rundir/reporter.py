"""Record events in events.jsonl at once; deliver callbacks in the thread that made the manager.

Saves run in threads of their own. Their events wait here until the training thread calls
`deliver`: consoles and callbacks are not made to be called from other threads.
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
    """Records events and tells them to `on_event(event, fields)`. Without one they go to the log,
    as a sentence where they are a warning."""

    def __init__(self, catalog: Catalog, on_event: EventHandler | None = None) -> None:
        self._catalog, self._on_event = catalog, on_event
        self.recording = True  # False while the directory is not ours
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
        except OSError as error:  # a full disk: the checkpoint matters more than its line
            self.warn(error)

    def warn(self, error: Exception) -> None:
        """Log an error that costs no state."""
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
        """Tell all events that wait; to be called in the training thread."""
        while self._on_event is not None:
            try:
                event, fields = self._waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._on_event(event, fields)
            except Exception:  # a closed terminal must not end a training, nor undo a save
                log.exception("on_event(%r)", event)
