"""From an image in memory to a checkpoint: written, named, announced, read back; then old ones go.

The order is the promise: durable, then announced, then verified, then pruned. Called from one
thread at a time.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from holdfast.checkpoint.records import Save, Saved
from holdfast.checkpoint.rundir import (
    BEST,
    LATEST,
    MAIN,
    Contents,
    Entry,
    in_words,
    name_of,
    rollback,
    space,
    summary,
    tidy,
)
from holdfast.checkpoint.save.ledger import Ledger, is_transient
from holdfast.checkpoint.save.options import Options
from holdfast.checkpoint.system import filesystem
from holdfast.errors import CheckpointError, DamagedCheckpoint, HoldfastError

log = logging.getLogger("holdfast")

# No bytes, or no inodes, though there seemed to be room: another writer was faster, or a quota.
_REFUSED = {errno.ENOSPC, errno.EDQUOT}


class Publisher:
    """Makes checkpoints of saves in one run directory."""

    def __init__(self, ledger: Ledger, options: Options) -> None:
        self.ledger = ledger
        self._catalog, self._reporter = ledger.catalog, ledger.reporter
        self._retention, self._limit = options.keep, options.io_limit
        self._make_room = options.make_room or bool(options.keep)

    def publish(self, save: Save) -> Saved:
        """Make a checkpoint of `save.ranges`; return when it is durable, verified and old ones are
        gone. The ledger is told as soon as it is durable under all of its names.

        Whatever goes wrong is tried once more with a new file where that may help. Raises `OSError`
        or `HoldfastError`; what was there before is then as it was.
        """
        for attempt in (1, 2):
            try:
                return self._publish(save)
            except (DamagedCheckpoint, OSError) as error:
                if attempt == 2 or not (is_transient(error) or self._made_room(error, save)):
                    raise
        raise AssertionError("unreachable")

    def _publish(self, save: Save) -> Saved:
        catalog = self._catalog
        if self._make_room:
            self._tell_gone(space.make_room(catalog, save.size, _run_id(save)))
        space.check_space(catalog.directory, save.size)
        contents = catalog.scan()
        entry = summary(save.manifest, save.size)
        entry = replace(entry, names=(name_of(entry),))
        target = catalog.path(entry)
        old = self._write(save, target, contents)
        how = self._name(entry, contents, target if old is None else None)
        best = contents.of(entry.run_id).best
        saved = Saved(
            entry=entry,
            path=target,
            seconds=time.monotonic() - save.asked,
            names=how,
            is_best=_improves(entry, best),
            previous_best=best.loss if best else None,
            stall=save.stall,
        )
        self._announce(saved)
        self.ledger.durable(save, saved)
        return self._verify(saved, contents, old)

    def _write(self, save: Save, target: Path, contents: Contents) -> Path | None:
        """Write the file. Return the second name of what had its name, which stays until this one
        is verified."""
        filesystem.make_directory(target.parent)
        name = target.relative_to(self._catalog.directory).as_posix()
        old = tidy.keep_old(self._catalog, target, name, contents)
        try:
            filesystem.write_file(
                target, save.ranges, save.size, ready=save.ready, limit=self._limit
            )
        except BaseException:  # an interrupt, too
            if old is not None and filesystem.same_data(old, target):
                # The target still has its old data, so the saved second name is not needed.
                filesystem.remove(old)
            raise
        return old

    def _name(self, entry: Entry, contents: Contents, new: Path | None) -> dict[str, str]:
        """Give a durable file its other names; return how each name was made. `new` is the file
        where nothing had its name before."""
        catalog, same_run = self._catalog, contents.of(entry.run_id)
        # A rescue may make up for a checkpoint that is older than what lies here.
        newest = all(each.order < entry.order for each in same_run.entries)
        try:
            with catalog.lock():
                catalog.clear_roles(contents)
                roles = [LATEST, MAIN] if newest else []
                how = {entry.names[0]: "file", **catalog.publish(entry, roles)}
                if _improves(entry, same_run.best):
                    how |= catalog.publish(entry, [BEST])
        except OSError as error:
            if error.errno in _REFUSED and new is not None:
                # The checkpoint was never announced: delete it and free its space.
                filesystem.remove(new)
            raise
        return how

    def _announce(self, saved: Saved) -> None:
        entry = saved.entry
        self._reporter.record(
            "durable",
            id=entry.id,
            run_id=entry.run_id,
            generation=entry.generation,
            sequence=entry.sequence,
            step=entry.step,
            epoch=entry.epoch,
            kind=entry.kind,
            reason=entry.reason,
            size=entry.size,
            names=list(saved.names),
            seconds=round(saved.seconds, 3),
            stall=round(saved.stall, 4),
        )
        self._reporter.tell("durable", saved=saved)

    def _verify(self, saved: Saved, before: Contents, old: Path | None) -> Saved:
        """Read back what is announced; only then may anything that lay here before go.

        `old` is the second name of what had the same name. Raises `DamagedCheckpoint`.
        """
        entry = saved.entry
        try:
            tidy.verify_back(entry, saved.path)
        except CheckpointError as error:
            self._take_back(entry, saved.path, old, error.why)
            raise DamagedCheckpoint(str(error), why=error.why) from error
        except (OSError, MemoryError) as error:  # it stays what was announced; nothing older goes
            reason = in_words(error)
            self._reporter.report("unverified", id=entry.id, step=entry.step, reason=reason)
            return saved
        self._reporter.report("verified", id=entry.id, step=entry.step)
        self._let_go(entry, before, old)
        return replace(saved, entry=replace(entry, verified=True))

    def _let_go(self, entry: Entry, before: Contents, old: Path | None) -> None:
        """Let go what need not stay now that `entry` is verified: what had its name, what is of
        other runs, and what no policy keeps."""
        catalog = self._catalog
        try:
            if old is not None:
                tidy.settle_old(catalog, entry, before, old)
            if not all(earlier.verified for earlier in before.entries[:2]):
                self._verify_earlier()
            if self._retention:
                others = tidy.archive_others(catalog, entry.run_id)
                if others is not None:
                    self._reporter.tell("archived", count=others[0], to=str(others[1]))
                tidy.prune(catalog, self._retention)
        except (OSError, HoldfastError) as error:  # what cannot go now goes after the next save
            log.warning("%s: %s", catalog.directory, error)

    def _verify_earlier(self) -> None:
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

    def _take_back(self, entry: Entry, path: Path, old: Path | None, reason: str) -> None:
        names = tidy.take_back(self._catalog, entry, path, old, reason)
        self._reporter.tell("quarantined", names=names, reason=reason, step=entry.step)

    def _made_room(self, error: Exception, save: Save) -> bool:
        """Let old checkpoints go for one that the disk has refused; True if there were any."""
        if not self._make_room or not isinstance(error, OSError) or error.errno not in _REFUSED:
            return False
        gone = space.make_room(self._catalog, save.size, _run_id(save), refused=True)
        self._tell_gone(gone)
        return bool(gone)

    def _tell_gone(self, gone: Sequence[Entry]) -> None:
        if gone:
            names = [entry.names[0] for entry in gone]
            self._reporter.tell("room_made", names=names, size=sum(entry.size for entry in gone))


def _run_id(save: Save) -> str:
    return str(save.manifest["identity"]["run_id"])


def _improves(entry: Entry, best: Entry | None) -> bool:
    if entry.loss is None:
        return False
    return best is None or best.loss is None or entry.loss < best.loss
