"""Hold the image of one snapshot in memory, and say how much memory there is for more.

torch is imported only where a GPU or a tensor is asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PREFAULT = 64 << 20  # bytes a system call: the process must be able to end in between
_MADV_POPULATE_WRITE = 23  # madvise(2), Linux 5.14: fault all pages in at once
_libc = ctypes.CDLL(None) if os.name == "posix" else None


class Slot:
    """A page-aligned buffer of this process that holds the image of one snapshot at a time."""

    def __init__(self, capacity: int) -> None:
        """Take `capacity` bytes. Raises `OSError` or MemoryError where there is no room."""
        self.capacity = capacity
        self._map = self._allocate()
        self.buffer = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        self._pinned = False

    def _allocate(self) -> mmap.mmap:
        if os.name != "posix":
            return mmap.mmap(-1, self.capacity)
        anonymous = mmap.mmap(
            -1, self.capacity, flags=mmap.MAP_PRIVATE | getattr(mmap, "MAP_ANONYMOUS", 0x20)
        )
        with contextlib.suppress(OSError, AttributeError):  # a wish, and Linux only
            anonymous.madvise(mmap.MADV_HUGEPAGE)
        return anonymous

    def prefault(self, size: int) -> None:
        """Touch the pages of the first `size` bytes now, rather than in the first snapshot.

        The content stays: a snapshot may be under way in the meantime.
        """
        if _libc is not None:
            for start in range(0, size, _PREFAULT):
                part = min(_PREFAULT, size - start)
                _libc.madvise(
                    ctypes.c_void_p(self.address + start),
                    ctypes.c_size_t(part),
                    _MADV_POPULATE_WRITE,
                )

    def pin(self) -> None:
        """Let a GPU copy straight into the buffer. Costs a second per some GiB; done once."""
        import torch

        if not self._pinned and torch.cuda.is_available():
            error = torch.cuda.cudart().cudaHostRegister(  # type: ignore[no-untyped-call]
                self.address, self.capacity, 0
            )
            self._pinned = int(error) == 0  # where it fails, copies are slower, nothing else

    def tensor(self, offset: int, size: int) -> torch.Tensor:
        """Return a window of `size` bytes as a tensor."""
        import torch

        return torch.frombuffer(self.buffer, dtype=torch.uint8, count=size, offset=offset)

    def close(self) -> None:
        """Give the memory back."""
        if self._pinned:
            import torch

            torch.cuda.cudart().cudaHostUnregister(self.address)  # type: ignore[no-untyped-call]
            self._pinned = False
        with contextlib.suppress(BufferError):  # a tensor over it is alive: it goes with that
            self.buffer.release()
            self._map.close()

    # Only a slot in shared memory has to do something here.

    def begin(self, size: int) -> None:
        """Say that the content is about to change, its first `size` bytes at once: it is no
        snapshot any more. Raises `OSError` where there is no room for them."""

    def fit(self, size: int) -> None:
        """Make room for an image of `size` bytes. Raises `OSError` where there is none."""

    def complete(self, manifest: Mapping[str, Any]) -> None:
        """Say that the content is the whole snapshot of `manifest`, checksums included."""

    def discard(self) -> None:
        """Give the content up: it is not needed any more, not even after a crash."""


def available_memory() -> int:
    """Return the bytes that the machine, and a container's limit, still give without swapping.

    Elsewhere than on Linux half of the physical memory is assumed; on Windows, no limit.
    """
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return min(int(line.split()[1]) << 10, _cgroup_room())
    if hasattr(os, "sysconf"):
        with contextlib.suppress(ValueError, OSError):
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 1 << 62


def _cgroup_room() -> int:
    """Return the bytes left under the limit of our control group (Docker, Kubernetes, systemd)."""
    room = 1 << 62
    for group, limit, usage in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            used = int(Path(group, usage).read_text())
            room = min(room, int(Path(group, limit).read_text()) - used)
    return max(0, room)
