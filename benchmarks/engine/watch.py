"""A process that observes when a new checkpoint is durable. No torch here.

It looks at a directory every millisecond. When a new `.pt` is renamed into it, it syncs that file
and the directory itself, and reports the time when the last call returned. The clock is
CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from holdfast.checkpoint.system import sync_directory, sync_file

ROOT = Path(__file__).parents[2]  # where `benchmarks` can be imported
_PAUSE = 0.001


def published(directory: Path) -> set[str]:
    """Return the names of the checkpoints in `directory`."""
    return {path.name for path in directory.iterdir() if path.suffix == ".pt"}


def sync_tree(target: Path) -> None:
    """Make `target`, everything below it and its name durable."""
    if target.is_dir():
        for path, _folders, files in os.walk(target, topdown=False):
            for name in files:
                _sync(Path(path, name))
            sync_directory(Path(path))
    else:
        _sync(target)
    sync_directory(target.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        sync_file(fd)
    finally:
        os.close(fd)


class Watcher:
    """Run the observer for one directory. Call `arm`, then `seen`, in turn."""

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine.watch", str(directory.absolute())],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C must not end it
        )
        self._directory = directory

    @property
    def pid(self) -> int:
        return self._process.pid

    def arm(self) -> None:
        """Wait until the observer knows the present files and looks for new ones."""
        self._tell()
        self._answer()

    def seen(self) -> float:
        """Wait for a new checkpoint. Return the `time.monotonic()` at which it was durable."""
        return float(self._answer())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _tell(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("look\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise OSError(f"the observer of {self._directory.name} has died")
        return line.strip()


def main(directory: Path) -> None:
    """Answer each line of stdin twice: "armed", then the time when a new file is durable."""
    for _line in sys.stdin:
        known = published(directory)
        print("armed", flush=True)
        while not (new := published(directory) - known):
            time.sleep(_PAUSE)
        for name in sorted(new):
            sync_tree(directory / name)
        print(repr(time.monotonic()), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
