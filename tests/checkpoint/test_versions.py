"""Versions of the file: 1 and 2 are read, and what is newer is refused in words and left alone."""

from __future__ import annotations

import logging
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import load
from holdfast.checkpoint import Catalog, verify
from holdfast.checkpoint.format import NewerFormat, container, leaves
from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.state import load_weights
from holdfast.errors import CheckpointError, DamagedCheckpoint, ForeignCheckpoint, SaveFailed
from holdfast.exchange import export_raw
from holdfast.manage import verify as verifying
from holdfast.manage.cleaning.clean import Wish, execute, plan
from holdfast.training.inference.loading import find_checkpoint
from tests.checkpoint.independent import records_of
from tests.manage.runs import make_run as trained
from tests.support import (
    Toy,
    assert_same,
    craft,
    die,
    flip,
    identity,
    in_child,
    make_run,
    tree_of,
    write_divided,
    write_state,
)

LEAF = leaves.LEAF


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    large = torch.randint(0, 256, (3 * LEAF + 77,), dtype=torch.uint8, generator=generator)
    return {
        "large": large,
        "small": torch.arange(7),
        "empty": torch.empty(0),
        "page": torch.arange(1024, dtype=torch.float32),
        "values": {"a": 1, "b": [None, 2.5]},
    }


def newer(path: Path, **more: Any) -> Path:
    """What holdfast 99 might have written: every checksum is right."""
    return craft(path, {"format_version": 99, **identity(9), **more})


# ---------------------------------------------------------------------------------- version 2


@pytest.mark.parametrize("cuts", [(), (LEAF,), (4096, 5 * 4096, LEAF + 4096)])
def test_both_versions_are_read_by_us_by_torch_by_zip_and_by_the_specification(
    tmp_path: Path, cuts: tuple[int, ...]
) -> None:
    one = write_state(tmp_path / "one.pt", state())
    two = write_divided(tmp_path / "two.pt", state(), cuts)
    assert [container.read_manifest(path)["format_version"] for path in (one, two)] == [1, 2]
    for path in (one, two):
        assert_same(load(path), state())
        assert verify(path) is None
        assert_same(torch.load(path, weights_only=True), state())
        assert zipfile.ZipFile(path).testzip() is None
    alone = records_of(one), records_of(two)
    shared = {name for name in alone[0] if "/data" in name}
    assert all(alone[0][name] == alone[1][name] for name in shared)


def test_a_flip_in_any_byte_of_a_divided_file_is_found(tmp_path: Path) -> None:
    small = {"a": torch.arange(3000, dtype=torch.uint8), "b": torch.arange(9), "c": 1}
    path = write_divided(tmp_path / "x.pt", small, (1024,))
    rng = random.Random(1)
    for offset in range(path.stat().st_size):
        if offset % 7 and offset > 4096:
            continue  # one in seven is enough behind the first page
        bit = rng.randrange(8)
        flip(path, offset, bit)
        assert verify(path) is not None, offset
        flip(path, offset, bit)
    assert verify(path) is None


@pytest.mark.parametrize("crc", [True, False])
def test_a_flip_in_any_leaf_is_found_by_every_way_of_reading(tmp_path: Path, crc: bool) -> None:
    path = write_divided(tmp_path / "x.pt", state(), (8192, LEAF + 4096))
    for at in (0, 8191, 8192, LEAF, 3 * LEAF + 76):
        flip(path, 4096 + at)
        with container.Reader(path) as reader, pytest.raises(DamagedCheckpoint, match="data/0"):
            reader.verify(crc=crc)
        with pytest.raises(DamagedCheckpoint, match="data/0"):
            load(path)
        flip(path, 4096 + at)


@pytest.mark.parametrize("wrong", [
    "short", "long", "odd", "zero", "large", "moved", "digest"
])  # fmt: skip
def test_a_table_that_is_none_of_its_records_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """Its own checksum is right: a writer has computed nonsense."""
    real, entry = leaves.entries, leaves.ENTRY
    first = iter([True])

    def spoilt(view: memoryview) -> bytes:
        table = real(view)
        if not next(first, False):
            return table
        size, hashed = entry.unpack_from(table)
        return {
            "short": table[: -entry.size],
            "long": table + entry.pack(1, hashed),
            "odd": table[:-1],
            "zero": entry.pack(0, hashed) + table,
            "large": entry.pack(2 * LEAF, hashed) + table[2 * entry.size :],
            "moved": entry.pack(size - 1, hashed) + table[entry.size :],
            "digest": table,
        }[wrong]

    monkeypatch.setattr(leaves, "entries", spoilt)
    if wrong == "digest":
        monkeypatch.setattr(leaves, "digest", lambda _table: "0" * 32)
    path = write_divided(tmp_path / "x.pt", state())
    monkeypatch.undo()
    with pytest.raises(ForeignCheckpoint, match="no sense"):
        load(path)


def test_a_divided_checkpoint_is_resumed_from_and_kept(tmp_path: Path) -> None:
    toy = make_run(tmp_path, 2)
    path = tmp_path / "checkpoint_step_2.pt"
    manifest = container.read_manifest(path)
    said = {k: v for k, v in manifest.items() if k not in ("records", "tensors", "tree")}
    whole = load(path)
    for name in ("checkpoint_step_2.pt", "latest.pt", "model.pt"):
        (tmp_path / name).unlink()
    said.pop("format_version")
    write_divided(path, whole, (512,), **said)
    again = Toy()
    with again.manager(tmp_path) as manager:
        resumed = manager.resume()
        assert resumed is not None and resumed.step == 2
    assert_same(again.model.state_dict(), toy.model.state_dict())


# ------------------------------------------------------------------------------ what is newer


def test_a_newer_file_is_refused_with_the_words_what_to_install(tmp_path: Path) -> None:
    path = newer(tmp_path / "x.pt")
    for read in (load, load_weights, container.read_manifest, lambda p: export_raw.read(p, None)):
        with pytest.raises(NewerFormat, match=r"version 99.*pip install --upgrade holdfast"):
            read(path)
    assert "pip install" in str(verify(path))


@pytest.mark.parametrize("named", ["x.pt", "*.pt", "."])
def test_no_older_file_takes_the_place_of_a_newer_one_that_was_named(
    tmp_path: Path, named: str
) -> None:
    other = tmp_path / "other"
    make_run(other, 2)
    newer(other / "x.pt")
    before = tree_of(other)
    with Toy().manager(tmp_path / "run") as manager, pytest.raises(CheckpointError, match="pip in"):
        manager.resume(other / named)
    assert tree_of(other) == before


def test_saving_pruning_and_cleaning_beside_a_newer_file_leave_it(tmp_path: Path) -> None:
    toy = make_run(tmp_path, 3)
    path = newer(tmp_path / "checkpoint_step_9.pt")
    content = path.read_bytes()
    with toy.manager(tmp_path, keep_last=1) as manager:
        manager.resume(tmp_path / "checkpoint_step_3.pt")
        for step in range(4, 10):  # the last one has its very name
            toy.step()
            manager.save(step=step, strict=True)
        (name,) = [name for name, _why in Catalog(tmp_path).scan().unreadable]
        assert (tmp_path / name).read_bytes() == content
    with Toy().manager(tmp_path) as manager, pytest.raises(CheckpointError, match="pip install"):
        manager.resume()
    execute(plan(tmp_path, Wish(1, temp=True, quarantine=True, archive=True)))
    assert (tmp_path / name).read_bytes() == content
    assert not (tmp_path / "quarantine").exists()


def test_a_newer_file_in_the_archive_stays_when_the_archive_is_cleaned(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", (2.0, 3.0, 4.0))
    (run / "archive/old").mkdir(parents=True)
    path = newer(run / "archive/old/model_epoch_1.pt")
    shown = plan(run, Wish(None, archive=True))
    assert {row.names[0]: row.reason for row in shown.rows}[
        "archive/old/model_epoch_1.pt"
    ] == "newer"
    execute(shown)
    assert path.exists()


def test_verify_calls_a_newer_file_unread_and_says_what_to_install(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", (2.0, 3.0))
    newer(run / "model_epoch_9.pt")
    verdicts = {v.target.paths[0].name: v for v in verifying.verify(verifying.targets_of([run]))}
    verdict = verdicts["model_epoch_9.pt"]
    assert verdict.state == verifying.UNREADABLE
    assert "pip install --upgrade holdfast" in verdict.reason
    assert (run / "model_epoch_9.pt").exists()


def test_using_a_model_beside_a_newer_file_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trained(tmp_path / "run", (2.0, 3.0))
    newer(run / "model_epoch_9.pt")
    with caplog.at_level(logging.WARNING, "holdfast"):
        path, _entry = find_checkpoint(run)
    assert path.name == "model_epoch_1.pt"
    assert "model_epoch_9.pt is passed over" in caplog.text
    assert "pip install --upgrade holdfast" in caplog.text


@pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")
@pytest.mark.parametrize("what", ["file", "head", "file behind a rotten head"])
def test_a_newer_snapshot_in_memory_is_neither_removed_nor_passed_over(
    tmp_path: Path, what: str
) -> None:
    def run() -> None:
        toy = Toy()
        manager = toy.manager(tmp_path, memory_every=1)
        manager.resume()
        for step in (1, 2):
            toy.step()
            manager.after_step(step)
            manager.wait_for_copy()
        die()

    in_child(run)
    (remains,) = [r for r in shared_memory.remains() if r.belongs_to(tmp_path)]
    try:
        left = shared_memory.newest_in(remains)
        assert left is not None and left.step == 2
        head = left.path.with_suffix(".head")
        if what == "head":
            text = head.read_bytes().partition(b"\n")[0].rpartition(b" ")[0]
            text = text.replace(b'"holdfast": 1', b'"holdfast": 2')
            line = text + b" " + container.checksums(text)[1].encode() + b"\n"
            head.write_bytes(line.ljust(shared_memory.HEAD_SIZE, b"\0"))
        else:
            manifest = container.read_manifest(left.path)
            craft(left.path, {**manifest, "format_version": 99})
        if what == "file behind a rotten head":
            flip(head, 5)
        names = tree_of(remains.directory)
        refused = (SaveFailed, NewerFormat)
        with Toy().manager(tmp_path) as manager, pytest.raises(refused, match="pip install"):
            manager.resume()
        assert tree_of(remains.directory) == names
    finally:
        shutil.rmtree(remains.directory, ignore_errors=True)
