"""Looking again and again at runs that come, go, fail and are chosen; never an exception."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from holdfast.checkpoint.system.lock import FileLock
from holdfast.monitor import run_view
from holdfast.monitor.curves import Series
from holdfast.monitor.run_view import FINISHED, STOPPED, RunView
from holdfast.monitor.terminal import watcher
from holdfast.monitor.terminal.watcher import Look, Watcher, runs_in
from tests.manage.runs import make_run
from tests.monitor.recorded import Recorded


def watch(root: Path, interval: float = 60.0) -> Watcher:
    return Watcher(root, interval, lambda _look: None)


@pytest.fixture(autouse=True)
def search_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "SEARCH_EVERY", 0.0)
    monkeypatch.setattr(watcher, "SHARE", 0)


def test_a_directory_that_is_not_there_is_waited_for(tmp_path: Path) -> None:
    found = watch(tmp_path / "run")
    look = found.look()
    assert (look.runs, look.snapshot) == ((), None)
    assert look.problem == f"Waiting for a training in {tmp_path / 'run'}"
    run = Recorded(tmp_path / "run")
    assert found.look().snapshot is None, "an empty directory holds no run yet"
    run.started(0, 0)
    run.step(10, 1)
    look = found.look()
    assert look.snapshot is not None
    assert (look.snapshot.step, look.runs, look.problem) == (10, (run.directory,), "")
    assert look.curves is not None and look.curves.loss == Series([10], [2.0])


def test_a_run_that_is_deleted_is_waited_for_and_watched_again(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    run = Recorded(directory)
    run.started(0, 0)
    run.step(10, 1)
    found = watch(tmp_path)
    assert found.look().snapshot is not None
    shutil.rmtree(directory)
    look = found.look()
    assert look.snapshot is None
    assert look.problem == f"The directory is gone; waiting for a training in {directory}"
    assert look.curves is None
    run = Recorded(directory)
    run.started(0, 100)
    run.step(20, 101)
    look = found.look()
    assert look.snapshot is not None
    assert (look.snapshot.step, look.problem) == (20, "")
    assert look.curves is not None and look.curves.loss == Series([20], [2.0])


def test_one_of_several_runs_is_chosen(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        Recorded(tmp_path / name).started(0, 0)
        Recorded(tmp_path / name).step(10, 1)
    Recorded(tmp_path / "b").metric("finished", 10, 2)
    for age, name in enumerate(("a", "c", "b")):
        os.utime(tmp_path / name / "metrics.jsonl", (time.time() - age,) * 2)
    found = watch(tmp_path)
    first = found.look()
    assert first.snapshot is not None
    assert (first.index, len(first.runs), first.snapshot.state) == (0, 3, STOPPED)
    found.choose(first.runs[1])
    second = found.look()
    assert second.snapshot is not None
    assert (second.index, second.snapshot.state) == (1, FINISHED)
    Recorded(tmp_path / "a2").started(0, 5)  # a new run does not move the choice
    third = found.look()
    assert third.snapshot is not None
    assert (third.index, len(third.runs), third.snapshot.directory.name) == (2, 4, "b")


def test_who_names_none_of_several_sees_the_one_that_trains_else_the_newest(tmp_path: Path) -> None:
    for age, name in enumerate(("c", "b", "a")):
        Recorded(tmp_path / name).started(0, 0)
        os.utime(tmp_path / name / "metrics.jsonl", (time.time() - 60 * age,) * 2)
    assert watch(tmp_path).look().index == 2
    with FileLock(tmp_path / "b" / ".run.lock"):
        assert watch(tmp_path).look().index == 1


def test_a_directory_of_nothing_but_checkpoints_is_a_run(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    (directory / "events.jsonl").unlink()
    assert runs_in(directory) == [directory]
    look = watch(directory).look()
    assert look.snapshot is not None
    assert [row.entry.step for row in look.snapshot.rows] == [400, 300, 200, 100]


def test_an_error_of_the_disk_is_shown_beside_what_was_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run")
    found = watch(tmp_path)
    found.look()
    real = RunView.refresh

    def fail(_view: RunView) -> bool:
        raise OSError(5, "Input/output error", "metrics.jsonl")

    monkeypatch.setattr(RunView, "refresh", fail)
    look = found.look()
    assert "Input/output error" in look.problem
    assert look.snapshot is not None
    assert len(look.snapshot.rows) == 4
    monkeypatch.setattr(RunView, "refresh", real)
    assert found.look().problem == ""


def test_a_look_that_failed_halfway_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came while the directory could not be read is not missed for good."""
    view = RunView(make_run(tmp_path / "run"))
    real = run_view.look

    def fail(*_where: object, **_how: object) -> run_view.RunDirectory:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(run_view, "look", fail)
    with pytest.raises(OSError, match="Input"):
        view.refresh()
    monkeypatch.setattr(run_view, "look", real)
    assert view.refresh()
    assert len(view.entries) == 4


def test_a_large_tree_is_searched_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []

    def search(root: Path) -> list[Path]:
        searches.append(root)
        time.sleep(0.02)
        return []

    monkeypatch.setattr(watcher, "SHARE", 100)
    monkeypatch.setattr(watcher, "runs_in", search)
    found = watch(tmp_path)
    for _time in range(20):
        found.look()
    assert len(searches) == 1, "two seconds have to pass"


def test_the_thread_delivers_wakes_and_ends(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Recorded(tmp_path / name).started(0, 0)
    looks: list[Look] = []
    came = threading.Semaphore(0)

    def deliver(look: Look) -> None:
        looks.append(look)
        came.release()

    found = Watcher(tmp_path, 3600.0, deliver)
    found.start()
    assert came.acquire(timeout=20)
    found.choose(looks[0].runs[1])  # does not wait for the hour to be over
    assert came.acquire(timeout=20)
    assert looks[1].index == 1
    found.stop()
    found.join(20)
    assert not found.is_alive()
