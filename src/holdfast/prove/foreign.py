"""Open what any training has saved, as plain containers, values and tensors; run none of it.

torch files are read with `weights_only=True`. A pickle that names anything else is not opened.
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast.i18n import _

# Containers of values that appear in many training states; building one runs nothing of a file.
_multiarray = getattr(np, "_core", None) or np.core
_HARMLESS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    pathlib.WindowsPath,
    np.ndarray,
    np.dtype,
    *(
        (getattr(_multiarray.multiarray, name), f"{room}.multiarray.{name}")
        for name in ("_reconstruct", "scalar")
        for room in ("numpy._core", "numpy.core")
    ),
    *(type(np.dtype(code)) for code in "?bhilqBHILQefd"),
]
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of an old torch file
_ZIP = b"PK\x03\x04"
DCP = ".metadata"  # what makes a directory one of torch.distributed.checkpoint
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Unopened(Exception):
    """A file that cannot be read here; the message says why."""


def is_state(path: Path) -> bool:
    """Return True if `path` is of a form that `opened` reads, whole or not."""
    if path.name == DCP or path.suffix in (".safetensors", ".npz", ".npy"):
        return True
    if path.suffix == ".distcp":  # a part of what its `.metadata` names
        return False
    with path.open("rb") as file:
        head = file.read(len(_LEGACY))
    return head.startswith(_ZIP) or head == _LEGACY


def opened(path: Path) -> Any:
    """Return what is in a file, or in the directory of a `.metadata` file.

    Raises `Unopened`.
    """
    try:
        if path.name == DCP:
            return _distributed(path.parent)
        if path.suffix == ".safetensors":
            return _safetensors(path.read_bytes())
        if path.suffix in (".npz", ".npy"):
            found = np.load(path, allow_pickle=False)
            return _plain(found if isinstance(found, np.ndarray) else dict(found))
        with path.open("rb") as file:
            return _plain(_torch(file))
    except pickle.UnpicklingError as error:
        name = str(error).split("GLOBAL ")[-1].split(" ")[0].strip()
        raise Unopened(_("it holds more than plain values ({name})", name=name)) from error
    except Exception as error:  # torn and foreign bytes raise anything; nothing was changed
        words = str(error).strip().splitlines() or [""]
        raise Unopened(f"{type(error).__name__}: {words[0][:160]}") from error


def _torch(file: Any) -> Any:
    with torch.serialization.safe_globals(_HARMLESS):
        return torch.load(file, map_location="cpu", weights_only=True)


def _plain(value: Any) -> Any:  # noqa: PLR0911 - one return a kind
    """Turn NumPy's values and harmless objects into what `differences` compares."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.ascontiguousarray(value).copy())
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, argparse.Namespace):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _safetensors(data: bytes) -> dict[str, Any]:
    """Read the format that https://github.com/huggingface/safetensors describes."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    found: dict[str, Any] = {}
    for name, what in sorted(header.items()):
        if name == "__metadata__":
            found[name] = what
            continue
        start, end = (8 + length + at for at in what["data_offsets"])
        if end > len(data):
            raise Unopened(_("it ends too early"))
        raw = (
            torch.frombuffer(bytearray(data[start:end]), dtype=torch.uint8)
            if end > start
            else (torch.empty(0, dtype=torch.uint8))
        )
        kind = _DTYPES.get(what["dtype"])
        found[name] = raw if kind is None else raw.view(kind).reshape(what["shape"])
    return found


# ------------------------------------------------------------------- torch.distributed.checkpoint


_METADATA = "torch.distributed.checkpoint.metadata"
_PLAIN_RECORDS = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    *(
        (room, name)
        for room in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    ),
}


class _Index(pickle.Unpickler):
    """Read a `.metadata` file: plain records of names, shapes and offsets, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == _METADATA or (module, name) in _PLAIN_RECORDS:
            found = super().find_class(module, name)
            # A dotted name, or one that the module has only imported, could be anything.
            if (
                "." not in name
                and isinstance(found, type)
                and found.__module__ in (module, "torch")
            ):
                return found
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def _distributed(directory: Path) -> dict[str, Any]:
    """Return every piece of every value, under its name and its place in the whole."""
    index = _Index(io.BytesIO((directory / DCP).read_bytes())).load()
    found = {}
    for piece, where in index.storage_data.items():
        if getattr(where, "transform_descriptors", None):
            raise Unopened(_("it is compressed"))
        inside = (directory / where.relative_path).resolve()
        if not inside.is_relative_to(directory.resolve()):
            raise Unopened(_("it names a file outside of its directory"))
        with inside.open("rb") as file:
            file.seek(where.offset)
            part = io.BytesIO(file.read(where.length))
        offset = "" if not piece.offset or not any(piece.offset) else f"@{tuple(piece.offset)}"
        found[piece.fqn + offset] = _plain(_torch(part))
    return dict(sorted(found.items()))
