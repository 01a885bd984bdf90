"""The only door to the disk on the write side: every call that durability hangs on is made here.

Files of a run directory, which a stranger may have packed, are opened by `open_regular` alone.

One small seam on purpose: faults are injected here, and platforms differ here and nowhere else.
`HOLDFAST_DISABLE=hardlinks,reflink,fallocate,direct,sharedmemory` switches fast paths
off, for tests and odd systems.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import shutil
import stat
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from holdfast.checkpoint.system import direct
from holdfast.checkpoint.system.pages import PAGE, Buffer

log = logging.getLogger("holdfast")

_FICLONE = 0x40049409  # ioctl(2): share the blocks of another file (Btrfs, XFS, bcachefs)
WRITE_MAX = 1 << 30  # Linux writes at most 2 GiB - 4 KiB a call
READ_ONLY = 0o444
RESERVE = 64 << 20  # bytes that stay free: logs and the history must still be written
_PREFIX = ".holdfast-"
SMALL = 64 << 20  # bytes: far more than any settings, cache or tokenizer of a run takes
said: set[str] = set()
_seek_lock = threading.Lock()


def disabled(fast_path: str) -> bool:
    """Return True if `HOLDFAST_DISABLE` switches this fast path off."""
    return fast_path in os.environ.get("HOLDFAST_DISABLE", "").split(",")


def _say_once(message: str, *args: object) -> None:
    if message not in said:
        said.add(message)
        log.info(message, *args)


# ------------------------------------------------------------------------- files of a stranger


def open_regular(path: Path, flags: int = os.O_RDONLY, *, follow: bool = False) -> int:
    """Open `path` and return its descriptor, only if it is a regular file.

    A FIFO would block the open for ever, a device never ends, and a symbolic link leads out of the
    run directory: `follow` one only where the user has named it. Raises OSError.
    """
    flags |= _EXTRA_FLAGS | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    if follow:
        flags &= ~getattr(os, "O_NOFOLLOW", 0)
    fd = os.open(path, flags, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    except BaseException:  # an interrupt, too, leaks no descriptor
        os.close(fd)
        raise
    return fd


def read_small(path: Path, most: int = SMALL, *, follow: bool = False) -> bytes:
    """Return the bytes of a regular file of at most `most` bytes. Raises OSError."""
    with os.fdopen(open_regular(path, follow=follow), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return data


# ---------------------------------------------------------------------------------- durability


def sync_file(fd: int) -> None:
    """Return when the bytes of `fd` are on the device, as far as the platform can promise it."""
    if sys.platform == "darwin":
        import fcntl

        # fsync(2) of macOS does not flush the drive's cache; F_FULLFSYNC does. Some network
        # file systems lack it.
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def sync_directory(path: Path) -> None:
    """Make the names in `path` durable: a rename is only promised after this."""
    if os.name == "nt":  # Windows journals names with the file and cannot open a directory
        return
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        _say_once("This file system cannot sync a directory; it keeps names its own way.")
    finally:
        os.close(fd)


def check_links(path: Path) -> None:
    """Raise OSError (ENOLINK, with both names) if `path` or a parent is a link to nothing.

    As a rule it leads to a disk that is not mounted: to create what is missing there would put a
    run on another disk, where the next mount hides it.
    """
    for each in (path, *path.parents):
        if each.is_symlink() and not each.exists():
            said = os.strerror(errno.ENOLINK)
            raise OSError(errno.ENOLINK, said, str(each), None, str(each.readlink()))


def make_directory(path: Path) -> None:
    """Create `path` and its parents, each durable before what is put into it. Raises OSError."""
    if path.is_dir():
        return
    check_links(path)
    make_directory(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    sync_directory(path.parent)


# ---------------------------------------------------------------------------------- whole files


def write_file(
    target: Path,
    pieces: Iterable[tuple[int, Buffer]],
    size: int,
    *,
    mode: int = READ_ONLY,
    ready: direct.Ready | None = None,
    limit: float = 0,
) -> None:
    """Create or replace `target` durably: it has all of its bytes, or it is as it was before.

    `pieces` are `(offset, bytes)` in ascending order without gaps, `size` bytes together. The
    space is claimed before the first byte, so a full disk is known at once. Pieces of whole pages
    go past the page cache where the file system can do that, at `limit` bytes a second, 0 for any
    number. `ready(end)` is called before the bytes up to `end` are taken. `OSError` as it
    comes; the temporary file is gone then.
    """
    with replacing(target) as file:
        allocate(file.fileno(), size)
        write_ranges(file.fileno(), pieces, ready=ready, limit=limit)
        if hasattr(os, "fchmod"):
            os.fchmod(file.fileno(), mode)


def write_ranges(
    fd: int,
    ranges: Iterable[tuple[int, Buffer]],
    *,
    ready: direct.Ready | None = None,
    limit: float = 0,
) -> None:
    """Write `(offset, bytes)` in ascending order; what lies between them is left as it is.

    Where all of them are whole pages in aligned memory they go past the page cache. `ready` and
    `limit` as for `write_file`.
    """
    views = [(offset, memoryview(each).cast("B")) for offset, each in ranges if len(each)]
    if views and all(offset % PAGE == 0 and direct.is_aligned(view) for offset, view in views):
        if disabled("direct") or not direct.switch_on(fd):
            _say_once("No direct writes here: checkpoints pass through the page cache.")
        direct.write_blocks(fd, views, write_all, ready=ready, limit=limit)
        return
    for offset, view in views:
        if ready is not None:
            ready(offset + len(view))
        write_all(fd, view, offset)


@contextlib.contextmanager
def replacing(target: Path, prefix: str = ".holdfast-") -> Iterator[BinaryIO]:
    """Yield a new file, of any length, which becomes `target` durably when the block ends.

    Where the block fails the file is removed and `target` is as it was. The file's name begins with
    `prefix` until then. `OSError` as it comes.
    """
    temporary = temporary_name(target, prefix)
    new = open(temporary, "x+b", opener=_open_without_following)  # noqa: SIM115 - below
    try:
        with new as file:
            yield file
            file.flush()
            sync_file(file.fileno())
        rename(temporary, target)
    except BaseException:  # an interrupt, too, leaves nothing half-written
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(target.parent)


def write_json(target: Path, value: Any) -> None:
    """Replace the small file `target` durably with `value` as JSON."""
    text = json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass") + b"\n"
    write_file(target, [(0, text)], len(text), mode=0o644)


def append_line(path: Path, line: str) -> None:
    """Append `line` durably in one write; a torn last line of a crash is closed off first."""
    fd = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        end = os.lseek(fd, 0, os.SEEK_END)
        torn = end > 0 and _last_byte(fd, end) != b"\n"
        data = ("\n" if torn else "") + line + "\n"
        _append_all(fd, data.encode("utf-8", "surrogatepass"))
        sync_file(fd)
    finally:
        os.close(fd)
    if end == 0:
        sync_directory(path.parent)


def publish(source: Path, name: Path, *, copy: bool = True) -> str:
    """Let `name` stand for the data of `source`: "link", "reflink" or "copy", whichever works.

    Replaces `name` atomically; without `copy`, "" where only a copy would do. The caller syncs the
    directory once after all its names.
    """
    temporary = temporary_name(name)
    try:
        how = link(source, temporary) or reflink(source, temporary)
        if not how and copy:
            how = _copy(source, temporary)
        if how:
            rename(temporary, name)
    finally:
        # A rename between two links of one inode does nothing and leaves both: take ours away.
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return how


def same_data(a: Path, b: Path) -> bool:
    """Return True if two names are links to one inode."""
    try:
        return a.samefile(b)
    except (FileNotFoundError, NotADirectoryError):
        return False


def move(source: Path, target: Path) -> Path:
    """Rename durably into another directory of the same file system, never over anything.

    Returns where it lies now.
    """
    make_directory(target.parent)
    while target.exists():
        target = target.with_name(f"{target.stem}-{secrets.token_hex(2)}{target.suffix}")
    rename(source, target)
    sync_directory(target.parent)
    sync_directory(source.parent)
    return target


def remove(path: Path) -> None:
    """Unlink `path`; a name that is gone already is no error: a crash repeats the clean-up."""
    with contextlib.suppress(FileNotFoundError):
        if os.name == "nt":
            path.chmod(0o600)  # Windows refuses to delete read-only files
        path.unlink()


def is_temporary(name: str) -> bool:
    """Return True for a temporary file of a writer, which is dead if the run lock is ours."""
    return name.startswith(_PREFIX)


def temporaries(directory: Path) -> Iterator[Path]:
    """Yield the temporary files in `directory`, if there is one."""
    if directory.is_dir():
        yield from (path for path in directory.iterdir() if is_temporary(path.name))


def try_writing(directory: Path) -> None:
    """Raise the `OSError` that a new file in `directory` would meet now."""
    temporary = temporary_name(directory / "probe")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _EXTRA_FLAGS, 0o600))
    temporary.unlink()


def free_bytes(directory: Path) -> int:
    """Return the bytes that an unprivileged process may still write on the disk of `directory`."""
    return shutil.disk_usage(directory).free


# ------------------------------------------------------------------------------------ the details

_EXTRA_FLAGS = (
    getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
)


def temporary_name(target: Path, prefix: str = ".holdfast-") -> Path:
    """Return a name of our own beside the target: another directory might be another device.

    The target's name is not part of it: that may already be as long as a name can be.
    """
    return target.with_name(f"{prefix}{os.getpid()}-{secrets.token_hex(6)}.tmp")


def _open_without_following(name: str, flags: int) -> int:
    return os.open(name, flags | _EXTRA_FLAGS, 0o644)


def allocate(fd: int, size: int) -> None:
    if size == 0 or not hasattr(os, "posix_fallocate") or disabled("fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        _say_once("This file system cannot reserve space ahead; a full disk shows while writing.")


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data`: a short write is continued, one of zero bytes is an error."""
    done = 0
    while done < data.nbytes:
        done += _written(pwrite(fd, data[done : done + WRITE_MAX], offset + done))


def _append_all(fd: int, data: bytes) -> None:
    done = 0
    while done < len(data):
        done += _written(os.write(fd, data[done:]))


def _written(count: int) -> int:
    if count == 0:
        raise OSError(errno.EIO, "the system wrote zero bytes")
    return count


def pwrite(fd: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _seek_lock:  # Windows has no positional write, and a file has several writers
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def _last_byte(fd: int, end: int) -> bytes:
    os.lseek(fd, end - 1, os.SEEK_SET)
    return os.read(fd, 1)


def rename(source: Path, target: Path) -> None:
    source.replace(target)


def link(source: Path, target: Path) -> str:
    if disabled("hardlinks"):
        return ""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        _say_once("No hard links here (%s): names of one checkpoint are copies.", error)
        return ""
    return "link"


def reflink(source: Path, target: Path) -> str:
    if disabled("reflink") or not sys.platform.startswith("linux"):
        return ""
    import fcntl

    with source.open("rb") as original:
        fd = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _EXTRA_FLAGS, 0o600)
        try:
            fcntl.ioctl(fd, _FICLONE, original.fileno())
            os.fchmod(fd, READ_ONLY)
            sync_file(fd)
            return "reflink"
        except OSError:
            target.unlink()
            return ""
        finally:
            os.close(fd)


def _copy(source: Path, target: Path) -> str:
    target.touch(0o600, exist_ok=False)
    shutil.copyfile(source, target)
    with target.open("r+b") as copy:
        target.chmod(READ_ONLY)
        sync_file(copy.fileno())
    return "copy"
