"""Helpers that several rooms' tests share: checkpoints on disk, exact comparisons, processes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdfast import CheckpointManager
from holdfast.checkpoint import Catalog, Saved
from holdfast.checkpoint.format import container, image, layout, leaves
from holdfast.checkpoint.state import codec
from holdfast.checkpoint.state.tree import normalise
from holdfast.checkpoint.system import filesystem

# ------------------------------------------------------------------------------------------- files


def write_image(path: Path, made: image.Image) -> Path:
    """Put an image on the disk as the engine does."""
    filesystem.write_file(path, made.pieces, made.size, mode=0o644)
    return path


def image_of(state: Any, *, reserve: int = 0, **manifest: Any) -> image.Image:
    tree = normalise(state)
    return image.build(tree.payloads(), {**manifest, **codec.to_json(tree)}, reserve=reserve)


def write_state(path: Path, state: Any, **manifest: Any) -> Path:
    """A checkpoint of `state` with whatever else its manifest is to say."""
    return write_image(path, image_of(state, **manifest))


def write_divided(path: Path, state: Any, cuts: Sequence[int] = (), **manifest: Any) -> Path:
    """A file of version 2; writers' runs end at `cuts`, bytes into each storage."""
    tree = normalise(state)
    said = {**manifest, **codec.to_json(tree)}
    payloads: list[tuple[str, Any]] = [(s.record, s.payload()) for s in tree.storages]
    parts = []
    for _name, payload in payloads:
        edges = sorted({0, len(payload), *(cut for cut in cuts if cut < len(payload))})
        parts.append(b"".join(leaves.entries(payload[a:b]) for a, b in itertools.pairwise(edges)))
    payloads += [(leaves.LEAVES, b"".join(parts)), *tree.companions()]
    blueprint = image.design([(name, len(payload)) for name, payload in payloads], said)
    records, pieces = [], []
    digests = [leaves.digest(part) for part in parts]
    for record, (_name, payload) in zip(blueprint.records, payloads, strict=True):
        crc32, xxh3 = image.checksums(payload)
        xxh3 = digests.pop(0) if digests else xxh3
        records.append(dataclasses.replace(record, crc32=crc32, xxh3=xxh3))
        header = layout.local_header(records[-1])
        pieces += [(record.header, header), (record.offset, payload)]
    at = blueprint.slot.header
    for part in blueprint.ending(records):
        pieces.append((at, part))
        at += len(part)
    return write_image(path, image.Image(blueprint.size, blueprint.manifest, pieces))


def identity(step: int, *, generation: int = 1, sequence: int | None = None, **more: Any) -> dict:
    """The manifest fields that a catalogue wants of a checkpoint of `step`."""
    return {
        "identity": {
            "id": more.pop("id", f"id{generation}x{step}x{sequence}"),
            "run_id": more.pop("run_id", "run"),
            "generation": generation,
            "step": step,
            "sequence": step if sequence is None else sequence,
            "parent": None,
        },
        "kind": "step",
        "reason": "test",
        "epoch": None,
        "created": "2026-01-01T00:00:00.000+00:00",
        "metrics": {},
        "score": None,
        **more,
    }


def craft(path: Path, manifest: Any, payloads: Sequence[tuple[str, bytes]] = ()) -> Path:
    """A file whose every checksum is right and whose manifest says whatever it says.

    `manifest` is text, bytes, or a mapping; that one gets a version and the true records, and where
    it says "@deep" stand 900 lists in one another.
    """
    placed: list[tuple[layout.Record, bytes]] = []
    cursor = 0
    for name, payload in [*payloads, ("checkpoint/data.pkl", b"N.")]:
        record = layout.place(cursor, name, len(payload), *image.checksums(payload))
        placed.append((record, payload))
        cursor = record.end
    if isinstance(manifest, Mapping):
        true = [record.to_json() for record, _payload in placed]
        manifest = json.dumps({"format_version": 1, "records": true, **manifest})
        manifest = manifest.replace('"@deep"', "[" * 900 + "]" * 900)
    if isinstance(manifest, str):
        manifest = manifest.encode("utf-8", "surrogatepass")
    manifest = manifest.ljust(layout.PAGE)
    slot = layout.place(cursor, layout.MANIFEST, len(manifest), *image.checksums(manifest))
    with path.open("wb") as file:
        for record, payload in [*placed, (slot, manifest)]:
            file.write(layout.local_header(record) + payload)
        file.write(layout.tail([*(record for record, _payload in placed), slot]))
    return path


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file in place."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def damage(path: Path) -> None:
    """Flip a bit in the middle of the first payload, whatever names the file has."""
    with container.Reader(path) as reader:
        offset = reader.records[0].offset
    flip(path, offset)


def tree_of(directory: Path) -> set[str]:
    """All files below a directory, relative."""
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


def archived(directory: Path, generation: int = 1) -> Path:
    """Where the one run that has archived something in that generation has put it."""
    (place,) = (directory / "archive").glob(f"*/generation_{generation}")
    return place


def twin(template: Path, directory: Path) -> Path:
    """A run like `template`, made in a moment: checkpoints are never written to in place."""

    def take(source: str, target: str) -> None:
        (os.link if source.endswith(".pt") else shutil.copy)(source, target)

    shutil.copytree(template, directory, copy_function=take)
    return directory


def everything(directory: Path) -> set[str]:
    """The ids of all checkpoints, here and in the archive."""
    found = set()
    for path in directory.rglob("*.pt"):
        entry = Catalog(path.parent).scan().entries
        found |= {each.id for each in entry}
    return found


def events(directory: Path) -> list[dict[str, Any]]:
    """The history, less the checksums."""
    text = (directory / "events.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{name: value for name, value in line.items() if name != "crc"} for line in lines]


def end_epoch(manager: CheckpointManager, epoch: int, **keywords: Any) -> Saved | None:
    """`CheckpointManager.end_epoch`, and wait until all of it is done; None where it failed."""
    pending = manager.end_epoch(epoch, **keywords)
    manager.wait()
    return None if pending.settled.exception() else pending.durable.result()


# -------------------------------------------------------------------------------------- comparing


def bits(tensor: torch.Tensor) -> bytes:
    """The elements of a tensor, to the bit."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


class Same:
    """Asserts that two states are the same: types, bits, order, and what is the same object or the
    same memory as what."""

    def __init__(self) -> None:
        self._there: dict[int, Any] = {}
        self._back: dict[int, Any] = {}
        self._storages: dict[int, int] = {}
        self._alive: list[Any] = []

    def __call__(self, a: Any, b: Any, path: str = "state") -> None:
        assert type(a) is type(b), (path, type(a), type(b))
        if isinstance(a, torch.Tensor | dict | list | set | bytearray) or (
            isinstance(a, tuple) and a
        ):
            self._alive += [a, b]
            assert (id(a) in self._there) == (id(b) in self._back), path
            if id(a) in self._there:
                assert self._there[id(a)] is b, f"{path}: another object"
                return
            self._there[id(a)], self._back[id(b)] = b, a
        if isinstance(a, torch.Tensor):
            self._tensor(a, b, path)
        elif isinstance(a, np.ndarray):
            assert (a.dtype, a.tolist()) == (b.dtype, b.tolist()), path
        elif isinstance(a, float):
            assert struct.pack("d", a) == struct.pack("d", b), path
        elif isinstance(a, complex):
            assert struct.pack("dd", a.real, a.imag) == struct.pack("dd", b.real, b.imag), path
        elif isinstance(a, dict):
            assert len(a) == len(b), path
            for (ka, va), (kb, vb) in zip(a.items(), b.items(), strict=True):
                self(ka, kb, f"{path} key {ka!r}")
                self(va, vb, f"{path}/{ka!r}")
            if isinstance(a, OrderedDict):
                self(vars(a), vars(b), f"{path}.__dict__")
        elif isinstance(a, list | tuple):
            assert len(a) == len(b), path
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                self(x, y, f"{path}/{i}")
        elif isinstance(a, set):
            assert sorted(map(repr, a)) == sorted(map(repr, b)), path
        else:
            assert a == b, path

    def _tensor(self, a: torch.Tensor, b: torch.Tensor, path: str) -> None:
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()), path
        assert bits(a) == bits(b), path
        if a.numel():
            assert a.storage_offset() == b.storage_offset(), path
            ours, theirs = a.untyped_storage().data_ptr(), b.untyped_storage().data_ptr()
            assert self._storages.setdefault(ours, theirs) == theirs, f"{path}: other memory"
            assert self._storages.setdefault(-theirs, ours) == ours, f"{path}: other memory"


def assert_same(a: Any, b: Any) -> None:
    Same()(a, b)


def snapshot(state: Any) -> Any:
    """A deep copy of what a state is now, by its `state_dict`s, to compare with later."""
    if hasattr(state, "state_dict"):
        return snapshot(state.state_dict())
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)([snapshot(value) for value in state])
    return copy.deepcopy(state)


# ---------------------------------------------------------------------------------- small trainings


class Toy:
    """A training of a few numbers that goes another way if a single bit of its state differs."""

    def __init__(self, seed: int = 0, lr: float = 0.1) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)
        self.losses: list[float] = []
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "losses": self.losses,
        }

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(4, 3)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    @property
    def now(self) -> int:
        return len(self.losses)

    def manager(self, directory: Path, **options: Any) -> CheckpointManager:
        return CheckpointManager(directory, self.state, **options)


def make_run(directory: Path, steps: int, *, kind: str = "step", **options: Any) -> Toy:
    """Train and save every step; the directory is then as after a run that ended."""
    toy = Toy()
    with toy.manager(directory, **{"keep_last": 0, **options}) as manager:
        for _step in range(steps):
            toy.step()
            manager.save(step=toy.now, epoch=toy.now, kind=kind, strict=True)
    return toy


def after(steps: int) -> Toy:
    """The same training without any saving: what a resumed one must come to."""
    toy = Toy()
    for _step in range(steps):
        toy.step()
    return toy


Told = list[tuple[str, dict[str, Any]]]


def listener() -> tuple[Told, Callable[[str, dict[str, Any]], None]]:
    told: Told = []
    return told, lambda event, fields: told.append((event, fields))


def said(told: Told) -> list[str]:
    return [event for event, _fields in told]


# ----------------------------------------------------------------------------------------- failures


def fail_with(number: int) -> Callable[..., Any]:
    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


class Broken:
    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def state_dict(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {}

    def load_state_dict(self, _state: dict[str, Any]) -> None: ...


def lie(monkeypatch: pytest.MonkeyPatch, times: int, how: Callable[[Path], None]) -> None:
    """Let the disk change a file between writing it and reading it back, `times` times."""
    real, left = filesystem.write_file, times

    def write(target: Path, *args: Any, **kwargs: Any) -> None:
        nonlocal left
        real(target, *args, **kwargs)
        if target.suffix == ".pt" and left:
            left -= 1
            how(target)

    monkeypatch.setattr(filesystem, "write_file", write)


def cut(path: Path) -> None:
    path.chmod(0o644)
    os.truncate(path, 5000)


# --------------------------------------------------------------------------------------- processes


def processor_seconds(work: Callable[[], Any]) -> float:
    """Processor time that the child processes of `work` took: however busy the machine is."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def in_child(function: Callable[[], Any]) -> int:
    """Run `function` in a forked process: its exit status, or minus the signal that ended it.

    An exception there is printed and is status 1. Forking costs milliseconds where starting a
    Python that imports torch costs seconds.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:  # noqa: BLE001 - the parent is told by the exit status
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    _pid, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def die(*_args: Any, **_kwargs: Any) -> Any:
    """End this process as a power cut would: nothing is flushed, nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


# The calls of the engine to the disk, in holdfast.checkpoint.system.filesystem.
SEAM = ("allocate", "write_all", "sync_file", "sync_directory", "rename", "link", "remove",
        "append_line")  # fmt: skip


def killed_at(moment: int, work: Callable[[], None], *, hangs: float = 0.0) -> bool:
    """Run `work` in a process that dies before its `moment`-th call to the disk; whether it did.
    The call first `hangs` for so many seconds, in which other threads go on."""

    def run() -> None:
        calls = 0

        def dying(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == moment:
                    time.sleep(hangs)
                    die()
                return real(*args, **kwargs)

            return call

        for name in SEAM:
            setattr(filesystem, name, dying(getattr(filesystem, name)))
        work()

    status = in_child(run)
    assert status in (0, -signal.SIGKILL)
    return status != 0


_HIDE = """
import sys

class _Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "holdfast":
            raise ImportError("holdfast does not exist here")

sys.meta_path.insert(0, _Hide())
"""


def python(code: str, *args: str | Path, hide_holdfast: bool = False) -> str:
    """Run Python code in a process of its own; its output. Fails the test if it does."""
    code = (_HIDE if hide_holdfast else "") + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, *(["-I"] if hide_holdfast else []), "-c", code, *map(str, args)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
