"""Rot: each region of the newest checkpoint flipped, cut, zeroed, or swapped with another file's.

It must always be found, never be loaded, and the checkpoint before it be taken.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults import cycle
from tests.faults.inject import Fault
from tests.faults.savers import Saver
from tests.faults.tally import Tally

Damage = Callable[[bytearray, int, int, bytes], None]  # file, from, to, another file


def _flip(data: bytearray, start: int, stop: int, _other: bytes) -> None:
    data[(start + stop) // 2] ^= 0x10


def _zero(data: bytearray, start: int, stop: int, _other: bytes) -> None:
    data[start:stop] = bytes(stop - start)


def _cut(data: bytearray, start: int, _stop: int, _other: bytes) -> None:
    del data[start:]


def _swap(data: bytearray, start: int, stop: int, other: bytes) -> None:
    data[start:stop] = other[start:stop].ljust(stop - start, b"\0")


KINDS: dict[str, Damage] = {"flip": _flip, "zero": _zero, "cut": _cut, "swap": _swap}


def rot(saver: type[Saver], *, points: int, seed: int) -> Tally:
    """`points` damages of the newest file, spread over all regions and kinds."""
    tally, began = Tally("bit rot, cut, zeroed, swapped", saver.name), time.monotonic()
    with cycle.scratch() as template, cycle.scratch() as work:
        (template / "run").mkdir()
        outcome = cycle.save_under(saver, template / "run", Fault())
        newest, before = _newest(template / "run"), cycle.announced(outcome) - 1
        whole, other = newest.read_bytes(), _another(template / "run", newest)
        for kind, start, stop in choose(newest, points, random.Random(seed)):
            data = bytearray(whole)
            KINDS[kind](data, start, stop, other)
            if data == whole:
                continue  # zeros where there were zeros
            directory = work / "run"
            _copy_with_links(template / "run", directory)
            _overwrite(directory / newest.relative_to(template / "run"), data)
            tally.note(directory)
            verdict = cycle.recover(saver, directory, before)
            tally.judge(verdict, f"{kind} {start}-{stop} of {len(whole)}")
            shutil.rmtree(directory)
    tally.seconds = time.monotonic() - began
    return tally


def regions(path: Path) -> list[tuple[int, int]]:
    """Every part of a ZIP file: local headers with their padding, payloads, and what follows; of
    another file, the whole."""
    if not zipfile.is_zipfile(path):
        return [(0, path.stat().st_size)]
    size, found, end = path.stat().st_size, [], 0
    with zipfile.ZipFile(path) as file, path.open("rb") as raw:
        for info in sorted(file.infolist(), key=lambda info: info.header_offset):
            raw.seek(info.header_offset)
            header = raw.read(30)
            names = int.from_bytes(header[26:28], "little") + int.from_bytes(
                header[28:30], "little"
            )
            payload = info.header_offset + 30 + names
            if end < info.header_offset:
                found.append((end, info.header_offset))  # data descriptor or padding
            found += [(info.header_offset, payload), (payload, payload + info.compress_size)]
            end = payload + info.compress_size
    directory = (end + size) // 2
    return [*found, (end, directory), (directory, size)]


def choose(path: Path, points: int, rng: random.Random) -> Iterator[tuple[str, int, int]]:
    """Kinds and byte ranges: every region with every kind first, then anywhere."""
    size = path.stat().st_size
    every = [(kind, a, b) for a, b in regions(path) if a < b for kind in KINDS]
    rng.shuffle(every)
    for number in range(points):
        if number < len(every):
            kind, a, b = every[number]
            start = rng.randrange(a, b)
            yield kind, start, min(b, start + rng.choice([1, 64, 4096]))
        else:
            start = rng.randrange(size)
            yield rng.choice([*KINDS]), start, min(size, start + rng.choice([1, 512, 4096]))


def _newest(directory: Path) -> Path:
    """The file that the last step lies in, or most of it."""
    latest = directory / "latest.pt"
    if latest.exists():
        return latest
    files = [path for path in directory.rglob("*") if path.is_file()]
    last = max(files, key=os.path.getmtime).parent
    return max((path for path in files if path.parent == last), key=os.path.getsize)


def _another(directory: Path, newest: Path) -> bytes:
    for path in sorted(directory.rglob(f"*{newest.suffix}")):
        if path.is_file() and not path.samefile(newest):
            return path.read_bytes()
    return newest.read_bytes()[::-1]


def _copy_with_links(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", source, target], check=True)


def _overwrite(path: Path, data: bytes | bytearray) -> None:
    """In place: all names of the inode see it, as they would see rot."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()
    path.chmod(0o444)
