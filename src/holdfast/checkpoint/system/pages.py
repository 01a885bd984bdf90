"""The unit of direct I/O and of mmap, and what counts as bytes."""

from __future__ import annotations

PAGE = 4096  # bytes; payloads of a page or more start on one: direct I/O and mmap require it

Buffer = bytes | bytearray | memoryview
