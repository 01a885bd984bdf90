"""A file system on paper: what recorded calls have made, and what a power cut may leave of it.

The rules are those of POSIX where it promises little, and so pessimistic on purpose; they are the
weakest of the models in Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014), plus
what journaled file systems (ext4, XFS, Btrfs) all give: an atomic rename and no foreign data.

- *Data.* Since the last fsync of a file, each of its blocks (or, torn, each of its sectors) may be
  on the disk as any of the writes since has left it, or as it was before. Its size is one of those
  that it has had; what is inside the size and was never written are zeros. Direct writes are no
  more durable than others: they wait in the drive's cache. fsync makes data and size durable, not
  the name (ext4 would write a new file's name as well: nobody may count on that).
- *Names.* A change of names (create, link, rename, unlink, mkdir) is atomic and touches one or two
  slots, each a name in a directory. Changes of one slot reach the disk in their order; changes of
  different slots, even of one directory, in any. fsync of a directory makes all changes of its
  slots durable, and those that they follow. The one order of a journal (ext4 "ordered") and an
  order for each directory are special cases of this.
- A file exists while a name leads to it; a directory's names, while the directory does.

Modes and times are taken as they stand: nothing that is judged here hangs on them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import random
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.prove.recorder import Call

SECTOR, BLOCK = 512, 4096  # bytes: what a drive writes whole, and what a file system does
_EXHAUSTIVE = 6  # pending changes up to which every legal set of them is tried
_AGO = 3600.0  # seconds since the first call, in the times of the files that are built
_TORN = 6  # random mixtures of blocks for each file with pending data


@dataclass(eq=False, slots=True)
class Inode:
    """A file, or a directory (without versions)."""

    mode: int
    versions: list[bytes] = field(default_factory=list)  # durable, then after each call since
    parts: list[bytes] = field(default_factory=list)  # what else may be on the disk, once asked for
    changed: int = 0  # the number of the call that changed its data last; 0: none

    @property
    def is_directory(self) -> bool:
        return not self.versions


Slot = tuple[Inode, str]  # a name in a directory
Names = Mapping[Slot, Inode]


@dataclass(eq=False, slots=True)
class Change:
    """One atomic change of names: what each slot holds afterwards (None: nothing)."""

    slots: dict[Slot, Inode | None]
    follows: list[Change] = field(default_factory=list)  # pending ones that must be there before


@dataclass(frozen=True, slots=True)
class State:
    """What lies in a directory: the content of each inode, under its paths."""

    directories: tuple[str, ...]
    files: tuple[tuple[tuple[str, ...], bytes, int], ...]  # paths of one inode, content, mode
    order: tuple[int, ...] = ()  # of each file, when it was written: a script may ask for that

    @property
    def digest(self) -> bytes:
        """Names, links and bytes."""
        files = ((paths, _digest(content)) for paths, content, _mode in self.files)
        return _digest(repr((self.directories, sorted(files))).encode())

    def build(self, place: Path) -> None:
        """Make it in the empty directory `place`."""
        for path in self.directories:
            (place / path).mkdir()
        start = time.time() - _AGO
        for (paths, content, mode), when in zip(self.files, self.order, strict=True):
            first = place / paths[0]
            first.write_bytes(content)
            first.chmod(mode)
            os.utime(first, (start + when / 1000, start + when / 1000))
            for path in paths[1:]:
                (place / path).hardlink_to(first)


class Disk:
    """The live file system that the calls have made, and how much of it is durable."""

    def __init__(self) -> None:
        self.root = Inode(0o700)
        self.durable: dict[Slot, Inode] = {}
        self.live: dict[Slot, Inode] = {}
        self.pending: list[Change] = []
        self._by_number: dict[int, Inode] = {}  # of the recorded file system
        self._calls = 0  # that have changed data

    @classmethod
    def read(cls, directory: Path) -> Disk:
        """What lies in `directory`, all of it durable; symbolic links are left out."""
        disk = cls()
        seen: dict[int, Inode] = {}

        def enter(place: Path, parent: Inode) -> None:
            for path in sorted(place.iterdir()):
                found = path.lstat()
                inode = Inode(stat.S_IMODE(found.st_mode))
                if path.is_symlink():
                    continue
                if path.is_dir():
                    enter(path, inode)
                else:
                    inode = seen.setdefault(found.st_ino, inode)
                    inode.versions = inode.versions or [path.read_bytes()]
                disk.durable[parent, path.name] = inode

        enter(directory, disk.root)
        disk.live = dict(disk.durable)
        return disk

    # ----------------------------------------------------------------------------------- the calls

    def apply(self, call: Call, root: str) -> None:
        """Replay one recorded call below the directory `root`."""
        path = os.path.relpath(call.path, root)
        other = os.path.relpath(call.other, root) if call.other else ""
        match call.name:
            case "open" | "truncating":
                self.open(path, call.inode, truncate=call.name == "truncating")
            case "write":
                self.write(self._file(call, path), call.offset, call.data)
            case "ftruncate":
                self.resize(self._file(call, path), call.offset)
            case "fallocate":
                inode = self._file(call, path)
                self.resize(inode, max(call.offset, len(inode.versions[-1])))
            case "fchmod":
                self._file(call, path).mode = call.offset
            case "fsync":
                self.sync(self._file(call, path))
            case "mkdir":
                self.change({self.slot(path): Inode(0o755)})
            case "unlink" | "rmdir":
                self.change({self.slot(path): None})
            case "link":
                self.change({self.slot(other): self.find(path)})
            case "rename":
                self.rename(path, other)
            case "chmod":
                pass
            case _:
                raise ValueError(f"a call that this file system does not know: {call.name}")

    def slot(self, path: str) -> Slot:
        parent, name = os.path.split(path)
        return self.find(parent), name

    def find(self, path: str) -> Inode:
        inode = self.root
        for part in Path(path).parts:
            inode = self.live[inode, part]
        return inode

    def open(self, path: str, number: int = 0, *, truncate: bool = False) -> Inode:
        """Create a file, or find it; `number` is what the recorded file system calls it."""
        slot = self.slot(path)
        if slot not in self.live:
            self.change({slot: Inode(0o644, [b""])})
        inode = self.live[slot]
        self._by_number[number] = inode
        if truncate:
            self.resize(inode, 0)
        return inode

    def write(self, inode: Inode, offset: int, data: bytes) -> None:
        before = inode.versions[-1].ljust(offset, b"\0")
        self._now(inode, before[:offset] + data + before[offset + len(data) :])

    def resize(self, inode: Inode, size: int) -> None:
        self._now(inode, inode.versions[-1][:size].ljust(size, b"\0"))

    def rename(self, path: str, to: str) -> None:
        inode = self.find(path)
        if self.live.get(self.slot(to)) is not inode:  # of two links to one file it does nothing
            self.change({self.slot(path): None, self.slot(to): inode})

    def change(self, slots: dict[Slot, Inode | None]) -> None:
        """Change names; the change follows the pending ones of the same slots."""
        follows = [before for before in self.pending if not slots.keys().isdisjoint(before.slots)]
        self.pending.append(Change(slots, follows))
        _set(self.live, slots)

    def sync(self, inode: Inode) -> None:
        """fsync: of a file its data and size, of a directory the names in it."""
        if not inode.is_directory:
            inode.versions, inode.parts = inode.versions[-1:], []
            return
        here = [change for change in self.pending if any(slot[0] is inode for slot in change.slots)]
        done = _with_what_they_follow(here)
        for change in self.pending:
            if change in done:
                _set(self.durable, change.slots)
        self.pending = [change for change in self.pending if change not in done]
        for change in self.pending:
            change.follows = [earlier for earlier in change.follows if earlier not in done]

    def settle(self) -> None:
        """Make everything durable, as time does."""
        for inode in self._reachable():
            self.sync(inode)
        self.durable, self.pending = dict(self.live), []

    def _file(self, call: Call, path: str) -> Inode:
        try:
            return self.find(path)
        except KeyError:  # it is open and has no name any more
            return self._by_number[call.inode]

    def _now(self, inode: Inode, content: bytes) -> None:
        self._calls += 1
        inode.changed = self._calls
        if content != inode.versions[-1]:
            inode.versions.append(content)
            inode.parts = []

    # ------------------------------------------------------------------------- what a cut may leave

    def state(
        self, changes: Collection[Change] = (), data: Mapping[Inode, bytes] | None = None
    ) -> State:
        """The state with these pending changes of names on the disk, and these contents (else the
        durable ones)."""
        names = dict(self.durable)
        for change in self.pending:
            if change in changes:
                _set(names, change.slots)
        return _state(self.root, names, lambda inode: (data or {}).get(inode, inode.versions[0]))

    def now(self) -> State:
        """What a process sees."""
        return _state(self.root, self.live, lambda inode: inode.versions[-1])

    def states(self, rng: random.Random, more: int) -> Iterator[State]:
        """Legal states after a cut now, the telling ones first: nothing of what is pending is on
        the disk, all of it, only names, only data; every legal set of changes where they are few,
        else each one missing, each one alone and each prefix of them; each file with pending data
        in parts; then `more` random ones. A state may come twice."""
        files = [inode for inode in self._reachable() if len(inode.versions) > 1]
        old: dict[Inode, bytes] = {}
        new = {inode: inode.versions[-1] for inode in files}
        zeros = {inode: _unwritten(inode) for inode in files}
        for inode in files:
            inode.parts = inode.parts or _parts(inode, rng)
        everything = list(self.pending)
        for changes, data in itertools.product(([], everything), (old, new, zeros)):
            yield self.state(changes, data)
        for inode in files:
            yield from (self.state(everything, {**new, inode: part}) for part in inode.parts)
        for legal in self.sets():
            yield from (self.state(legal, data) for data in (new, old, zeros))
        for _ in range(more):
            mixed = {i: rng.choice([*i.parts, *i.versions, zeros[i]]) for i in files}
            yield self.state(self.random_set(rng), mixed)

    def _reachable(self) -> Iterable[Inode]:
        """Files that some state may show."""
        later = (inode for change in self.pending for inode in change.slots.values())
        return dict.fromkeys(i for i in (*self.durable.values(), *later) if i and i.versions)

    def sets(self) -> Iterator[Sequence[Change]]:
        pending = self.pending
        if len(pending) <= _EXHAUSTIVE:
            for count in range(len(pending) + 1):
                for some in itertools.combinations(pending, count):
                    if _is_legal(some):
                        yield some
            return
        for change in pending:
            yield _without(pending, change)
            yield _with_what_they_follow([change])
        for count in range(1, len(pending)):
            yield pending[:count]
        for directory in dict.fromkeys(slot[0] for change in pending for slot in change.slots):
            yield _with_what_they_follow(
                [change for change in pending if any(s[0] is directory for s in change.slots)]
            )

    def random_set(self, rng: random.Random) -> list[Change]:
        likely = rng.choice((0.2, 0.5, 0.8))
        chosen: list[Change] = []
        for change in self.pending:
            if rng.random() < likely and all(earlier in chosen for earlier in change.follows):
                chosen.append(change)
        return chosen


# ------------------------------------------------------------------------------------- the details


def _set(names: dict[Slot, Inode], slots: Mapping[Slot, Inode | None]) -> None:
    for slot, inode in slots.items():
        if inode is None:
            names.pop(slot, None)
        else:
            names[slot] = inode


def _is_legal(changes: Collection[Change]) -> bool:
    return all(earlier in changes for change in changes for earlier in change.follows)


def _with_what_they_follow(changes: Iterable[Change]) -> list[Change]:
    found: list[Change] = []
    waiting = list(changes)
    while waiting:
        change = waiting.pop()
        if change not in found:
            found.append(change)
            waiting += change.follows
    return found


def _without(pending: Sequence[Change], missing: Change) -> list[Change]:
    """All but one, and but those that follow it."""
    gone = [missing]
    for change in pending:
        if any(earlier in gone for earlier in change.follows):
            gone.append(change)
    return [change for change in pending if change not in gone]


def _state(root: Inode, names: Names, content: Callable[[Inode], bytes]) -> State:
    inside: dict[Inode, list[tuple[str, Inode]]] = {}
    for (parent, name), inode in names.items():
        inside.setdefault(parent, []).append((name, inode))
    directories: list[str] = []
    paths: dict[Inode, list[str]] = {}

    def enter(parent: Inode, prefix: str) -> None:
        for name, inode in sorted(inside.get(parent, []), key=lambda item: item[0]):
            if inode.is_directory:
                directories.append(prefix + name)
                enter(inode, f"{prefix}{name}/")
            else:
                paths.setdefault(inode, []).append(prefix + name)

    enter(root, "")
    files = [(tuple(where), content(inode), inode.mode) for inode, where in paths.items()]
    return State(tuple(directories), tuple(files), tuple(inode.changed for inode in paths))


def _unwritten(inode: Inode) -> bytes:
    """The size is on the disk and none of the data."""
    old, new = inode.versions[0], inode.versions[-1]
    return old[: len(new)].ljust(len(new), b"\0")


def _parts(inode: Inode, rng: random.Random) -> list[bytes]:
    """Contents of a file with pending data of which parts are on the disk."""
    new = inode.versions[-1]
    last = max(0, len(new) - 1) // BLOCK
    torn = _torn(inode)
    found = [
        *inode.versions[1:-1],
        mix(inode, BLOCK, lambda at: -1 if at else 0),  # the first block is missing
        mix(inode, BLOCK, lambda at: 0 if at == last else -1),  # the last one is
        mix(inode, BLOCK, lambda at: -1 if at <= last // 2 else 0),
        mix(inode, SECTOR, lambda at: -1 if at < torn else 0),
    ]
    count = len(inode.versions)
    for number in range(_TORN):
        grain = SECTOR if number % 2 else BLOCK
        pieces = -(-len(new) // grain)
        chances = [rng.randrange(count) for _piece in range(pieces)]
        found.append(mix(inode, grain, chances.__getitem__))
    return list(dict.fromkeys(found))


def _torn(inode: Inode) -> int:
    """The sector in the middle of what the last call has changed."""
    before, after = inode.versions[-2:]
    pieces = range(0, len(after), SECTOR)
    changed = [at for at in pieces if before[at : at + SECTOR] != after[at : at + SECTOR]]
    return changed[len(changed) // 2] // SECTOR if changed else 0


def mix(inode: Inode, grain: int, pick: Callable[[int], int]) -> bytes:
    """The newest size, and each piece of `grain` bytes as the version `pick(number)` has it; zeros
    where that one was shorter."""
    pieces = []
    for at in range(-(-len(inode.versions[-1]) // grain)):
        start, end = at * grain, min((at + 1) * grain, len(inode.versions[-1]))
        pieces.append(inode.versions[pick(at)][start:end].ljust(end - start, b"\0"))
    return b"".join(pieces)


@functools.lru_cache(maxsize=4096)
def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
