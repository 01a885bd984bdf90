"""From the disk into memory: a few threads, page-aligned, past the page cache where that is faster.

Nothing of the format is known here: ranges of a file and who takes their bytes. Every byte is read
with a positional read into memory of our own and handed on as it lies there: a map of a file that
shrinks is a SIGBUS, and what was hashed must be what is used.
`HOLDFAST_DISABLE=direct` switches direct I/O off, for tests and odd systems.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from holdfast.checkpoint.system import PAGE, direct, filesystem, together

T = TypeVar("T")
CHUNK = 1 << 22  # bytes a read: hides the system call, and is still in the caches when hashed
OWN_PAGES = 1 << 18  # memory from this size on gets pages of its own: direct I/O can fill it
_WORTH = 1 << 20  # where fewer bytes than this are wanted, no question is asked about the cache
_SAMPLES = 9  # pages that are asked for: the majority says where the file is
PAUSES = (0.02, 0.1, 0.4)  # seconds before the next try at what the system has refused
# What trying again does not change: there is no such file, or it cannot be read in this way.
_FINAL = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
_seek_lock = threading.Lock()
_dice = random.Random()  # its own: the global generator belongs to the training


def patiently(work: Callable[[], T]) -> T:
    """Return `work()`. Try again a few times, half a second in all, where the system fails: it may
    be short of descriptors or memory for a moment, and one error of a disk says little.

    Raises the last `OSError`. It says nothing about the content of a file.
    """
    for pause in PAUSES:
        try:
            return work()
        except OSError as error:
            if error.errno in _FINAL:
                raise
        time.sleep(pause)
    return work()


def own_pages(size: int) -> mmap.mmap | None:
    """Writable memory of `size` bytes that starts on a page, for direct I/O.

    None where `size` is less than `OWN_PAGES` or the system has no more such pieces to give: the
    usual allocator does it then. No huge pages are asked for: where the kernel must compact memory
    to find them, loading took four times as long (docs/en/performance.md).
    """
    if size < OWN_PAGES or not hasattr(mmap, "MAP_PRIVATE"):
        return None
    try:
        return _map(size)
    except OSError:  # Linux gives a process 65530 maps
        return None


def _map(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size)
    # Private: a shared map would be one memory for this process and those that it forks.
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


# ---------------------------------------------------------------------------------------- one file


class File:
    """A file open for reading, a second time for direct I/O once `open_direct` has been called."""

    def __init__(self, path: Path, *, patient: bool = True) -> None:
        """Open `path`. `patient`: try again what the system refuses, as `patiently` does."""
        self._path = path
        self._try: Callable[[Callable[[], int]], int] = patiently if patient else _once
        self._fd = self._try(lambda: filesystem.open_regular(path, follow=True))
        self._direct = -1
        self._tried = False
        try:
            self.size = os.fstat(self._fd).st_size
        except BaseException:  # whatever ends this, an interrupt too, leaks no descriptor
            self.close()
            raise

    def close(self) -> None:
        open_ones, self._fd, self._direct = (self._fd, self._direct), -1, -1
        for fd in open_ones:
            if fd >= 0:
                os.close(fd)

    def open_direct(self) -> bool:
        """Make direct I/O possible where this platform and file system have it; whether they do."""
        if not self._tried and self._fd >= 0:
            self._tried = True
            if hasattr(os, "preadv") and not filesystem.disabled("direct"):
                self._reopen()
        return self._direct >= 0

    def _reopen(self) -> None:
        try:
            self._direct = filesystem.open_regular(self._path, follow=True)
            same = os.path.samestat(os.fstat(self._direct), os.fstat(self._fd))
        except OSError:  # the name has gone: what is open still reads
            same = False
        if self._direct >= 0 and not (same and direct.switch_on(self._direct)):
            os.close(self._direct)
            self._direct = -1

    def forget_cached(self, offset: int = 0, size: int = 0) -> None:
        """Ask the kernel to drop these pages (all: 0), so that the device is read next time."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, size, os.POSIX_FADV_DONTNEED)

    def read(self, offset: int, *buffers: memoryview, past_cache: bool = False) -> int:
        """Fill `buffers`, one behind the other; the bytes read, fewer only where the file ends.

        `past_cache` reads from the device: by direct I/O where it has been opened and `offset` and
        `buffers` are made for it, else after dropping these pages from the cache.
        """
        size, got = sum(buffer.nbytes for buffer in buffers), 0
        fit = offset % PAGE == 0 and all(map(direct.is_aligned, buffers))
        if past_cache and fit and self._direct >= 0:
            got = self._read_direct(offset, buffers, size)
        if past_cache and got < size:  # what direct reads have left over, if only the end
            self.forget_cached(offset + got // PAGE * PAGE, size - got // PAGE * PAGE)
        while got < size:
            rest, at = _behind(got, buffers), offset + got
            count = self._try(partial(_preadv, self._fd, rest, at))
            if count == 0:
                break
            got += count
        return got

    def _read_direct(self, offset: int, buffers: Sequence[memoryview], size: int) -> int:
        got = 0
        while got < size and got % PAGE == 0:  # it is not at the end of the file
            try:
                rest, at = _behind(got, buffers), offset + got
                count = self._try(partial(_preadv, self._direct, rest, at))
            except OSError as error:
                if error.errno != errno.EINVAL:  # opened for it and refuses it: odd, and allowed
                    raise
                return got
            if count == 0:
                break
            got += count
        return got

    def is_mostly_cached(self, pages: Sequence[int]) -> bool:
        """Whether the page cache has most of the file, judged by some of its `pages` (offsets); yes
        where the system cannot say, or where there is no way past the cache."""
        if not self.open_direct() or not hasattr(os, "RWF_NOWAIT"):
            return True
        return sum(map(self.is_cached, pages)) > len(pages) // 2

    def is_cached(self, offset: int) -> bool:
        """Whether the page cache has the page at `offset`, asked without waiting for the disk.

        It will have it afterwards, so ask for another one next time. Asking for many at once would
        have all of them read ahead.
        """
        try:
            return os.preadv(self._fd, [bytearray(1)], offset, os.RWF_NOWAIT) > 0
        except OSError as error:  # a file system that cannot say, or trouble that a read will meet
            return error.errno != errno.EAGAIN


def _once(work: Callable[[], int]) -> int:
    return work()


def _behind(got: int, buffers: Sequence[memoryview]) -> list[memoryview]:
    """What is left to fill of `buffers` when `got` bytes of them are filled."""
    rest = []
    for buffer in buffers:
        if got < buffer.nbytes:
            rest.append(buffer[got:])
        got = max(0, got - buffer.nbytes)
    return rest


def _preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, buffers, offset)
    with _seek_lock:  # Windows has no positional read
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, buffers[0].nbytes)
    buffers[0][: len(data)] = data
    return len(data)


def sample_pages(size: int) -> list[int]:
    """Some pages of a file of `size` bytes, to ask the cache for."""
    return [_dice.randrange(0, max(size, 1), PAGE) for _sample in range(_SAMPLES)]


# -------------------------------------------------------------------------------------- many parts


class Part:
    """The bytes from `start` to `stop` of a file, handed to `take` in order, in pieces.

    With `buffer`, they lie in it by then; without, `take` sees scratch memory that is used again.
    """

    __slots__ = ("buffer", "done", "left", "start", "stop", "take")

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
        self.left: dict[int, int] = {}  # what has been read too early to be taken, by its start

    def own(self, start: int, stop: int) -> memoryview:
        assert self.buffer is not None
        return self.buffer[start - self.start : stop - self.start]


@dataclass(slots=True)
class Piece:
    """Some whole pages, straight into the buffer of a part or through scratch memory."""

    start: int
    stop: int
    shares: list[tuple[Part, int, int]]  # what of it is whose
    target: memoryview | None = None


def cut(parts: Iterable[Part]) -> list[list[Piece]]:
    """The reads that give `parts` (in the order of the file, apart): pieces that touch, in order.

    Where a part has an aligned buffer its whole pages go there; all that lies between such bodies
    (small records, headers, the ends of large ones) goes through scratch memory. No read crosses a
    multiple of `CHUNK`, so they are as large as they can be, and of one size.
    """
    reads: list[list[Piece]] = []
    for part in parts:
        body = part.stop // PAGE * PAGE if _has_body(part) else part.start
        start = part.start
        while start < part.stop:
            page = start // PAGE * PAGE
            grid = (page // CHUNK + 1) * CHUNK
            stop = min(grid, body if start < body else part.stop)
            last = reads[-1][-1] if reads else None
            if start < body:
                piece = Piece(start, stop, [], part.own(start, stop))
            elif last and _goes_on(last, page):
                piece = last
            else:
                piece = Piece(page, page, [])
            piece.shares.append((part, start, stop))
            piece.stop = max(piece.stop, -(-stop // PAGE) * PAGE)
            if piece is not last:
                if last and last.stop == piece.start and piece.start % CHUNK:
                    reads[-1].append(piece)
                else:
                    reads.append([piece])
            start = stop
    return reads


def _goes_on(last: Piece, page: int) -> bool:
    """Whether what starts on `page` goes through the same scratch memory as `last`."""
    return last.target is None and page <= last.stop and page // CHUNK * CHUNK < last.stop


def _has_body(part: Part) -> bool:
    if part.buffer is None or part.stop - part.start < OWN_PAGES or part.start % PAGE:
        return False
    return direct.is_aligned(part.own(part.start, part.stop // PAGE * PAGE))


def run(file: File, parts: Iterable[Part], *, threads: int, fresh: bool) -> None:
    """Read `parts` (in the order of the file, apart) by `threads` at once.

    `fresh` reads from the device, whatever the page cache holds, as far as the system allows it.
    Otherwise that is done where most of the file is not cached: then it is faster, and nobody
    else's pages make room for these.
    Raises what reading or a `take` raises, the first in the order of the file; `EOFError` with the
    offset where the file ends too early.
    """
    _Run(file, cut(parts), fresh).go(threads)


class _Stopped(Exception):
    """What this read waits for will never come."""


class _Run:
    """Threads that take reads in order, hash what they have read, and wait where a part's earlier
    bytes are not hashed yet: another thread has them in hand, so nobody waits for ever.
    """

    def __init__(self, file: File, reads: list[list[Piece]], fresh: bool) -> None:
        self._file, self._reads = file, reads
        self._past_cache = self._open_direct(fresh)
        loose = (sum(p.stop - p.start for p in r if p.target is None) for r in reads)
        self._scratch = max(loose, default=0)
        self._turn = threading.Condition()
        self._next = 0
        self._end = len(reads)  # reads from here on are given up
        self._failure: BaseException | None = None  # that of the read `_end`

    def go(self, threads: int) -> None:
        together(self._work, min(threads, len(self._reads)), stop=lambda: self._give_up(-1, None))
        if self._failure is not None:
            try:
                raise self._failure
            finally:
                self._failure = None  # no ring of error, frames and buffers that outlives its use

    def _open_direct(self, fresh: bool) -> bool:
        """Whether to read past the page cache; without direct I/O only what must be `fresh` is."""
        if not fresh and sum(r[-1].stop - r[0].start for r in self._reads) < _WORTH:
            return False
        if not self._file.open_direct() or fresh:
            return fresh
        places = [_dice.choice(self._reads) for _sample in range(_SAMPLES)]
        pages = [_dice.randrange(r[0].start, r[-1].stop, PAGE) for r in places]
        return not self._file.is_mostly_cached(pages)

    def _give_up(self, index: int, error: BaseException | None) -> None:
        with self._turn:
            if index < self._end:
                self._end, self._failure = index, error
            self._turn.notify_all()

    def _work(self) -> None:
        scratch = memoryview(patiently(lambda: _map(self._scratch)) if self._scratch else b"")
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
        pieces = self._reads[index]
        buffers = []
        for piece in pieces:
            size = piece.stop - piece.start
            buffers.append(scratch[:size] if piece.target is None else piece.target)
            scratch = scratch if piece.target is not None else scratch[size:]
        start = pieces[0].start
        end = start + self._file.read(start, *buffers, past_cache=self._past_cache)
        for piece, buffer in zip(pieces, buffers, strict=True):
            for part, start, stop in piece.shares:
                if end < stop:
                    raise EOFError(end)
                found = buffer[start - piece.start : stop - piece.start]
                if piece.target is None and part.buffer is not None:
                    part.own(start, stop)[:] = found
                self._hand_on(index, part, start, stop, found)

    def _hand_on(self, index: int, part: Part, start: int, stop: int, found: memoryview) -> None:
        """Let `part` take what was found, in its turn: bytes that lie where they belong can be left
        to the thread whose turn it is, those in scratch memory must wait for it."""
        with self._turn:
            if part.done != start and part.buffer is not None:
                part.left[start] = stop
                return
            self._turn.wait_for(lambda: part.done == start or self._end < index)
            if part.done != start:
                raise _Stopped
        while True:
            part.take(found if part.buffer is None else part.own(start, stop))
            with self._turn:
                part.done = start = stop
                if start not in part.left:
                    self._turn.notify_all()
                    return
                stop = part.left.pop(start)
