"""The disk of a run directory: room, speed, and whether what it calls durable is durable.

Measured with files of our own in a directory of our own, which is gone afterwards, for a few
seconds at most. The engine's own functions write (checkpoint/system/filesystem.py), so that the
speed is that of a save. No torch in this room.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from holdfast.checkpoint.system import PAGE, RESERVE, direct, filesystem
from holdfast.formatting import format_bytes, format_seconds
from holdfast.i18n import _
from holdfast.manage.doctor import mounts
from holdfast.manage.doctor.findings import BAD, OK, UNKNOWN, WARN, Finding, unknown

FASTEST_FSYNC = 20e-6
"""Seconds below which a median of write and fsync is not believed.

Each makes the file longer, so it takes at least a write of the journal and a flush, and a round
trip on the bus for both. The fastest devices there are (drives with capacitors or Optane on
PCIe) answer one such request in 5 to 10 µs, before the file system has done anything for it.
"""

_ROOMY = 1 << 30  # bytes of free space where nothing is known of the run
_MANY_NAMES = 1000  # inodes that a run does not use up
FIRST_PROBE, PROBE = 8 << 20, 128 << 20  # bytes written to learn the speed, at most twice
_PROBE_SECONDS = 1.0  # that the larger probe may take, by what the first one says
SYNCS, _SYNC_SECONDS = 200, 1.0


def existing_parent(path: Path) -> Path:
    """The directory itself, or the nearest one above it that exists."""
    path = Path(os.path.realpath(path))
    while not path.is_dir():
        path = path.parent
    return path


def disk_checks(place: Path, needed: int) -> Iterator[Finding]:
    """Check the disk of `place`, an existing directory.

    `needed` is the size in bytes of the run's checkpoints, 0 where it is not known.
    """
    yield free_space(filesystem.free_bytes(place), needed)
    yield free_names(place)
    mount = mounts.mount_of(place, mounts.mounted())
    yield file_system(mount)
    try:
        scratch = tempfile.TemporaryDirectory(
            prefix=".doctor-", dir=place, ignore_cleanup_errors=True
        )
    except OSError as error:
        yield Finding(
            "directory",
            BAD,
            _("{directory} cannot be written: {reason}", directory=place, reason=error.strerror),
            _("choose another directory, or change who may write there"),
        )
        return
    with scratch as name:
        yield Finding("directory", OK, _("{directory} can be written", directory=place))
        yield from _measured(Path(name), mount, needed)


def _measured(scratch: Path, mount: mounts.Mount | None, needed: int) -> Iterator[Finding]:
    checks: dict[str, Callable[[], Finding]] = {
        "write_speed": lambda: write_speed(scratch, needed),
        "fsync": lambda: fsync(fsync_seconds(scratch), mount),
        "hard_links": lambda: hard_links(scratch),
    }
    for name, check in checks.items():
        try:
            yield check()
        except OSError as error:
            yield Finding(
                name,
                BAD,
                _("failed: {reason}", reason=error.strerror),
                _("look into the system's log, and at the disk"),
            )


# ------------------------------------------------------------------------------------------- room


def free_space(free: int, needed: int) -> Finding:
    """Check that another checkpoint fits beside the reserve that stays free."""
    found = _("{free} free", free=format_bytes(free))
    advice = _("free some space, or choose another directory")
    if needed:
        found += _("; a checkpoint of this run has {size}", size=format_bytes(needed))
    if free < needed + RESERVE:
        return Finding("free_space", BAD, found, advice)
    if free < max(3 * needed + RESERVE, 0 if needed else _ROOMY):
        return Finding("free_space", WARN, found, advice)
    return Finding("free_space", OK, found)


def free_names(place: Path) -> Finding:
    """Check that files can be created: a disk may have room and no inodes."""
    if not hasattr(os, "statvfs"):
        return unknown("free_names")
    found = os.statvfs(place)
    if not found.f_files:
        return Finding("free_names", OK, _("this file system does not count them"))
    text = _("{count} free", count=f"{found.f_favail:,}")
    advice = _("remove files that are not needed: each takes one, however small")
    if found.f_favail < 16:
        return Finding("free_names", BAD, text, advice)
    return Finding(
        "free_names",
        WARN if found.f_favail < _MANY_NAMES else OK,
        text,
        advice if found.f_favail < _MANY_NAMES else "",
    )


# ------------------------------------------------------------------------------------ durability


def file_system(mount: mounts.Mount | None) -> Finding:
    """Name the file system and every reason why "durable" is hollow there."""
    if mount is None:
        return unknown("file_system")
    found = _(
        "{kind} on {source}, mounted at {point}",
        kind=mount.kind,
        source=mount.source,
        point=mount.point,
    )
    if mount.read_only:
        return Finding(
            "file_system",
            BAD,
            found + _(", read-only"),
            _("mount it writable, or choose another directory"),
        )
    concerns = mounts.concerns(mount)
    reasons = "; ".join([found, *(concern.reason for concern in concerns)])
    advice = "; ".join(dict.fromkeys(concern.advice for concern in concerns))
    return Finding("file_system", WARN if concerns else OK, reasons, advice)


def fsync_seconds(scratch: Path) -> float:
    """The median of many small writes, each of which makes the file longer and is synced."""
    page, began = b"\x5a" * PAGE, time.perf_counter()
    times: list[float] = []
    with tempfile.TemporaryFile(dir=scratch, buffering=0) as file:
        while len(times) < SYNCS and time.perf_counter() - began < _SYNC_SECONDS:
            start = time.perf_counter()
            file.write(page)
            filesystem.sync_file(file.fileno())
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def fsync(seconds: float, mount: mounts.Mount | None) -> Finding:
    """Check that a write and its fsync took as long as a device needs at least."""
    found = _(
        "{microseconds} µs for a small write and its fsync", microseconds=f"{seconds * 1e6:.0f}"
    )
    if mount is not None and any(c.name == "memory" for c in mounts.concerns(mount)):
        return Finding("fsync", OK, found + _(", in memory"))
    if seconds < FASTEST_FSYNC:
        return Finding(
            "fsync",
            WARN,
            found + _(', faster than any device can: "durable" is hollow here'),
            _(
                "look for what swallows it: a virtual disk that caches on its host, libeatmydata, "
                "sync=disabled"
            ),
        )
    return Finding("fsync", OK, found)


# ----------------------------------------------------------------------------------------- speed


def write_speed(scratch: Path, needed: int) -> Finding:
    """Measure how fast a checkpoint becomes durable, past the page cache and through it."""
    room = filesystem.free_bytes(scratch) // 4
    if room < FIRST_PROBE:
        return Finding("write_speed", UNKNOWN, _("not measured: the disk is too full"))
    first = _seconds(scratch, FIRST_PROBE, past_cache=True)
    size = int(FIRST_PROBE / first * _PROBE_SECONDS)
    size = max(FIRST_PROBE, min(size, PROBE, room)) & -PAGE
    speeds = [size / _seconds(scratch, size, past_cache=past) for past in (True, False)]
    found = _(
        "{direct}/s past the page cache, {cached}/s through it ({size} written)",
        direct=format_bytes(int(speeds[0])),
        cached=format_bytes(int(speeds[1])),
        size=format_bytes(size),
    )
    if needed:
        found += _(
            "; a checkpoint of this run in about {time}", time=format_seconds(needed / max(speeds))
        )
    return Finding("write_speed", OK, found)


def _seconds(scratch: Path, size: int, *, past_cache: bool) -> float:
    """Seconds until `size` bytes are durable, written as a checkpoint is."""
    memory = mmap.mmap(-1, size)  # page-aligned, which direct writes want
    while memory.tell() < size:
        memory.write(os.urandom(min(direct.BLOCK, size - memory.tell())))
    view = memoryview(memory)
    pieces = [(0, view)] if past_cache else [(0, view[:PAGE]), (PAGE, view[PAGE:])]
    target = scratch / "speed"
    try:
        began = time.perf_counter()
        filesystem.write_file(target, pieces, size)
        return time.perf_counter() - began
    finally:
        filesystem.remove(target)


# ------------------------------------------------------------------------- what the engine can use


def hard_links(scratch: Path) -> Finding:
    """The names of one checkpoint are links to it where that works."""
    source, name = scratch / "first", scratch / "second"
    filesystem.write_file(source, [(0, b"x" * PAGE)], PAGE)
    if filesystem.link(source, name):
        return Finding("hard_links", OK, _("yes"))
    return Finding(
        "hard_links",
        WARN,
        _("no: the names of one checkpoint are copies, which take room and time"),
        _("choose a file system that has them, such as ext4, XFS, Btrfs or NTFS"),
    )
