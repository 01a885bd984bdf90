"""Hostile files in a run directory: refused, with nothing executed and nothing written outside.

Each stands there as if it were the newest checkpoint; what the run itself announced must be found.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from holdfast.checkpoint.format import layout
from tests.faults import cycle
from tests.faults.inject import Fault
from tests.faults.savers import Ours
from tests.faults.tally import Tally, Verdict
from tests.support import craft, identity

_STEP = 999


class _Runs:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.system, (f"touch {self.mark}",)


def _pickled_code(path: Path, mark: Path) -> None:
    torch.save({"model": _Runs(mark), "global_step": _STEP}, path)


def _bare_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(_Runs(mark)))


def _pickled_code_with_a_manifest(path: Path, mark: Path) -> None:
    """Ours in everything, but for the pickle that other people's torch.load reads."""
    payload = pickle.dumps(_Runs(mark))
    craft(
        path,
        {**identity(_STEP), "tree": {"t": "dict", "v": []}},
        [("checkpoint/data.pkl2", payload)],
    )


def _names_that_climb(path: Path, _mark: Path) -> None:
    craft(path, identity(_STEP), [("../../climbed", b"x" * 64), ("/tmp/climbed", b"x" * 64)])


def _id_that_climbs(path: Path, _mark: Path) -> None:
    craft(path, identity(_STEP, id="../../climbed", run_id="../climbed"))


def _bomb(path: Path, _mark: Path) -> None:
    """A megabyte that would inflate to a gigabyte."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("checkpoint/data.pkl", b"N.")
        file.writestr(layout.MANIFEST, b" " * (1 << 30))


def _claims_a_terabyte(path: Path, _mark: Path) -> None:
    tensor = {"t": "tensor", "record": "checkpoint/data/0", "dtype": "float32",
              "shape": [1 << 38], "stride": [0], "offset": 0}  # fmt: skip
    tree = {"t": "dict", "v": [["model", tensor]]}
    craft(path, {**identity(_STEP), "tree": tree}, [("checkpoint/data/0", b"\0" * 64)])


def _endless_nesting(path: Path, _mark: Path) -> None:
    craft(path, {**identity(_STEP), "tree": "@deep"})


def _lies_about_sizes(path: Path, _mark: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("checkpoint/data.pkl", b"N.")
        file.writestr(layout.MANIFEST, json.dumps(identity(_STEP)))
    data = bytearray(buffer.getvalue())
    at = data.rfind(b"PK\1\2")
    data[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    path.write_bytes(data)


def _link_elsewhere(path: Path, mark: Path) -> None:
    """A symbolic link where a checkpoint should be."""
    outside = mark.with_name("outside.pt")
    outside.write_bytes(b"mine")
    path.symlink_to(outside)


def _pipe(path: Path, _mark: Path) -> None:
    os.mkfifo(path)


def _cache_that_lies(path: Path, _mark: Path) -> None:
    """metadata.json and the history name files that are not there, and others that are."""
    files = {"../outside.pt": {"stamp": "1-1-1", **identity(_STEP)["identity"]}}
    (path.parent / "metadata.json").write_text(json.dumps({"format_version": 1, "files": files}))
    with (path.parent / "events.jsonl").open("a") as file:
        file.write('{"event": "durable", "step": "many", "names": ["../x"], "generation": []}\n')
        file.write('{"event": "verified", "id": {"a": 1}}\n[1, 2]\nnull\n' + "[" * 5000 + "\n")


FILES: dict[str, Callable[[Path, Path], None]] = {
    "pickle with code": _pickled_code,
    "bare pickle with code": _bare_pickle,
    "pickle with code, our manifest": _pickled_code_with_a_manifest,
    "record names that climb": _names_that_climb,
    "an id that climbs": _id_that_climbs,
    "ZIP bomb": _bomb,
    "a tensor of a terabyte": _claims_a_terabyte,
    "endless nesting": _endless_nesting,
    "sizes that lie": _lies_about_sizes,
    "a symbolic link": _link_elsewhere,
    "a pipe": _pipe,
    "cache and history that lie": _cache_that_lies,
}
NAMES = ("checkpoint_step_999.pt", "latest.pt", "temp/temp_epoch9_step999.pt")


def hostile(*, full: bool) -> Tally:
    """Every file under every name that it may take; without `full` under one name, each in turn."""
    tally, began = Tally("hostile files", Ours.name), time.monotonic()
    for number, (what, make) in enumerate(FILES.items()):
        for name in NAMES if full else [NAMES[number % len(NAMES)]]:
            with cycle.scratch() as place:
                _one(place, what, make, name, tally)
    tally.seconds = time.monotonic() - began
    return tally


def _one(
    place: Path, what: str, make: Callable[[Path, Path], None], name: str, tally: Tally
) -> None:
    directory, mark = place / "a" / "run", place / "executed"
    directory.mkdir(parents=True)
    newest = cycle.announced(cycle.save_under(Ours, directory, Fault()))
    target = directory / name
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    make(target, mark)
    outside = _outside(place, directory)
    tally.note(directory)
    verdict = cycle.recover(Ours, directory, newest)
    if _outside(place, directory) != outside:
        verdict = Verdict(newest, cycle.STEPS, 0, error="something was written outside")
    tally.judge(verdict, f"{what} as {name}")


def _outside(place: Path, directory: Path) -> dict[str, bytes]:
    files = [p for p in place.rglob("*") if p.is_file() and not p.is_relative_to(directory)]
    return {str(path): path.read_bytes() for path in files}
