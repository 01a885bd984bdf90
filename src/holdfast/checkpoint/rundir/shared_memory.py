"""Keep snapshots in shared memory, where they outlive the process, and find them again.

A run has a directory of its own in /dev/shm, 0700, named after the run directory's device and
inode, so that a copied run never meets the snapshots of its original. In it each slot is a file
that is a complete `.pt`, and beside it a head that says what it is:

    holdfast-<uid>-<device>-<inode>-<run>-g<generation>/
        owner.lock              held by the process that writes here
        run                     the path of the run directory
        slot-0.pt  slot-0.head  the image; and one line of JSON with its checksum

A head is valid only while the slot beside it holds a whole snapshot, checksums included; a slot
without a valid head is not believed. Other processes of this user make and remove such directories
at any moment: code that looks at one must expect any file in it to be gone. No torch here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import mmap
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from holdfast.checkpoint.format import Reader, newer_format, read_manifest
from holdfast.checkpoint.policy import Order
from holdfast.checkpoint.rundir.entries import NONSENSE
from holdfast.checkpoint.system import FileLock, Slot, filesystem
from holdfast.errors import DamagedCheckpoint, ForeignCheckpoint, RunLocked
from holdfast.i18n import _

log = logging.getLogger("holdfast")

PLACE = Path("/dev/shm")
_RUN, _LOCK = "run", "owner.lock"
_PATIENCE = 2.0  # seconds; earlier versions take a lock for a moment only to ask about it
_HEAD_VERSION = 1
HEAD_SIZE = 4096  # the first line of a head, padded: one page is written whole or not at all
_NAME_RE = re.compile(r"holdfast-(\d+)-(\d+)-(\d+)-([0-9a-f]{8})-g(\d+)(-[0-9a-f]+)?")


def usable() -> bool:
    """Return True if this platform has shared memory that outlives a process."""
    return (
        sys.platform.startswith("linux")
        and not filesystem.disabled("sharedmemory")
        and os.access(PLACE, os.W_OK)
    )


def free_bytes() -> int:
    """Return the bytes that shared memory still takes; Docker's default is 64 MB in all."""
    return filesystem.free_bytes(PLACE)


def _order(identity: Mapping[str, Any]) -> Order:
    return (identity["generation"], identity["sequence"])


# -------------------------------------------------------------------------------------- writing


class MemoryTier:
    """Directory in shared memory of one run, for its owner."""

    def __init__(self, run_directory: Path, run_id: str, generation: int) -> None:
        """Claim the directory of this run. Raises `OSError` or `RunLocked`."""
        self._lock = _claim(_name(run_directory, run_id, generation))
        self.directory = self._lock.path.parent
        self._slots = 0
        self._newest = self._durable = (0, 0)
        try:
            self.directory.chmod(0o700)  # the lock makes it anew where it has just been swept
            # For people who look at what is left; nothing that resuming does depends on it.
            (self.directory / _RUN).write_bytes(os.fsencode(run_directory.absolute()))
        except BaseException:  # no room, an interrupt: the caller gets no tier to close
            self.close(abandon=True)
            raise

    def in_memory(self, order: Order) -> None:
        """Note that a snapshot of this order is whole here."""
        self._newest = max(self._newest, order)

    def on_disk(self, order: Order) -> None:
        """Note that a checkpoint of this order is durable and verified."""
        self._durable = max(self._durable, order)

    def slot(self, capacity: int) -> Slot:
        """Make one more slot. Raises `OSError` where shared memory has no room for it."""
        path = self.directory / f"slot-{self._slots}.pt"
        slot = SharedSlot(self, path, capacity)
        self._slots += 1
        return slot

    def close(self, *, abandon: bool = False) -> None:
        """Remove everything, unless a snapshot here is newer than the disk: the next start goes on
        from it. With `abandon` no start will, and it goes too."""
        if self._lock.held:  # a forked child holds nothing
            try:
                if abandon or self._newest <= self._durable:
                    _remove(self._lock)
            except (OSError, RunLocked) as error:  # a later sweep removes it
                log.warning("%s: %s", self.directory, error)
            finally:
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
            self.discard()
            raise
        self._size = capacity

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
        fds, self._fd, self._head = (self._fd, self._head), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def begin(self, size: int) -> None:
        os.pwrite(self._head, bytes(HEAD_SIZE), 0)
        if size > self._size:  # writing behind the end of a mapped file is a SIGBUS
            self.fit(size)

    def fit(self, size: int) -> None:
        if size != self._size:
            os.ftruncate(self._fd, size)
            if size > self._size:
                os.posix_fallocate(self._fd, 0, size)
            self._size = size

    def complete(self, manifest: Mapping[str, Any]) -> None:
        if not os.fstat(self._fd).st_nlink:  # systemd does that when its user logs out
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._path))
        identity, kind = manifest["identity"], manifest["kind"]
        head = {"holdfast": _HEAD_VERSION, "identity": identity, "kind": kind, "sealed": True}
        text = json.dumps(head).encode()
        line = text + b" " + xxhash.xxh3_128_hexdigest(text).encode() + b"\n"
        assert len(line) <= HEAD_SIZE, "an identity has a fixed size"
        os.pwrite(self._head, line.ljust(HEAD_SIZE, b"\0"), 0)
        self._tier.in_memory(_order(identity))


def _claim(name: str) -> FileLock:
    """Make a directory in shared memory that belongs to this process alone; return its lock, held.
    Raises `OSError` or `RunLocked`."""
    directory = PLACE / name
    while True:
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            # An earlier process has left snapshots that are not to be overwritten yet.
            directory = PLACE / f"{name}-{secrets.token_hex(4)}"
            continue
        lock = FileLock(directory / _LOCK, wait=_PATIENCE)
        with contextlib.suppress(FileNotFoundError):  # another process has swept it, still empty
            lock.acquire()
            return lock


def _name(run_directory: Path, run_id: str, generation: int) -> str:
    found = run_directory.stat()
    return f"holdfast-{os.getuid()}-{found.st_dev}-{found.st_ino}-{run_id[:8]}-g{generation}"


def _remove(lock: FileLock) -> None:
    """Remove a directory of shared memory whose `lock` is held, with all that is in it.

    The lock file goes last. If another process makes it anew at that moment, it is locked again
    before anything more is removed. Raises `OSError`, or `RunLocked`.
    """
    directory = lock.path.parent
    while True:
        for path in reversed(_listing(directory)):  # slots before the lock
            filesystem.remove(path)
        try:
            directory.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            lock.renew()
        else:
            return


def _listing(directory: Path) -> list[Path]:
    """Return the paths in `directory`; none if it is gone."""
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


# ------------------------------------------------------------------------------- finding them again


@dataclass(frozen=True, slots=True)
class Remains:
    """A directory of snapshots that a process has left in shared memory, or uses there."""

    directory: Path
    size: int  # bytes
    device: int
    inode: int

    def belongs_to(self, run_directory: Path) -> bool:
        try:
            found = run_directory.stat()
        except OSError:  # gone, or hidden from us
            return False
        return (self.device, self.inode) == (found.st_dev, found.st_ino)

    @property
    def run(self) -> Path | None:
        """Path that the run directory had."""
        try:
            return Path(os.fsdecode((self.directory / _RUN).read_bytes()))
        except OSError:
            return None

    @property
    def lock(self) -> FileLock:
        """Lock that a living owner holds."""
        return FileLock(self.directory / _LOCK)

    def remove(self) -> bool:
        """Give the memory back; False where a process uses it or it cannot go."""
        try:
            with self.lock as lock:
                _remove(lock)
            return True
        except RunLocked:
            return False
        except OSError as error:
            log.warning("%s: %s", self.directory, error)
            return False


@dataclass(frozen=True, slots=True)
class Left:
    """A whole snapshot in shared memory that no process owns any more."""

    path: Path
    identity: Mapping[str, Any]
    remains: Remains
    kept: bool = False  # whether its checkpoint was asked for by name: not a temporary one
    version: int = _HEAD_VERSION  # of its head

    @property
    def order(self) -> Order:
        """As `Entry.order`."""
        return _order(self.identity)

    @property
    def id(self) -> object:
        """As `Entry.id`."""
        return self.identity.get("id")

    @property
    def step(self) -> int:
        return int(self.identity["step"])


def remains() -> list[Remains]:
    """Return all directories of this user's runs in shared memory. A link, or a directory of
    another user, may be a trap and is left out."""
    if not sys.platform.startswith("linux"):
        return []
    found = []
    for directory in _listing(PLACE):
        named = _NAME_RE.fullmatch(directory.name)
        if named is None:
            continue
        with contextlib.suppress(FileNotFoundError, PermissionError):
            status = directory.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
                found.append(Remains(directory, _size(directory), int(named[2]), int(named[3])))
    return found


def _size(directory: Path) -> int:
    size = 0
    for path in _listing(directory):
        with contextlib.suppress(FileNotFoundError):
            size += path.lstat().st_blocks * 512
    return size


def left_by(run_directory: Path, run_id: str, generation: int, *, sure: bool = False) -> list[Left]:
    """Return the snapshots of this run and generation that a dead process has left, newest first.

    `sure`: the caller holds the run's lock, so that no other training can own what belongs to it.
    Then a lock that another process has taken is waited for, and `RunLocked` raised where it stays
    taken: a snapshot passed over now would win over what was trained since, later.
    """
    found = []
    for each in remains():
        if not each.belongs_to(run_directory) or each.lock.in_this_process:
            continue
        if sure and any(_snapshots(each)):
            _await_free(each)
        elif each.lock.taken:
            continue
        for left in _snapshots(each):
            if (left.identity["run_id"], left.identity["generation"]) == (run_id, generation):
                found.append(left)
    return sorted(found, key=lambda left: left.order, reverse=True)


def _await_free(found: Remains) -> None:
    deadline = time.monotonic() + _PATIENCE
    while owner := found.lock.owner():
        if time.monotonic() >= deadline:
            raise RunLocked(
                "Snapshots of this run in shared memory ({path}) are in use by another process "
                "({owner}). Stop it and start again.",
                path=found.directory,
                owner=owner,
            )
        time.sleep(0.02)


def _snapshots(found: Remains) -> Iterator[Left]:
    for head in _listing(found.directory):
        line = _read_line(head) if head.suffix == ".head" else None
        if line is not None:
            identity = line["identity"]
            numbers = (identity.get("generation"), identity.get("step"), identity.get("sequence"))
            if all(type(number) is int for number in numbers) and "run_id" in identity:
                kept = line.get("kind", "temp") != "temp"  # earlier versions do not say
                version = line.get("holdfast")
                version = version if type(version) is int else _HEAD_VERSION
                yield Left(head.with_suffix(".pt"), identity, found, kept, version)


def sweep(run_directory: Path) -> None:
    """Remove directories of this run whose processes were killed before their first snapshot."""
    for each in remains():
        if each.belongs_to(run_directory) and newest_in(each) is None and not each.lock.taken:
            each.remove()


def newest_in(found: Remains) -> Left | None:
    """Return the newest whole snapshot in `found`, if there is one."""
    return max(_snapshots(found), key=lambda left: left.order, default=None)


def _read_line(head: Path) -> dict[str, Any] | None:
    """Return the line in a head; None if its slot holds no whole snapshot.

    Where the head itself is rotten, the manifest in the slot says the same. `OSError` as it comes:
    it says nothing about the slot. Raises `NewerFormat` where a later version has filled that.
    """
    try:
        text, _blank, digest = head.read_bytes()[:HEAD_SIZE].partition(b"\n")[0].rpartition(b" ")
        if not text.strip(b"\0"):  # as `begin` leaves it
            return None
        if xxhash.xxh3_128_hexdigest(text).encode() == digest:
            line = json.loads(text)
        else:
            line = {**read_manifest(head.with_suffix(".pt")), "sealed": True}
        return line if isinstance(line["identity"], dict) and line["sealed"] is True else None
    except (FileNotFoundError, *NONSENSE):
        return None
    except (DamagedCheckpoint, ForeignCheckpoint) as error:
        log.warning("%s: %s", head, error)
        return None


@contextlib.contextmanager
def opened(left: Left) -> Iterator[tuple[Mapping[str, Any], memoryview]]:
    """Open a snapshot: its manifest and its bytes, after every byte was verified.

    Raises `DamagedCheckpoint` where they are not what was written, or gone; `NewerFormat` where a
    later version wrote them; `OSError` as it comes.
    """
    if left.version > _HEAD_VERSION:
        raise newer_format(left.path, left.version)
    try:
        with Reader(left.path) as reader:
            reader.verify()
            manifest, size = reader.manifest, reader.size
    except FileNotFoundError as error:
        raise DamagedCheckpoint(str(error)) from error
    if manifest["identity"] != left.identity:
        why = _("it holds another checkpoint")
        raise DamagedCheckpoint("{path} is damaged: {why}.", path=left.path, why=why)
    with left.path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)  # reading a hole of a full tmpfs is a SIGBUS
        # Never closed by hand: views of it in the traceback of an error that is on its way would
        # make closing fail, with an error that hides the first. It goes with the last view.
        yield manifest, memoryview(mmap.mmap(file.fileno(), size))
