"""List the checkpoints of a run directory, give them their names, move and remove them.

Only manifests are read (no torch). A checkpoint is known by its manifest, never by inode or clock,
so a directory that was copied without its links is understood as well. `metadata.json` is a cache
that can be thrown away: code that only shows may read it, code that decides must not. Code that
changes the directory holds `lock()`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from holdfast.checkpoint.format import NewerFormat, Reader, patiently, read_manifest
from holdfast.checkpoint.rundir.entries import (
    ARCHIVE,
    BEST,
    EVENTS,
    LATEST,
    MAIN,
    METADATA,
    NONSENSE,
    QUARANTINE,
    REPLACED,
    ROLES,
    TEMP,
    Contents,
    Entry,
    archive_of,
    name_of,
    sane,
    summary,
    telling,
)
from holdfast.checkpoint.rundir.history import Event, History, now
from holdfast.checkpoint.system import CATALOG_LOCK, FileLock, filesystem, run_lock
from holdfast.errors import CheckpointError, DamagedCheckpoint, ForeignCheckpoint
from holdfast.i18n import _

log = logging.getLogger("holdfast")

# metadata.json begins with a checksum of what stands behind "files".
_CACHE_HEAD, _CACHE_FILES = b'{\n"format_version": 2,\n"xxh3_128": ', b'"files": '


def in_words(error: BaseException) -> str:
    """Return the message of `error`, or its class where it has none."""
    return str(error) or type(error).__name__


class Catalog:
    """The checkpoints of one run directory."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.history = History(self.directory / EVENTS)
        self.run_lock = run_lock(directory)  # of a training, a clean or a roll-back
        self._read: dict[tuple[str, str], Entry] = {}  # what this object has read of the manifests

    def lock(self, wait: float = 30.0) -> FileLock:
        """Return the short lock to hold while the directory is changed; not the lock of the run."""
        return FileLock(self.directory / CATALOG_LOCK, wait=wait)

    def path(self, entry: Entry) -> Path:
        return self.directory / entry.names[0]

    # -------------------------------------------------------------------------------- looking

    def scan(self, *, cached: bool = False) -> Contents:
        """Return all checkpoints here, from their manifests; a file that cannot be read is named in
        the result and raises nothing.

        `cached` also believes metadata.json: to show a thousand checkpoints, never to decide what
        is removed, moved or gone on from.
        """
        read = {**self._read_cache(), **self._read} if cached else self._read
        seen: dict[tuple[str, str], Entry] = {}
        known = self.history.known
        found: dict[str, Entry] = {}
        names: dict[str, list[str]] = {}
        by_inode: dict[tuple[int, int], Entry] = {}
        damaged: list[tuple[str, str]] = []
        foreign: list[str] = []
        unreadable: list[tuple[str, str]] = []
        temporaries: list[str] = []
        for name, status in self._files():
            if not name.endswith(".pt"):
                temporaries.append(name)
                continue
            key = (status.st_dev, status.st_ino)
            try:
                stamp = (name, _stamp(status))
                entry = by_inode.get(key) or read.get(stamp)
                if entry is None:
                    # A disk that has failed once is not waited for again.
                    path, patient = self.directory / name, not unreadable
                    entry = summary(read_manifest(path, patient=patient), status.st_size)
            except DamagedCheckpoint as error:
                damaged.append((name, error.why))
            except NewerFormat as error:
                unreadable.append((name, str(error)))
            except ForeignCheckpoint:
                if name in known.names:  # it was ours, and no longer looks like it
                    damaged.append((name, _("something else has been written over it")))
                else:
                    foreign.append(name)
            except FileNotFoundError:
                continue  # the trainer has just replaced it
            except (OSError, MemoryError) as error:  # says nothing about the file
                unreadable.append((name, in_words(error)))
            else:
                by_inode[key] = seen[stamp] = entry
                found.setdefault(entry.id, entry)
                names.setdefault(entry.id, []).append(name)
        entries = [
            replace(
                entry,
                names=tuple(sorted(names[id_], key=telling)),
                verified=id_ in known.verified,
                pinned=id_ in known.pinned,
            )
            for id_, entry in found.items()
        ]
        entries.sort(key=lambda entry: entry.order, reverse=True)
        if not cached:
            self._read = seen
        return Contents(entries, damaged, foreign, unreadable, temporaries, known)

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield what may be a checkpoint or a writer's temporary file, with its status."""
        for prefix in ("", TEMP):
            place = os.path.join(self.directory, prefix)  # noqa: PTH118 - a Path for each of a
            try:  # thousand files takes longer than looking at them
                listing = sorted(patiently(partial(os.listdir, place)))
            except (FileNotFoundError, NotADirectoryError):
                continue
            for item in listing:
                if item.endswith(".pt") or filesystem.is_temporary(item):
                    with contextlib.suppress(FileNotFoundError):  # replaced or pruned just now
                        found = os.lstat(os.path.join(place, item))  # noqa: PTH118
                        if stat.S_ISREG(found.st_mode):
                            yield f"{prefix}/{item}" if prefix else item, found

    # -------------------------------------------------------------------------------- history

    def record(self, event: str, **fields: Any) -> None:
        """Append one line to the history, durably."""
        self.history.record(event, **fields)

    def events(self, *kinds: str) -> Iterator[Event]:
        """Yield the whole history, or its events of some kinds, oldest first."""
        return self.history.events(*kinds)

    def _note(self, event: str, **fields: Any) -> bool:
        """Record an act that a full disk must not prevent. Return False if there was no room for
        the line."""
        try:
            self.record(event, **fields)
        except OSError as error:
            log.warning("%s: %s", EVENTS, error)
            return False
        return True

    # -------------------------------------------------------------------------------- changing

    def assign_roles(self, contents: Contents) -> Contents:
        """Point latest, main and best at the checkpoints they stand for, also after a crash in the
        middle of this. Return what lies here then."""
        changed = self.clear_roles(contents)
        newest = contents.newest
        if newest is not None:
            self.publish(newest, (LATEST, MAIN))
            changed = changed or not {LATEST, MAIN}.issubset(newest.names)
            best = contents.of(newest.run_id).best
            if best is not None:
                self.publish(best, (BEST,))
                changed = changed or BEST not in best.names
        return self.scan() if changed else contents

    def give_name(self, source: Path, entry: Entry) -> Path:
        """Give `entry`, which lies at `source`, a name of its own here, without replacing anything.
        Return the path."""
        own = self.directory / name_of(entry)
        free = own.with_name(f"{own.stem}-{entry.id[:8]}.pt") if own.exists() else own
        filesystem.make_directory(free.parent)
        filesystem.publish(source, free)
        filesystem.sync_directory(free.parent)
        return free

    def publish(self, entry: Entry, names: Sequence[str]) -> dict[str, str]:
        """Let `names` stand for `entry`; return how ("link", "reflink", "copy") for each.

        Without hard links a temporary checkpoint is published as latest.pt only: copies of the
        whole state every few minutes would cost more than the name is worth.
        """
        source = self.directory / entry.names[0]
        how: dict[str, str] = {}
        for name in names:
            target = self.directory / name
            if target == source or filesystem.same_data(source, target):
                how[name] = "link"
                continue
            if name in entry.names:
                how[name] = _rejoin(source, target)
                continue
            how[name] = filesystem.publish(source, target)
            if how[name] == "copy" and entry.kind == "temp":
                break
        filesystem.sync_directory(self.directory)
        return how

    def delete(self, entry: Entry, why: str) -> None:
        """Remove a checkpoint under all names. The caller has decided that it may go."""
        fields = {"id": entry.id, "step": entry.step, "names": list(entry.names), "reason": why}
        noted = self._note("removed", **fields)
        for name in entry.names:
            filesystem.remove(self.directory / name)
        for parent in {(self.directory / name).parent for name in entry.names}:
            filesystem.sync_directory(parent)
        if not noted:  # the disk was full: now there is room for the line
            self._note("removed", **fields)

    def quarantine(self, names: Iterable[str], reason: str) -> list[str]:
        """Move damaged files to `quarantine/` with every name of the same inode, and write the
        reason beside them. Return the names."""
        wanted = [self.directory / name for name in names if (self.directory / name).exists()]
        every = [name for name, _stat in self._files() if name.endswith(".pt")]
        same = [
            n for n in every if any(filesystem.same_data(self.directory / n, w) for w in wanted)
        ]
        place = self.directory / QUARANTINE
        for name in same:
            filesystem.move(self.directory / name, place / name)
        if same:
            with contextlib.suppress(OSError):  # a full disk: the history says it as well
                line = f"{now()} {', '.join(same)}: {reason}"
                filesystem.append_line(place / "reasons.txt", line)
            self._note("quarantined", names=same, reason=reason)
        return same

    def clear_roles(self, contents: Contents) -> bool:
        """Move away what bears the name of a role and is no checkpoint of ours, because it is
        damaged or another program's: nothing is overwritten unseen. What cannot be read now stays a
        candidate: it keeps another name, or is given one, as a checkpoint is that has no other.
        Return True if a file was moved or got a name."""
        moved = False
        for name, reason in contents.damaged:
            if name in ROLES:
                moved = bool(self.quarantine([name], reason)) or moved
        for name in contents.foreign:
            if name in ROLES:
                self.replace(name)
                moved = True
        unreadable = [name for name, _why in contents.unreadable]
        for name in unreadable:
            path = self.directory / name
            others = (self.directory / other for other in unreadable if other not in ROLES)
            if name in ROLES and not any(filesystem.same_data(path, other) for other in others):
                filesystem.move(path, path.with_name(f"unread_{name}"))
                moved = True
        for entry in contents.entries:
            if all(name in ROLES for name in entry.names):
                # Its own name is gone, and the next save takes the others away from it.
                self.give_name(self.directory / entry.names[0], entry)
                moved = True
        return moved

    def replace(self, name: str) -> Path:
        """Move the file called `name` to `archive/replaced/`; return its new path."""
        place = filesystem.move(self.directory / name, self.directory / ARCHIVE / REPLACED / name)
        self._note("archived", names=[name], to=f"{ARCHIVE}/{REPLACED}")
        return place

    def archive(self, entries: Sequence[Entry], generation: int) -> Path:
        """Move checkpoints to `archive/`, where recovery does not look, into a folder of their run
        and of `generation`, the one that ends with them. Return the folder of the newest."""
        for entry in entries:
            label = archive_of(entry, generation)
            place = self.directory / label
            for name in entry.names:
                with contextlib.suppress(FileNotFoundError):  # a damaged copy of it is gone already
                    filesystem.move(self.directory / name, place / name)
            self._note(
                "archived",
                id=entry.id,
                step=entry.step,
                generation=entry.generation,
                names=list(entry.names),
                to=label,
            )
        return self.directory / archive_of(entries[0], generation)

    # -------------------------------------------------------------------------------- the cache

    def write_cache(self, contents: Contents | None = None) -> None:
        """Write metadata.json anew, which spares `holdfast list` reading a thousand manifests."""
        contents = contents or self.scan()
        files = {}
        for entry in contents.entries:
            marks = ("names", "verified", "pinned")
            fields = {k: v for k, v in asdict(entry).items() if k not in marks}
            for name in entry.names:
                with contextlib.suppress(FileNotFoundError):
                    stamp = _stamp((self.directory / name).stat())
                    files[name] = {"stamp": stamp, **fields}
        text = json.dumps(files, ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass")
        data = b"%s%s,\n%s%s\n}\n" % (_CACHE_HEAD, _digest(text), _CACHE_FILES, text)
        try:
            filesystem.write_file(self.directory / METADATA, [(0, data)], len(data), mode=0o644)
        except OSError as error:  # it is only a cache
            log.warning("%s: %s", METADATA, error)

    def _read_cache(self) -> Mapping[tuple[str, str], Entry]:
        """Return the entries in metadata.json; none where a byte of it has changed."""
        try:
            data = filesystem.read_small(self.directory / METADATA)
            head, found, rest = data.partition(b",\n" + _CACHE_FILES)
            text = rest.removesuffix(b"\n}\n")
            if not found or head != _CACHE_HEAD + _digest(text):
                return {}
            files = json.loads(text.decode("utf-8", "surrogatepass"))
            return {
                (name, entry.pop("stamp")): sane(Entry(**entry)) for name, entry in files.items()
            }
        except (OSError, *NONSENSE):
            return {}  # it is only a cache


def _rejoin(source: Path, target: Path) -> str:
    """Make `target`, a copy of the checkpoint `source`, a link to it again, where links work.

    Only an intact `source` may replace the copy: one of the two may be damaged.
    """
    try:
        with Reader(source) as reader:
            reader.verify()
    except (CheckpointError, OSError):
        return "copy"
    return filesystem.publish(source, target, copy=False) or "copy"


def _digest(text: bytes) -> bytes:
    return b'"%s"' % xxhash.xxh3_128_hexdigest(text).encode()


def _stamp(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}"
