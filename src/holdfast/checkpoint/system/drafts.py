"""Folders that are filled beside their target, and what killed processes have left of such.

A draft's name has the process in it, and that process holds a lock of the folder. Both must be free
before it is swept: the number says nothing of another machine, and a lock is taken after the name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from holdfast.checkpoint.system import filesystem

try:
    import fcntl
except ImportError:  # Windows: nothing is swept there
    fcntl = None  # type: ignore[assignment]

# A FIFO of that name would block the open for ever.
_LOOK = sum(getattr(os, flag, 0) for flag in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"))


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Mark `folder` as in use until the block ends, also under another name."""
    fd = -1
    with contextlib.suppress(OSError):
        if fcntl is not None:
            fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def sweep(parent: Path, prefix: str) -> None:
    """Remove the folders `<prefix><process>-…` of dead processes in `parent`."""
    for path in left(parent, prefix):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                filesystem.remove(path)


def left(parent: Path, prefix: str) -> list[Path]:
    """Return the drafts `<prefix><process>-…` in `parent` that no process uses any more."""
    with contextlib.suppress(OSError):
        return [
            path
            for path in sorted(parent.iterdir())
            if path.name.startswith(prefix) and _is_free(path, path.name[len(prefix) :])
        ]
    return []


def _is_free(path: Path, rest: str) -> bool:
    number = rest.partition("-")[0]
    if fcntl is None or not number.isdecimal() or _lives(int(number)):
        return False
    try:
        fd = os.open(path, _LOOK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
