"""Page-aligned memory into a file, past the page cache, while its end is still computed.

filesystem.py owns the file's life; here are only blocks, threads and speed. All of it happens
outside the interpreter lock but for a few calls a block. reading.py asks here for direct reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from holdfast.checkpoint.system.pages import PAGE
from holdfast.checkpoint.system.threads import together

BLOCK = 16 << 20  # bytes a write: two threads of 16 MiB were the fastest (docs/en/performance.md)
THREADS = 2
_PACES_A_SECOND = 10  # a limited writer pauses so often, not for seconds at a time
_F_NOCACHE = 48  # fcntl(2) of macOS: the nearest it has to O_DIRECT

Ready = Callable[[int], None]
WriteAll = Callable[[int, memoryview, int], None]


def is_aligned(buffer: memoryview) -> bool:
    """Return True if `buffer` begins on a page of memory and has whole pages only."""
    if buffer.readonly or not buffer.c_contiguous or not buffer.nbytes or buffer.nbytes % PAGE:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE == 0


def switch_on(fd: int) -> bool:
    """Let writes to `fd` go past the page cache; False where this file system does not."""
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, _F_NOCACHE, 1)
            return True
    elif hasattr(os, "O_DIRECT"):
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
            return True
    return False


def switch_off(fd: int) -> None:
    """Let writes to `fd` go through the page cache again."""
    if hasattr(os, "O_DIRECT"):
        import fcntl

        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


def write_blocks(
    fd: int,
    ranges: Sequence[tuple[int, memoryview]],
    write_all: WriteAll,
    *,
    ready: Ready | None,
    limit: float,
) -> None:
    """Write `ranges`, `(offset, bytes)` of whole pages in ascending order, to `fd`:
    `write_all(fd, bytes, offset)` block by block.

    Before a block is written, `ready(end)` is called, by one thread at a time and in ascending
    order: the bytes before `end` must be final when it returns. While one thread is in there, the
    other one writes. `limit` is bytes a second, 0 for none. Raises what `write_all` raises.

    Where the first block shows that the file takes no direct writes after all, it and the others go
    through the page cache.
    """
    block = BLOCK if not limit else max(PAGE, min(BLOCK, int(limit / _PACES_A_SECOND) & -PAGE))
    pace, turn, stopped = _Pace(limit), threading.Lock(), threading.Event()
    blocks = _blocks(ranges, block)

    def work() -> None:
        while True:
            with turn:
                offset, data = next(blocks, (0, None))
                if data is None or stopped.is_set():
                    return
                if ready is not None:
                    ready(offset + len(data))
                pace.wait(len(data))
            _write_block(fd, data, offset, write_all)

    size = sum(len(data) for _offset, data in ranges)
    together(work, min(THREADS, -(-size // block)), stop=stopped.set)


def _blocks(
    ranges: Sequence[tuple[int, memoryview]], most: int
) -> Iterator[tuple[int, memoryview]]:
    for offset, data in ranges:
        for start in range(0, len(data), most):
            yield offset + start, data[start : start + most]


def _write_block(fd: int, block: memoryview, offset: int, write_all: WriteAll) -> None:
    try:
        write_all(fd, block, offset)
    except OSError as error:
        # Some file systems take the flag and refuse the write.
        if error.errno != errno.EINVAL:
            raise
        switch_off(fd)
        write_all(fd, block, offset)


class _Pace:
    """Holds a writer back to `limit` bytes a second."""

    def __init__(self, limit: float) -> None:
        self._limit, self._due = limit, time.monotonic()

    def wait(self, count: int) -> None:
        if self._limit:
            time.sleep(max(0.0, self._due - time.monotonic()))
            self._due = max(self._due, time.monotonic() - 1.0) + count / self._limit
