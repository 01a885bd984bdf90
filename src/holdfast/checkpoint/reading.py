"""From the disk into memory: a few threads, page-aligned, past the page cache where that is faster.

Nothing of the format is known here: ranges of a file and who takes their bytes. Every byte is read
with a positional read into memory of our own and handed on as it lies there: a map of a file that
shrinks is a SIGBUS, and what was hashed must be what is used.
`HOLDFAST_DISABLE=direct` switches direct I/O off, for tests and odd systems.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from holdfast.checkpoint.layout import PAGE

CHUNK = 1 << 22  # bytes a read: hides the system call, and is still in the caches when hashed
OWN_PAGES = 1 << 18  # memory from this size on gets pages of its own: direct I/O can fill it
_PROBE = 1 << 16  # what is smaller than this is not worth asking where it is
_seek_lock = threading.Lock()
_dice = random.Random()  # its own: the global generator belongs to the training


def own_pages(size: int) -> mmap.mmap | None:
    """Writable memory of `size` bytes that starts on a page, for direct I/O.

    None where `size` is less than `OWN_PAGES` or the system has no more such pieces to give: the
    usual allocator does it then. Huge pages, where there are any, make the first touch three times
    as fast (measured: 0.15 s in place of 0.5 s a GiB, where hashing takes 0.05 s).
    """
    if size < OWN_PAGES or not hasattr(mmap, "MAP_PRIVATE"):
        return None
    try:
        # Private: a shared map would be one memory for this process and those that it forks.
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # Linux gives a process 65530 maps
        return None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


# ---------------------------------------------------------------------------------------- one file


class File:
    """A file open for reading, a second time for direct I/O once `open_direct` has been called."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, _FLAGS)
        self._direct = -1
        self._tried = False
        try:
            self.size = os.fstat(self._fd).st_size
        except BaseException:  # whatever ends this, an interrupt too, leaks no descriptor
            self.close()
            raise

    def close(self) -> None:
        self._fd, fd = -1, self._fd
        self._direct, direct = -1, self._direct
        for each in (fd, direct):
            if each >= 0:
                os.close(each)

    def open_direct(self) -> bool:
        """Make reads go past the page cache where this platform and file system let them."""
        if not self._tried and self._fd >= 0:
            self._tried = True
            disabled = "direct" in os.environ.get("HOLDFAST_DISABLE", "").split(",")
            if hasattr(os, "O_DIRECT") and hasattr(os, "preadv") and not disabled:
                self._reopen(os.O_DIRECT)
        return self._direct >= 0

    def _reopen(self, flag: int) -> None:
        try:
            self._direct = os.open(self._path, _FLAGS | flag)
            same = os.path.samestat(os.fstat(self._direct), os.fstat(self._fd))
        except OSError:  # this file system has none, or the name has gone: buffered reads do
            same = False
        if not same and self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def forget_cached(self, offset: int = 0, size: int = 0) -> None:
        """Ask the kernel to drop these pages (all: 0), so that the device is read next time."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_DONTNEED)

    def read(self, offset: int, buffer: memoryview, *, fresh: bool = False) -> int:
        """Fill `buffer`; the bytes that were read, fewer only where the file ends.

        Direct I/O is used where `offset` and `buffer` are made for it and, unless it must be
        `fresh`, where the page cache does not have the bytes.
        """
        got = 0
        if (
            self._direct >= 0
            and offset % PAGE == 0
            and buffer.nbytes % PAGE == 0
            and (fresh or not self._is_cached(offset, buffer))
            and _on_a_page(buffer)
        ):
            got = self._read_direct(offset, buffer)
        if fresh and got == 0:
            self.forget_cached(offset, buffer.nbytes)
        while got < buffer.nbytes:
            count = _preadv(self._fd, buffer[got:], offset + got)
            if count == 0:
                break
            got += count
        return got

    def _read_direct(self, offset: int, buffer: memoryview) -> int:
        got = 0
        while got < buffer.nbytes and got % PAGE == 0:  # it is not at the end of the file
            try:
                count = os.preadv(self._direct, [buffer[got:]], offset + got)
            except OSError as error:
                if error.errno != errno.EINVAL:  # opened for it and refuses it: odd, and allowed
                    raise
                return got
            if count == 0:
                break
            got += count
        return got

    def _is_cached(self, offset: int, buffer: memoryview) -> bool:
        """Whether the page cache has these bytes, by asking for one of their pages without waiting.

        Asking for all would be read ahead into the cache, and be read twice where it is not there.
        Another page each time, because the one that was asked for is there the next time.
        """
        if buffer.nbytes <= _PROBE or not hasattr(os, "RWF_NOWAIT"):
            return True
        at = _dice.randrange(buffer.nbytes // PAGE) * PAGE
        try:
            return os.preadv(self._fd, [buffer[at : at + PAGE]], offset + at, os.RWF_NOWAIT) > 0
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot say
                return True
            if error.errno != errno.EAGAIN:
                raise
            return False


_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def _on_a_page(buffer: memoryview) -> bool:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE == 0


def _preadv(fd: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    with _seek_lock:  # Windows has no positional read
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, buffer.nbytes)
    buffer[: len(data)] = data
    return len(data)


# -------------------------------------------------------------------------------------- many parts


class Part:
    """The bytes from `start` to `stop` of a file, handed to `take` in order, in pieces.

    With `buffer`, they lie in it by then; without, `take` sees scratch memory that is used again.
    """

    __slots__ = ("buffer", "done", "start", "stop", "take")

    def __init__(
        self,
        start: int,
        stop: int,
        take: Callable[[memoryview], None],
        buffer: memoryview | None = None,
    ) -> None:
        assert buffer is None or buffer.nbytes == stop - start, (buffer, start, stop)
        self.start, self.stop, self.take, self.buffer = start, stop, take, buffer
        self.done = start  # what lies before this has been taken

    def own(self, start: int, stop: int) -> memoryview:
        assert self.buffer is not None
        return self.buffer[start - self.start : stop - self.start]


@dataclass(slots=True)
class Piece:
    """One read: whole pages, straight into the buffer of a part or through scratch memory."""

    start: int
    stop: int
    shares: list[tuple[Part, int, int]]  # what of it is whose
    target: memoryview | None = None


def cut(parts: Iterable[Part]) -> Iterator[Piece]:
    """The reads that give `parts` (in the order of the file, apart): few, aligned, in that order.

    Where a part has an aligned buffer its whole pages go there; all that lies between such bodies
    (small records, headers, the ends of large ones) is read together through scratch memory.
    """
    loose: Piece | None = None
    for part in parts:
        start = part.start
        if _has_body(part):
            if loose is not None:
                yield loose
                loose = None
            body = part.stop // PAGE * PAGE
            while start < body:
                stop = min(start + CHUNK, body)
                yield Piece(start, stop, [(part, start, stop)], part.own(start, stop))
                start = stop
        while start < part.stop:
            page = start // PAGE * PAGE
            if loose is not None and (page > loose.stop or start >= loose.start + CHUNK):
                yield loose
                loose = None
            if loose is None:
                loose = Piece(page, page, [])
            stop = min(part.stop, loose.start + CHUNK)
            loose.shares.append((part, start, stop))
            loose.stop = -(-stop // PAGE) * PAGE
            start = stop
    if loose is not None:
        yield loose


def _has_body(part: Part) -> bool:
    long = part.stop - part.start >= OWN_PAGES and part.start % PAGE == 0
    return long and part.buffer is not None and _on_a_page(part.buffer)


def run(file: File, parts: Iterable[Part], *, threads: int, fresh: bool) -> None:
    """Read `parts` (in the order of the file, apart) by `threads` at once.

    `fresh` reads from the device, whatever the page cache holds, as far as the system allows it.
    Raises what reading or a `take` raises, the first in the order of the file; `EOFError` with the
    offset where the file ends too early.
    """
    _Run(file, list(cut(parts)), fresh).go(threads)


class _Stopped(Exception):
    """What this piece waits for will never come."""


class _Run:
    """Threads that take pieces in order. Each reads its own; those of one part wait their turn.

    Whoever waits does so for an earlier piece, which somebody has in hand: nobody waits for ever.
    """

    def __init__(self, file: File, pieces: list[Piece], fresh: bool) -> None:
        self._file, self._pieces, self._fresh = file, pieces, fresh
        self._scratch = max((p.stop - p.start for p in pieces if p.target is None), default=0)
        self._turn = threading.Condition()
        self._next = 0
        self._end = len(pieces)  # pieces from here on are given up
        self._failure: BaseException | None = None  # that of the piece `_end`

    def go(self, threads: int) -> None:
        if self._fresh or any(piece.stop - piece.start > _PROBE for piece in self._pieces):
            self._file.open_direct()
        threads = min(threads, len(self._pieces))
        if threads <= 1:
            self._work()
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="holdfast-read") as pool:
                try:
                    for each in [pool.submit(self._work) for _thread in range(threads)]:
                        each.result()
                except BaseException as error:  # an interrupt: the pool waits for its threads
                    self._give_up(-1, error)
                    raise
        if self._failure is not None:
            raise self._failure

    def _give_up(self, index: int, error: BaseException) -> None:
        with self._turn:
            if index < self._end:
                self._end, self._failure = index, error
            self._turn.notify_all()

    def _work(self) -> None:
        scratch = memoryview(mmap.mmap(-1, self._scratch) if self._scratch else b"")
        while True:
            with self._turn:
                index = self._next
                self._next += 1
                if index >= self._end:
                    return
            try:
                self._do(index, scratch)
            except _Stopped:
                return
            except BaseException as error:  # noqa: BLE001 - `go` raises the first of them
                self._give_up(index, error)
                return

    def _do(self, index: int, scratch: memoryview) -> None:
        piece = self._pieces[index]
        buffer = scratch[: piece.stop - piece.start] if piece.target is None else piece.target
        end = piece.start + self._file.read(piece.start, buffer, fresh=self._fresh)
        for part, start, stop in piece.shares:
            if end < stop:
                raise EOFError(end)
            found = buffer[start - piece.start : stop - piece.start]
            if piece.target is None and part.buffer is not None:
                own = part.own(start, stop)
                own[:] = found
                found = own
            self._wait(index, part, start)
            part.take(found)
            part.done = stop
            if stop != part.stop:
                with self._turn:
                    self._turn.notify_all()

    def _wait(self, index: int, part: Part, start: int) -> None:
        if part.done != start:
            with self._turn:
                self._turn.wait_for(lambda: part.done == start or self._end < index)
                if part.done != start:
                    raise _Stopped
