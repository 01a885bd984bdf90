"""What lies in a run directory: told by manifests, whatever clocks, inodes and caches say."""

from __future__ import annotations

import errno
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint.format import container
from holdfast.checkpoint.rundir import catalog as catalog_module
from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.checkpoint.rundir.entries import BEST, LATEST, MAIN, Entry, name_of, summary
from holdfast.errors import ForeignCheckpoint, RunLocked
from tests.support import (
    Toy,
    craft,
    damage,
    events,
    everything,
    fail_with,
    flip,
    identity,
    image_of,
    in_child,
    make_run,
    python,
    tree_of,
    write_image,
    write_state,
)

STATE = {"n": 1}


def put(directory: Path, name: str, step: int, **more: Any) -> Path:
    (directory / name).parent.mkdir(exist_ok=True, parents=True)
    return write_state(directory / name, STATE, **identity(step, **more))


def scored(value: float | None, *, lower: bool = True) -> dict[str, Any]:
    return {"score": {"name": "loss", "value": value, "lower_is_better": lower}}


def steps(directory: Path) -> list[int]:
    return [entry.step for entry in Catalog(directory).scan().entries]


# ------------------------------------------------------------------------------------------ looking


def test_an_empty_or_missing_directory_holds_nothing(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        contents = Catalog(directory).scan()
        assert (contents.entries, contents.damaged, contents.foreign) == ([], [], [])
        assert contents.newest is contents.best is None
        assert Catalog(directory).scan().generation == 0
    (tmp_path / "temp").write_text("a file where a directory is expected")
    assert steps(tmp_path) == []


def test_newest_is_what_was_saved_last_in_the_highest_generation(tmp_path: Path) -> None:
    """Modification times say the opposite, and so do steps, where a loop counts them anew."""
    orders = [(1, 50, 5), (1, 100, 6), (2, 30, 7), (2, 40, 8), (2, 10, 9)]
    now = time.time()
    for age, (generation, step, sequence) in enumerate(orders):
        path = put(tmp_path, f"{age}.pt", step, generation=generation, sequence=sequence)
        os.utime(path, (now - 1000 * age, now - 1000 * age))
    found = Catalog(tmp_path).scan().entries
    assert [entry.sequence for entry in found] == [9, 8, 7, 6, 5]


def test_links_are_names_of_one_checkpoint(tmp_path: Path) -> None:
    path = put(tmp_path, "model_epoch_3.pt", 30)
    for name in (LATEST, MAIN, BEST):
        os.link(path, tmp_path / name)
    (entry,) = Catalog(tmp_path).scan().entries
    assert entry.names == ("model_epoch_3.pt", BEST, LATEST, MAIN), "the telling one first"
    assert Catalog(tmp_path).path(entry) == path


def test_copies_are_recognised_as_the_same_checkpoint(tmp_path: Path) -> None:
    path = put(tmp_path, "model_epoch_3.pt", 30)
    shutil.copy(path, tmp_path / LATEST)
    (entry,) = Catalog(tmp_path).scan().entries
    assert entry.names == ("model_epoch_3.pt", LATEST)


def test_temporary_checkpoints_lie_in_a_directory_of_their_own(tmp_path: Path) -> None:
    put(tmp_path, "temp/temp_step7.pt", 7, kind="temp")
    assert Catalog(tmp_path).scan().entries[0].names == ("temp/temp_step7.pt",)


def test_what_is_no_checkpoint_is_told_apart(tmp_path: Path) -> None:
    put(tmp_path, "good.pt", 1)
    damage(put(tmp_path, "bad.pt", 2))  # in the payload: seen when it is read
    cut = put(tmp_path, "cut.pt", 3)
    cut.chmod(0o644)
    cut.write_bytes(cut.read_bytes()[:-10])
    (tmp_path / "empty.pt").touch()
    torch.save({}, tmp_path / "theirs.pt")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "directory.pt").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "good.pt")
    contents = Catalog(tmp_path).scan()
    assert [name for name, _why in contents.damaged] == ["cut.pt", "empty.pt"]
    assert contents.foreign == ["theirs.pt"]
    assert {name for entry in contents.entries for name in entry.names} == {"good.pt", "bad.pt"}


def test_what_was_announced_and_is_no_checkpoint_any_more_is_damaged(tmp_path: Path) -> None:
    """A file that somebody has overwritten with something else altogether."""
    catalog = Catalog(tmp_path)
    catalog.record("durable", generation=1, step=3, run_id="run", names=["a.pt", "latest.pt"])
    (tmp_path / "a.pt").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path / "b.pt").write_bytes(random.Random(0).randbytes(5000))
    contents = catalog.scan()
    assert [name for name, _why in contents.damaged] == ["a.pt"]
    assert contents.foreign == ["b.pt"]


def test_what_a_later_version_wrote_is_neither_damaged_nor_foreign(tmp_path: Path) -> None:
    craft(tmp_path / "a.pt", '{"format_version":99}')
    contents = Catalog(tmp_path).scan()
    assert (contents.damaged, contents.foreign) == ([], [])
    assert contents.unreadable[0][0] == "a.pt"


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE])
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    put(tmp_path, "a.pt", 1)
    monkeypatch.setattr(catalog_module, "read_manifest", fail_with(number))
    contents = Catalog(tmp_path).scan()
    assert [name for name, _why in contents.unreadable] == ["a.pt"]
    assert contents.damaged == []


def test_a_file_that_vanishes_while_looking_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        put(tmp_path, f"{step}.pt", step)
    real = os.lstat

    def lstat(path: str) -> os.stat_result:
        if str(path).endswith("1.pt"):
            raise FileNotFoundError(path)
        return real(path)

    monkeypatch.setattr(os, "lstat", lstat)
    assert steps(tmp_path) == [3, 2]


SENSELESS: dict[str, Any] = {
    "no identity": {"identity": None},
    "step is text": identity(1) | {"identity": identity(1)["identity"] | {"step": "1"}},
    "step is a float": identity(1) | {"identity": identity(1)["identity"] | {"step": 1.5}},
    "generation missing": {"identity": {"id": "x"}},
    "id is a path": identity(1, id="../../x"),
    "id is a number": identity(1, id=5),
    "run id is a list": identity(1, run_id=[]),
    "epoch is text": identity(1, epoch="1/../.."),
    "kind is null": identity(1, kind=None),
    "metrics are a list": identity(1, metrics=[]),
    "metrics are nested": identity(1, metrics={"a": {"b": 1}}),
    "score is text": identity(1, score={"value": "low", "lower_is_better": False}),
    "score is NaN": identity(1, **scored(float("nan"))),
    "score is beyond a float": identity(1, **scored(10**400)),
    "score without a direction": identity(1, score={"value": 1.0}),
    "score is a list": identity(1, score=[1]),
    "parent is text": identity(1) | {"identity": identity(1)["identity"] | {"parent": "x"}},
}  # fmt: skip


@pytest.mark.parametrize("name", SENSELESS)
def test_a_manifest_that_describes_no_checkpoint_is_foreign(tmp_path: Path, name: str) -> None:
    put(tmp_path, "good.pt", 5)
    craft(tmp_path / "bad.pt", SENSELESS[name])
    contents = Catalog(tmp_path).scan()
    assert [entry.step for entry in contents.entries] == [5]
    assert contents.foreign == ["bad.pt"]


def test_a_summary_of_nothing_is_foreign() -> None:
    for junk in ({}, [], None, 7, {"identity": {}}):
        with pytest.raises(ForeignCheckpoint):
            summary(junk, 0)  # type: ignore[arg-type]


def test_the_best_has_the_lowest_score_or_the_highest(tmp_path: Path) -> None:
    for step, loss in enumerate([3.0, 1.0, 2.0]):
        put(tmp_path, f"{step}.pt", step, **scored(loss))
    best = Catalog(tmp_path).scan().best
    assert best is not None
    assert best.step == 1
    for step, accuracy in enumerate([0.1, 0.7, 0.3]):
        put(tmp_path, f"{step}.pt", step, **scored(accuracy, lower=False))
    best = Catalog(tmp_path).scan().best
    assert best is not None
    assert best.step == 1


def test_names_tell_what_a_checkpoint_is() -> None:
    entry = Entry("a", "r", 1, 1500, 1, "epoch", "", 3, "", 0, None)
    assert name_of(entry) == "model_epoch_3.pt"
    assert name_of(replace(entry, kind="temp")) == "temp/temp_epoch3_step1500.pt"
    assert name_of(replace(entry, kind="temp", epoch=None)) == "temp/temp_step1500.pt"
    assert name_of(replace(entry, kind="step")) == "checkpoint_step_1500.pt"
    assert name_of(replace(entry, kind="best")) == "checkpoint_step_1500.pt"


# ------------------------------------------------------------------------------------------ history


def test_the_history_only_grows_and_survives_torn_lines(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    catalog.record("durable", step=1, note="汉 \u2028 \x85 字")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "durable", "st')
    catalog.record("verified", id="abc")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'\xff\xfe garbage\n[1, 2]\n"text"\n{"event": "verified", "id": "def"}\n')
    assert [event["event"] for event in catalog.events()] == ["durable", "verified", "verified"]
    assert next(catalog.events())["note"] == "汉 \u2028 \x85 字"
    assert catalog.history.known.verified == {"abc", "def"}


def test_a_history_of_nonsense_is_passed_over(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    for fields in ({}, {"generation": "x", "step": 1}, {"names": 7}, {"generation": 2}):
        catalog.record("durable", **fields)
    assert catalog.history.known.announced == {}
    assert catalog.scan().generation == 2


def test_verified_is_what_the_history_says(tmp_path: Path) -> None:
    put(tmp_path, "a.pt", 1, id="first")
    put(tmp_path, "b.pt", 2, id="second")
    catalog = Catalog(tmp_path)
    catalog.record("verified", id="first")
    assert [entry.verified for entry in catalog.scan().entries] == [False, True]


def test_the_generation_is_the_highest_that_was_ever_begun(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    put(tmp_path, "a.pt", 1, generation=2)
    assert catalog.scan().generation == 2
    catalog.record("resumed", generation=5)
    assert catalog.scan().generation == 5


# ----------------------------------------------------------------------------------------- changing


def test_roles_are_pointed_at_what_they_mean(tmp_path: Path) -> None:
    for step, loss in [(1, 0.5), (2, 0.1), (3, 0.7)]:
        put(tmp_path, f"{step}.pt", step, **scored(loss))
    catalog = Catalog(tmp_path)
    catalog.assign_roles(catalog.scan())
    found = {entry.step: entry.names for entry in catalog.scan().entries}
    assert found == {3: ("3.pt", LATEST, MAIN), 2: ("2.pt", BEST), 1: ("1.pt",)}


def test_copies_become_links_again(tmp_path: Path) -> None:
    path = put(tmp_path, "model_epoch_1.pt", 1, **scored(1.0))
    for name in (LATEST, MAIN, BEST):
        shutil.copy(path, tmp_path / name)
    catalog = Catalog(tmp_path)
    catalog.assign_roles(catalog.scan())
    assert path.stat().st_nlink == 4


def test_an_intact_copy_is_not_replaced_by_a_damaged_one(tmp_path: Path) -> None:
    path = put(tmp_path, "model_epoch_1.pt", 1, **scored(1.0))
    shutil.copy(path, tmp_path / BEST)
    good = (tmp_path / BEST).read_bytes()
    with container.Reader(path) as reader:
        flip(path, reader.records[0].offset)
    catalog = Catalog(tmp_path)
    catalog.publish(catalog.scan().entries[0], [BEST])
    assert (tmp_path / BEST).read_bytes() == good


def test_copies_stay_where_links_do_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_DISABLE", "hardlinks,reflink")
    put(tmp_path, "model_epoch_1.pt", 1)
    catalog = Catalog(tmp_path)
    catalog.assign_roles(catalog.scan())
    first = (tmp_path / LATEST).stat()
    catalog.assign_roles(catalog.scan())
    assert (tmp_path / LATEST).stat().st_mtime_ns == first.st_mtime_ns, "not copied once more"


def test_without_links_a_temporary_is_published_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_DISABLE", "hardlinks,reflink")
    put(tmp_path, "temp/temp_step1.pt", 1, kind="temp")
    catalog = Catalog(tmp_path)
    assert catalog.publish(catalog.scan().entries[0], (LATEST, MAIN)) == {LATEST: "copy"}
    assert not (tmp_path / MAIN).exists()


@pytest.mark.parametrize("kind", ["epoch", "temp"])
def test_a_checkpoint_whose_own_name_is_gone_gets_it_back(tmp_path: Path, kind: str) -> None:
    """A crash in the middle of archiving, or somebody who copied latest.pt alone: the next save
    would take the name from the only state there is."""
    put(tmp_path, LATEST, 7, kind=kind, epoch=3)
    catalog = Catalog(tmp_path)
    catalog.assign_roles(catalog.scan())
    own = "model_epoch_3.pt" if kind == "epoch" else "temp/temp_epoch3_step7.pt"
    assert catalog.scan().entries[0].names == (own, LATEST, MAIN)


def test_a_new_run_takes_no_last_name_from_an_older_one(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    (tmp_path / "checkpoint_step_2.pt").unlink()
    before = everything(tmp_path)
    with Toy(seed=5).manager(tmp_path) as manager:
        manager.save(step=1, strict=True)
    assert len(before) == 2
    assert before < everything(tmp_path)


def test_a_lost_name_that_somebody_else_has_now(tmp_path: Path) -> None:
    put(tmp_path, "model_epoch_3.pt", 6, epoch=3, kind="epoch")
    put(tmp_path, LATEST, 7, epoch=3, kind="epoch", id="abcdefghijk")
    catalog = Catalog(tmp_path)
    catalog.assign_roles(catalog.scan())
    assert catalog.scan().entries[0].names[0] == "model_epoch_3-abcdefgh.pt"
    assert steps(tmp_path) == [7, 6]


def test_somebody_elses_file_under_our_names_is_kept(tmp_path: Path) -> None:
    torch.save({"theirs": 1}, tmp_path / MAIN)
    put(tmp_path, "a.pt", 1)
    catalog = Catalog(tmp_path)
    catalog.assign_roles(catalog.scan())
    assert torch.load(tmp_path / "archive" / "replaced" / MAIN) == {"theirs": 1}
    assert catalog.scan().entries[0].names == ("a.pt", LATEST, MAIN)
    assert events(tmp_path)[-1]["event"] == "archived"


def test_deleting_takes_all_names_and_says_so(tmp_path: Path) -> None:
    path = put(tmp_path, "a.pt", 1)
    os.link(path, tmp_path / LATEST)
    put(tmp_path, "b.pt", 2)
    catalog = Catalog(tmp_path)
    catalog.delete(catalog.scan().entries[1], "retention")
    assert tree_of(tmp_path) == {"b.pt", "events.jsonl"}
    assert events(tmp_path)[-1] | {"time": ""} == {
        "time": "", "event": "removed", "id": "id1x1xNone", "step": 1,
        "names": ["a.pt", LATEST], "reason": "retention",
    }  # fmt: skip


def test_quarantine_takes_every_name_of_the_inode_and_the_reason(tmp_path: Path) -> None:
    path = put(tmp_path, "temp/temp_step1.pt", 1)
    os.link(path, tmp_path / LATEST)
    put(tmp_path, "b.pt", 2)
    catalog = Catalog(tmp_path)
    assert catalog.quarantine([LATEST], "it stinks") == [LATEST, "temp/temp_step1.pt"]
    assert tree_of(tmp_path / "quarantine") == {LATEST, "temp/temp_step1.pt", "reasons.txt"}
    assert "it stinks" in (tmp_path / "quarantine" / "reasons.txt").read_text()
    assert steps(tmp_path) == [2]
    assert catalog.quarantine([LATEST], "again") == [], "repeating it changes nothing"
    assert len(events(tmp_path)) == 1


def test_archiving_keeps_everything_and_the_links(tmp_path: Path) -> None:
    path = put(tmp_path, "a.pt", 1)
    os.link(path, tmp_path / LATEST)
    put(tmp_path, "temp/t.pt", 2)
    catalog = Catalog(tmp_path)
    entries = catalog.scan().entries
    place = catalog.archive(entries, 1)
    assert tree_of(place) == {"a.pt", LATEST, "temp/t.pt"}
    assert (place / "a.pt").stat().st_nlink == 2
    assert steps(tmp_path) == []
    catalog.archive(entries, 1)
    assert tree_of(place) == {"a.pt", LATEST, "temp/t.pt"}, "repeating it loses nothing"


def test_a_full_disk_does_not_keep_things_from_being_moved_or_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        put(tmp_path, f"{step}.pt", step)
    (tmp_path / "quarantine").mkdir()
    (tmp_path / "archive" / "run" / "generation_1").mkdir(parents=True)

    for name in ("append_line", "write_file"):
        monkeypatch.setattr(catalog_module.filesystem, name, fail_with(errno.ENOSPC))
    catalog = Catalog(tmp_path)
    newest, middle, oldest = catalog.scan().entries
    catalog.delete(oldest, "retention")
    catalog.quarantine(middle.names, "bad")
    catalog.archive([newest], 1)
    catalog.write_cache()
    assert tree_of(tmp_path) == {"quarantine/2.pt", "archive/run/generation_1/3.pt"}


def test_the_catalogues_lock_excludes_others(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)

    def other() -> None:
        with pytest.raises(RunLocked), Catalog(tmp_path).lock(wait=0):
            pass

    with catalog.lock():
        assert in_child(other) == 0


# -------------------------------------------------------------------------------------------- cache


def test_the_cache_spares_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        put(tmp_path, f"{step}.pt", step)
    catalog = Catalog(tmp_path)
    before = catalog.scan()
    catalog.write_cache()
    monkeypatch.setattr(catalog_module, "read_manifest", None)
    assert Catalog(tmp_path).scan(cached=True) == before


def test_the_cache_is_not_believed_when_a_file_has_changed(tmp_path: Path) -> None:
    put(tmp_path, "a.pt", 1)
    catalog = Catalog(tmp_path)
    catalog.write_cache()
    put(tmp_path, "a.pt", 2)
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize(
    "junk",
    ["", "{", "[]", "7", '{"files": 7}', '{"files": {"a.pt": 7}}', '{"files": {"a.pt": {}}}',
     '{"files": {"a.pt": {"stamp": []}}}', "\xff", "[" * 100_000],
)  # fmt: skip
def test_a_cache_of_nonsense_is_not_missed(tmp_path: Path, junk: str) -> None:
    put(tmp_path, "a.pt", 1)
    (tmp_path / "metadata.json").write_bytes(junk.encode("latin-1"))
    assert [entry.step for entry in Catalog(tmp_path).scan(cached=True).entries] == [1]


@pytest.mark.parametrize(("field", "value"), [("step", "9"), ("generation", None), ("loss", "x"),
                                              ("id", "../x"), ("metrics", 7)])  # fmt: skip
def test_a_cache_with_wrong_types_is_not_believed(tmp_path: Path, field: str, value: Any) -> None:
    put(tmp_path, "a.pt", 1)
    catalog = Catalog(tmp_path)
    catalog.write_cache()
    contents = catalog.scan()
    (entry,) = contents.entries
    catalog.write_cache(replace(contents, entries=[replace(entry, **{field: value})]))
    assert Catalog(tmp_path).scan(cached=True).entries == [entry]


def test_a_flipped_bit_in_the_cache_changes_nothing(tmp_path: Path) -> None:
    for step in (1, 2):
        put(tmp_path, f"{step}.pt", step)
    catalog, path = Catalog(tmp_path), tmp_path / "metadata.json"
    catalog.write_cache()
    data, entries = path.read_bytes(), catalog.scan().entries
    for offset in range(len(data)):
        rotten = bytearray(data)
        rotten[offset] ^= 1 << offset % 8
        path.write_bytes(rotten)
        assert Catalog(tmp_path).scan(cached=True).entries == entries, f"byte {offset}"


def test_what_decides_does_not_look_into_the_cache(tmp_path: Path) -> None:
    """Its checksum may be right, and what it says wrong."""
    for step in (1, 2):
        put(tmp_path, f"{step}.pt", step)
    catalog = Catalog(tmp_path)
    contents = catalog.scan()
    lies = [replace(entry, sequence=9 - entry.sequence) for entry in contents.entries]
    catalog.write_cache(replace(contents, entries=lies))
    assert [entry.step for entry in Catalog(tmp_path).scan(cached=True).entries] == [1, 2]
    assert steps(tmp_path) == [2, 1]


def test_what_was_read_once_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training looks at every save, and a manifest may be large."""
    put(tmp_path, "1.pt", 1)
    catalog = Catalog(tmp_path)
    catalog.scan()
    put(tmp_path, "2.pt", 2)
    read: list[str] = []
    real = catalog_module.read_manifest
    monkeypatch.setattr(catalog_module, "read_manifest", lambda path, **how: (
        read.append(path.name), real(path, **how))[1])  # fmt: skip
    assert [entry.step for entry in catalog.scan().entries] == [2, 1]
    assert read == ["2.pt"]


def test_a_thousand_checkpoints_are_scanned_quickly(tmp_path: Path) -> None:
    for step in range(1000):
        image = image_of(STATE, **identity(step))
        with (tmp_path / f"{step}.pt").open("wb") as file:
            file.writelines(piece for _offset, piece in image.pieces)
    catalog = Catalog(tmp_path)
    for what, how in (("cold", {}), ("again", {}), ("with a cache", {"cached": True})):
        began = time.perf_counter()
        assert len(catalog.scan(**how).entries) == 1000
        print(f"scan of 1000 checkpoints, {what}: {time.perf_counter() - began:.3f} s")
        catalog.write_cache()


def test_looking_does_not_import_torch(tmp_path: Path) -> None:
    write_image(tmp_path / "a.pt", image_of(STATE, **identity(3)))
    said = python(
        """
        import sys
        import holdfast, holdfast.checkpoint, holdfast.checkpoint.rundir.catalog
        from holdfast.checkpoint import Catalog, EverySteps
        print(Catalog(sys.argv[1]).scan().newest.step, "torch" in sys.modules)
        """,
        tmp_path,
    )
    assert said.split() == ["3", "False"]
