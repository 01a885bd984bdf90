"""The memory tier: snapshots in shared memory that outlive the process, and finding them again.

A run has a directory of its own in /dev/shm, 0700, named after the run directory's device and
inode, so that a copied run never meets the snapshots of its original. In it each slot is a file
that is a complete `.pt`, and beside it a head that says what it is:

    holdfast-<uid>-<device>-<inode>-<run>-g<generation>/
        owner.lock              held by the process that writes here
        run                     the path of the run directory
        slot-0.pt  slot-0.head  the image; and one line of JSON, its checksum, the bare manifest

A head is valid only while the slot beside it holds a whole snapshot. No torch here.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from holdfast.checkpoint import filesystem, image
from holdfast.checkpoint.container import Reader
from holdfast.checkpoint.layout import MANIFEST, Record, place, plan
from holdfast.checkpoint.lock import FileLock
from holdfast.checkpoint.retention import Order
from holdfast.checkpoint.slot import Slot
from holdfast.errors import CheckpointError, RunLocked
from holdfast.i18n import _

PLACE = Path("/dev/shm")
_RUN = "run"
HEAD_SIZE = 4096  # the first line of a head, padded: one page is written whole or not at all
_NAME_RE = re.compile(r"holdfast-(\d+)-(\d+)-(\d+)-([0-9a-f]{8})-g(\d+)(-[0-9a-f]+)?")
NONSENSE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def usable() -> bool:
    """Whether this platform has shared memory that outlives a process."""
    return (
        sys.platform.startswith("linux")
        and not filesystem.disabled("sharedmemory")
        and os.access(PLACE, os.W_OK)
    )


def free_bytes() -> int:
    """Bytes that shared memory still takes; Docker's default is 64 MB in all."""
    return filesystem.free_bytes(PLACE)


def _order(identity: Mapping[str, Any]) -> Order:
    return (identity["generation"], identity["sequence"])


# -------------------------------------------------------------------------------------- writing


class MemoryTier:
    """The directory in shared memory of one run, as its owner sees it."""

    def __init__(self, run_directory: Path, run_id: str, generation: int) -> None:
        """Claim the directory of this run. Raises `OSError` or `RunLocked`."""
        self.directory = PLACE / _name(run_directory, run_id, generation)
        if not _make_private(self.directory) or any(self.directory.glob("slot-*")):
            # An earlier process has left snapshots that are not to be overwritten yet.
            self.directory = self.directory.with_name(
                f"{self.directory.name}-{secrets.token_hex(4)}"
            )
            _make_private(self.directory)
        self._lock = FileLock(self.directory / "owner.lock")
        self._lock.acquire()
        # For people who look at what is left; nothing that resuming does depends on it.
        (self.directory / _RUN).write_bytes(os.fsencode(run_directory.absolute()))
        self._slots = 0
        self._newest = self._durable = (0, 0)

    def in_memory(self, order: Order) -> None:
        """A snapshot of this order is whole here."""
        self._newest = max(self._newest, order)

    def on_disk(self, order: Order) -> None:
        """A checkpoint of this order is durable and verified."""
        self._durable = max(self._durable, order)

    def slot(self, capacity: int) -> Slot:
        """One more slot. Raises `OSError` where shared memory has no room for it."""
        path = self.directory / f"slot-{self._slots}.pt"
        slot = SharedSlot(self, path, capacity)
        self._slots += 1
        return slot

    def close(self, *, abandon: bool = False) -> None:
        """Everything goes, unless a snapshot here is newer than what is on the disk: that stays for
        whoever goes on with the run. With `abandon` nobody will."""
        if self._lock.held:  # a forked child holds nothing
            if abandon or self._newest <= self._durable:
                _remove(self.directory)
            self._lock.release()


class SharedSlot(Slot):
    """A slot that is a file in shared memory; its head says whether it holds a snapshot."""

    def __init__(self, tier: MemoryTier, path: Path, capacity: int) -> None:
        self._tier, self._path = tier, path
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._head = -1
        self._fd = os.open(path, flags, 0o600)
        try:
            self._head = os.open(path.with_suffix(".head"), flags, 0o600)
            super().__init__(capacity)
        except BaseException:  # no room, an interrupt: nothing of it stays behind
            self._close_files()
            path.with_suffix(".head").unlink(missing_ok=True)
            path.unlink()
            raise
        self._size = capacity
        self._line: dict[str, Any] = {}

    def _allocate(self) -> mmap.mmap:
        # Claimed before it is mapped: a hole in a full tmpfs is a SIGBUS, not an exception.
        os.posix_fallocate(self._fd, 0, self.capacity)
        return mmap.mmap(self._fd, self.capacity)

    def close(self) -> None:
        super().close()
        self._close_files()

    def discard(self) -> None:
        for path in (self._path.with_suffix(".head"), self._path):
            filesystem.remove(path)

    def _close_files(self) -> None:
        for fd in (self._fd, self._head):
            if fd >= 0:
                os.close(fd)

    def begin(self) -> None:
        os.pwrite(self._head, bytes(HEAD_SIZE), 0)

    def fit(self, size: int) -> None:
        if size != self._size:
            os.ftruncate(self._fd, size)
            if size > self._size:
                os.posix_fallocate(self._fd, 0, size)
            self._size = size

    def complete(self, blueprint: image.Blueprint) -> None:
        told = {
            "sizes": [[record.name, record.size] for record in blueprint.records],
            "manifest": blueprint.manifest,
            "slot": blueprint.slot.size,
            "size": blueprint.size,
        }
        bare = json.dumps(told, ensure_ascii=False).encode("utf-8", "surrogatepass")
        _pwrite_all(self._head, bare, HEAD_SIZE)
        self._line = {
            "holdfast": 1,
            "identity": blueprint.manifest["identity"],
            "blueprint": {"size": len(bare), "xxh3_128": xxhash.xxh3_128_hexdigest(bare)},
            "sealed": False,
        }
        self._write_line()
        self._tier.in_memory(_order(self._line["identity"]))

    def sealed(self) -> None:
        if self._line:
            self._line["sealed"] = True
            self._write_line()

    def _write_line(self) -> None:
        text = json.dumps(self._line).encode()
        line = text + b" " + xxhash.xxh3_128_hexdigest(text).encode() + b"\n"
        assert len(line) <= HEAD_SIZE, "an identity has a fixed size"
        os.pwrite(self._head, line.ljust(HEAD_SIZE, b"\0"), 0)


def _pwrite_all(fd: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def _make_private(directory: Path) -> bool:
    """Create `directory` for us alone; False where it exists. Raises `OSError`."""
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        return False
    return True


def _name(run_directory: Path, run_id: str, generation: int) -> str:
    found = run_directory.stat()
    return f"holdfast-{os.getuid()}-{found.st_dev}-{found.st_ino}-{run_id[:8]}-g{generation}"


def _remove(directory: Path) -> None:
    for path in sorted(directory.iterdir(), reverse=True):  # slots before the lock
        filesystem.remove(path)
    directory.rmdir()


# ------------------------------------------------------------------------------- finding them again


@dataclass(frozen=True, slots=True)
class Remains:
    """What a process has left in shared memory, or is using there."""

    directory: Path
    size: int  # bytes
    device: int
    inode: int

    def belongs_to(self, run_directory: Path) -> bool:
        found = run_directory.stat()
        return (self.device, self.inode) == (found.st_dev, found.st_ino)

    @property
    def run(self) -> Path | None:
        """The path that the run directory had."""
        try:
            return Path(os.fsdecode((self.directory / _RUN).read_bytes()))
        except OSError:
            return None

    def remove(self) -> bool:
        """Give the memory back; False where somebody has begun to use it meanwhile."""
        try:
            with FileLock(self.directory / "owner.lock"):
                _remove(self.directory)
                return True
        except (RunLocked, FileNotFoundError):
            return False


@dataclass(frozen=True, slots=True)
class Left:
    """A whole snapshot in shared memory that no process owns any more."""

    path: Path
    identity: Mapping[str, Any]
    sealed: bool
    remains: Remains

    @property
    def order(self) -> Order:
        """As `Entry.order`."""
        return _order(self.identity)

    @property
    def step(self) -> int:
        return int(self.identity["step"])


def remains() -> list[Remains]:
    """Everything of ours in shared memory: of this user, not a link, not somebody's trap."""
    if not sys.platform.startswith("linux"):
        return []
    found = []
    for directory in sorted(PLACE.glob("holdfast-*")):
        named = _NAME_RE.fullmatch(directory.name)
        with contextlib.suppress(FileNotFoundError):
            status = directory.lstat()
            if named is None or not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                continue
            size = sum(path.lstat().st_blocks * 512 for path in directory.iterdir())
            found.append(Remains(directory, size, int(named[2]), int(named[3])))
    return found


def in_use(directory: Path) -> bool:
    """Whether a living process owns this directory of shared memory."""
    if not (directory / "owner.lock").exists():
        return False  # and do not create it: its owner is about to be gone altogether
    try:
        with FileLock(directory / "owner.lock"):
            return False
    except RunLocked:
        return True


def left_by(run_directory: Path, run_id: str, generation: int) -> list[Left]:
    """The whole snapshots of this run and generation that a dead process has left, newest first."""
    found = []
    for each in remains():
        if in_use(each.directory) or not each.belongs_to(run_directory):
            continue
        for left in _snapshots(each):
            if (left.identity["run_id"], left.identity["generation"]) == (run_id, generation):
                found.append(left)
    return sorted(found, key=lambda left: left.order, reverse=True)


def _snapshots(found: Remains) -> Iterator[Left]:
    for head in sorted(found.directory.glob("slot-*.head")):
        line = _read_line(head)
        if line is not None:
            identity = line["identity"]
            numbers = (identity.get("generation"), identity.get("step"), identity.get("sequence"))
            if all(type(number) is int for number in numbers) and "run_id" in identity:
                yield Left(head.with_suffix(".pt"), identity, line["sealed"] is True, found)


def sweep(run_directory: Path) -> None:
    """Remove what processes that were killed before their first snapshot have left of this run."""
    for each in remains():
        if (
            each.belongs_to(run_directory)
            and newest_in(each) is None
            and not in_use(each.directory)
        ):
            each.remove()


def newest_in(found: Remains) -> Left | None:
    """The newest whole snapshot in `found`."""
    return max(_snapshots(found), key=lambda left: left.order, default=None)


def _read_line(head: Path) -> dict[str, Any] | None:
    """The first line of a head, if it is valid."""
    try:
        text, _blank, digest = head.read_bytes()[:HEAD_SIZE].partition(b"\n")[0].rpartition(b" ")
        if xxhash.xxh3_128_hexdigest(text).encode() != digest:
            return None
        line = json.loads(text)
        return line if isinstance(line["identity"], dict) and "sealed" in line else None
    except (OSError, *NONSENSE):
        return None


def make_whole(left: Left) -> None:
    """Give a snapshot that has no checksums yet what it lacks, from what lies in its head.

    Raises `CheckpointError` or `OSError` where it cannot be made a checkpoint. Afterwards, and for
    a sealed one, reading it verifies it as any other file.
    """
    if not left.sealed:
        with left.path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            buffer = memoryview(mapped)
            try:
                blueprint = _blueprint(left.path.with_suffix(".head"))
                if blueprint.size != len(buffer):
                    raise _not_whole(left.path)
                image.Sealer(blueprint, buffer).advance(blueprint.size)
            finally:
                buffer.release()
    with Reader(left.path) as reader:
        reader.check_structure()


def _not_whole(path: Path) -> CheckpointError:
    return CheckpointError(_("{path} belongs to no whole snapshot.", path=path))


def _blueprint(head: Path) -> image.Blueprint:
    line = _read_line(head)
    if line is None:
        raise _not_whole(head)
    size = int(line["blueprint"]["size"])
    bare = head.read_bytes()[HEAD_SIZE : HEAD_SIZE + size]
    if xxhash.xxh3_128_hexdigest(bare) != line["blueprint"]["xxh3_128"]:
        raise _not_whole(head)
    try:
        told = json.loads(bare.decode("utf-8", "surrogatepass"))
        records: list[Record] = plan((str(name), int(count)) for name, count in told["sizes"])
        slot = place(records[-1].end, MANIFEST, int(told["slot"]))
        return image.Blueprint(records, told["manifest"], slot, int(told["size"]))
    except NONSENSE as error:
        raise _not_whole(head) from error
