"""Rot: each region of the newest checkpoint flipped, cut, zeroed, or swapped with another file's;
the same in shared memory; and flipped bits in the cache and in the history.

It must always be found, never be loaded, and the checkpoint before it be taken.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from holdfast.checkpoint import Catalog
from holdfast.checkpoint.format import container
from holdfast.checkpoint.rundir import shared_memory
from holdfast.errors import CheckpointError
from tests.faults import cycle, inject
from tests.faults.inject import Fault
from tests.faults.restarts import FromMemory, intact
from tests.faults.savers import Ours, Saver
from tests.faults.tally import Tally
from tests.support import flip

ROT = "bit rot, cut, zeroed, swapped"
CACHE = "bit rot in metadata.json and events.jsonl"
SLOTS = "rot in what a killed process left in memory"

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


def rot(saver: type[Saver], *, points: int, seed: int, until_failed: bool = False) -> Tally:
    """`points` damages of the newest file, spread over all regions and kinds."""
    tally, began = Tally(ROT, saver.name, until_failed), time.monotonic()
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
            if tally.decided:
                break
    tally.seconds = time.monotonic() - began
    return tally


def cache_rot(
    saver: type[Ours], *, points: int | None, seed: int, until_failed: bool = False
) -> Tally:
    """One flipped bit in each byte of the cache and of the history, or in `points` of them: the
    newest is gone on from, and every file stays that would have stayed."""
    tally, began, rng = (
        Tally(CACHE, saver.name, until_failed),
        time.monotonic(),
        random.Random(seed),
    )
    with cycle.scratch() as template, cycle.scratch() as work:
        cycle.save_under(Ours, template / "run", Fault())
        temp = Catalog(template / "run").scan().entries[1]  # goes with the next but one
        Catalog(template / "run").record("pinned", id=temp.id, step=temp.step)
        _copy_with_links(template / "run", work / "run")
        cycle.recover(Ours, work / "run", cycle.STEPS)
        stay = intact(work / "run")  # the ids that are there after two more saves, undamaged
        assert temp.id in stay, "only its pin keeps it"
        ours = stay & intact(template / "run")
        for name, offset, bit in _bits(template / "run", points, rng):
            shutil.rmtree(work / "run")
            _copy_with_links(template / "run", work / "run")
            if (
                name == "metadata.json"
            ):  # a copy has other inodes: its cache would count for nothing
                Catalog(work / "run").write_cache()
            flip(work / "run" / name, offset, bit)
            tally.note(work / "run")
            verdict = cycle.recover(saver, work / "run", cycle.STEPS)
            gone = ours - intact(work / "run")
            if gone and not verdict.problem:
                verdict = replace(verdict, step=0, error=f"gone: {gone}")
            tally.judge(verdict, f"bit {bit} of byte {offset} of {name}, seed {seed}")
            if tally.decided:
                break
    tally.seconds = time.monotonic() - began
    return tally


def _bits(directory: Path, points: int | None, rng: random.Random) -> list[tuple[str, int, int]]:
    """A bit of each byte of both files, or of `points` of them; first those that make one number
    of an order another, and those of the line that pins."""
    orders = re.compile(rb'"(?:sequence|generation)": (\d)')
    telling, pins, others = [], [], []
    for name in ("metadata.json", "events.jsonl"):
        data = (directory / name).read_bytes()
        digits = {found.start(1) for found in orders.finditer(data) if name == "metadata.json"}
        telling += [(name, offset, rng.randrange(3)) for offset in sorted(digits)]
        if name == "events.jsonl":
            pin = range(data.rindex(b"\n", 0, -1) + 1, len(data))
            pins = [(name, offset, rng.randrange(8)) for offset in pin]
        others += [(name, offset, rng.randrange(8)) for offset in range(len(data))]
    rng.shuffle(telling)
    rng.shuffle(pins)
    rng.shuffle(others)
    if points is None:
        return telling + others
    chosen = telling[: points // 2] + pins[: points // 4]
    return chosen + others[: points - len(chosen)]


def slot_rot(saver: type[Ours], *, points: int, seed: int, until_failed: bool = False) -> Tally:
    """`points` damages of what a killed process has left in shared memory: it is told and never
    trained on; the snapshot before it is taken, or the disk where all are damaged."""
    tally, began, rng = (
        Tally(SLOTS, saver.name, until_failed),
        time.monotonic(),
        random.Random(seed),
    )
    if not shared_memory.usable():
        tally.skipped = "no shared memory here"
        return tally
    cycle.digests()  # imports here what every forked process would import
    for number in range(points):
        with cycle.scratch() as directory:
            inject.run(
                lambda _arm, _say, at=directory: FromMemory().prepare(at), directory, Fault()
            )  # type: ignore[misc]
            try:
                what, promised, quiet = _damage_slots(directory, number, rng)
                tally.note(directory)
                verdict = cycle.recover(saver, directory, promised)
                told = Catalog(directory).events("failed")
                silent = not quiet and not any(each.get("step") == cycle.STEPS for each in told)
                if 0 < verdict.step < cycle.STEPS and silent:
                    verdict = replace(verdict, step=-1, error="it has not been told")
                tally.judge(verdict, f"{what}, seed {seed}")
            finally:
                FromMemory().clean(directory)
        if tally.decided:
            break
    tally.seconds = time.monotonic() - began
    return tally


def _damage_slots(directory: Path, number: int, rng: random.Random) -> tuple[str, int, bool]:
    """Damage the newest snapshot, its head, or all of them in their turn; what it was, the newest
    step that is still to be had, and whether nothing can be told (no head, no snapshot)."""
    (remains,) = (each for each in shared_memory.remains() if each.belongs_to(directory))
    slots = {}
    for path in remains.directory.glob("*.pt"):
        with contextlib.suppress(CheckpointError):  # not filled yet
            slots[container.read_manifest(path)["identity"]["step"]] = path
    newest, before = slots[max(slots)], slots[max(slots) - 1].read_bytes()
    if number % 4 == 3:
        head = newest.with_suffix(".head")
        size = len(head.read_bytes().rstrip(b"\0"))
        flip(head, offset := rng.randrange(size), bit := rng.randrange(8))
        return f"bit {bit} of byte {offset} of the head", cycle.STEPS - 1, True
    size = newest.stat().st_size
    if number % 8 == 1:
        half = rng.choice([(0, size // 2), (size // 2, size), (0, size)])
        chosen = ("swap", *half)
    else:
        whole = list(choose(newest, 200, rng))
        chosen = rng.choice(whole)
    kind, start, stop = chosen
    all_of_them = number % 4 == 2
    changed = False
    for path in slots.values() if all_of_them else [newest]:
        data = bytearray(path.read_bytes())
        was = bytes(data)
        KINDS[kind](data, start, stop, before)
        if all_of_them and bytes(data) == was:
            _flip(data, start, stop, before)
        changed = changed or bytes(data) != was
        path.write_bytes(data)
    what = f"{kind} {start}-{stop} of {size} in {'every slot' if all_of_them else 'the newest'}"
    promised = 2 if all_of_them else cycle.STEPS - 1 if changed else cycle.STEPS
    return what, promised, not changed


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
