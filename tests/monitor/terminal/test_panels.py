"""What the panels and the plain snapshot say, and that it fits, in both languages."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.text import Text

from holdfast.checkpoint.system.lock import FileLock
from holdfast.i18n import set_language
from holdfast.monitor.curves import curves_of
from holdfast.monitor.forecast import Disk
from holdfast.monitor.machine import Gpu, Machine, Probe
from holdfast.monitor.measured import Safety
from holdfast.monitor.run_view import RunView
from holdfast.monitor.terminal import panels, words
from holdfast.monitor.terminal.snapshot import CANNOT_SAVE, UNFINISHED, Snapshot, take
from holdfast.monitor.terminal.watcher import Look
from tests.manage.runs import Training, make_run
from tests.monitor.recorded import Recorded, ago, stamp

GIB = 1 << 30
MACHINE = Machine(
    8, 55.4, 3 * GIB, 16 * GIB, 398.0, 1_288_490_188,
    (Gpu("NVIDIA H200", 87.0, 13_207_024_435, 150_754_820_096, 54.0),),
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs that was interrupted once and could not save once."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    make_run(directory)
    run = Recorded(directory)
    run.started(0, ago(400))
    run.steps(10, 400, ago(390), pace=0.5)
    for step in (100, 200, 300, 400):
        run.metric("evaluation", step, ago(200), val_loss=2.0 + step / 1000)
    # The checkpoints were made just now, so what comes after them is to come.
    run.event("failed", ago(-15), step=250, reason="No space left on device: /a/long/path/x.pt")
    run.event("durable", ago(-16), step=260, kind="temp", reason="signal", size=GIB,
              names=["temp/temp_epoch3_step260.pt", "latest.pt"])  # fmt: skip
    run.started(400, ago(-20))
    run.steps(410, 480, ago(-30), pace=1.0)
    return directory


@pytest.fixture
def snapshot(directory: Path) -> Iterator[Snapshot]:
    with FileLock(directory / ".run.lock"):
        view = RunView(directory)
        view.refresh()
        found = take(view, Probe())
        yield replace(found, machine=MACHINE, safety=replace(found.safety, disk_seconds=105.0))
    (directory / ".run.lock").unlink()


@pytest.fixture
def look(snapshot: Snapshot, directory: Path) -> Look:
    view = RunView(directory)
    view.refresh()
    return Look(directory, (directory, directory / "other"), 0, snapshot, curves_of(view, ""))


def plain(lines: list[Text] | Text) -> list[str]:
    return [line.plain for line in ([lines] if isinstance(lines, Text) else lines)]


def every_panel(look: Look, width: int) -> dict[str, list[str]]:
    return {
        "header": plain(panels.header(look, width)),
        "progress": plain(panels.progress(look, width)),
        "loss": plain(panels.loss(look, width, 12)),
        "safety": plain(panels.safety(look, width)),
        "machine": plain(panels.machine(look, width)),
        "checkpoints": plain(panels.checkpoints(look, width)),
        "events": plain(panels.events(look, width)),
        "keys": plain(panels.keys(True, width)),
        "help": plain(panels.help_lines(width)),
    }


# -------------------------------------------------------------------------------------- the values


def test_what_would_be_lost_is_said_in_steps_and_time(snapshot: Snapshot) -> None:
    said = dict(words.safety(snapshot))
    assert said["power cut"] == "80 steps · 1 min 45 s"
    assert said["kill"] == "80 steps"
    assert said["disk loss"] == "all, no remote copy"
    assert said["durable"] == "step 400"
    safer = replace(snapshot, safety=Safety(480, 400, 100.0, 479))
    said = dict(words.safety(safer))
    assert said["kill"] == "1 step"
    assert said["durable"] == "step 400, in memory 479"
    safe = replace(snapshot, safety=Safety(400, 400, 0.0, None))
    assert [value for _label, value in words.safety(safe)][:2] == ["nothing", "nothing"]


@pytest.mark.parametrize(
    ("disk", "room", "full"),
    [
        (Disk(48 * GIB, GIB, GIB, 0.0), "48.0 GiB, next 1.00 GiB", "not in sight"),
        (Disk(4 * GIB, GIB, GIB, 2.0 * GIB), "4.00 GiB, next 1.00 GiB", "in 2 h 00 min"),
        (Disk(GIB // 2, GIB, GIB, 0.0), "512 MiB, next 1.00 GiB", "the next does not fit!"),
        (Disk(4 * GIB, 0, 0, 0.0), "4.00 GiB", "-"),  # nothing saved yet, nothing known
    ],
)
def test_the_disk(snapshot: Snapshot, disk: Disk, room: str, full: str) -> None:
    assert words.disk(replace(snapshot, disk=disk)) == [("disk free", room), ("disk full", full)]


def test_the_machine(snapshot: Snapshot) -> None:
    assert words.machine(snapshot) == [
        ("machine", "CPU 55 % · 3.00/16.0 GiB"),
        ("process", "CPU 398 % · 1.20 GiB"),
        ("GPU", "87 % · 12.3/140 GiB · 54 °C"),
    ]
    bare = replace(snapshot, machine=Machine(8))
    assert words.machine(bare) == [("machine", "-"), ("GPU", "none")]
    assert snapshot.last is not None
    own = replace(bare, last=replace(snapshot.last, gpu_bytes=GIB))
    assert words.machine(own)[-1] == ("own GPU", "1.00 GiB")
    two = replace(snapshot, machine=replace(MACHINE, gpus=MACHINE.gpus * 2))
    assert [label for label, _value in words.machine(two)][-2:] == ["GPU 0", "GPU 1"]


def test_a_training_that_cannot_save_says_so_where_nobody_misses_it(
    snapshot: Snapshot, look: Look
) -> None:
    failing = replace(snapshot, saving_fails="No space left on device")
    shown = replace(look, snapshot=failing)
    assert "training, saving fails" in panels.header(shown, 80).plain
    assert "saving fails: No space left on device" in panels.progress(shown, 80)[1].plain
    assert "saving fails: No space left on device" in words.lines(failing)
    assert failing.exit_status == CANNOT_SAVE


def test_a_training_that_is_silent_says_for_how_long(snapshot: Snapshot) -> None:
    assert words.state(replace(snapshot, overdue=True, silent=700.0)) == (
        "training, silent for 11 min"
    )


def test_a_loss_that_is_no_number_is_said_where_nobody_misses_it(tmp_path: Path) -> None:
    run = Recorded(tmp_path / "run")
    run.started(0, ago(10))
    run.step(10, ago(9), loss=None)
    view = RunView(run.directory)
    view.refresh()
    look = Look(run.directory, (run.directory,), 0, take(view, Probe()))
    said = "the loss has been NaN or infinite since step 10"
    assert [line.plain for line in panels.progress(look, 80)][1] == said
    assert [line.plain for line in panels.loss(look, 80, 8)] == [
        "· train nan  ─ smoothed -  o validation -", said,
    ]  # fmt: skip
    assert look.snapshot is not None
    assert f"loss: {said}" in words.lines(look.snapshot)
    assert look.snapshot.to_json()["nan_since_step"] == 10


def test_an_evaluation_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    run = Recorded(tmp_path / "run")
    run.started(0, ago(10))
    for step, loss in ((10, "nan"), (20, 2.0), (30, "nan")):
        run.step(step, ago(9 - step / 10))
        run.metric("evaluation", step, ago(9 - step / 10), val_loss=loss)
    view = RunView(run.directory)
    view.refresh()
    assert take(view, Probe()).to_json()["best_val_step"] == 20


def test_a_hundred_percent_is_said_only_at_the_end() -> None:
    assert words.percent(0.9999) == "99.9 %"
    assert words.percent(1.0) == "100.0 %"


def test_events_are_told_newest_first_and_worries_are_marked(look: Look) -> None:
    told = plain(panels.events(look, 200))
    assert [line[0] for line in told] == ["!", "!", " "]
    assert "step 260 is durable" in told[0]
    assert told[0].endswith("a signal asked the training to stop")
    assert "step 250 could not be saved: No space left on device" in told[1]
    assert told[2].endswith("the run began")


def test_the_time_of_an_event_of_another_day_has_its_day() -> None:
    assert words.clock(stamp(0), stamp(0)[:10]) == "12:00:00"
    assert words.clock(stamp(0), "2030-01-01") == "03-01 12:00"
    assert words.clock(None, "") == "-"


def test_a_waiting_monitor_says_for_what(tmp_path: Path) -> None:
    waiting = Look(tmp_path, problem=f"Waiting for a training in {tmp_path}")
    for shown in every_panel(waiting, 80).values():
        assert all(cell_len(line) <= 80 for line in shown)
    assert panels.progress(waiting, 80)[0].plain.startswith("Waiting for a training in")
    assert f"{tmp_path.name} " in panels.header(waiting, 80).plain
    assert panels.checkpoints(waiting, 80) == []


# ------------------------------------------------------------------------------------- the widths


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("width", [36, 43, 60, 80, 120, 200])
def test_every_line_fits_its_panel(look: Look, language: str, width: int) -> None:
    set_language(language)
    shown = every_panel(look, width)
    assert all(shown.values())
    wide = {
        name: [line for line in lines if cell_len(line) > width]
        for name, lines in shown.items()
        if name != "checkpoints" or width >= 60  # a table gives up its columns but for three
    }
    assert {name: lines for name, lines in wide.items() if lines} == {}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("width", [34, 36, 48])
def test_no_number_is_cut_in_a_narrow_column(look: Look, language: str, width: int) -> None:
    set_language(language)
    assert look.snapshot is not None
    risk = Safety(123_456_789, 23_456_789, 93_784.0, 123_450_000)
    shown = replace(look, snapshot=replace(look.snapshot, safety=risk))
    text = "\n".join(plain(panels.safety(shown, width)) + plain(panels.machine(shown, width)))
    for value in ("100000000", "6789", "23456789", "123450000", "12.3/140", "3.00/16.0", "398"):
        assert re.search(rf"(?<![\d.]){re.escape(value)}(?![\d.])", text), (value, text)


def test_the_legend_has_all_three_losses_at_the_width_of_80_columns(look: Look) -> None:
    text = " ".join(plain(panels.loss(look, 43, 10))[:2])
    for part in ("· train 0.2041", "─ smoothed 0.2041", "o validation 2.4000"):
        assert part in text


def test_a_small_panel_of_the_curve_stays_empty(look: Look) -> None:
    assert panels.loss(look, 10, 10) == []
    assert panels.loss(look, 40, 1) == []
    no_curve = replace(look, curves=None)
    assert "no curve yet" in plain(panels.loss(no_curve, 60, 10))


def test_the_number_of_the_run_is_shown_where_there_are_several(look: Look) -> None:
    assert panels.header(look, 120).plain.startswith("[1/2] ")
    assert "other run" in panels.keys(True, 80).plain
    assert "other run" not in panels.keys(False, 80).plain


def test_on_a_narrow_screen_the_clock_goes_before_the_name_and_is_never_cut(look: Look) -> None:
    for width in range(30, 81):
        plain = panels.header(look, width).plain
        assert cell_len(plain) == width
        assert "training" in plain
        assert re.search(r"training(  \d\d:\d\d:\d\d( [+-]\d{4})?)?$", plain), plain
    assert re.search(r" [+-]\d{4}$", panels.header(look, 80).plain), "with its zone at 80 columns"


def test_a_long_name_loses_its_beginning(look: Look) -> None:
    long = replace(look, runs=(Path("/" + "很长的目录" * 20 + "/end"),))
    shown = panels.header(long, 60).plain
    assert cell_len(shown) <= 60
    assert "…" in shown
    assert "目录/end" in shown


# ------------------------------------------------------------------------------------ the snapshot


def test_the_plain_snapshot_is_made_of_whole_lines(snapshot: Snapshot) -> None:
    lines = words.lines(snapshot)
    assert f"run: {snapshot.directory}" in lines
    assert any(re.match(r"state: training · ", line) for line in lines)
    assert "progress: epoch 5/10 · step 480/1000 · 48.0 % · 8 min 40 s left" in lines
    assert "lost after power cut: 80 steps · 1 min 45 s" in lines
    assert "loss: train 0.2041 · smoothed 0.2041 · validation 2.4000 · best 2.1000 at step 100" in (
        lines
    )
    header = next(line for line in lines if line.startswith("file"))
    assert header.split() == ["file", "kind", "step", "val", "loss", "size", "age", "verified",
                              "mark"]  # fmt: skip
    best = next(line for line in lines if line.startswith("model_epoch_2.pt"))
    assert best.endswith("best")
    assert any("step 250 could not be saved" in line for line in lines)
    assert all("\x1b" not in line for line in lines)


def test_the_documented_json(snapshot: Snapshot) -> None:
    told = snapshot.to_json()
    assert set(told) == {
        "directory", "state", "owner", "silent_seconds", "model", "parameters", "device", "host",
        "epoch", "epochs", "step", "total_steps", "progress", "eta_seconds", "time", "loss",
        "nan_since_step", "smoothed_loss", "learning_rate", "tokens_per_second", "val_loss",
        "val_step", "best_val_loss", "best_val_step", "safety", "saving_fails", "disk", "machine",
        "checkpoints", "events",
    }  # fmt: skip
    assert (told["state"], told["step"], told["total_steps"]) == ("training", 480, 1000)
    assert told["progress"] == pytest.approx(0.48)
    assert told["eta_seconds"] == pytest.approx(520, abs=1)
    assert (told["best_val_loss"], told["best_val_step"]) == (2.1, 100)
    safety = told["safety"]
    assert safety["power_cut"] == {"steps_lost": 80, "seconds_lost": 105.0}
    assert (safety["kill"], safety["remote"]) == ({"steps_lost": 80}, None)
    assert told["disk"]["next_fits"] is True
    newest = told["checkpoints"][0]
    assert (newest["file"], newest["step"], newest["verified"]) == ("model_epoch_4.pt", 400, True)
    assert [row["best"] for row in told["checkpoints"]] == [False, False, True, False]
    assert [event["warning"] for event in told["events"]] == [False, True, True]
    assert told["events"][-1]["text"].startswith("step 260 is durable")
    assert told["events"][-1]["event"] == "durable"


def test_exit_statuses_tell_scripts_what_to_do(tmp_path: Path, snapshot: Snapshot) -> None:
    assert snapshot.exit_status == 0, "it trains"
    view = RunView(make_run(tmp_path / "run"))
    view.refresh()
    stopped = take(view, Probe())
    assert stopped.exit_status == UNFINISHED
    assert replace(stopped, saving_fails="x").exit_status == UNFINISHED
    Recorded(tmp_path / "run").metric("finished", 400, ago(0))
    view.refresh()
    assert take(view, Probe()).exit_status == 0


def test_a_loop_of_a_stranger_has_no_metrics_and_is_shown_all_the_same(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with Training(directory) as training:
        training.epoch(1, 3.0)
        view = RunView(directory)
        view.refresh()
        found = take(view, Probe())
    assert (found.state, found.step, found.progress, found.last) == ("training", 100, None, None)
    shown = Look(directory, (directory,), 0, found)
    assert panels.progress(shown, 80)[0].plain == "step 100"
    assert "no curve yet" in plain(panels.loss(shown, 60, 10))
    assert "step 100" in "\n".join(words.lines(found))


def test_what_a_strangers_loop_would_lose_is_told_in_time_and_never_as_nothing(
    tmp_path: Path,
) -> None:
    """It tells what it saves, and not how far it has come since: steps are not known."""
    directory = tmp_path / "run"
    with Training(directory) as training:
        training.epoch(1, 3.0)
        time.sleep(1.1)
        view = RunView(directory)
        view.refresh()
        found = take(view, Probe())
    told = dict(words.safety(found))
    assert told["power cut"] == told["kill"] and re.fullmatch(r"[\d.]+ s", told["kill"])
    assert "green" not in [str(line.spans[-1].style) for line in panels.safety(
        Look(directory, (directory,), 0, found), 60)[:2]]  # fmt: skip
    risk = found.to_json()["safety"]
    assert (risk["power_cut"]["steps_lost"], risk["kill"]["steps_lost"]) == (None, None)
    assert risk["power_cut"]["seconds_lost"] > 1
    view.refresh()
    ended = take(view, Probe())
    assert words.state(ended) == "stopped", "where its end was to be, it has not said"


def test_a_directory_that_is_deleted_while_it_is_looked_at(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run")
    view = RunView(directory)
    view.refresh()
    shutil.rmtree(directory)
    found = take(view, Probe())
    assert found.disk is None
    assert words.disk(found) == [("disk free", "-")]
    assert found.to_json()["disk"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_has_no_figures_that_are_none(snapshot: Snapshot, value: float) -> None:
    told: dict[str, Any] = replace(snapshot, eta=value, silent=value).to_json()
    assert (told["eta_seconds"], told["silent_seconds"]) == (None, None)
