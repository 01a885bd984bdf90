"""From an image in memory to a checkpoint: written, named, announced, read back; then old ones go.

The order is the promise: durable, then announced, then verified, then pruned. Called from one
thread at a time.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.checkpoint.policy import Policy
from holdfast.checkpoint.records import Saved
from holdfast.checkpoint.rundir import (
    BEST,
    LATEST,
    MAIN,
    Catalog,
    Contents,
    Entry,
    Reporter,
    in_words,
    name_of,
    rollback,
    space,
    tidy,
)
from holdfast.checkpoint.rundir import summary as entry_of
from holdfast.checkpoint.system import Buffer, direct, filesystem
from holdfast.errors import CheckpointError, DamagedCheckpoint, HoldfastError

log = logging.getLogger("holdfast")

# Worth one more try with a new file; a failed fsync is never repeated on the same one, because the
# kernel may have dropped the dirty pages and would report success (FAULTS.md, 7).
_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.EBUSY, errno.ETIMEDOUT}
# No bytes, or no inodes, though there seemed to be room: somebody was faster, or there is a quota.
_REFUSED = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True, slots=True)
class Draft:
    """An image to publish: all of its bytes, or those that `ready` makes final on the way."""

    manifest: Mapping[str, Any]
    size: int
    pieces: Sequence[tuple[int, Buffer]]
    ready: direct.Ready | None = None

    @property
    def run_id(self) -> str:
        """The run that the checkpoint belongs to."""
        return str(self.manifest["identity"]["run_id"])


class Publisher:
    """Makes checkpoints of images in one run directory."""

    def __init__(
        self,
        catalog: Catalog,
        reporter: Reporter,
        keep: Sequence[Policy] = (),
        *,
        limit: float = 0,
        secure: Callable[[], None] | None = None,
        make_room: bool = False,
    ) -> None:
        """`keep` says what to keep; without any, nothing is removed, unless the disk is too full
        and `make_room` lets go of what the floor does not need. `limit`: bytes a second. `secure`
        raises where the run directory is no longer at its path; it is called before each write."""
        self._catalog, self._reporter, self._keep = catalog, reporter, keep
        self._limit, self._secure = limit, secure
        self._make_room = make_room or bool(keep)
        self._turn = threading.Lock()

    def publish(
        self,
        draft: Draft,
        *,
        asked: float,
        stall: float = 0.0,
        announced: Callable[[Saved], None] = lambda _saved: None,
    ) -> Saved:
        """Make `draft` a checkpoint; returns when it is durable, verified and old ones are gone.

        `announced` is called as soon as it is durable under all of its names. `asked` is when it
        was asked for (time.monotonic), `stall` the seconds that training has waited for it.
        Whatever goes wrong is tried once more with a new file where that may help.

        Raises `OSError` or `HoldfastError`; what was there before is then as it was.
        """
        with self._turn:
            for attempt in (1, 2):
                try:
                    return self._publish(draft, asked, stall, announced)
                except (DamagedCheckpoint, OSError) as error:
                    if attempt == 2 or not (is_transient(error) or self._made_room(error, draft)):
                        raise
        raise AssertionError("unreachable")

    def _publish(
        self, draft: Draft, asked: float, stall: float, announced: Callable[[Saved], None]
    ) -> Saved:
        catalog = self._catalog
        if self._secure is not None:
            self._secure()
        if self._make_room:
            self._tell_gone(space.make_room(catalog, draft.size, draft.run_id))
        space.check_space(catalog.directory, draft.size)
        contents = catalog.scan()
        entry = entry_of(draft.manifest, draft.size)
        name = name_of(entry)
        target = catalog.directory / name
        filesystem.make_directory(target.parent)
        kept = tidy.keep_old(catalog, target, name, contents)
        try:
            filesystem.write_file(
                target, draft.pieces, draft.size, ready=draft.ready, limit=self._limit
            )
        except BaseException:  # an interrupt, too
            if kept is not None and filesystem.same_data(kept, target):
                filesystem.remove(kept)  # what it is a second name of is where it was
            raise
        entry = replace(entry, names=(name,))
        best = contents.of(entry.run_id).best
        is_best = _improves(entry, best)
        # A rescue may make up for a checkpoint that is older than what lies here.
        newest = all(e.order < entry.order for e in contents.of(entry.run_id).entries)
        try:
            with catalog.lock():
                catalog.clear_roles(contents)
                how = {name: "file", **catalog.publish(entry, [LATEST, MAIN] if newest else [])}
                if is_best:
                    how |= catalog.publish(entry, [BEST])
        except OSError as error:
            if error.errno in _REFUSED and kept is None:  # what nobody was told takes no room
                filesystem.remove(target)
            raise
        saved = Saved(entry, target, time.monotonic() - asked, how, is_best,
                      best.loss if best else None, stall)  # fmt: skip
        self._reporter.record(
            "durable", id=entry.id, run_id=entry.run_id, generation=entry.generation,
            sequence=entry.sequence, step=entry.step, epoch=entry.epoch, kind=entry.kind,
            reason=entry.reason,
            size=entry.size, names=list(how), seconds=round(saved.seconds, 3),
            stall=round(stall, 4),
        )  # fmt: skip
        self._reporter.tell("durable", saved=saved)
        announced(saved)
        return self._verify(saved, contents, kept)

    def _verify(self, saved: Saved, before: Contents, kept: Path | None) -> Saved:
        """Read back what is announced; only then may anything that lay here before go.

        `kept` is the second name of what had the same name. Raises `DamagedCheckpoint`.
        """
        entry = saved.entry
        try:
            tidy.verify_back(entry, saved.path)
        except CheckpointError as error:
            self._take_back(entry, saved.path, kept, error.why)
            raise DamagedCheckpoint(str(error), error.why) from error
        except (OSError, MemoryError) as error:  # it stays what was announced; nothing older goes
            reason = in_words(error)
            self._reporter.report("unverified", id=entry.id, step=entry.step, reason=reason)
            return saved
        self._reporter.report("verified", id=entry.id, step=entry.step)
        self._let_go(entry, before, kept)
        return replace(saved, entry=replace(entry, verified=True))

    def _let_go(self, entry: Entry, before: Contents, kept: Path | None) -> None:
        """Let go what need not stay now that `entry` is verified: what had its name, what is of
        other runs, and what no policy keeps."""
        catalog = self._catalog
        try:
            if kept is not None:
                tidy.settle_old(catalog, entry, before, kept)
            if not all(earlier.verified for earlier in before.entries[:2]):
                self._verify_owed()
            if self._keep:
                others = tidy.archive_others(catalog, entry.run_id)
                if others is not None:
                    self._reporter.tell("archived", count=others[0], to=str(others[1]))
                tidy.prune(catalog, self._keep)
        except (OSError, HoldfastError) as error:  # what cannot go now goes after the next save
            log.warning("%s: %s", catalog.directory, error)

    def _verify_owed(self) -> None:
        """Read back what could not be when it was saved, because the system failed or the process
        was killed: the newest two, which the floor would count."""
        for entry in self._catalog.scan().entries[1:3]:
            path = self._catalog.path(entry)
            if entry.verified:
                continue
            try:
                reason = rollback.damage_of_all(self._catalog, entry)
            except (OSError, MemoryError):
                continue  # it was told when it was saved
            if reason is None:
                self._reporter.report("verified", id=entry.id, step=entry.step)
            else:
                self._take_back(entry, path, None, reason)

    def _take_back(self, entry: Entry, path: Path, kept: Path | None, reason: str) -> None:
        names = tidy.take_back(self._catalog, entry, path, kept, reason)
        self._reporter.tell("quarantined", names=names, reason=reason, step=entry.step)

    def _made_room(self, error: Exception, draft: Draft) -> bool:
        """Whether old checkpoints could go for one that the disk has refused."""
        if not self._make_room or not isinstance(error, OSError) or error.errno not in _REFUSED:
            return False
        gone = space.make_room(self._catalog, draft.size, draft.run_id, refused=True)
        self._tell_gone(gone)
        return bool(gone)

    def _tell_gone(self, gone: Sequence[Entry]) -> None:
        if gone:
            names = [entry.names[0] for entry in gone]
            self._reporter.tell("room_made", names=names, size=sum(entry.size for entry in gone))


def is_transient(error: Exception) -> bool:
    """Whether a new file may succeed where this one has failed: then it is tried, once."""
    if isinstance(error, OSError):
        return error.errno in _TRANSIENT
    return isinstance(error, DamagedCheckpoint)


def _improves(entry: Entry, best: Entry | None) -> bool:
    if entry.loss is None:
        return False
    return best is None or best.loss is None or entry.loss < best.loss
