"""`holdfast clean`: the floor holds, everything has its reason, and a training is not disturbed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from holdfast import load
from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.checkpoint.rundir.entries import Entry
from holdfast.checkpoint.system import filesystem
from holdfast.checkpoint.system.lock import FileLock, run_lock
from holdfast.errors import ResourceError, RunLocked
from holdfast.manage import locking
from holdfast.manage import rollback as going_back
from holdfast.manage.cleaning import clean
from holdfast.manage.cleaning.clean import Plan, Wish, execute, plan
from holdfast.manage.pin import pin
from holdfast.manage.rundir import look
from holdfast.table import Screen
from tests.manage.runs import Training, desk, flip, forget_verified, make_run, names_in
from tests.support import archived


def going(shown: Plan) -> dict[str, str]:
    return {row.names[0]: row.reason for row in shown.going}


def staying(shown: Plan) -> dict[str, str]:
    return {row.names[0]: row.reason for row in shown.rows if row.stays}


def test_the_best_the_newest_and_two_verified_stay_whatever_is_asked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (2.0, 4.0, 5.0, 3.0, 3.5))
    shown = plan(run, Wish(1, temp=True, quarantine=True))
    assert staying(shown) == {
        "model_epoch_5.pt": "newest",
        "model_epoch_4.pt": "two_verified",
        "model_epoch_1.pt": "best",
    }
    assert going(shown) == {"model_epoch_3.pt": "older", "model_epoch_2.pt": "older"}
    text = "\n".join(shown.lines(Screen()))
    assert "goes: 2 of 5" in text and "older than the last 1" in text
    size = (run / "model_epoch_2.pt").stat().st_size
    assert shown.freed == 2 * size


def test_what_was_shown_goes_and_cache_and_history_know(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (2.0, 4.0, 5.0, 3.0, 3.5))
    done = execute(plan(run, Wish(1)))
    left = {f"model_epoch_{n}.pt" for n in (1, 4, 5)}
    assert names_in(run) == left | {"latest.pt", "model.pt", "best_model.pt"}
    assert len(done.going) == 2 and done.freed > 0
    assert set(json.loads((run / "metadata.json").read_text())["files"]) == names_in(run)
    removed = [event for event in Catalog(run).events() if event["event"] == "removed"]
    assert [(event["step"], event["reason"]) for event in removed] == [
        (300, "clean"), (200, "clean")
    ]  # fmt: skip
    for name in names_in(run):
        load(run / name)
    assert not plan(run, Wish(1)).going


def test_nothing_goes_before_two_are_verified(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    forget_verified(run)
    shown = plan(run, Wish(1))
    assert shown.unverified and not shown.going
    assert staying(shown)["model_epoch_1.pt"] == "too_few_verified"


def test_verified_once_and_found_damaged_later_counts_no_more(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (5.0, 4.0, 3.0, 2.0))
    flip(run / "model_epoch_3.pt")
    assert desk("verify", run).returncode == 4
    shown = plan(run, Wish(1))
    assert {"model_epoch_4.pt", "model_epoch_2.pt"} <= set(staying(shown))
    assert staying(shown)["model_epoch_2.pt"] == "two_verified"


def test_what_is_newer_than_the_newest_verified_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (2.0, 4.0, 5.0, 3.0, 3.5))
    events = run / "events.jsonl"
    ids = {entry.step: entry.id for entry in look(run).entries}
    lines = events.read_text().splitlines(keepends=True)
    unverified = ('"verified"', (ids[500], ids[400]))
    events.write_text(
        "".join(x for x in lines if not (unverified[0] in x and any(i in x for i in unverified[1])))
    )
    assert staying(plan(run, Wish(1))) == {
        "model_epoch_5.pt": "newest",
        "model_epoch_4.pt": "unverified",
        "model_epoch_3.pt": "two_verified",
        "model_epoch_2.pt": "two_verified",
        "model_epoch_1.pt": "best",
    }


def test_the_best_that_is_verified_stays_beside_a_better_one_that_is_not(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (2.0, 4.0, 5.0, 3.0, 1.0))
    events = run / "events.jsonl"
    newest = look(run).entries[0].id
    lines = events.read_text().splitlines(keepends=True)
    events.write_text("".join(x for x in lines if not ('"verified"' in x and newest in x)))
    (run / "best_model.pt").unlink()  # the trainer has not come to publishing it
    assert staying(plan(run, Wish(1)))["model_epoch_1.pt"] == "best_verified"


def test_only_what_was_asked_for_goes(tmp_path: Path) -> None:
    with Training(tmp_path / "run") as training:
        training.epoch(1, 4.0)
        for step in (110, 120, 130):
            training.temp(step)
        for number in (2, 3, 4):
            training.epoch(number, 4.0 + number)
    run = tmp_path / "run"
    # The engine has removed its own temporary files; some are there again, from a backup.
    (run / "temp").mkdir(exist_ok=True)
    with Training(tmp_path / "other") as other:
        other.temp(10)
        other.temp(20)
    for path in (tmp_path / "other" / "temp").iterdir():
        os.link(path, run / "temp" / path.name)
    temps = {f"temp/temp_epoch1_step{n}.pt" for n in (10, 20)}
    assert temps <= names_in(run)
    assert set(going(plan(run, Wish(None, temp=True)))) == temps
    assert staying(plan(run, Wish(1)))["temp/temp_epoch1_step10.pt"] == "not_temp"
    assert staying(plan(run, Wish(None, temp=True)))["model_epoch_2.pt"] == "not_keep"
    assert not plan(run, Wish(0)).going
    # Another directory still has the data of these two: no byte comes back.
    assert plan(run, Wish(None, temp=True)).freed == 0


def test_quarantine_goes_when_something_intact_is_known_and_stays_otherwise(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    flip(run / "latest.pt")
    with Training(run):
        pass
    assert set(going(plan(run, Wish(2)))) == {"model_epoch_1.pt"}  # nobody asked for the rest
    shown = plan(run, Wish(None, quarantine=True))
    assert {name.split("/")[0] for name in going(shown)} == {"quarantine"}
    history = (run / "events.jsonl").read_text()
    forget_verified(run)
    assert set(staying(plan(run, Wish(None, quarantine=True))).values()) >= {"only_damaged"}
    (run / "events.jsonl").write_text(history)
    execute(shown)
    assert not (run / "quarantine").exists()
    assert "model_epoch_3.pt" in names_in(run)


def test_nothing_goes_from_where_a_link_leads_to(tmp_path: Path) -> None:
    """A run that was copied may bring links along: what lies behind them is somebody's own."""
    run, own = make_run(tmp_path / "run"), tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("mine")
    (own / "x.pt").write_bytes((run / "latest.pt").read_bytes())
    for name in ("quarantine", "archive"):
        (run / name).symlink_to(own)
    shown = plan(run, Wish(None, quarantine=True, archive=True))
    assert not shown.going and not shown.freed
    assert staying(shown)["quarantine"] == staying(shown)["archive"] == "linked"
    execute(shown)
    assert {path.name for path in own.iterdir()} == {"thesis.txt", "x.pt"}


def test_unfinished_files_go_unless_a_training_runs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Training(run) as training:
        training.epoch(1, 1.0)
        leftover = run / ".holdfast-1-abc.tmp"
        leftover.write_bytes(b"x" * 100)
        shown = plan(run, Wish(None, temp=True))
        assert going(shown) == {leftover.name: "unfinished"}
        done = execute(shown)
        assert not done.going and leftover.exists()
        assert staying(done)[leftover.name] == "training"
    done = execute(plan(run, Wish(None, temp=True)))
    assert done.freed in (100, 4096) and not leftover.exists()  # a block, where the system tells


def test_what_came_after_the_plan_was_shown_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shown = plan(run, Wish(1))
    assert set(going(shown)) == {"model_epoch_1.pt"}
    with Training(run) as training:
        for number in (5, 6):
            training.epoch(number, 3.0)
    assert "model_epoch_3.pt" in going(plan(run, Wish(1)))
    done = execute(shown)
    assert set(going(done)) == {"model_epoch_1.pt"}
    assert staying(done)["model_epoch_3.pt"] == "came"


def test_ctrl_c_takes_effect_when_the_removal_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", (2.0, 4.0, 5.0, 3.0, 3.5))
    delete = Catalog.delete

    def interrupted(self: Catalog, entry: Entry, why: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        delete(self, entry, why)

    monkeypatch.setattr(Catalog, "delete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(plan(run, Wish(1)))
    assert {"model_epoch_2.pt", "model_epoch_3.pt"}.isdisjoint(names_in(run))
    assert set(json.loads((run / "metadata.json").read_text())["files"]) == names_in(run)
    with Catalog(run).lock(wait=0):
        pass  # it was given back


def test_clean_and_verify_beside_a_training_lose_nothing(tmp_path: Path) -> None:
    """Other processes clean and verify while this one trains: what is announced can be loaded."""
    run, stop = tmp_path / "run", threading.Event()
    failures: list[str] = []

    def disturb(*argv: str) -> None:
        while not stop.is_set():
            done = desk(*argv)
            if done.returncode or "Traceback" in done.stderr:
                failures.append(done.stdout + done.stderr)

    with Training(run) as training:
        training.epoch(1, 9.0)
        threads = [
            threading.Thread(target=disturb, args=("clean", str(run), "--keep", "1", "--yes")),
            threading.Thread(target=disturb, args=("verify", str(run))),
        ]
        for thread in threads:
            thread.start()
        for number in range(2, 42):
            training.epoch(number, 9.0 - 0.01 * number if number % 7 else 9.0)
            assert load(run / "latest.pt")["epoch"] == number
            contents = Catalog(run).scan()
            assert contents.best is not None and (run / "best_model.pt").exists()
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]
    removed = [e for e in Catalog(run).events() if e["event"] == "removed"]
    assert len(removed) >= 10, "the test has not disturbed anything"
    assert sum(entry.verified for entry in look(run).entries) >= 2
    assert load(run / "best_model.pt")["epoch"] == 41


def test_an_empty_directory_has_nothing_to_clean_and_is_not_touched(tmp_path: Path) -> None:
    shown = plan(tmp_path, Wish(1, temp=True, quarantine=True))
    assert shown.lines(Screen()) == [f"There is nothing to clean in {tmp_path}."]
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_was_the_best_once_goes(tmp_path: Path) -> None:
    with Training(tmp_path / "run") as training:
        for step, loss in ((10, 3.0), (20, 2.0)):
            training.manager.save(step=step, kind="best", metrics={"val_loss": loss})
        for number in (1, 2):
            training.epoch(number, 2.5)
    # The engine has let go of it already; it is there again, from a backup.
    with Training(tmp_path / "other") as training:
        training.manager.save(step=15, kind="best", metrics={"val_loss": 2.9})
    os.link(tmp_path / "other" / "checkpoint_step_15.pt", tmp_path / "run" / "old.pt")
    assert going(plan(tmp_path / "run", Wish(1))) == {"old.pt": "no_longer_best"}
    assert not plan(tmp_path / "run", Wish(0)).going


def test_one_step_saved_twice_is_one_verified_state(tmp_path: Path) -> None:
    with Training(tmp_path / "run") as training:
        training.epoch(1, 3.0)
        training.manager.save(step=100, kind="step")
    shown = plan(tmp_path / "run", Wish(1, temp=True))
    assert shown.unverified and not shown.going


# ------------------------------------------------------------------ --keep-best, --every, --archive


def test_the_best_stay_and_what_is_not_among_them_goes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (5.0, 2.0, 4.0, 1.0, 3.0, 6.0, 6.5))
    shown = plan(run, Wish(None, keep_best=3))
    assert staying(shown) == {
        "model_epoch_7.pt": "newest",
        "model_epoch_6.pt": "two_verified",
        "model_epoch_5.pt": "among_best",
        "model_epoch_4.pt": "best",
        "model_epoch_2.pt": "among_best",
    }
    assert going(shown) == {"model_epoch_3.pt": "not_kept", "model_epoch_1.pt": "not_kept"}
    text = "\n".join(shown.lines(Screen()))
    assert "no rule keeps it" in text and " among the best 3" in text and "older" not in text


def test_every_tenth_stays_by_the_number_in_its_name(tmp_path: Path) -> None:
    with Training(tmp_path / "run") as training:
        for step in (30, 40, 55):
            training.manager.save(step=step, kind="step")
        for number in range(1, 9):
            training.epoch(number, 1.0 + number)  # the first is the best
    shown = plan(tmp_path / "run", Wish(None, every=4))
    assert staying(shown) == {
        "model_epoch_8.pt": "newest",
        "model_epoch_7.pt": "two_verified",
        "model_epoch_4.pt": "every",
        "model_epoch_1.pt": "best",
        "checkpoint_step_40.pt": "every",
    }
    assert "  a multiple of 4" in "\n".join(shown.lines(Screen()))


def test_what_one_rule_keeps_the_others_do_not_take(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (9.0, 2.0, 1.0, 8.0, 7.0, 6.0, 5.0, 5.5, 5.6))
    shown = plan(run, Wish(3, keep_best=2, every=4))
    assert staying(shown) == {
        "model_epoch_9.pt": "newest",
        "model_epoch_8.pt": "last",
        "model_epoch_7.pt": "last",
        "model_epoch_4.pt": "every",
        "model_epoch_3.pt": "best",
        "model_epoch_2.pt": "among_best",
    }
    assert {shown.why(row) for row in shown.going} == {"no rule keeps it"}
    assert not plan(run, Wish(0, keep_best=1)).going, "--keep 0 keeps all"


def go_back(run: Path, wanted: str) -> None:
    with run_lock(run):
        going_back.execute(going_back.plan(run, wanted))


def test_what_a_roll_back_has_set_aside_goes_only_when_asked_for(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (4.0, 3.0, 2.0, 5.0))
    go_back(run, "200")
    assert {row.names[0] for row in plan(run, Wish(1, temp=True, quarantine=True)).rows} == {
        "model_epoch_2.pt", "model_epoch_1.pt"
    }  # fmt: skip
    pin(run, str(archived(run) / "model_epoch_4.pt"))
    shown = plan(run, Wish(None, archive=True))
    place = archived(run).relative_to(run).as_posix()
    assert going(shown) == {f"{place}/model_epoch_3.pt": "archived"}
    assert staying(shown)[f"{place}/model_epoch_4.pt"] == "pinned"
    (row,) = shown.going
    assert row.step == 300 and f"{place}/best_model.pt" in row.names
    with FileLock(run / ".run.lock"):  # a training may be about to need it
        done = execute(shown)
    assert staying(done)[f"{place}/model_epoch_3.pt"] == "training"
    done = execute(shown)
    assert list(going(done)) == [f"{place}/model_epoch_3.pt"]
    left = {path.name for path in archived(run).iterdir()}
    assert left == {"model_epoch_4.pt", "latest.pt", "model.pt"}
    pin(run, str(archived(run) / "model_epoch_4.pt"), remove=True)
    execute(plan(run, Wish(None, archive=True)))
    assert not (run / "archive").exists()
    with Training(run) as training:
        assert training.resumed is not None and training.resumed.step == 200


def test_the_archive_stays_while_nothing_here_is_verified_or_a_roll_back_needs_it(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run", (4.0, 3.0, 2.0, 5.0))
    go_back(run, "200")
    go_back(run, str(archived(run) / "model_epoch_3.pt"))
    (run / "model_epoch_3.pt").unlink()  # as a crash before it was linked would leave it
    for role in ("latest.pt", "model.pt", "best_model.pt"):
        (run / role).unlink()
    name = f"{archived(run).relative_to(run).as_posix()}/model_epoch_3.pt"
    assert staying(plan(run, Wish(None, archive=True)))[name] == "rolled_back_to"
    with Training(run) as training:
        assert training.resumed is not None and training.resumed.step == 300
        training.epoch(4, 1.0)
    assert name in going(plan(run, Wish(None, archive=True)))
    forget_verified(run)
    assert set(staying(plan(run, Wish(None, archive=True))).values()) >= {"only_archived"}
    assert not going(plan(run, Wish(None, archive=True)))


# --------------------------------------------------------------------------- disks, locks, Ctrl-C


def du(directory: Path) -> int:
    """What du(1) says of the checkpoints in `directory`, in bytes."""
    files = [str(path) for path in directory.rglob("*.pt")]
    done = subprocess.run(["du", "-c", "-B1", *files], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1].split()[0])


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_the_bytes_that_come_back_are_those_of_du(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Also where names are copies, where one file is held from elsewhere, and in the archive."""
    if not links:
        monkeypatch.setenv("HOLDFAST_DISABLE", "hardlinks,reflink")
    run = make_run(tmp_path / "run", (2.0, 4.0, 5.0, 3.0, 3.5, 6.0, 7.0))
    go_back(run, "600")
    with Training(run) as training:
        training.epoch(7, 8.0)
    (tmp_path / "elsewhere").mkdir()
    os.link(run / "model_epoch_2.pt", tmp_path / "elsewhere" / "kept.pt")
    before = du(run)
    shown = plan(run, Wish(1, temp=True, archive=True))
    done = execute(shown)
    one = (run / "model_epoch_7.pt").stat().st_size
    held = one  # another directory still has one of them
    assert len(done.going) >= 5 and any("archive" in row.names[0] for row in done.going)
    assert shown.freed == done.freed == before - du(run) - held
    assert {"model_epoch_1.pt", "model_epoch_7.pt"} <= names_in(run)
    assert load(run / "best_model.pt")["epoch"] == 1 and load(run / "latest.pt")["epoch"] == 7


def test_it_is_done_in_turns_and_a_training_may_save_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", (1.0, 4.0, 5.0, 3.0, 3.5, 6.0, 7.0))
    monkeypatch.setattr(clean, "TURN", 0.0)
    came_in = []

    def pause(_seconds: float) -> None:
        with Catalog(run).lock(wait=0):
            came_in.append(len(names_in(run)))

    monkeypatch.setattr(clean.time, "sleep", pause)
    shown = plan(run, Wish(1))
    done = execute(shown)
    assert len(shown.going) == 4 and going(done) == going(shown) and done.freed == shown.freed
    assert came_in == [9, 8, 7], "one turn each, and the lock is free between them"
    removed = [event["step"] for event in Catalog(run).events("removed")]
    assert sorted(removed) == [200, 300, 400, 500]


def test_ctrl_c_in_the_middle_says_what_has_gone_and_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", (1.0, 4.0, 5.0, 3.0, 3.5))
    monkeypatch.setattr(clean, "TURN", 0.0)
    delete = Catalog.delete

    def interrupted(self: Catalog, entry: Entry, why: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        delete(self, entry, why)

    monkeypatch.setattr(Catalog, "delete", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"Stopped: 1 of 2 removed, 36\.0 KiB came back"):
        execute(plan(run, Wish(1)))
    assert "model_epoch_3.pt" not in names_in(run) and "model_epoch_2.pt" in names_in(run)
    assert set(json.loads((run / "metadata.json").read_text())["files"]) == names_in(run)


def test_a_lock_that_is_held_is_waited_for_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", (1.0, 4.0, 5.0, 3.0, 3.5))
    before, shown = names_in(run), plan(run, Wish(1))
    monkeypatch.setattr(locking, "WAIT", 0.1)
    with Catalog(run).lock():
        assert plan(run, Wish(1)).going, "to look takes no lock"
        with pytest.raises(RunLocked, match=r"is changing .*run \(this process\).*Try again"):
            execute(shown)
    assert names_in(run) == before
    assert len(execute(shown).going) == 2


def test_ctrl_c_while_it_waits_for_the_lock_does_not_wait(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (1.0, 4.0, 5.0, 3.0, 3.5))
    shown, before = plan(run, Wish(1)), names_in(run)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with Catalog(run).lock(), pytest.raises(KeyboardInterrupt, match="0 of 2 removed"):
        execute(shown)
    assert time.monotonic() - began < 10 and names_in(run) == before


def test_a_directory_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", (1.0, 4.0, 5.0, 3.0, 3.5))
    shown, before = plan(run, Wish(1)), names_in(run)

    open_ = os.open

    def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return open_(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ResourceError, match=r"run cannot be written: Read-only file system\."):
        execute(shown)
    assert names_in(run) == before


def test_an_empty_archive_of_a_save_that_is_under_way_is_left_alone(tmp_path: Path) -> None:
    """The engine makes the folder first and takes the lock then."""
    run = make_run(tmp_path / "run", (1.0, 4.0, 5.0, 3.0, 3.5))
    filesystem.make_directory(run / "archive" / "replaced")
    execute(plan(run, Wish(1, archive=True, quarantine=True, temp=True)))
    assert (run / "archive" / "replaced").is_dir()
