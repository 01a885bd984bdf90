"""The numbers behind every plot: all that a run knows, thinned without losing a peak."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from holdfast.monitor.curves import CHECKPOINT, INTERRUPTED, MOST, RESUMED, TROUBLE, labels_of, thin
from tests.manage.runs import LOSSES, Training, make_run
from tests.monitor.views import add_metrics, curves, run_with_metrics


def test_a_run_with_metrics_gives_every_curve(tmp_path: Path) -> None:
    found = curves(run_with_metrics(tmp_path / "run"))
    assert found.loss.steps == list(range(10, 401, 10)) and found.loss.values[-1] < 3.1
    assert found.val_loss.steps == [100, 200, 300, 400]
    assert found.marks[CHECKPOINT] == [100, 200, 300, 400]
    assert found and found.marks[INTERRUPTED] == [], "its newest step is on the disk"


def test_a_loop_without_metrics_has_the_losses_of_its_epochs(tmp_path: Path) -> None:
    found = curves(make_run(tmp_path / "run"))
    assert (found.val_loss.steps, found.val_loss.values) == ([100, 200, 300, 400], list(LOSSES))
    assert found.loss.values == [5.0, 2.5, 5 / 3, 1.25]
    assert found


def test_nothing_at_all_is_nothing_to_draw(tmp_path: Path) -> None:
    with Training(tmp_path / "run"):
        pass
    assert not curves(tmp_path / "run")


def test_interruptions_resumes_and_troubles_are_marked(tmp_path: Path) -> None:
    with Training(tmp_path / "run") as training:
        training.epoch(1, 1.0)
        training.manager.save(step=150, kind="temp", reason="signal")
    with Training(tmp_path / "run"):
        pass
    with (tmp_path / "run" / "events.jsonl").open("a") as events:
        for event in ({"event": "failed", "step": 170}, {"event": "uploaded", "step": 1}):
            events.write(json.dumps({"time": "2026-03-01T10:00:00+00:00", **event}) + "\n")
    marks = curves(tmp_path / "run").marks
    assert marks == {CHECKPOINT: [100], INTERRUPTED: [150], RESUMED: [150], TROUBLE: [170]}


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    run = add_metrics(make_run(tmp_path / "run"), 50)
    with (run / "metrics.jsonl").open("a") as file:
        for step, loss in ((60, "nan"), (70, None), (80, [1]), (90, 2.5), ("x", 1.0)):
            line = {"event": "step", "step": step, "loss": loss, "learning_rate": "inf"}
            file.write(json.dumps(line) + "\n")
    found = curves(run)
    assert found.loss.steps[-2:] == [50, 90]


@pytest.mark.parametrize("count", [0, 1, MOST, MOST + 1, 12345])
def test_thinning_keeps_ends_and_extremes(count: int) -> None:
    seed = random.randrange(10**9)
    dice = random.Random(seed)
    steps, values = list(range(count)), [dice.gauss(0, 1) for _ in range(count)]
    if count > 9000:
        values[4321], values[8765] = 100.0, -100.0
    few_steps, few = thin(steps, values)
    assert len(few) == len(few_steps) <= MOST, seed
    assert few_steps == sorted(set(few_steps)) and [values[s] for s in few_steps] == few, seed
    if count:
        assert (few_steps[0], few_steps[-1]) == (0, count - 1), seed
        assert (max(few), min(few)) == (max(values), min(values)), seed
    if count <= MOST:
        assert few == values


def test_labels_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    assert labels_of([tmp_path / "runs" / "a"]) == ["a"]
    assert labels_of([Path("x/a"), Path("y/b")]) == ["a", "b"]
    assert labels_of([Path("x/run"), Path("y/run")]) == ["x/run", "y/run"]
    assert labels_of([Path("x"), Path("x")]) == ["x", "x"]
    assert labels_of([]) == []
