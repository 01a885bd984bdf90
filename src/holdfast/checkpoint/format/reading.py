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

    def read(self, offset: int, buffer: memoryview, *, past_cache: bool = False) -> int:
        """Fill `buffer`; return the bytes read, fewer only where the file ends.

        `past_cache` reads from the device: by direct I/O where it has been opened and `offset` and
        `buffer` are aligned for it, else after dropping these pages from the cache.
        """
        got = 0
        if past_cache and offset % PAGE == 0 and direct.is_aligned(buffer) and self._direct >= 0:
            got = self._read_direct(offset, buffer)
        if past_cache and got < len(buffer):  # what direct reads have left over, if only the end
            whole = got // PAGE * PAGE
            self.forget_cached(offset + whole, len(buffer) - whole)
        while got < len(buffer):
            count = self._try(partial(_pread, self._fd, buffer[got:], offset + got))
            if count == 0:
                break
            got += count
        return got

    def _read_direct(self, offset: int, buffer: memoryview) -> int:
        got = 0
        while got < len(buffer) and got % PAGE == 0:  # it is not at the end of the file
            try:
                count = self._try(partial(_pread, self._direct, buffer[got:], offset + got))
            except OSError as error:
                if error.errno != errno.EINVAL:  # opened for it and refuses it: odd, and allowed
                    raise
                return got
            if count == 0:
                break
            got += count
        return got

    def is_mostly_cached(self, pages: Sequence[int]) -> bool:
        """Return True if the page cache has most of the file, judged by some of its `pages`
        (offsets); also where the system cannot say, or where there is no way past the cache."""
        if not self.open_direct() or not hasattr(os, "RWF_NOWAIT"):
            return True
        return sum(map(self.is_cached, pages)) > len(pages) // 2

    def is_cached(self, offset: int) -> bool:
        """Return True if the page cache has the page at `offset`, without waiting for the disk.

        It will have it afterwards, so ask for another one next time. Asking for many at once would
        have all of them read ahead.
        """
        try:
            return os.preadv(self._fd, [bytearray(1)], offset, os.RWF_NOWAIT) > 0
        except OSError as error:  # a file system that cannot say, or trouble that a read will meet
            return error.errno != errno.EAGAIN


def _once(work: Callable[[], int]) -> int:
    return work()


def _pread(fd: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    with _seek_lock:  # Windows has no positional read
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, buffer.nbytes)
    buffer[: len(data)] = data
    return len(data)


def sample_pages(size: int) -> list[int]:
    """Some pages of a file of `size` bytes, to ask the cache for."""
    return [_dice.randrange(0, max(size, 1), PAGE) for _sample in range(_SAMPLES)]


# -------------------------------------------------------------------------------------- many parts


class Part:
    """The bytes from `start` to `stop` of a file, handed to `take` in order, in pieces.

    With `buffer`, they lie in it by then; without, `take` sees scratch memory that is used again.
    """

    __slots__ = ("body", "buffer", "start", "stop", "take")

    def __init__(
        self,
        start: int,
        stop: int,
        take: Callable[[memoryview], None],
        buffer: memoryview | None = None,
    ) -> None:
        assert buffer is None or buffer.nbytes == stop - start, (buffer, start, stop)
        self.start, self.stop, self.take, self.buffer = start, stop, take, buffer
        self.body = self._body()  # whole pages up to this byte are read straight into `buffer`

    def own(self, start: int, stop: int) -> memoryview:
        """Return the part of `buffer` for these bytes of the file."""
        assert self.buffer is not None
        return self.buffer[start - self.start : stop - self.start]

    def _body(self) -> int:
        if self.buffer is None or self.stop - self.start < OWN_PAGES or self.start % PAGE:
            return self.start
        body = self.stop // PAGE * PAGE
        return body if direct.is_aligned(self.own(self.start, body)) else self.start


def grouped(parts: Iterable[Part]) -> list[list[Part]]:
    """Return `parts` (in the order of the file, apart) in groups of about `CHUNK` bytes, each for
    one thread. A part with a body of its own ends its group."""
    groups: list[list[Part]] = [[]]
    for part in parts:
        if part.start == part.stop:
            continue
        if groups[-1] and part.start - groups[-1][-1].stop >= PAGE:
            groups.append([])  # what lies between is not wanted
        groups[-1].append(part)
        if part.stop - groups[-1][0].start >= CHUNK or part.body > part.start:
            groups.append([])
    return [group for group in groups if group]


def run(file: File, parts: Iterable[Part], *, threads: int, fresh: bool) -> None:
    """Read `parts` (in the order of the file, apart) by `threads` at once.

    `fresh` reads from the device, whatever the page cache holds, as far as the system allows it.
    Otherwise that is done where most of the file is not cached: then it is faster, and the pages
    of other processes stay cached.
    Raises what reading or a `take` raises, the first in the order of the file; `EOFError` with the
    offset where the file ends too early.
    """
    _Run(file, grouped(parts), fresh).go(threads)


class _Run:
    """Threads that take one group of parts after another, read it and hand it on in order."""

    def __init__(self, file: File, groups: list[list[Part]], fresh: bool) -> None:
        self._file, self._groups = file, groups
        self._past_cache = self._open_direct(fresh)
        self._lock = threading.Lock()
        self._next = 0
        self._end = len(groups)  # groups from here on are given up
        self._failure: BaseException | None = None  # that of the group `_end`

    def go(self, threads: int) -> None:
        together(self._work, min(threads, len(self._groups)), stop=lambda: self._give_up(-1, None))
        if self._failure is not None:
            try:
                raise self._failure
            finally:
                self._failure = None  # no ring of error, frames and buffers that outlives its use

    def _open_direct(self, fresh: bool) -> bool:
        """Return True to read past the page cache: only if `fresh` where there is no direct I/O."""
        if not fresh and sum(g[-1].stop - g[0].start for g in self._groups) < _WORTH:
            return False
        if not self._file.open_direct() or fresh:
            return fresh
        places = [_dice.choice(self._groups) for _sample in range(_SAMPLES)]
        pages = [_dice.randrange(g[0].start // PAGE * PAGE, g[-1].stop, PAGE) for g in places]
        return not self._file.is_mostly_cached(pages)

    def _give_up(self, index: int, error: BaseException | None) -> None:
        with self._lock:
            if index < self._end:
                self._end, self._failure = index, error

    def _work(self) -> None:
        scratch = memoryview(patiently(lambda: _map(CHUNK)))  # touched as far as it is used
        while True:
            with self._lock:
                index = self._next
                self._next += 1
                if index >= self._end:
                    return
            try:
                self._read(self._groups[index], scratch)
            except BaseException as error:  # noqa: BLE001 - `go` raises the first of them
                self._give_up(index, error)
                return

    def _read(self, group: list[Part], scratch: memoryview) -> None:
        """Read a group. Whole pages of a body go straight into its buffer; all else (headers, small
        records, the ends of large ones) goes through scratch memory, several parts at a time."""
        last = group[-1]
        first = stop = 0  # the bytes of the file that lie in scratch memory
        for part in group:
            at = part.start
            while at < part.stop:
                if at < part.body:
                    end = min(at + CHUNK, part.body)
                    found = self._fill(at, part.own(at, end), end)
                else:
                    if at >= stop:
                        first = at // PAGE * PAGE
                        until = last.start if at < last.start < last.body else last.stop
                        stop = min(until, first + CHUNK)
                        self._fill(first, scratch[: -(-(stop - first) // PAGE) * PAGE], stop)
                    end = min(part.stop, stop)
                    found = scratch[at - first : end - first]
                    if part.buffer is not None:
                        own = part.own(at, end)
                        own[:] = found
                        found = own
                part.take(found)
                at = end

    def _fill(self, start: int, buffer: memoryview, needed: int) -> memoryview:
        """Fill `buffer` from byte `start` of the file; at least up to byte `needed` of it."""
        end = start + self._file.read(start, buffer, past_cache=self._past_cache)
        if end < needed:
            raise EOFError(end)
        return buffer
