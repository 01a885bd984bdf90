"""`holdfast pin`: a state that nothing takes, known by the history alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdfast.checkpoint import Catalog
from holdfast.checkpoint.system.lock import run_lock
from holdfast.errors import CheckpointError, HoldfastError
from holdfast.manage.cleaning import clean
from holdfast.manage.listing import listing_of
from holdfast.manage.pin import pin
from holdfast.manage.rollback import execute, plan
from holdfast.manage.rundir import look
from holdfast.table import Screen
from tests.manage.runs import Training, copy_without_links, make_run, names_in
from tests.support import Toy, archived, end_epoch, events


def pinned(directory: Path) -> list[int]:
    return [entry.step for entry in Catalog(directory).scan().entries if entry.pinned]


def test_it_is_written_down_once_and_taken_back_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for changed in (True, False):
        done = pin(run, "model_epoch_1.pt")
        assert (done.entry.step, done.pinned, done.changed) == (100, True, changed)
        assert pinned(run) == [100]
    pin(run, "300")
    assert pinned(run) == [300, 100]
    for changed in (True, False):
        assert pin(run, "100", remove=True).changed is changed
        assert pinned(run) == [300]
    told = [e["event"] for e in events(run) if e["event"].endswith("pinned")]
    assert told == ["pinned", "pinned", "unpinned"]


def test_it_outlives_the_cache_and_goes_with_a_copy(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    pin(run, "best_model.pt")
    assert pinned(copy_without_links(run, tmp_path / "copy")) == [200]
    (run / "metadata.json").unlink()
    assert pinned(run) == [200]


def test_the_training_leaves_it_alone_while_it_runs(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, keep_last=1) as manager:
        manager.resume()
        for epoch in range(1, 6):
            toy.step()
            end_epoch(manager, epoch, step=toy.now)
            if epoch == 2:
                pin(tmp_path, "1")  # by another process, in between
        assert [entry.step for entry in manager.list()] == [5, 4, 1]
        pin(tmp_path, "1", remove=True)
        toy.step()
        end_epoch(manager, 6, step=toy.now)
        assert [entry.step for entry in manager.list()] == [6, 5]


def test_a_temporary_one_stays_too(tmp_path: Path) -> None:
    with Training(tmp_path / "run") as training:
        training.temp(10)
        pin(tmp_path / "run", "10")
        for step in (20, 30, 40):
            training.temp(step)
        training.epoch(1, 1.0)
        training.epoch(2, 0.5)
    assert "temp/temp_epoch1_step10.pt" in names_in(tmp_path / "run")
    assert "temp/temp_epoch1_step20.pt" not in names_in(tmp_path / "run")


def test_saved_once_more_the_pinned_file_keeps_a_name(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, keep_last=0) as manager:
        manager.resume()
        toy.step()
        manager.save(step=1, strict=True)
        first = pin(tmp_path, "1").entry
        manager.save(step=1, strict=True)
    (kept,) = tmp_path.glob("checkpoint_step_1-*.pt")
    assert {entry.id: entry.names for entry in Catalog(tmp_path).scan().entries}[first.id] == (
        kept.name,
    )


def test_clean_says_why_it_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    pin(run, "100")
    shown = clean.plan(run, clean.Wish(keep=1, temp=True))
    (row,) = [row for row in shown.rows if row.step == 100]
    assert row.stays and shown.why(row) == "pinned"
    clean.execute(shown)
    assert "model_epoch_1.pt" in names_in(run)
    pin(run, "100", remove=True)
    clean.execute(clean.plan(run, clean.Wish(keep=1)))
    assert "model_epoch_1.pt" not in names_in(run)


def test_the_list_shows_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    pin(run, "100")
    listing = listing_of(look(run))
    record = json.loads(json.dumps(listing.to_json()))["checkpoints"]
    assert [r["pinned"] for r in record] == [False, False, False, True]
    (line,) = [line for line in listing.lines(Screen()) if line.startswith("model_epoch_1.pt")]
    assert "🔒 pinned" in line
    text = "\n".join(listing.lines(Screen(width=100)))
    assert text.count("🔒") == 2 and "🔒 pinned: no clean-up takes it" in text
    pin(run, "100", remove=True)
    assert "🔒" not in "\n".join(listing_of(look(run)).lines(Screen(width=100)))


def test_what_went_to_the_archive_is_reachable_and_still_pinned(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    pin(run, "400")
    with run_lock(run):
        execute(plan(run, "200"))
    file = archived(run) / "model_epoch_4.pt"
    assert pinned(run) == [] and file.exists()
    with run_lock(run):
        execute(plan(run, str(file)))
    assert pinned(run) == [400]
    assert not pin(run, str(file)).changed


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (1.0,))
    before = events(run)
    for wanted in ("7", "gone.pt", str(tmp_path)):
        with pytest.raises(CheckpointError):
            pin(run, wanted)
    with pytest.raises(HoldfastError, match="no directory"):
        pin(tmp_path / "gone", "7")
    assert events(run) == before and not (tmp_path / "gone").exists()
