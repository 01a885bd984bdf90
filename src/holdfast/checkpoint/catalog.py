"""What lies in a run directory: which file is which checkpoint, the newest, the best, the history.

Reads manifests only (no torch): identity is the manifest's, never the inode's or the clock's, so a
directory copied without its links is understood as well. `events.jsonl` is the history and only
grows; `metadata.json` is a cache that can be thrown away. Whatever changes the catalogue holds
`lock()`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.checkpoint import filesystem
from holdfast.checkpoint.container import read_manifest
from holdfast.checkpoint.lock import FileLock
from holdfast.checkpoint.retention import Candidate, KeepBest
from holdfast.errors import DamagedCheckpoint, ForeignCheckpoint

LATEST, MAIN, BEST = "latest.pt", "model.pt", "best_model.pt"
ROLES = (BEST, LATEST, MAIN)  # names that move from checkpoint to checkpoint
TEMP, QUARANTINE, ARCHIVE = "temp", "quarantine", "archive"
EVENTS, METADATA = "events.jsonl", "metadata.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint under all of its names; `names` are relative, the telling one first."""

    id: str
    run_id: str
    generation: int
    step: int
    sequence: int
    kind: str  # "epoch", "step", "best" or "temp"
    reason: str
    epoch: int | None
    created: str  # ISO 8601 with the zone
    size: int
    loss: float | None  # decides which is best; lower is better
    metrics: dict[str, Any] = field(default_factory=dict)
    parent: dict[str, Any] | None = None
    names: tuple[str, ...] = ()
    verified: bool = False

    @property
    def order(self) -> tuple[int, int, int]:
        """Newer is greater. Clocks and mtimes decide nothing."""
        return (self.generation, self.step, self.sequence)

    def candidate(self) -> Candidate:
        return Candidate(self.id, self.order, self.kind, self.loss, self.verified)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a scan found; `entries` newest first."""

    entries: list[Entry]
    damaged: list[tuple[str, str]]  # name and reason
    foreign: list[str]

    @property
    def newest(self) -> Entry | None:
        return self.entries[0] if self.entries else None

    @property
    def best(self) -> Entry | None:
        mask = KeepBest(1)([entry.candidate() for entry in self.entries])
        return next((e for e, chosen in zip(self.entries, mask, strict=True) if chosen), None)


def now() -> str:
    """The local time with its zone, ISO 8601."""
    return datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")


class Catalog:
    """The checkpoints of one run directory."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def lock(self, wait: float = 30.0) -> FileLock:
        """The short lock of whoever changes the catalogue; not the lock of the run."""
        return FileLock(self.directory / ".catalog.lock", wait=wait)

    def path(self, entry: Entry) -> Path:
        return self.directory / entry.names[0]

    # -------------------------------------------------------------------------------- looking

    def scan(self) -> Contents:
        """All checkpoints here, from their manifests; what cannot be read is named, not raised."""
        cache = self._read_cache()
        verified = self.verified_ids()
        found: dict[str, Entry] = {}
        names: dict[str, list[str]] = {}
        by_inode: dict[tuple[int, int], Entry] = {}
        damaged: list[tuple[str, str]] = []
        foreign: list[str] = []
        for name, stat in self._files():
            key = (stat.st_dev, stat.st_ino)
            try:
                entry = by_inode.get(key) or cache.get((name, _stamp(stat)))
                entry = entry or summary(read_manifest(self.directory / name), stat.st_size)
            except DamagedCheckpoint as error:
                damaged.append((name, str(error)))
            except ForeignCheckpoint:
                foreign.append(name)
            except FileNotFoundError:
                continue  # the trainer has just replaced it
            except OSError as error:
                damaged.append((name, str(error)))
            else:
                by_inode[key] = entry
                found.setdefault(entry.id, entry)
                names.setdefault(entry.id, []).append(name)
        entries = [
            replace(entry, names=tuple(sorted(names[id_], key=_telling)), verified=id_ in verified)
            for id_, entry in found.items()
        ]
        entries.sort(key=lambda entry: entry.order, reverse=True)
        return Contents(entries, damaged, foreign)

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        for prefix in ("", TEMP):
            with contextlib.suppress(FileNotFoundError), os.scandir(self.directory / prefix) as it:
                for item in sorted(it, key=lambda item: item.name):
                    if item.name.endswith(".pt") and item.is_file(follow_symlinks=False):
                        yield (f"{prefix}/{item.name}" if prefix else item.name), item.stat()

    def generation(self) -> int:
        """The highest generation that was ever begun here; 0 where there is no run yet."""
        begun = (event.get("generation", 0) for event in self.events())
        present = (entry.generation for entry in self.scan().entries)
        return max((*begun, *present), default=0)

    # -------------------------------------------------------------------------------- history

    def record(self, event: str, **fields: Any) -> None:
        """Append one line to the history, durably."""
        line = json.dumps({"time": now(), "event": event, **fields}, ensure_ascii=False)
        filesystem.append_line(self.directory / EVENTS, line)

    def events(self) -> Iterator[dict[str, Any]]:
        """The history, oldest first; a line that a crash has torn is passed over."""
        try:
            text = (self.directory / EVENTS).read_text("utf-8", "surrogateescape")
        except FileNotFoundError:
            return
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event

    def verified_ids(self) -> set[str]:
        """Which checkpoints have been read back from the device and found right."""
        events = (event for event in self.events() if event.get("event") == "verified")
        return {event.get("id", "") for event in events}

    # -------------------------------------------------------------------------------- changing

    def assign_roles(self, contents: Contents) -> None:
        """Point latest, main and best at what they should mean; repairs what a crash left."""
        newest = contents.newest
        if newest is not None:
            self.publish(newest, (LATEST, MAIN))
        if contents.best is not None:
            self.publish(contents.best, (BEST,))

    def publish(self, entry: Entry, names: Sequence[str]) -> dict[str, str]:
        """Let `names` stand for `entry`; returns how ("link", "reflink", "copy") for each.

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
            how[name] = filesystem.publish(source, target)
            if how[name] == "copy" and entry.kind == "temp":
                break
        filesystem.sync_directory(self.directory)
        return how

    def delete(self, entry: Entry, why: str) -> None:
        """Remove a checkpoint under all names. Whether it may go was decided by retention."""
        self.record("removed", id=entry.id, step=entry.step, names=list(entry.names), reason=why)
        for name in entry.names:
            filesystem.remove(self.directory / name)
        for parent in {(self.directory / name).parent for name in entry.names}:
            filesystem.sync_directory(parent)

    def quarantine(self, names: Iterable[str], reason: str) -> list[str]:
        """Set damaged files aside, with every name of the same inode and the reason beside them."""
        wanted = [self.directory / name for name in names]
        every = [name for name, _stat in self._files()]
        same = [
            n for n in every if any(filesystem.same_data(self.directory / n, w) for w in wanted)
        ]
        place = self.directory / QUARANTINE
        for name in same:
            filesystem.move(self.directory / name, place / name)
        filesystem.append_line(place / "reasons.txt", f"{now()} {', '.join(same)}: {reason}")
        self.record("quarantined", names=same, reason=reason)
        return same

    def archive(self, entries: Iterable[Entry], label: str) -> Path:
        """Move checkpoints out of the way of recovery; they are kept, under `archive/label`."""
        place = self.directory / ARCHIVE / label
        for entry in entries:
            for name in entry.names:
                filesystem.move(self.directory / name, place / name)
            self.record("archived", id=entry.id, step=entry.step, generation=entry.generation,
                        names=list(entry.names), to=f"{ARCHIVE}/{label}")  # fmt: skip
        return place

    # -------------------------------------------------------------------------------- the cache

    def write_cache(self, contents: Contents | None = None) -> None:
        """Write metadata.json anew; reading it spares `holdfast list` a thousand manifests."""
        contents = contents or self.scan()
        files = {}
        for entry in contents.entries:
            fields = {k: v for k, v in asdict(entry).items() if k not in ("names", "verified")}
            for name in entry.names:
                with contextlib.suppress(FileNotFoundError):
                    stamp = _stamp((self.directory / name).stat())
                    files[name] = {"stamp": stamp, **fields}
        filesystem.write_json(self.directory / METADATA, {"format_version": 1, "files": files})

    def _read_cache(self) -> Mapping[tuple[str, str], Entry]:
        try:
            files = json.loads((self.directory / METADATA).read_text("utf-8"))["files"]
            return {(name, entry.pop("stamp")): Entry(**entry) for name, entry in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # it is only a cache


def summary(manifest: Mapping[str, Any], size: int) -> Entry:
    """The entry that a manifest describes. Raises `ForeignCheckpoint` where it says too little."""
    try:
        identity, score = manifest["identity"], manifest.get("score") or {}
        value = score.get("value")
        loss = None if value is None else (value if score["lower_is_better"] else -value)
        return Entry(
            id=identity["id"],
            run_id=identity["run_id"],
            generation=identity["generation"],
            step=identity["step"],
            sequence=identity["sequence"],
            parent=identity["parent"],
            kind=manifest["kind"],
            reason=manifest["reason"],
            epoch=manifest["epoch"],
            created=manifest["created"],
            metrics=manifest["metrics"],
            size=size,
            loss=loss,
        )
    except (KeyError, TypeError) as error:
        raise ForeignCheckpoint(str(error)) from error


def _stamp(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"


def _telling(name: str) -> tuple[bool, str]:
    return name in ROLES, name
