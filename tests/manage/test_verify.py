"""`holdfast verify`: every byte is checked, every verdict is recorded, nothing is moved."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.errors import HoldfastError
from holdfast.manage.progress import Progress
from holdfast.manage.rundir import look
from holdfast.manage.verify import targets_of, verify
from tests.manage.runs import (
    Training,
    copy_without_links,
    cut,
    flip,
    forget_verified,
    make_run,
    names_in,
)


def states(*sources: Path) -> dict[str, str]:
    return {v.target.paths[0].name: v.state for v in verify(targets_of(sources))}


def test_each_file_is_read_once_and_recorded_as_verified(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    forget_verified(run)
    verdicts = list(verify(targets_of([run])))
    assert [v.target.paths[0].name for v in verdicts] == [
        f"model_epoch_{n}.pt" for n in (4, 3, 2, 1)
    ]
    assert all(v.state == "intact" and v.recorded and not v.failed for v in verdicts)
    assert [path.name for path in verdicts[0].target.paths[1:]] == ["latest.pt", "model.pt"]
    assert [v.step for v in verdicts] == [400, 300, 200, 100]
    assert all(entry.verified for entry in look(run).entries)


@pytest.mark.parametrize("offset", [10, 4200, -10, -500, -5000])
def test_a_flip_anywhere_is_found_and_nothing_is_moved(tmp_path: Path, offset: int) -> None:
    run = make_run(tmp_path / "run")
    path = run / "model_epoch_3.pt"
    flip(path, offset % path.stat().st_size)
    before = names_in(run)
    found = {v.target.paths[0].name: v for v in verify(targets_of([run]))}
    assert found["model_epoch_3.pt"].state == "damaged" and found["model_epoch_3.pt"].failed
    reason = found["model_epoch_3.pt"].reason
    assert reason and "model_epoch_3.pt" not in reason, "whoever shows it has named the file"
    assert [name for name, v in found.items() if v.failed] == ["model_epoch_3.pt"]
    assert names_in(run) == before


def test_damage_ends_the_trust_of_an_earlier_verification(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert all(entry.verified for entry in look(run).entries)
    flip(run / "model_epoch_3.pt")
    assert states(run)["model_epoch_3.pt"] == "damaged"
    assert [e.verified for e in look(run).entries] == [True, False, True, True]
    (event,) = [e for e in Catalog(run).events() if e["event"] == "damaged"]
    assert event["step"] == 300 and event["names"] == ["model_epoch_3.pt"]
    flip(run / "model_epoch_3.pt")  # the cable was loose
    states(run)
    assert all(entry.verified for entry in look(run).entries)


def test_of_two_copies_one_damaged_leaves_the_checkpoint_unverified(tmp_path: Path) -> None:
    run = copy_without_links(make_run(tmp_path / "run"), tmp_path / "copy")
    flip(run / "latest.pt")  # epoch 4 has intact copies before and after it
    assert len(targets_of([run])) == 7
    found = states(run)
    assert (found["model_epoch_4.pt"], found["latest.pt"], found["model.pt"]) == (
        "intact", "damaged", "intact",
    )  # fmt: skip
    assert not look(run).entries[0].verified


def test_a_cut_file_and_a_foreign_one_are_told_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    cut(run / "model_epoch_1.pt")
    (run / "notes.pt").write_bytes(b"somebody else's")
    verdicts = {v.target.paths[0].name: v for v in verify(targets_of([run]))}
    assert (verdicts["model_epoch_1.pt"].state, verdicts["notes.pt"].state) == (
        "damaged", "foreign",
    )  # fmt: skip
    assert not verdicts["notes.pt"].failed  # nobody said that it is a checkpoint
    (named,) = verify(targets_of([run / "notes.pt"]))
    assert named.failed


def test_a_single_file_is_recorded_where_its_run_is(tmp_path: Path) -> None:
    with Training(tmp_path / "run") as training:
        training.temp(10)
    run = tmp_path / "run"
    forget_verified(run)
    (verdict,) = verify(targets_of([run / "temp" / "temp_epoch1_step10.pt"]))
    assert verdict.recorded and look(run).entries[0].verified
    alone = tmp_path / "elsewhere" / "model.pt"
    alone.parent.mkdir()
    alone.write_bytes((run / "latest.pt").read_bytes())
    (verdict,) = verify(targets_of([alone]))
    assert verdict.state == "intact" and not verdict.recorded
    assert [path.name for path in alone.parent.iterdir()] == ["model.pt"]


def test_a_history_that_cannot_be_written_is_said_and_the_check_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (1.0,))
    (run / ".catalog.lock").unlink()
    (run / ".catalog.lock").mkdir()  # also stops root, whom no permission stops
    (verdict,) = verify(targets_of([run]))
    assert verdict.state == "intact" and not verdict.recorded
    assert "could not be written" in (verdict.note or "")


def test_a_file_that_goes_while_others_are_checked_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    seen = []
    for verdict in verify(targets_of([run])):
        seen.append(verdict.target.paths[0].name)
        (run / "model_epoch_1.pt").unlink(missing_ok=True)
    assert seen == ["model_epoch_4.pt", "model_epoch_3.pt", "model_epoch_2.pt"]


def test_how_far_it_has_come_is_told_in_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    flip(run / "model_epoch_2.pt")  # what is behind the damage counts as done
    (run / "notes.pt").write_bytes(b"somebody else's")
    told: list[Progress] = []
    verdicts = list(verify(targets_of([run]), told.append))
    assert {p.number for p in told} == {1, 2, 3, 4, 5} and {p.of for p in told} == {5}
    assert {p.total for p in told} == {sum(v.size for v in verdicts if v.state != "foreign")}
    assert all(a.done <= b.done for a, b in pairwise(told))
    assert told[-1].done == told[-1].total and told[-1].path.name == "notes.pt"
    half = Progress(1, 2, run, done=50, total=150, seconds=2.0)
    assert (half.speed, half.left) == (25.0, 4.0)
    assert Progress(1, 2, run, 0, 150, 0.0).left is None


def test_an_interrupt_in_the_middle_of_a_file_ends_the_reading(tmp_path: Path) -> None:
    told: list[Progress] = []

    def interrupt(progress: Progress) -> None:
        told.append(progress)
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(verify(targets_of([make_run(tmp_path / "run")]), interrupt))
    assert told[-1].done < told[-1].total


def test_everything_means_the_archive_and_the_quarantine_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (6.0, 5.0, 4.0, 3.0, 2.0))
    catalog = Catalog(run)
    fifth, fourth, third, *_older = catalog.scan().entries
    place = catalog.archive([third], 1)
    catalog.quarantine(fifth.names, "it looked damaged")
    catalog.quarantine(fourth.names, "it is damaged")
    flip(run / "quarantine" / "model_epoch_4.pt")
    (run / "archive" / "notes.pt").write_bytes(b"somebody else's")
    assert len(targets_of([run])) == 2
    before = list(catalog.events())
    found = {v.target.paths[0].name: v for v in verify(targets_of([run], everything=True))}
    assert [(name, v.target.place, v.state, v.failed) for name, v in found.items()] == [
        ("model_epoch_2.pt", "run", "intact", False),
        ("model_epoch_1.pt", "run", "intact", False),
        ("model_epoch_3.pt", "archive", "intact", False),
        ("notes.pt", "archive", "foreign", False),
        ("model_epoch_5.pt", "quarantine", "intact", False),
        ("model_epoch_4.pt", "quarantine", "damaged", False),
    ]
    recorded = list(catalog.events())[len(before) :]
    assert [event["step"] for event in recorded] == [200, 100], "copies elsewhere prove nothing"
    flip(place / "model_epoch_3.pt")
    failed = [v for v in verify(targets_of([run], everything=True)) if v.failed]
    assert [v.target.paths[0].name for v in failed] == ["model_epoch_3.pt"]


def test_a_link_into_the_archive_is_read_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "archive").mkdir()
    (run / "archive" / "kept.pt").hardlink_to(run / "model_epoch_1.pt")
    assert len(targets_of([run], everything=True)) == 4


def test_what_is_not_there_is_said_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(HoldfastError, match=r"no checkpoint at .*nowhere\.pt"):
        targets_of([make_run(tmp_path / "run", (1.0,)), tmp_path / "nowhere.pt"])
