"""Reading from the disk: every byte once, in order, by several threads, on every kind of system."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.checkpoint.format import reading
from holdfast.checkpoint.format.reading import CHUNK, OWN_PAGES, File, Part, own_pages, run
from holdfast.checkpoint.system import direct, filesystem
from holdfast.checkpoint.system.pages import PAGE

Ways = Callable[[pytest.MonkeyPatch], None]


def _refused(patch: pytest.MonkeyPatch) -> None:
    """A file system that can be opened for direct I/O and then refuses every read."""
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        if is_direct(fd):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffers, offset, *flags)

    patch.setattr(os, "preadv", preadv)


def _cannot_say(patch: pytest.MonkeyPatch) -> None:
    """A file system that does not know what it has cached."""
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        if flags:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(fd, buffers, offset, *flags)

    patch.setattr(os, "preadv", preadv)


WAYS: dict[str, Ways] = {
    "as it is": lambda _patch: None,
    "switched off": lambda patch: patch.setenv("HOLDFAST_DISABLE", "hardlinks,direct"),
    "not to be had": lambda patch: patch.setattr(direct, "switch_on", lambda _fd: False),
    "opened and refused": _refused,
    "cache unknown": _cannot_say,
    "no preadv": lambda patch: patch.delattr(os, "preadv"),
    "no RWF_NOWAIT": lambda patch: patch.delattr(os, "RWF_NOWAIT"),
    "no private maps": lambda patch: patch.delattr("mmap.MAP_PRIVATE"),
    "no huge pages": lambda patch: patch.delattr("mmap.MADV_HUGEPAGE"),
}


def is_direct(fd: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, bytes]:
    """A file of a few chunks that does not end on a page, and what is in it."""
    content = random.Random(7).randbytes(3 * CHUNK + 12_345)
    path = tmp_path / "file"
    path.write_bytes(content)
    return path, content


@pytest.fixture
def file(data: tuple[Path, bytes]) -> Iterator[File]:
    file = File(data[0])
    yield file
    file.close()


def drop_cache(path: Path) -> None:
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Reads:
    """What was read, how: (offset, bytes) of direct reads and of others."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.direct: list[tuple[int, int]] = []
        self.cached: list[tuple[int, int]] = []
        real = os.preadv

        def preadv(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
            count = real(fd, buffers, offset, *flags)
            if not flags:  # no question about the cache
                (self.direct if is_direct(fd) else self.cached).append((offset, count))
            return count

        patch.setattr(os, "preadv", preadv)


def needs_direct(file: File) -> None:
    if not file.open_direct():
        pytest.skip("this file system has no direct I/O")


def collect(start: int, stop: int, buffer: memoryview | None = None) -> tuple[Part, bytearray]:
    taken = bytearray()
    return Part(start, stop, taken.extend, buffer), taken


def random_parts(rng: random.Random, end: int) -> list[tuple[Part, bytearray]]:
    """Ranges apart from each other: tiny, small, with memory of their own on a page and beside."""
    parts = []
    cursor = 0
    while True:
        size = rng.choice([0, 1, 100, PAGE, OWN_PAGES - 1, OWN_PAGES + 77, CHUNK, CHUNK + PAGE + 1])
        start = cursor + rng.choice([0, 0, 1, 5000, 300_000])
        pages = own_pages(size) if rng.random() < 0.7 else None
        buffer = memoryview(pages or bytearray(size)) if rng.random() < 0.7 else None
        if pages is not None:
            start = -(-start // PAGE) * PAGE
        if start + size > end:
            return parts
        parts.append(collect(start, start + size, buffer))
        cursor = start + size


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_part_gets_its_bytes_in_order(
    data: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch, way: str, fresh: bool, threads: int
) -> None:
    path, content = data
    WAYS[way](monkeypatch)
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    file = File(path)
    for cold in (True, False):
        if cold:
            drop_cache(path)
        parts = random_parts(rng, len(content))
        run(file, [part for part, _taken in parts], threads=threads, fresh=fresh)
        for part, taken in parts:
            expected = content[part.start : part.stop]
            assert taken == expected
            assert part.buffer is None or part.buffer == expected
    file.close()


def test_what_is_not_cached_is_read_past_the_cache(
    data: tuple[Path, bytes], file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_direct(file)
    path, content = data
    drop_cache(path)
    reads = Reads(monkeypatch)
    part, taken = collect(0, len(content))
    run(file, [part], threads=2, fresh=False)
    assert taken == content
    assert sum(count for _offset, count in reads.direct) == len(content)


def test_what_is_cached_is_taken_from_the_cache(
    data: tuple[Path, bytes], file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = data
    assert path.read_bytes() == content  # now it is
    reads = Reads(monkeypatch)
    part, taken = collect(0, len(content))
    run(file, [part], threads=2, fresh=False)
    assert taken == content
    assert not reads.direct


def test_fresh_is_from_the_device_whatever_is_cached(
    data: tuple[Path, bytes], file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_direct(file)
    path, content = data
    assert path.read_bytes() == content
    reads = Reads(monkeypatch)
    part, taken = collect(0, len(content))
    run(file, [part], threads=2, fresh=True)
    assert taken == content
    assert sum(count for _offset, count in reads.direct) == len(content)
    assert sum(count for _offset, count in reads.cached) == 0


@pytest.mark.parametrize("way", ["switched off", "not to be had", "opened and refused"])
def test_fresh_without_direct_reads_drops_the_pages_first(
    data: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    WAYS[way](monkeypatch)
    dropped = 0
    real = os.posix_fadvise

    def advise(fd: int, offset: int, size: int, advice: int) -> None:
        nonlocal dropped
        assert advice == os.POSIX_FADV_DONTNEED
        dropped += size
        real(fd, offset, size, advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    path, content = data
    file = File(path)
    part, taken = collect(0, len(content))
    run(file, [part], threads=2, fresh=True)
    file.close()
    assert taken == content
    assert dropped >= len(content)


def test_what_direct_reads_leave_over_is_dropped_from_the_cache_too(
    data: tuple[Path, bytes], file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that gives a page directly and refuses the next: the rest must be as fresh."""
    needs_direct(file)
    _path, content = data
    dropped: list[tuple[int, int]] = []
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        if not is_direct(fd):
            return real(fd, buffers, offset, *flags)
        if offset % CHUNK:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, [buffers[0][:PAGE]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(File, "forget_cached", lambda _file, *what: dropped.append(what))
    part, taken = collect(0, len(content))
    run(file, [part], threads=2, fresh=True)
    assert taken == content
    whole = [(start + PAGE, CHUNK - PAGE) for start in range(0, 3 * CHUNK, CHUNK)]
    assert sorted(dropped)[:3] == whole


def from_the_device() -> int:
    """Bytes that this process has had fetched from a device, ever."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


@pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="nobody counts here")
@pytest.mark.parametrize("way", ["as it is", "switched off", "not to be had", "opened and refused"])
def test_what_was_written_through_the_cache_is_read_from_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """What the kernel counts, not what we asked for: the file lies in the page cache as a whole."""
    path, content = tmp_path / "file", random.Random(7).randbytes(3 * CHUNK + 12_345)
    filesystem.write_file(path, [(0, content)], len(content))

    def fetched(*, fresh: bool) -> int:
        before = from_the_device()
        file, (part, taken) = File(path), collect(0, len(content))
        run(file, [part], threads=2, fresh=fresh)
        file.close()
        assert taken == content
        return from_the_device() - before

    drop_cache(path)
    if fetched(fresh=False) < len(content):
        pytest.skip("a file system without a device, or without a page cache")
    assert path.read_bytes() == content
    WAYS[way](monkeypatch)
    assert fetched(fresh=False) < len(content), "it lies in the cache"
    assert path.read_bytes() == content
    assert fetched(fresh=True) >= len(content)


def test_a_file_of_another_inode_under_the_same_name_is_not_read(
    data: tuple[Path, bytes], file: File
) -> None:
    """The second descriptor is opened by name, and a save may have replaced what has that name."""
    path, content = data
    other = path.with_name("other")
    other.write_bytes(bytes(len(content)))
    other.replace(path)
    part, taken = collect(0, len(content))
    run(file, [part], threads=2, fresh=True)
    assert taken == content


@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_that_shrinks_is_an_error_and_no_signal(
    data: tuple[Path, bytes], file: File, threads: int
) -> None:
    path, content = data
    part, _taken = collect(0, len(content))
    os.truncate(path, CHUNK + 100)
    with pytest.raises(EOFError) as caught:
        run(file, [part], threads=threads, fresh=False)
    assert caught.value.args == (CHUNK + 100,)


class Fault(Exception):
    pass


def test_of_many_faults_the_first_in_the_file_is_raised(
    data: tuple[Path, bytes], file: File
) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)

    def refuse(at: int) -> Callable[[memoryview], None]:
        def take(_found: memoryview) -> None:
            raise Fault(at)

        return take

    end = len(data[1])
    for _round in range(50):
        bad = set(rng.sample(range(40), rng.choice([1, 2, 10])))
        steps = [end * i // 40 for i in range(41)]
        parts = [
            Part(steps[i], steps[i + 1], refuse(i) if i in bad else lambda _found: None)
            for i in range(40)
        ]
        with pytest.raises(Fault) as caught:
            run(file, parts, threads=4, fresh=False)
        assert caught.value.args == (min(bad),)


def test_what_a_thread_meets_at_the_disk_is_raised(
    data: tuple[Path, bytes], file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        if offset >= CHUNK:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    part, _taken = collect(0, len(data[1]))
    with pytest.raises(OSError, match="Input/output"):
        run(file, [part], threads=4, fresh=False)
    assert not [t for t in threading.enumerate() if t.name.startswith("holdfast-read")]


def test_an_interrupt_ends_the_threads_first(data: tuple[Path, bytes], file: File) -> None:
    """Ctrl-C while they read: no thread goes on in a file that is closed then."""
    pieces = 0

    def take(_found: memoryview) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 1:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.2)

    step = len(data[1]) // 50
    with pytest.raises(KeyboardInterrupt):
        run(file, [Part(i * step, (i + 1) * step, take) for i in range(50)], threads=2, fresh=True)
    assert pieces < 50
    assert not [t for t in threading.enumerate() if t.name.startswith("holdfast-read")]


def test_own_pages_are_private_to_a_process() -> None:
    pages = own_pages(OWN_PAGES)
    assert pages is not None
    pid = os.fork()
    if pid == 0:
        pages[0] = 1
        os._exit(0)
    os.waitpid(pid, 0)
    assert pages[0] == 0
    assert own_pages(OWN_PAGES - 1) is None


def test_the_global_random_numbers_are_left_alone(data: tuple[Path, bytes], file: File) -> None:
    """They belong to the training: loading must not draw from them."""
    before = random.getstate()
    drop_cache(data[0])
    part, _taken = collect(0, len(data[1]))
    run(file, [part], threads=2, fresh=False)
    assert random.getstate() == before


def test_no_more_maps_to_be_had_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(reading.mmap, "mmap", full)
    assert own_pages(OWN_PAGES) is None
