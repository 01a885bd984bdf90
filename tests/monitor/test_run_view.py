"""A run as it is now: what counts of its curves, whether it trains, what would be lost."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.system.lock import FileLock
from holdfast.errors import HoldfastError
from holdfast.monitor.curves import INTERRUPTED, curves_of
from holdfast.monitor.run_view import (
    BROKE_OFF,
    EMPTY,
    FINISHED,
    STOPPED,
    TRAINING,
    RunView,
    find_runs,
)
from tests.manage.runs import Training, flip, make_run
from tests.monitor.recorded import Recorded, ago, stamp
from tests.support import Toy, in_child

linux = pytest.mark.skipif(not shared_memory.usable(), reason="needs locks and /dev/shm of Linux")


@pytest.fixture
def run(tmp_path: Path) -> Recorded:
    return Recorded(tmp_path / "run")


@pytest.fixture
def training(run: Recorded) -> Iterator[None]:
    """Somebody trains in `run`."""
    with FileLock(run.directory / ".run.lock"):
        yield


def seen(run: Recorded) -> RunView:
    view = RunView(run.directory)
    view.refresh()
    return view


def steps(view: RunView) -> list[int]:
    return [point.step for point in view.points]


# ------------------------------------------------------------------------------------ what counts


def test_points_come_as_they_are_written(run: Recorded) -> None:
    run.started(0, 0)
    run.step(10, 1, loss=5.0)
    view = seen(run)
    assert steps(view) == [10]
    point = view.points[0]
    assert (point.epoch, point.loss, point.smoothed, point.learning_rate) == (1, 5.0, 5.0, 1e-3)
    assert not view.refresh(), "nothing has come"
    run.step(20, 2)
    assert view.refresh()
    assert steps(view) == [10, 20]


def test_a_loss_that_was_no_number_is_none(run: Recorded) -> None:
    run.started(0, 0)
    run.step(10, 1, loss=None)
    assert seen(run).points[0].loss is None


def test_it_is_known_since_when_the_loss_is_no_number(run: Recorded) -> None:
    run.started(0, 0)
    for step, loss in ((10, 5.0), (20, None), (30, 4.0), (40, None), (50, None)):
        run.step(step, step / 10, loss=loss)
    view = seen(run)
    assert view.nan_since == 40
    assert [point.step for point in view.wild] == [20, 40, 50]
    run.metric("resumed", 30, 6)  # undone with the steps
    view.refresh()
    assert (view.nan_since, [point.step for point in view.wild]) == (None, [20])
    run._append("metrics.jsonl", {"time": stamp(7), "event": "step", "step": 40})
    view.refresh()
    assert view.nan_since is None, "who writes no loss has none that is wrong"


def test_a_torn_line_costs_that_line_alone(run: Recorded) -> None:
    run.started(0, 0)
    run.step(10, 1)
    run.torn()
    run.torn("events.jsonl")
    view = seen(run)
    run.started(10, 5)  # behind the half line, as the next start writes it
    run.step(20, 6)
    assert view.refresh()
    assert steps(view) == [10, 20]
    assert view.started["step"] == 10


@pytest.mark.parametrize(
    "fields",
    [
        {"event": "step", "step": "ten"},
        {"event": "step"},
        {"event": 7, "step": 3},
        {"event": "sample", "step": 3, "epoch": "one", "text": None},
        {"event": "diverged", "step": 3, "back_to": None},
        {"event": "evaluation", "step": 3, "val_loss": "x", "time": 5},
        {"event": "started", "step": 0, "total_steps": "many", "host": 7, "pid": "x"},
    ],
)
def test_lines_that_make_no_sense_do_no_harm(run: Recorded, fields: dict[str, object]) -> None:
    run.started(0, 0)
    run.step(10, 1)
    run._append("metrics.jsonl", {"time": "nonsense", **fields})
    run._append("events.jsonl", {"time": None, **fields})
    view = seen(run)
    assert view.step >= 0
    assert view.state in (TRAINING, STOPPED)
    assert view.marks is not None
    assert view.safety.disk_steps >= 0


def test_a_resume_undoes_what_came_after_its_step(run: Recorded) -> None:
    run.started(0, 0)
    run.steps(10, 100, 1)
    run.metric("evaluation", 100, 101, val_loss=3.0)
    run.metric("sample", 100, 101, epoch=1, text="x")
    run.steps(110, 150, 102)
    view = seen(run)
    run.started(100, 500)
    run.metric("resumed", 100, 500, generation=1)
    view.refresh()
    assert steps(view)[-1] == 100
    assert [e.step for e in view.evaluations] == [100], "that of the step itself stays"
    run.steps(110, 120, 510)
    view.refresh()
    assert steps(view) == list(range(10, 121, 10))


def test_a_resume_from_an_earlier_step_undoes_evaluations_and_samples_too(run: Recorded) -> None:
    run.started(0, 0)
    run.steps(10, 100, 1)
    run.metric("evaluation", 100, 101, val_loss=3.0)
    run.metric("sample", 100, 101, epoch=1, text="x")
    run.started(50, 500)
    view = seen(run)
    assert steps(view)[-1] == 50
    assert (view.evaluations, view.samples) == ([], [])


def test_a_step_that_is_made_again_is_drawn_once(run: Recorded) -> None:
    """A kill between two lines: nothing announces the step back but the step itself."""
    run.started(0, 0)
    run.steps(10, 50, 1)
    run.steps(30, 40, 100)
    assert steps(seen(run)) == [10, 20, 30, 40]


def test_an_evaluation_that_is_made_again_after_a_kill_counts_once(run: Recorded) -> None:
    run.started(0, 0)
    for begins in (0, 10):  # killed between the line and the save of what it says
        run.metric("evaluation", 10, begins + 1, val_loss=4.0)
        run.metric("sample", 10, begins + 2, epoch=1, text="今天")
        run.started(10, begins + 3)
    view = seen(run)
    assert [each.step for each in view.evaluations] == [10]
    assert [each.step for each in view.samples] == [10]


def test_a_divergence_undoes_what_it_went_back_over(run: Recorded) -> None:
    run.started(0, 0)
    run.steps(10, 90, 1)
    run.metric("diverged", 95, 96, back_to=60)
    run.event("diverged", 96, step=95, reason="loss is nan", back_to=60)
    view = seen(run)
    assert steps(view)[-1] == 60
    told = [mark.kind for mark in view.marks if mark.kind != BROKE_OFF]
    assert told == ["diverged"], "written twice, marked once"


def test_a_roll_back_undoes_points_before_anybody_goes_on(run: Recorded) -> None:
    run.started(0, 0)
    run.steps(10, 90, 1)
    run.metric("finished", 90, 92)
    view = seen(run)
    assert view.state == FINISHED
    run.event("rolled_back", 1000, step=40, id="a", order=[1, 40, 1], generation=2, run_id="r")
    view.refresh()
    assert steps(view)[-1] == 40
    assert view.state == STOPPED, "it goes on from there"


def test_a_roll_back_long_ago_undoes_nothing_that_was_trained_since(run: Recorded) -> None:
    run.started(0, 0)
    run.steps(10, 90, 1)
    run.event("rolled_back", 1000, step=40, id="a", order=[1, 40, 1], generation=2, run_id="r")
    run.started(40, 1100)
    run.steps(50, 70, 1101)
    run.metric("evaluation", 70, 1200, val_loss=3.0)
    run.metric("sample", 70, 1200, epoch=1, text="x")
    run.metric("finished", 70, 1201)
    view = seen(run)
    assert steps(view) == [10, 20, 30, 40, 50, 60, 70]
    assert (len(view.evaluations), len(view.samples)) == (1, 1)
    assert view.state == FINISHED


def test_replaced_files_are_another_run(run: Recorded) -> None:
    run.started(0, 0)
    run.steps(10, 90, 1)
    run.event("began", 0, run_id="a", generation=1)
    view = seen(run)
    for name in ("metrics.jsonl", "events.jsonl"):
        (run.directory / name).rename(run.directory / f"old-{name}")
    run.started(0, 500)
    run.step(10, 501)
    run.event("began", 500, run_id="b", generation=1)
    view.refresh()
    assert steps(view) == [10]
    assert [event["run_id"] for event in view.events] == ["b"]


# ------------------------------------------------------------------------------------ what happened


def test_marks_and_notices_are_in_the_order_of_time(run: Recorded) -> None:
    run.event("began", 0, run_id="a", generation=1)
    run.event("durable", 5, step=10, kind="temp", reason="scheduled", names=["x.pt"], size=1)
    run.event("failed", 7, step=20, reason="full")
    run.event("durable", 9, step=25, kind="temp", reason="signal", names=["y.pt"], size=1)
    run.event("resumed", 20, step=25, run_id="a", generation=1)
    run.started(25, 21)
    run.step(30, 22)
    run.metric("finished", 40, 23)
    run.event("quarantined", 30, names=["y.pt"], reason="a bit")
    view = seen(run)
    kinds = ["failed", "interrupted", "resumed", "finished", "quarantined"]
    assert [mark.kind for mark in view.marks] == kinds
    told = ["began", "failed", "durable", "resumed", "finished", "quarantined"]
    assert [event["event"] for event in view.notices] == told


def test_saving_fails_until_it_works_again(run: Recorded) -> None:
    run.event("durable", 1, step=10, kind="temp", reason="scheduled", names=["x.pt"], size=1)
    view = seen(run)
    assert view.saving_fails == ""
    run.event("failed", 2, step=20, reason="No space left on device")
    view.refresh()
    assert view.saving_fails == "No space left on device"
    run.event("recovered", 3, step=30, failures=1)
    view.refresh()
    assert view.saving_fails == ""


def test_a_quarantined_file_is_a_mark_and_no_checkpoint(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    newest = directory / "model_epoch_4.pt"
    flip(newest)
    view = RunView(directory)
    view.refresh()
    assert view.entries[0].step == 400
    with Training(
        directory
    ) as again:  # finds the damage, sets it aside, goes on from the one before
        assert again.resumed is not None
        assert again.resumed.step == 300
    view.refresh()
    assert view.entries[0].step == 300
    assert [mark.kind for mark in view.marks] == ["quarantined", "resumed"]


# ------------------------------------------------------------------------------------- the state


def test_nothing_there_is_empty(tmp_path: Path) -> None:
    view = RunView(tmp_path)
    assert view.refresh()
    assert view.state == EMPTY
    assert (view.step, view.total_steps, view.eta, view.entries) == (0, None, None, [])
    assert view.silent == math.inf
    assert view.safety.disk_step is None


def test_a_directory_that_is_not_there_is_said_and_may_come(tmp_path: Path) -> None:
    run = Recorded(tmp_path / "run")
    shutil.rmtree(run.directory)
    view = RunView(run.directory)
    for _time in range(2):
        with pytest.raises(HoldfastError, match="There is no directory"):
            view.refresh()
    run = Recorded(tmp_path / "run")
    run.started(0, 0)
    run.step(10, 1)
    assert view.refresh()
    assert steps(view) == [10]


def test_a_directory_that_is_deleted_leaves_an_empty_view(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    run = Recorded(directory)
    run.started(0, 0)
    run.steps(10, 400, 1)
    run.configure(keep_last_n=3)
    view = seen(run)
    assert view.entries
    shutil.rmtree(directory)
    with pytest.raises(HoldfastError):
        view.refresh()
    assert (view.points, view.entries, view.events, view.config) == ([], [], [], {})
    assert view.state == EMPTY
    assert view.safety.disk_step is None
    make_run(directory)
    assert view.refresh()
    assert view.entries


@pytest.mark.usefixtures("training")
def test_who_holds_the_lock_trains(run: Recorded) -> None:
    run.started(0, 0)
    run.metric("finished", 10, 1)
    assert seen(run).state == TRAINING


def test_a_run_without_an_owner_has_stopped_or_is_finished(run: Recorded) -> None:
    run.started(0, ago(5))
    run.step(10, ago(4))
    view = seen(run)
    assert view.state == STOPPED, "killed four seconds ago"
    run.started(10, ago(3))
    view.refresh()
    assert view.state == STOPPED
    run.metric("finished", 20, ago(1))
    view.refresh()
    assert view.state == FINISHED


def test_a_kill_is_told_until_the_training_goes_on(tmp_path: Path) -> None:
    run = Recorded(make_run(tmp_path / "run"))
    run.started(0, ago(500))
    run.steps(310, 400, ago(490))
    view = seen(run)
    assert view.state == STOPPED
    assert BROKE_OFF not in [mark.kind for mark in view.marks], "step 400 is on the disk"
    run.step(450, ago(-5))
    view.refresh()
    (told,) = [mark for mark in view.marks if mark.kind == BROKE_OFF]
    assert (told.step, told.time) == (450, view.points[-1].time)
    assert view.notices[-1]["event"] == BROKE_OFF
    with FileLock(run.directory / ".run.lock"):
        assert BROKE_OFF not in [mark.kind for mark in view.marks], "it trains again"
    run.metric("finished", 460, ago(-6))
    view.refresh()
    assert BROKE_OFF not in [mark.kind for mark in view.marks]
    assert curves_of(view, "a").marks[INTERRUPTED] == []


def test_an_end_that_was_said_is_no_kill(run: Recorded) -> None:
    run.event("began", ago(9), run_id="a", generation=1)
    assert seen(run).broke_off is None, "a loop that has not said what it will do"
    run.started(0, ago(8))
    run.step(10, ago(7))
    view = seen(run)
    assert view.broke_off is not None and view.broke_off["step"] == 10
    assert curves_of(view, "a").marks[INTERRUPTED] == [10]
    run.metric("ended", 10, ago(6), reason="Diverged")
    view = seen(run)
    assert view.broke_off is None and view.state == STOPPED


def test_a_kill_stays_told_when_training_has_gone_on(run: Recorded) -> None:
    run.started(0, ago(90))
    run.step(10, ago(80))
    run.step(20, ago(79))
    run.started(12, ago(70))  # steps 13 to 20 are made again
    run.step(20, ago(60))
    run.metric("ended", 20, ago(59), reason="Interrupted")
    run.started(15, ago(50))  # gone back, of one's own will
    run.step(30, ago(40))
    run.metric("finished", 30, ago(39))
    view = seen(run)
    assert [(one["event"], one["step"]) for one in view.ends] == [(BROKE_OFF, 20), ("finished", 30)]
    assert [mark.step for mark in view.marks if mark.kind == BROKE_OFF] == [20]
    assert [event["event"] for event in view.notices] == [BROKE_OFF, "finished"]


@pytest.mark.usefixtures("training")
def test_a_training_that_runs_has_not_broken_off(run: Recorded) -> None:
    run.started(0, ago(2))
    run.step(10, ago(1))
    assert seen(run).broke_off is None


def test_a_run_that_was_killed_before_its_first_line_has_stopped(run: Recorded) -> None:
    run.event("began", 0, run_id="a", generation=1)
    assert seen(run).state == STOPPED


def test_a_training_elsewhere_trains_as_long_as_it_is_heard_of(run: Recorded) -> None:
    run.started(0, ago(500), host="another-machine")
    run.step(10, ago(110))
    run.step(20, ago(100))
    view = seen(run)
    assert view.state == TRAINING
    assert view.silent == pytest.approx(100, abs=5)
    assert view.eta is not None


def test_a_training_elsewhere_that_is_silent_has_stopped(run: Recorded) -> None:
    run.started(0, ago(900), host="another-machine")
    run.step(10, ago(510))
    run.step(20, ago(500))
    assert seen(run).state == STOPPED


def test_a_slow_training_elsewhere_is_given_its_time(run: Recorded) -> None:
    run.started(0, ago(2000), host="another-machine")
    run.step(10, ago(900))
    run.step(20, ago(500))  # one line in 400 s: 500 s of silence say nothing yet
    assert seen(run).state == TRAINING


# -------------------------------------------------------------------------------------- the time


@pytest.mark.usefixtures("training")
def test_the_time_left_is_that_of_the_last_lines(run: Recorded) -> None:
    run.started(0, 0)
    run.steps(10, 100, 1, pace=9.0)  # slow at first
    run.steps(110, 400, 1000, pace=0.5)
    view = seen(run)
    assert view.pace == pytest.approx(0.5)
    assert view.eta == pytest.approx(300.0)


@pytest.mark.usefixtures("training")
def test_what_a_start_before_has_measured_tells_nothing_of_this_one(run: Recorded) -> None:
    run.started(0, 0)
    run.steps(10, 200, 1)
    run.started(200, 90_000)
    run.step(210, 90_010)
    view = seen(run)
    assert view.eta is None, "the night between the two is no speed"
    run.step(220, 90_030)
    view.refresh()
    assert view.eta == pytest.approx(780 * 2.0)


def test_a_run_that_does_not_train_has_no_time_left(run: Recorded) -> None:
    run.started(0, 0)
    run.steps(10, 100, 1)
    assert seen(run).eta is None


# ------------------------------------------------------------------------------------- the safety


def test_what_a_power_cut_would_cost(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run = Recorded(directory)
    with Training(directory) as training:
        training.epoch(1, 3.0)
        run.started(0, ago(60))
        run.steps(100, 140, ago(50))
        view = seen(run)
        assert view.state == TRAINING
        assert (view.safety.step, view.safety.disk_step) == (140, 100)
        assert view.safety.disk_steps == 40
        assert view.safety.disk_seconds == pytest.approx(0, abs=5), "saved a moment ago"


def test_the_work_lost_is_that_of_this_start_however_old_the_checkpoint(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    path = directory / "events.jsonl"  # it was begun long ago
    path.write_text("".join(line for line in path.open() if '"began"' not in line))
    run = Recorded(directory)
    run.started(400, ago(-30))
    run.step(410, ago(-40))
    view = seen(run)
    created_to_start = 30
    assert view.safety.disk_steps == 10
    assert view.safety.disk_seconds == pytest.approx(10, abs=2)
    assert view.safety.disk_seconds < created_to_start


def test_nothing_is_lost_of_a_run_whose_end_is_durable(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    Recorded(directory).metric("finished", 400, ago(-100))
    view = RunView(directory)
    view.refresh()
    assert (view.safety.disk_steps, view.safety.disk_seconds) == (0, 0.0)
    assert view.safety.memory_steps == 0


def test_before_the_first_checkpoint_everything_would_be_lost(run: Recorded) -> None:
    run.started(0, ago(100))
    run.steps(10, 50, ago(90))
    with FileLock(run.directory / ".run.lock"):
        view = seen(run)
        assert (view.safety.disk_step, view.safety.disk_steps) == (None, 50)
        assert view.safety.disk_seconds == pytest.approx(100, abs=5)


@linux
def test_a_kill_costs_the_steps_since_the_newest_snapshot(tmp_path: Path) -> None:
    directory = tmp_path / "run"

    def trained_and_killed() -> None:
        toy = Toy()
        manager = toy.manager(directory, memory_every=1)
        for _step in range(6):
            toy.step()
            manager.after_step(step=toy.now, epoch=1)
        manager.save(step=toy.now, epoch=1, kind="temp", strict=True)
        for _step in range(3):
            toy.step()
            manager.after_step(step=toy.now, epoch=1)
        os._exit(9)

    assert in_child(trained_and_killed) == 9
    try:
        view = RunView(directory)
        view.refresh()
        assert view.safety.disk_step == 6
        assert view.safety.memory_step is not None
        assert 6 < view.safety.memory_step <= 9
        assert view.safety.memory_steps == view.safety.step - view.safety.memory_step
        Recorded(directory).event("rolled_back", ago(0), step=6, run_id="other", generation=2)
        view.refresh()
        assert view.safety.memory_step is None, "what a roll-back abandons saves nothing"
    finally:
        for left in shared_memory.remains():
            if left.belongs_to(directory):
                left.remove()


def test_elsewhere_the_memory_is_what_the_run_has_said(run: Recorded) -> None:
    run.started(0, ago(20), host="another-machine")
    run.step(10, ago(10), memory_step=9)
    view = seen(run)
    assert (view.safety.memory_step, view.safety.memory_steps) == (9, 1)


# ------------------------------------------------------------------------------------- the disk


def test_the_disk_is_settled_once_retention_is_at_its_limit(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run = Recorded(directory)
    run.configure(keep_last_n=3, save_every_epoch=True, save_every=None)
    with Training(directory, keep=3) as training:
        run.started(0, ago(-10))
        run.steps(10, 100, ago(-20))
        growths = []
        for number in range(1, 6):
            training.epoch(number, 5.0 - number)
            view = seen(run)
            growths.append(view.disk.growth)
    size = view.entries[0].size
    # A pace of 1 s a step and 100 steps an epoch are 36 epochs an hour.
    assert growths == pytest.approx([36 * size, 36 * size, 0.0, 0.0, 0.0])
    assert view.disk.hours_left == math.inf
    assert view.disk.used == sum(entry.size for entry in view.entries)
    assert view.disk.next_size == size


def test_nothing_grows_that_does_not_train(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    run = Recorded(directory)
    run.configure(keep_last_n=0, save_every_epoch=True, save_every=None)
    run.started(0, 0)
    run.steps(10, 400, 1)
    disk = seen(run).disk
    assert (disk.growth, disk.hours_left) == (0.0, math.inf)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"checkpoint": 7}', "\x00\xff"])
def test_a_config_that_makes_no_sense_is_none(run: Recorded, text: str) -> None:
    run.started(0, 0)
    (run.directory / "config.json").write_text(text)
    with FileLock(run.directory / ".run.lock"):
        assert seen(run).disk.growth == 0.0


# -------------------------------------------------------------------------------------- find_runs


def test_runs_are_found_below_a_directory_but_not_in_what_a_run_has_set_aside(
    tmp_path: Path,
) -> None:
    for name in ("a", "b/c", "a/archive/20260101_000000", "a/nested", ".hidden", "b/c/d/e/f"):
        Recorded(tmp_path / name).event("began", 0, run_id="r", generation=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    found = [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)]
    assert found == ["a", "a/nested", "b/c"]
    assert find_runs(tmp_path / "a", depth=0) == [tmp_path / "a"]
    assert find_runs(tmp_path / "nowhere") == []


# ------------------------------------------------------------------------------------- the speed


def test_a_hundred_thousand_lines_are_read_in_seconds_and_then_cost_nothing(
    run: Recorded,
) -> None:
    """Generous limits: the machine may be busy. Read alone it takes about one second."""
    run.started(0, 0, total_steps=10**7)
    line = (run.directory / "metrics.jsonl").read_text()
    run.step(10, 1)
    sample = (run.directory / "metrics.jsonl").read_text().removeprefix(line)
    lines = (sample.replace('"step": 10,', f'"step": {10 * i},') for i in range(1, 100_001))
    (run.directory / "metrics.jsonl").write_text(line + "".join(lines))
    began = time.process_time()
    view = seen(run)
    assert time.process_time() - began < 8.0
    assert len(view.points) == 100_000
    began = time.process_time()
    for _look in range(50):
        assert not view.refresh()
        assert view.state == STOPPED
        assert view.safety.disk_steps == 10**6
    assert (time.process_time() - began) / 50 < 0.01, "a look at a run in which nothing happens"
