"""`holdfast history`: every epoch that anything still knows of, and what happened on the way."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.manage.history import HISTORY, history_of, write_csv
from holdfast.manage.rundir import look
from holdfast.manage.story import describe, is_story, story
from holdfast.table import Screen
from tests.manage.runs import LOSSES, Training, flip, make_run
from tests.support import end_epoch


def test_the_newest_checkpoint_knows_the_epochs_that_are_gone(tmp_path: Path) -> None:
    history = history_of(look(make_run(tmp_path / "run", keep=1)))
    assert [epoch.epoch for epoch in history.epochs] == [1, 2, 3, 4]
    assert [epoch.val_loss for epoch in history.epochs] == list(LOSSES)
    assert [epoch.fate for epoch in history.epochs] == ["removed", "kept", "kept", "kept"]
    assert history.epochs[0].checkpoint is None
    assert history.epochs[1].checkpoint == "model_epoch_2.pt"
    assert history.epochs[2].perplexity == math.exp(3.0)
    assert history.best is history.epochs[1]
    assert all(epoch.time and epoch.step == 100 * epoch.epoch for epoch in history.epochs)


def test_the_checkpoint_is_believed_before_the_file_and_the_file_before_nothing(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run", (4.0, 2.0))
    known = {"epochs": [2, 3], "train_loss": [9.0, 1.5], "val_loss": [9.0, None]}
    (run / HISTORY).write_text(json.dumps(known))
    epochs = history_of(look(run)).epochs
    assert [epoch.val_loss for epoch in epochs] == [4.0, 2.0, None]
    assert epochs[2].train_loss == 1.5 and epochs[2].fate is None


def test_a_directory_with_a_history_file_alone_is_enough(tmp_path: Path) -> None:
    known = {"epochs": [1], "train_loss": [3.0], "val_loss": [2.0]}
    (tmp_path / HISTORY).write_text(json.dumps(known))
    (epoch,) = history_of(look(tmp_path)).epochs
    assert (epoch.train_loss, epoch.val_loss, epoch.checkpoint) == (3.0, 2.0, None)


def test_a_loop_without_a_history_is_told_from_its_metrics(tmp_path: Path) -> None:
    with Training(tmp_path / "run") as training:
        del training.state["history"]
        end_epoch(training.manager, 1, step=10, metrics={"val_loss": math.nan})
        end_epoch(training.manager, 2, step=20, metrics={"val_loss": 710.0})
    first, second = history_of(look(tmp_path / "run")).epochs
    assert first.val_loss is not None and math.isnan(first.val_loss)
    assert second.perplexity == math.inf  # exp would overflow
    assert history_of(look(tmp_path / "run")).best is not None


def test_nonsense_in_the_history_file_is_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (4.0,))
    for text in ("", "{", "[]", '{"epochs": 3}', '{"epochs": ["x"], "val_loss": {}}'):
        (run / HISTORY).write_text(text)
        assert len(history_of(look(run)).epochs) == 1


def test_events_of_a_strange_form_and_losses_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (math.nan, 2.0))
    for event in (
        {"event": "durable", "reason": "epoch", "epoch": 1, "names": 7},
        {"event": "removed", "names": 7},
        {"event": "removed", "names": [["a"]]},
        {"event": "durable", "reason": ["signal"]},
        {"event": "failed", "reason": {"a": 1}},
    ):
        with (run / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
    found = history_of(look(run))
    assert found.lines(Screen(80)) and found.lines(Screen(), everything=True)
    assert math.isnan(found.epochs[0].perplexity or 0) and found.best is found.epochs[1]


def test_quarantine_and_resume_are_in_the_table_and_in_the_story(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    flip(run / "model_epoch_4.pt")
    with Training(run):
        pass
    history = history_of(look(run))
    assert history.epochs[3].fate == "quarantined"
    text = "\n".join(history.lines(Screen()))
    told = text.split("What happened\n")[1].splitlines()
    assert told[0].endswith("  the run began")
    assert "went to quarantine/: " in told[1] and told[1].endswith("has changed")
    assert "training went on from step 300, generation 2; steps lost: 100" in told[2]
    assert "is durable" not in text


def test_every_event_is_told_when_asked_for(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", keep=1)
    events = list(Catalog(run).events())
    lines = story(events, everything=True)
    assert len(lines) == len(events)
    text = "\n".join(lines)
    assert "step 100 is durable: model_epoch_1.pt, latest.pt, model.pt, best_model.pt (" in text
    assert "step 100 was removed (older than what is kept): model_epoch_1.pt" in text


def test_an_event_of_a_later_version_is_told_with_all_of_its_fields() -> None:
    event = {"time": "2026-03-01T10:05:00+00:00", "event": "uploaded", "step": 3, "to": "s3"}
    assert is_story(event) and describe(event) == "uploaded step=3 to=s3"
    assert describe({"event": "resumed"}) == "resumed"  # fields are missing
    assert is_story({"event": "durable", "reason": "signal"})
    assert "\x1b" not in story([{"event": "failed", "step": 1, "reason": "\x1b[2J"}])[0]


def test_what_a_resume_has_lost_is_told_in_steps_and_time() -> None:
    resumed = {"event": "resumed", "step": 7, "generation": 2, "steps_lost": 3}
    text = "training went on from step 7, generation 2; steps lost: 3"
    assert describe(resumed) == text  # as an earlier version has recorded it
    assert describe({**resumed, "minutes_lost": 0.0}) == text
    assert describe({**resumed, "minutes_lost": 2.5}) == f"{text} (2 min 30 s of work)"


def test_errors_and_losses_gone_wrong_are_part_of_the_story() -> None:
    durable = {"event": "durable", "reason": "error", "step": 7, "names": ["latest.pt"], "size": 1}
    assert is_story(durable)
    assert "an error ended the training" in describe(durable)
    diverged = {"event": "diverged", "step": 7, "reason": "the loss is nan", "back_to": 5}
    assert is_story(diverged)
    text = describe(diverged)
    assert text == "step 7 went wrong (the loss is nan); training went back to step 5"


def test_csv_has_a_line_an_epoch_and_nothing_for_what_is_not_known(tmp_path: Path) -> None:
    history = history_of(look(make_run(tmp_path / "run", (4.0, None))))
    write_csv([history], tmp_path / "out.csv")
    first, second = csv.DictReader((tmp_path / "out.csv").open(encoding="utf-8"))
    assert (first["epoch"], first["val_loss"], first["best"]) == ("1", "4.0", "True")
    assert (second["epoch"], second["val_loss"], second["perplexity"]) == ("2", "", "")


def test_no_history_at_all_is_said_in_one_line(tmp_path: Path) -> None:
    assert len(history_of(look(tmp_path)).lines(Screen())) == 1
    with Training(tmp_path / "run"):
        pass
    lines = history_of(look(tmp_path / "run")).lines(Screen())
    assert lines[0] == "No epoch has been finished yet." and "the run began" in lines[-1]


def test_lost_work_is_told_in_steps_and_in_time() -> None:
    event = {"event": "resumed", "step": 300, "generation": 2, "steps_lost": 22}
    assert describe(event).endswith("; steps lost: 22")  # of an older version
    assert describe({**event, "minutes_lost": 4.4}).endswith("lost: 22 (4 min 24 s of work)")
    assert describe({**event, "minutes_lost": "x"}).endswith("; steps lost: 22")
