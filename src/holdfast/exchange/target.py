"""Where an export goes: there whole or not at all, and never over what nobody said to replace.

No torch in this room, and nothing of what is written.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from holdfast.checkpoint.system import SignalGuard, drafts, filesystem
from holdfast.errors import ConfigError, Interrupted, ResourceError
from holdfast.formatting import format_bytes
from holdfast.i18n import _

MARK = "holdfast.json"  # in every folder of ours: what may be replaced with --force

Progress = Callable[[str, int, int], None]
"""Told what is being done, and of how many bytes how many; of 0 where nobody can say."""

_RESERVE = 64 << 20  # bytes that stay free on the disk
_LOOK_EVERY = 0.2  # seconds between two looks at how much has been written


def check_target(target: Path, *, force: bool) -> None:
    """Raise ConfigError where something is at `target` that may not be replaced.

    What a process that was killed while it exchanged folders has moved away is put back first.
    """
    _put_back(target)
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise ConfigError(
            _("{path} is there already. Choose another --out, or replace it with --force.",
              path=target)
        )  # fmt: skip
    ours = target.is_file() or (target.is_dir() and (target / MARK).is_file())
    if target.is_symlink() or not (ours or (target.is_dir() and not any(target.iterdir()))):
        raise ConfigError(
            _("{path} is no export of holdfast, so --force does not replace it. Choose another "
              "--out.", path=target)
        )  # fmt: skip


def check_room(target: Path, needed: int) -> None:
    """Raise ResourceError unless `needed` bytes fit beside `target`."""
    place = target.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    free = filesystem.free_bytes(place)
    if free < needed + _RESERVE:
        raise ResourceError(
            _("The disk of {directory} has {free} free, and {needed} are needed. Free some space, "
              "or choose --out on another disk.", directory=place, free=format_bytes(free),
              needed=format_bytes(needed + _RESERVE))
        )  # fmt: skip


@contextlib.contextmanager
def making(target: Path, *, folder: bool, force: bool) -> Iterator[Path]:
    """A path beside `target` to be filled: a folder that is there, or the name of a file.

    When the block has ended well it is durable and takes the place of `target`; otherwise, whatever
    ended it, nothing is left of it, and `target` is as it was.
    """
    filesystem.make_directory(target.parent)
    _put_back(target)
    drafts.sweep(target.parent, _hidden(target, "part"))
    draft = target.with_name(f"{_hidden(target, 'part')}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        if folder:
            draft.mkdir()
        with drafts.held(draft):  # a file is not there yet: its process alone says whose it is
            yield draft
            _make_durable(draft)
            check_target(target, force=force)  # somebody may have been faster
            _exchange(draft, target)
    except BaseException:  # an interrupt, too, leaves nothing half-written
        _forget(draft)
        raise
    filesystem.sync_directory(target.parent)


def _exchange(draft: Path, target: Path) -> None:
    if not target.is_dir() and not (draft.is_dir() and target.exists()):
        draft.replace(target)
        return
    old = target.with_name(f"{_hidden(target, 'old')}{os.getpid()}-{secrets.token_hex(4)}")
    target.rename(old)
    try:  # a kill here leaves nothing at `target` until the next call: see _put_back
        draft.rename(target)
    except BaseException:  # whatever it was: what was there is there again
        old.rename(target)
        raise
    _forget(old)


def _put_back(target: Path) -> None:
    """Undo what a kill between the two moves of `_exchange` has left; after both, finish it."""
    for old in drafts.left(target.parent, _hidden(target, "old")):
        if target.exists() or target.is_symlink():
            _forget(old)
        else:
            old.rename(target)


def _hidden(target: Path, what: str) -> str:
    """What the names beside `target` begin with that stand for it for a while."""
    return f".{target.name}.{what}-"


def _make_durable(path: Path) -> None:
    folders = [Path(place) for place, _names, _files in os.walk(path)]
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    for file in files:
        mode = file.stat().st_mode
        if not mode & 0o200:
            continue  # a published checkpoint: durable before it was made read-only
        if not mode & 0o077:
            file.chmod(0o644)  # some libraries write files that nobody else may read
        fd = os.open(file, os.O_RDWR)  # Windows flushes only what may be written
        try:
            filesystem.sync_file(fd)
        finally:
            os.close(fd)
    for folder in folders:
        filesystem.sync_directory(folder)


def _forget(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def files_of(path: Path) -> list[tuple[str, int]]:
    """(name, bytes) of a file, or of the files in a folder."""
    if path.is_file():
        return [(path.name, path.stat().st_size)]
    found = sorted(f for f in path.rglob("*") if f.is_file())
    return [(f.relative_to(path).as_posix(), f.stat().st_size) for f in found]


# ---------------------------------------------------------------------------- while it is written


@contextlib.contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Let any signal that asks to stop end the block, with `message` and the signal's status.

    It is a KeyboardInterrupt inside: libraries that catch every Exception let that one through.
    """

    def stop(_number: int) -> None:
        raise KeyboardInterrupt

    with SignalGuard(stop) as guard:
        try:
            yield
        except KeyboardInterrupt as error:
            raise Interrupted(message, guard.requested or 2) from error


@contextlib.contextmanager
def watched(label: str, path: Path, total: int, progress: Progress) -> Iterator[None]:
    """Tell how much of `total` bytes lie at `path`, again and again, until the block is done."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(_LOOK_EVERY):
            with contextlib.suppress(OSError):  # files are renamed while we look
                progress(label, min(total, sum(size for _name, size in files_of(path))), total)

    progress(label, 0, total)
    thread = threading.Thread(target=look, name="holdfast-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
