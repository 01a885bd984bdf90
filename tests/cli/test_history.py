"""`holdfast history` as a process: several runs, curves where they are wanted, files."""

from __future__ import annotations

import csv
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.manage.runs import desk, desk_json, make_run
from tests.monitor.views import run_with_metrics

PROGRAM = [sys.executable, "-c", "import sys; from holdfast.cli.main import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("history")
    return run_with_metrics(place / "a"), run_with_metrics(place / "b", shift=0.5)


def on_terminal(*argv: str | Path, columns: int = 80, lines: int = 24) -> str:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, *map(str, argv)], stdin=slave, stdout=slave, stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", "HOLDFAST_LANG": "en", "COLUMNS": str(columns),
             "LINES": str(lines)},
    )  # fmt: skip
    os.close(slave)
    text = b""
    try:
        while chunk := os.read(master, 65536):
            text += chunk
    except OSError:
        pass  # EIO: the other side is closed
    os.close(master)
    assert process.wait(30) == 0, text
    return text.decode()


def test_a_pipe_gets_the_table_alone_unless_it_asks(runs: tuple[Path, Path]) -> None:
    assert "┌" not in desk("history", runs[0]).stdout
    done = desk("history", runs[0], "--plot")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.index("What happened") < done.stdout.index("loss in nats a token")
    assert "┌" in done.stdout and "\x1b" not in done.stdout


def test_a_terminal_sees_the_curve_unless_it_asks_not_to(runs: tuple[Path, Path]) -> None:
    text = on_terminal("history", runs[0])
    assert "\x1b[38;5;32m" in text and "loss in nats a token" in text
    assert "loss in nats" not in on_terminal("history", runs[0], "--no-plot")


def test_a_run_without_a_curve_draws_none_and_says_so_only_when_asked(tmp_path: Path) -> None:
    assert "plot" not in on_terminal("history", tmp_path)
    assert "nothing to plot yet" in desk("history", tmp_path, "--plot").stdout


def test_several_runs_have_a_table_each_and_one_plot(runs: tuple[Path, Path]) -> None:
    done = desk("history", *runs, "--plot")
    assert done.stdout.count("What happened") == 2
    assert done.stdout.count("loss in nats a token") == 1
    assert f"{runs[0]}:" in done.stdout and "• b: training loss" in done.stdout
    found = desk_json("history", *runs)["directories"]
    assert [one["directory"] for one in found] == [str(run) for run in runs]
    assert desk_json("history", runs[0]) == found[0]


def test_one_missing_directory_does_not_hide_the_others(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    done = desk("history", tmp_path / "gone", runs[0], "--plot")
    assert done.returncode == 1 and "There is no directory" in done.stderr
    assert "model_epoch_2.pt" in done.stdout and "┌" in done.stdout


def test_the_table_is_written_to_a_file(runs: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    done = desk("history", *runs, "--csv", path, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    assert [row["directory"] for row in rows] == [str(runs[0])] * 4 + [str(runs[1])] * 4
    assert rows[5]["val_loss"] == "2.0"


def test_a_place_that_is_none_is_one_line(runs: tuple[Path, Path], tmp_path: Path) -> None:
    done = desk("history", runs[0], "--csv", tmp_path / "no" / "such" / "file")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr


def test_plot_and_no_plot_exclude_each_other(runs: tuple[Path, Path]) -> None:
    assert desk("history", runs[0], "--plot", "--no-plot").returncode == 2


def test_without_plotext_the_table_stands_and_the_extra_is_named(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "plotext.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'plotext'\", name='plotext')"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = desk("history", runs[0], "--plot", env={"PYTHONPATH": path})
    assert done.returncode == 2 and "pip install 'holdfast-train[desk]'" in done.stderr
    assert "model_epoch_2.pt" in done.stdout


def test_an_unfinished_run_of_a_stranger_has_its_losses_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "validation loss" in desk("history", run, "--plot").stdout


def test_a_run_that_was_killed_says_so_before_it_is_resumed(tmp_path: Path) -> None:
    run = run_with_metrics(tmp_path / "run", steps=430)
    done = desk("history", run, "--plot")
    told = "training broke off at step 430, before that was saved: killed, or the machine failed"
    assert f"  {told}\n" in done.stdout and "✗ interrupted" in done.stdout
    assert told in desk("history", run, "--events").stdout
    asked = desk_json("history", run)
    assert (asked["state"], asked["ends"][-1]["event"]) == ("stopped", "broke_off")
    with (run / "metrics.jsonl").open("a") as file:
        line = {"time": "2026-03-01T11:00:00+00:00", "event": "finished", "step": 430}
        file.write(json.dumps(line) + "\n")
    told = desk("history", run).stdout
    assert "broke off" not in told and "training was finished at step 430" in told
    asked = desk_json("history", run)
    assert (asked["state"], asked["ends"][-1]["event"]) == ("finished", "finished")


def test_a_long_sentence_is_wrapped_on_a_terminal_only(tmp_path: Path) -> None:
    run = run_with_metrics(tmp_path / "run", steps=430)
    lines = on_terminal("history", run, "--no-plot", columns=60).replace("\r", "").splitlines()
    first = next(i for i, line in enumerate(lines) if "broke off" in line or "ended" in line)
    assert max(map(len, lines[first:])) <= 60
    assert all(line.startswith(" " * 27) for line in lines[first + 1 :])
