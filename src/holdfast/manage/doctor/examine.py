"""`holdfast doctor`: what may go wrong with a run here, found before it does.

The disk, the machine, and the run directory itself where there is one. Nothing is changed: what is
written to measure is gone afterwards. torch is imported by the last checks only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint.rundir import QUARANTINE, shared_memory
from holdfast.checkpoint.system import run_lock
from holdfast.formatting import format_bytes, format_time
from holdfast.i18n import _
from holdfast.manage.cleaning import leftovers
from holdfast.manage.doctor.disk_checks import disk_checks, existing_parent
from holdfast.manage.doctor.findings import BAD, OK, WARN, Finding, unknown, worst
from holdfast.manage.doctor.machine_checks import machine_checks
from holdfast.manage.rundir import RunDirectory, look, set_aside


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found about a directory."""

    directory: Path
    findings: list[Finding]

    @property
    def state(self) -> str:
        return worst(self.findings)

    def to_json(self) -> dict[str, Any]:
        """The documented form."""
        return {
            "directory": str(self.directory),
            "state": self.state,
            "checks": [finding.to_json() for finding in self.findings],
        }


def examine(directory: str | os.PathLike[str]) -> Iterator[Finding]:
    """Look at everything, one finding after the other; `directory` need not exist yet.

    Raises HoldfastError where it is something else than a directory.
    """
    path = Path(directory)
    run = look(path) if path.exists() else None
    needed = _checkpoint_size(run)
    yield from disk_checks(existing_parent(path), needed)
    if run is not None:
        yield from run_checks(run)
    yield from machine_checks(needed)


def _checkpoint_size(run: RunDirectory | None) -> int:
    return max((entry.size for entry in run.entries[:1]), default=0) if run else 0


# ------------------------------------------------------------------------------ the run directory


def run_checks(run: RunDirectory) -> Iterator[Finding]:
    """Look for a training at work, for damage and for what a killed training has left."""
    yield lock(run.directory)
    yield checkpoints(run)
    yield from quarantine(run.directory)
    yield from remains(run)


def lock(directory: Path) -> Finding:
    """Name the training that works in there now."""
    if not sys.platform.startswith("linux"):
        return unknown("lock")
    owner = run_lock(directory).owner()
    if owner:
        return Finding("lock", OK, _("a training works in it: {owner}", owner=owner))
    return Finding("lock", OK, _("nobody works in it"))


def checkpoints(run: RunDirectory) -> Finding:
    """Look at the headers; `holdfast verify` reads every byte."""
    contents = run.contents
    damaged = [name for name, _reason in contents.damaged]
    damaged += [entry.names[0] for entry in run.entries if entry.id in run.distrusted]
    count, newest = len(run.entries), contents.newest
    found = _("{count}, none is damaged at first sight", count=count)
    if newest is not None:
        found += _(
            "; the newest is step {step} of {time}",
            step=newest.step,
            time=format_time(newest.created),
        )
    if damaged:
        intact = count > sum(entry.id in run.distrusted for entry in run.entries)
        return Finding(
            "checkpoints",
            WARN if intact else BAD,
            _("damaged: {names}", names=", ".join(damaged)),
            _("start the training: it sets them aside and goes on from the newest that is intact")
            if intact
            else _("restore a copy from elsewhere: none here is intact"),
        )
    if contents.unreadable:
        name, reason = contents.unreadable[0]
        return Finding(
            "checkpoints",
            BAD,
            f"{name}: {reason}",
            _("make it readable: a training does not pass over it"),
        )
    return Finding("checkpoints", OK, found)


def quarantine(directory: Path) -> Iterator[Finding]:
    """Damaged files of earlier days: a disk that has damaged one may damage another."""
    files = [path for path in set_aside(directory, QUARANTINE) if path.suffix == ".pt"]
    if files:
        yield Finding(
            "quarantine",
            WARN,
            _("damaged files in quarantine/: {count}", count=len(files)),
            _("look at the disk's health (smartctl -a), then holdfast clean --quarantine"),
        )


def remains(run: RunDirectory) -> Iterator[Finding]:
    """Snapshots in shared memory that a killed training of this run has left."""
    ids = {entry.run_id for entry in run.entries} | {str(e.get("run_id")) for e in run.events}
    for row in leftovers.plan().rows:
        newest = shared_memory.newest_in(row.remains)
        # An inode may have been another run's before: whose it is the snapshot says.
        ours = newest is not None and newest.identity["run_id"] in ids
        if ours and row.remains.belongs_to(run.directory) and row.reason != "in_use":
            size = format_bytes(row.remains.size)
            if row.reason == "unsaved":
                yield Finding(
                    "remains",
                    WARN,
                    _(
                        "step {step} of a killed training, which is not on the disk ({size})",
                        step=row.step,
                        size=size,
                    ),
                    _("start the training before the machine goes off: it goes on from there"),
                )
            else:
                yield Finding(
                    "remains",
                    WARN,
                    _("{size} of a killed training, nothing that is not on the disk", size=size),
                    "holdfast clean --memory",
                )
