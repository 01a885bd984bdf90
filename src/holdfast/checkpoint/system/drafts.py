"""Files and folders that are filled beside their target, and what killed processes left of such.

The kernel drops the lock on a draft with the process that holds it: a draft without a lock is dead.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from holdfast.checkpoint.system import filesystem
from holdfast.checkpoint.system.signals import deferred_interrupt

try:
    import fcntl
except ImportError:  # Windows: nothing is swept there
    fcntl = None  # type: ignore[assignment]

# A FIFO of that name would block the open for ever.
_LOOK = sum(getattr(os, flag, 0) for flag in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"))


@contextlib.contextmanager
def folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder in `parent`, removed at the end unless it was renamed."""
    sweep(parent, prefix)
    path = parent / f"{prefix}{secrets.token_hex(6)}"
    path.mkdir()
    try:
        with held(path):
            yield path
    finally:
        with deferred_interrupt():
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Mark `path` as in use until the block ends, also under another name."""
    fd = _locked(path)
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def sweep(parent: Path, prefix: str) -> None:
    """Remove the drafts in `parent` whose names begin with `prefix` and that no process holds."""
    for path in parent.glob(f"{glob.escape(prefix)}*"):
        if (fd := _locked(path)) >= 0:
            os.close(fd)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    filesystem.remove(path)


def _locked(path: Path) -> int:
    """Lock `path` and return its descriptor; -1 if it is locked, or cannot be."""
    if fcntl is None:
        return -1
    try:
        fd = os.open(path, _LOOK)
    except OSError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return -1
    return fd
