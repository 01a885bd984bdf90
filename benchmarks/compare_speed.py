"""Speed of `holdfast compare --tensors`: two files against the mere reading of their bytes.

    python benchmarks/compare_speed.py [--gigabytes 1] [--directory DIR]

Writes two checkpoints of fp32 and of bf16 weights that differ in every element, compares them, and
prints it beside what reading and hashing the same files takes (`Reader.verify`, from the device),
and reading them from the page cache without looking at a byte. The peak of resident memory is that
of a process that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from holdfast import CheckpointManager
from holdfast.checkpoint.format.container import Reader
from holdfast.manage.compare.drift import drift


def write(directory: Path, dtype: torch.dtype, size: int, seed: int) -> Path:
    """A checkpoint with about `size` bytes of weights in layers of 16 Mi elements."""
    generator = torch.Generator().manual_seed(seed)
    elements = 1 << 24
    layers = max(1, size // (elements * dtype.itemsize))
    block = torch.randn(elements, generator=generator).to(dtype)
    weights = {f"layers.{i}.weight": block.roll(i).view(4096, -1) for i in range(layers)}
    manager = CheckpointManager(directory, {"model": weights})
    try:
        saved = manager.save(step=1, strict=True)
        assert saved is not None
        return saved.path
    finally:
        manager.close()


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that passed, and those of the processors, which tell more on a busy machine."""
    began, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - used


def read_all(paths: list[Path]) -> None:
    buffer = bytearray(1 << 22)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def verify_all(paths: list[Path]) -> None:
    for path in paths:
        with Reader(path) as reader:
            reader.verify(crc=False)


def forget(paths: list[Path]) -> None:
    os.sync()
    for path in paths:
        with Reader(path) as reader:
            reader.forget_cached()


_ALONE = """
import re, sys
from pathlib import Path
from holdfast.manage.compare.drift import drift
drift(("A", Path(sys.argv[1])), ("B", Path(sys.argv[2])))
# Not getrusage: a child begins with the peak of its parent there.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def peak(paths: list[Path]) -> int:
    """Bytes that a process of its own has resident at most while it compares (Linux)."""
    command = [sys.executable, "-c", _ALONE, *map(str, paths)]
    return 1024 * int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of each of the two files")
    parser.add_argument("--directory", type=Path, help="where to write (default: the system's)")
    given = parser.parse_args()
    size = int(given.gigabytes * 1e9)
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory(dir=given.directory) as folder:
            paths = [write(Path(folder) / name, dtype, size, i) for i, name in enumerate("ab")]
            measure(paths, str(dtype).removeprefix("torch."))


def measure(paths: list[Path], name: str) -> None:
    total = sum(path.stat().st_size for path in paths)

    def compare() -> None:
        drift(("A", paths[0]), ("B", paths[1]))

    read_all(paths)
    rows = {
        "read, page cache": timed(lambda: read_all(paths)),
        "compare, page cache": timed(compare),
        "read and hash, device": timed(lambda: verify_all(paths)),
    }
    forget(paths)
    rows["compare, device"] = timed(compare)
    print(f"{name}: 2 files of {total / 2e9:.2f} GB; peak {peak(paths) / 1e6:.0f} MB resident")
    for what, (seconds, used) in rows.items():
        print(
            f"  {what:<24} {seconds:6.2f} s  {total / seconds / 1e9:6.2f} GB/s  cpu {used:5.2f} s"
        )


if __name__ == "__main__":
    main()
