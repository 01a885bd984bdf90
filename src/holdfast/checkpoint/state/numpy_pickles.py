"""Build the NumPy numbers and arrays of other `.pt` files as plain data, by functions of ours.

NumPy's own functions are never called with what a file says: a dtype of a file's making can turn
bytes into pointers. Here a name in the file stands for one of the few functions below.
"""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

_NUMBERS = "biufc"  # kinds of dtypes: booleans, integers, floats, complex numbers
_lock = threading.Lock()  # torch keeps one list of safe names for all threads


class _DType:
    """A dtype as a file describes it."""

    def __init__(self, name: Any, *_align_and_copy: Any) -> None:
        self.name, self.order = name, "<"

    def __setstate__(self, state: Any) -> None:
        version, self.order, *rest = state
        if version not in (3, 4) or rest[:3] != [None, None, None]:
            raise pickle.UnpicklingError("GLOBAL numpy.dtype")

    def made(self) -> np.dtype[Any]:
        if not isinstance(self.name, str):
            raise pickle.UnpicklingError("GLOBAL numpy.dtype")
        dtype = np.dtype(self.name)
        if dtype.kind not in _NUMBERS or dtype.names is not None or dtype.subdtype is not None:
            raise pickle.UnpicklingError(f"GLOBAL numpy.{dtype.name}")
        return dtype.newbyteorder(">" if self.order == ">" else "<")


class _Array:
    """An array while it is built; `value` is there when its state has been."""

    value: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, by_columns, raw = state
        if type(dtype) is not _DType or type(raw) is not bytes:
            raise pickle.UnpicklingError("GLOBAL numpy.ndarray")
        flat = np.frombuffer(raw, dtype.made())
        array = flat.reshape(shape, order="F" if by_columns else "C")
        self.value = array.astype(array.dtype.newbyteorder("="), order="K")


def _reconstruct(kind: Any, _shape: Any, _typecode: Any) -> _Array:
    if kind is not _Array:
        raise pickle.UnpicklingError("GLOBAL numpy.ndarray")
    return _Array()


def _scalar(dtype: Any, raw: Any) -> Any:
    if type(dtype) is not _DType or type(raw) is not bytes:
        raise pickle.UnpicklingError("GLOBAL numpy.generic")
    (value,) = np.frombuffer(raw, dtype.made())
    return value.item()


def _no_bytes() -> bytes:
    """`b""` of an empty array, which pickle writes as a call of `bytes` without arguments."""
    return b""


_OURS: list[Any] = [
    (_DType, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_no_bytes, f"{module}.bytes") for module in ("builtins", "__builtin__")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core")),
]


def load(path: Path) -> Any:
    """Return what `torch.load(weights_only=True)` reads, NumPy's numbers and arrays included.

    Numbers become Python's. Raises what torch raises.
    """
    with _lock, torch.serialization.safe_globals(_OURS):
        state = torch.load(path, map_location="cpu", weights_only=True)
    return _finished(state, {})


def _finished(value: Any, known: dict[int, Any]) -> Any:
    """`value` with the arrays in place of what has built them; containers stay what they are."""
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("GLOBAL numpy.ndarray")
        return value.value
    if isinstance(value, _DType):
        return value.made().name
    if id(value) in known or not isinstance(value, dict | list | tuple):
        return known.get(id(value), value)
    known[id(value)] = value
    if type(value) is tuple:
        known[id(value)] = tuple(_finished(item, known) for item in value)
    elif isinstance(value, dict | list):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            new = _finished(item, known)
            if new is not item:
                value[key] = new
    return known[id(value)]
