"""A place for each run of a proof: a copy of the working directory, and what a run has written.

The runs of a proof must not meet each other's files, nor those of the real training.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from holdfast.checkpoint.rundir import shared_memory
from holdfast.errors import ConfigError
from holdfast.formatting import format_bytes

Mark = tuple[int, int]  # inode and time of change of a file
_LARGEST = 256 << 20  # bytes of a working directory that is copied for each run
_CACHES = {"__pycache__", "node_modules"}


@contextlib.contextmanager
def workshop(place: Path | None, keep: Path | None = None) -> Iterator[Path]:
    """Make a directory for the runs of a proof, in `place` or the system's own; afterwards it goes,
    and with it what they have in shared memory. `keep`: it is this one, and stays."""
    if keep is None:
        directory = Path(tempfile.mkdtemp(prefix=".holdfast-prove-", dir=place)).resolve()
    else:
        keep.mkdir(parents=True)
        directory = keep.resolve()
    try:
        yield directory
    finally:
        for left in shared_memory.remains():
            if left.run is not None and left.run.is_relative_to(directory):
                left.remove()
        if keep is None:
            shutil.rmtree(directory, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Run:
    """The place of one run: its working directory, and its own output directory where that one does
    not lie in it."""

    root: Path
    outside: Path | None

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def words(self, words: Sequence[str]) -> list[str]:
        """Return a command with this run's output directory in place of the one it names."""
        if self.outside is None:
            return list(words)
        named = re.compile(rf"{re.escape(str(self.outside))}(?=/|$)")
        return [named.sub(lambda _found: str(self.out), word) for word in words]


@dataclass(slots=True)
class Beginning:
    """What every run of a proof begins with: a working directory, without the output of earlier
    trainings (`output`), and with links to what is only read."""

    directory: Path
    output: Path | None = None  # relative to it, or absolute and outside
    links: Sequence[Path] = ()  # relative to it
    _files: list[Path] = field(default_factory=list)

    @property
    def outside(self) -> Path | None:
        return self.output if self.output is not None and self.output.is_absolute() else None

    @property
    def symlinks(self) -> int:
        """Symbolic links that a run begins with."""
        return len(self.links) + sum((self.directory / path).is_symlink() for path in self._files)

    def survey(self) -> None:
        """Find what has to be copied. Raises `ConfigError` where it is too much, or a link is
        missing."""
        for link in self.links:
            if link.is_absolute() or not (self.directory / link).exists():
                raise ConfigError(
                    "--link {path}: the working directory has nothing of that name.", path=link
                )
        left_out = {
            self.directory / path for path in (*self.links, self.output) if path is not None
        }
        size = 0
        for root, directories, files in os.walk(self.directory):
            here = Path(root)
            directories[:] = [
                name
                for name in directories
                if here / name not in left_out and _is_ours(here / name)
            ]
            for path in (here / name for name in files):
                if path not in left_out and (path.is_file() or path.is_symlink()):
                    self._files.append(path.relative_to(self.directory))
                    size += path.lstat().st_size
            self._files += [
                path.relative_to(self.directory)
                for path in (here / name for name in directories)
                if path.is_symlink() or not any(path.iterdir())
            ]
            if size > _LARGEST:
                raise ConfigError(
                    "Each run of the proof begins with a copy of {directory}, and that is more "
                    "than {size}. Name what is only read, such as the data, with --link PATH; name "
                    "the output of earlier trainings with --dir DIR.",
                    directory=self.directory,
                    size=format_bytes(_LARGEST),
                )

    def lay_out(self, root: Path, *, copy: bool = True) -> Run:
        """Make the place of a run; without `copy` only its links: the files come from elsewhere."""
        run = Run(root, self.outside)
        run.work.mkdir(parents=True, exist_ok=True)
        if copy and self.outside is not None and self.outside.is_dir():
            run.out.mkdir()
        for path in self._files if copy else ():
            source, target = self.directory / path, run.work / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir() and not source.is_symlink():
                target.mkdir(exist_ok=True)
            else:
                shutil.copy2(source, target, follow_symlinks=source.is_file())
        for path in self.links:
            (run.work / path).parent.mkdir(parents=True, exist_ok=True)
            (run.work / path).symlink_to((self.directory / path).resolve())
        return run


def _is_ours(path: Path) -> bool:
    """Return True unless a directory is hidden, a cache or a virtual environment."""
    hidden = path.name.startswith(".") or path.name in _CACHES
    return not hidden and not (path / "pyvenv.cfg").exists()


def written(root: Path, before: Mapping[Path, Mark] | None = None) -> dict[Path, Mark]:
    """Return the files below `root`, relative to it, that are not as they were `before`: inode and
    time of change of each."""
    found = {}
    for place, directories, files in os.walk(root):
        directories[:] = [name for name in directories if name not in _CACHES]
        for name in files:
            path = Path(place) / name
            with contextlib.suppress(OSError):  # a temporary file that is gone again
                status = path.lstat()
                found[path.relative_to(root)] = (status.st_ino, status.st_mtime_ns)
    return {path: mark for path, mark in found.items() if (before or {}).get(path) != mark}
