"""The lock of the catalogue for the desk: what a person is told who cannot have it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from holdfast.checkpoint.rundir import Catalog
from holdfast.errors import ResourceError, RunLocked
from holdfast.i18n import _

WAIT = 30.0  # seconds; a training holds it for a fraction of one


@contextlib.contextmanager
def catalogue_lock(catalog: Catalog) -> Iterator[None]:
    """Hold the catalogue's lock. Raises `RunLocked` where another process has it for longer than
    `WAIT` seconds, `ResourceError` where the directory cannot be written."""
    lock = catalog.lock(WAIT)
    try:
        lock.acquire()
    except RunLocked:
        raise RunLocked(
            "Another process is changing {directory} ({owner}) and has not ended within "
            "{seconds} s. Try again.",
            directory=catalog.directory,
            owner=lock.owner() or _("unknown process"),
            seconds=round(WAIT),
        ) from None
    except OSError as error:
        raise ResourceError(
            "{directory} cannot be written: {error}.",
            directory=catalog.directory,
            error=error.strerror or error,
        ) from error
    try:
        yield
    finally:
        lock.release()
