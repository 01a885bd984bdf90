"""Put an export at its target whole or not at all, and replace nothing. No torch here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from holdfast.checkpoint.system import SignalGuard, drafts, filesystem
from holdfast.errors import ConfigError, Interrupted, ResourceError
from holdfast.formatting import format_bytes


def check_target(target: Path) -> None:
    """Raise ConfigError unless nothing is at `target`, or an empty directory."""
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise ConfigError("{path} is there already. Choose another --out.", path=target)


def check_room(target: Path, needed: int) -> None:
    """Raise ResourceError unless `needed` bytes fit beside `target`."""
    place = target.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    free = filesystem.free_bytes(place)
    if free < needed + filesystem.RESERVE:
        raise ResourceError(
            "The disk of {directory} has {free} free, and {needed} are needed. Free some "
            "space, or choose --out on another disk.",
            directory=place,
            free=format_bytes(free),
            needed=format_bytes(needed + filesystem.RESERVE),
        )


@contextlib.contextmanager
def making(target: Path, *, folder: bool) -> Iterator[Path]:
    """Yield a path beside `target` to be filled: a folder that is there, or the name of a file.

    When the block has ended well it is durable and gets the name `target`. Otherwise nothing of it
    is left, whatever ended the block.
    """
    filesystem.make_directory(target.parent)
    with drafts.folder(target.parent, f".{target.name}.part-") as place:
        draft = place if folder else place / target.name
        yield draft
        _make_durable(draft)
        check_target(target)  # another program may have been faster
        if target.is_dir():
            target.rmdir()
        draft.rename(target)
    filesystem.sync_directory(target.parent)


def _make_durable(path: Path) -> None:
    folders = [Path(place) for place, _names, _files in os.walk(path)]
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    for file in files:
        mode = file.stat().st_mode
        if not mode & 0o200:
            continue  # a published checkpoint: durable before it was made read-only
        if not mode & 0o077:
            file.chmod(0o644)  # some libraries write files that only their owner may read
        fd = os.open(file, os.O_RDWR)  # Windows flushes only what may be written
        try:
            filesystem.sync_file(fd)
        finally:
            os.close(fd)
    for folder in folders:
        filesystem.sync_directory(folder)


def files_of(path: Path) -> list[tuple[str, int]]:
    """Return (name, bytes) of a file, or of the files in a folder."""
    if path.is_file():
        return [(path.name, path.stat().st_size)]
    found = sorted(f for f in path.rglob("*") if f.is_file())
    return [(f.relative_to(path).as_posix(), f.stat().st_size) for f in found]


@contextlib.contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Let any signal that asks to stop end the block, with `message` and the signal's status.

    Inside it is a KeyboardInterrupt: libraries that catch every Exception let that one through.
    """

    def stop(_number: int) -> None:
        raise KeyboardInterrupt

    with SignalGuard(stop) as guard:
        try:
            yield
        except KeyboardInterrupt as error:
            raise Interrupted(message, guard.requested or 2) from error
