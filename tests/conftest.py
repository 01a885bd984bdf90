"""What every test starts from: English, whatever the machine or the test before it speaks."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Two workers of pytest share two cores: threads of torch that spin for each other would make every
# test ten times as slow. Inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from holdfast.i18n import set_language


@pytest.fixture(autouse=True)
def english() -> Iterator[None]:
    before = os.environ.get("LANGUAGE")
    set_language("en")
    yield
    set_language("en")
    if before is None:
        os.environ.pop("LANGUAGE", None)
    else:
        os.environ["LANGUAGE"] = before


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where there is one: for sweeps that sync thousands of files."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes file systems of a few megabytes, with the errors of real full ones. Needs root."""
    mounted: list[Path] = []

    def make(size: int, *, inodes: int = 0) -> Path:
        """An empty file system of `size` bytes and so many `inodes` (0: enough)."""
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        options = f"size={size},nr_inodes={inodes}"
        call = ["mount", "-t", "tmpfs", "-o", options, "holdfast-test", str(place)]
        try:
            done = subprocess.run(call, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"there is no mount here: {error}")
        if done.returncode:
            pytest.skip(f"this user mounts nothing: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
