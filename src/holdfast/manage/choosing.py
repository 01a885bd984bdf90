"""Find the checkpoint that a person means by a step or the name of a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.checkpoint.format import read_manifest
from holdfast.checkpoint.rundir import ARCHIVE, EVENTS, Entry, summary
from holdfast.checkpoint.system import filesystem
from holdfast.errors import CheckpointError, DamagedCheckpoint
from holdfast.i18n import _
from holdfast.manage.rundir import RunDirectory, set_aside

_DEPTH = 5  # a file lies at most so deep: archive/0a1b2c3d/generation_1/temp/x.pt
_NEAREST = 4  # steps that are named where the one that was asked for is not there


@dataclass(frozen=True, slots=True)
class Choice:
    """A checkpoint of a run directory, and where it lies in the archive if it does."""

    entry: Entry
    source: str | None = None  # relative to the run directory


def choose(run: RunDirectory, wanted: str) -> Choice:
    """The checkpoint of `run` that `wanted` means: digits are a step, anything else is a file.

    Of several checkpoints of one step the newest is meant. A file is looked for from the working
    directory, then in the run directory; it may lie in `archive/`. Raises `CheckpointError` where
    there is none, `DamagedCheckpoint` where it cannot be read.
    """
    if wanted.isdecimal():
        return Choice(_of_step(run, int(wanted)))
    files = [path for path in (Path(wanted), run.directory / wanted) if path.is_file()]
    if not files:
        raise CheckpointError(
            "There is no checkpoint at {source}; `holdfast list` shows what is there.",
            source=wanted,
        )
    for path in files:
        found = _here(run, path) or _archived(run, path)
        if found is not None:
            return found
    for name, why in run.contents.damaged:
        path = run.directory / name
        if any(filesystem.same_data(path, file) for file in files):
            raise DamagedCheckpoint("{path} is damaged: {why}.", path=path, why=why)
    raise CheckpointError(
        "{path} is no checkpoint of {directory}; `holdfast list` shows what is there.",
        path=files[0],
        directory=run.directory,
    )


def directory_of(wanted: str) -> Path | None:
    """The run directory that the file `wanted` lies in: the nearest that keeps a history."""
    path = Path(wanted)
    if not path.is_file():
        return None
    places = list(Path(os.path.normpath(path.absolute())).parents)[:_DEPTH]
    found = next((place for place in places if (place / EVENTS).is_file()), None)
    return found if found is None or path.is_absolute() else Path(os.path.relpath(found))


def _of_step(run: RunDirectory, step: int) -> Entry:
    for entry in run.entries:  # the newest first
        if entry.step == step:
            return entry
    if not run.entries:
        raise CheckpointError("There are no checkpoints in {directory}.", directory=run.directory)
    near = sorted({entry.step for entry in run.entries}, key=lambda other: abs(other - step))
    message = _(
        "There is no checkpoint of step {step} in {directory}; the nearest are of step {steps}.",
        step=step,
        directory=run.directory,
        steps=", ".join(map(str, sorted(near[:_NEAREST]))),
    )
    for path in set_aside(run.directory, ARCHIVE):
        archived = entry_at(path)
        if archived is not None and archived.step == step:
            message += _(
                " Step {step} lies in the archive: name the file {path}.", step=step, path=path
            )
            break
    raise CheckpointError(message)


def _here(run: RunDirectory, path: Path) -> Choice | None:
    for entry in run.entries:
        if any(filesystem.same_data(run.directory / name, path) for name in entry.names):
            return Choice(entry)
    return None


def _archived(run: RunDirectory, path: Path) -> Choice | None:
    archive = run.directory.resolve() / ARCHIVE
    if not path.resolve().is_relative_to(archive):
        return None
    entry = summary(read_manifest(path), path.stat().st_size)
    here = next((e for e in run.entries if e.id == entry.id), None)
    if here is not None:
        return Choice(here)
    source = path.resolve().relative_to(archive.parent).as_posix()
    return Choice(replace(entry, names=(source,)), source)


def entry_at(path: Path) -> Entry | None:
    """The checkpoint that a file holds, without its size; None where it holds none."""
    try:
        return summary(read_manifest(path), 0) if path.suffix == ".pt" else None
    except (CheckpointError, OSError):
        return None
