"""Lay out, read and verify the bytes of the one file, a standard `.pt`.

Records, offsets, sizes and checksums. No torch enters this room, and no run directory.
"""

from __future__ import annotations

from holdfast.checkpoint.format import container, image, plain, reading
from holdfast.checkpoint.format.container import NewerFormat, Reader, newer_format, read_manifest
from holdfast.checkpoint.format.image import Blueprint, Sealer, design
from holdfast.checkpoint.format.layout import ARCHIVE, Record, plan
from holdfast.checkpoint.format.plain import plain_state
from holdfast.checkpoint.format.reading import patiently

__all__ = [
    "ARCHIVE",
    "Blueprint",
    "NewerFormat",
    "Reader",
    "Record",
    "Sealer",
    "container",
    "design",
    "image",
    "newer_format",
    "patiently",
    "plain",
    "plain_state",
    "plan",
    "read_manifest",
    "reading",
]
