"""The limits of this machine, measured in the same run as the saves.

The disk: a plain writer that creates, preallocates, writes with direct I/O, syncs, renames and
syncs the directory. Memory: one copy of the state into buffers that exist already. Reading: direct
I/O into such a buffer. Nothing is serialised, checked or hashed here.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.engine.watch import sync_tree
from benchmarks.engine.workload import Workload
from holdfast.checkpoint.system import sync_directory, sync_file

_MIB = 1 << 20
_ALIGN = 64  # bytes; vector instructions are fastest there
_WAYS = [(threads, block * _MIB) for threads in (1, 2) for block in (4, 16)]


class Memory:
    """A page-aligned buffer with room for the state, and the copies into it."""

    def __init__(self, work: Workload) -> None:
        self._work = work
        self.sources = list(work.tensors().values())
        self.size = work.nbytes
        room = sum(-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in self.sources)
        self.buffer = mmap.mmap(-1, -(-room // mmap.PAGESIZE) * mmap.PAGESIZE)
        self.views = list(self._views())
        for view, source in zip(self.views, self.sources, strict=True):
            view.copy_(source)
        if work.device.type == "cuda":  # the fastest way to copy from a GPU
            self.views = [torch.empty_like(view, pin_memory=True) for view in self.views]
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1)
        self.copy()

    def _views(self) -> Iterator[torch.Tensor]:
        offset = 0
        for tensor in self.sources:
            count = tensor.numel()
            view = torch.frombuffer(self.buffer, dtype=tensor.dtype, count=count, offset=offset)
            yield view.view(tensor.shape)
            offset += -(-tensor.nbytes // _ALIGN) * _ALIGN

    def copy(self) -> float:
        """Return the seconds of the fastest of: _foreach_copy_, memmove, memmove on all cores."""
        if self._work.device.type == "cuda":
            return self._seconds(lambda: torch._foreach_copy_(self.views, self.sources, True))
        pairs = list(zip(self.views, self.sources, strict=True))
        return min(
            self._seconds(lambda: torch._foreach_copy_(self.views, self.sources)),
            self._seconds(lambda: _move(pairs)),
            self._seconds(lambda: list(self._threads.map(_move, _halves(pairs, self.size)))),
        )

    def _seconds(self, act: Callable[[], object]) -> float:
        self._work.wait()
        began = time.monotonic()
        act()
        self._work.wait()
        return time.monotonic() - began

    def close(self) -> None:
        self._threads.shutdown()
        self.views.clear()


_Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def _move(pairs: _Pairs) -> None:
    for view, source in pairs:
        ctypes.memmove(view.data_ptr(), source.data_ptr(), source.nbytes)


def _halves(pairs: _Pairs, size: int) -> list[_Pairs]:
    """Divide `pairs` into one part for each core, of about the same number of bytes."""
    share, filled = size / (os.cpu_count() or 1), 0
    parts: list[_Pairs] = [[]]
    for pair in pairs:
        if filled > share * len(parts):
            parts.append([])
        parts[-1].append(pair)
        filled += pair[1].nbytes
    return parts


class Disk:
    """Write and read a buffer in `directory` as fast as this disk can.

    The best number of threads and block size are found once, at the start. Where direct I/O does
    not work (`direct` is False), writing is buffered and reading begins with an empty page cache.
    """

    def __init__(self, directory: Path, buffer: mmap.mmap) -> None:
        self._directory, self._buffer, self.size = directory, buffer, len(buffer)
        self._pool = ThreadPoolExecutor(max(threads for threads, _block in _WAYS))
        self.direct = self._try_direct()
        write, read = {}, {}
        for way in _WAYS:
            write[way] = self.write(*way)
            read[way] = self.read(*way)
        self.write_way = min(write, key=write.__getitem__)
        self.read_way = min(read, key=read.__getitem__)

    @property
    def path(self) -> Path:
        """The file that `write` leaves for `read`."""
        return self._directory / "limit.bin"

    def write(self, threads: int = 0, block: int = 0) -> float:
        """Return the seconds from creating a temporary file to the end of the directory's fsync."""
        if not threads:
            threads, block = self.write_way
        self.path.unlink(missing_ok=True)
        temporary = self.path.with_suffix(".tmp")
        began = time.monotonic()
        with self._opened(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY) as fd:
            os.posix_fallocate(fd, 0, len(self._buffer))
            view = memoryview(self._buffer)

            def put(offset: int) -> None:
                end = min(offset + block, len(view))
                while offset < end:
                    offset += os.pwrite(fd, view[offset:end], offset)

            self._each(put, threads, block)
            sync_file(fd)
        temporary.rename(self.path)
        sync_directory(self._directory)
        return time.monotonic() - began

    def read(self, threads: int = 0, block: int = 0) -> float:
        """Return the seconds to read the file of `write` from the disk, not from the page cache."""
        if not threads:
            threads, block = self.read_way
        drop_cache(self.path)
        began = time.monotonic()
        with self._opened(self.path, os.O_RDONLY) as fd:
            view = memoryview(self._buffer)

            def get(offset: int) -> None:
                end = min(offset + block, len(view))
                while offset < end:
                    offset += os.preadv(fd, [view[offset:end]], offset)

            self._each(get, threads, block)
        return time.monotonic() - began

    def close(self) -> None:
        self._pool.shutdown()
        self.path.unlink(missing_ok=True)

    @contextmanager
    def _opened(self, path: Path, flags: int) -> Iterator[int]:
        fd = os.open(path, flags | (os.O_DIRECT if self.direct else 0), 0o600)
        try:
            yield fd
        finally:
            os.close(fd)

    def _each(self, act: Callable[[int], None], threads: int, block: int) -> None:
        offsets = range(0, self.size, block)
        parts = [offsets[i::threads] for i in range(threads)]

        def work(part: range) -> None:
            for offset in part:
                act(offset)

        list(self._pool.map(work, parts))

    def _try_direct(self) -> bool:
        self.direct = True
        probe = self._directory / "probe.tmp"
        try:
            with self._opened(probe, os.O_CREAT | os.O_WRONLY) as fd:
                os.pwrite(fd, memoryview(self._buffer)[: mmap.PAGESIZE], 0)
        except OSError:
            return False
        finally:
            probe.unlink(missing_ok=True)
        return True


def drop_cache(target: Path) -> None:
    """Drop the files of `target` from the page cache."""
    sync_tree(target)  # dirty pages would stay
    for path in [target] if target.is_file() else target.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
