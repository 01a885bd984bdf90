"""`holdfast clean` on the command line: the rules that combine, wrong numbers, what it tells."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.cli.clean import run_clean
from holdfast.errors import ConfigError, RunLocked
from holdfast.manage import locking
from tests.manage.runs import desk, desk_json, make_run, names_in


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", (5.0, 2.0, 4.0, 1.0, 3.0, 6.0, 6.5))


def test_rules_add_up_and_the_rest_goes(run: Path) -> None:
    done = desk("clean", run, "--keep-best", "2", "--every", "3", "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert "no rule keeps it" in done.stdout
    left = {f"model_epoch_{n}.pt" for n in (2, 3, 4, 6, 7)}
    assert names_in(run) == left | {"latest.pt", "model.pt", "best_model.pt"}
    assert desk_json("clean", run, "--keep-best", "2", "--every", "3", "--yes")["removed"] == []


def test_the_json_names_the_rule_that_keeps(run: Path) -> None:
    found = desk_json("clean", run, "--keep", "1", "--keep-best", "3", "--every", "6", "--dry-run")
    reasons = {row["names"][0]: row["reason"] for row in found["kept"]}
    assert reasons == {
        "model_epoch_7.pt": "newest", "model_epoch_6.pt": "every", "model_epoch_5.pt": "among_best",
        "model_epoch_4.pt": "best", "model_epoch_2.pt": "among_best",
    }  # fmt: skip
    assert {row["reason"] for row in found["removed"]} == {"not_kept"}


@pytest.mark.parametrize("argv", [["--keep-best", "0"], ["--every", "0"], ["--every", "-5"]])
def test_a_number_that_makes_no_sense_is_refused(run: Path, argv: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"{argv[0]} {argv[1]}: .*not less than 1; see "):
        run_clean([str(run), *argv, "--yes"], "holdfast clean")


@pytest.mark.parametrize("flag", ["--archive", "--temp", "--quarantine"])
def test_what_is_given_alone_touches_nothing_else(run: Path, flag: str) -> None:
    before = names_in(run)
    done = desk("clean", run, flag, "--yes")
    assert done.returncode == 0 and "Nothing goes." in done.stdout
    assert names_in(run) == before


def test_memory_stands_alone(run: Path) -> None:
    for argv in (["--keep-best", "1"], ["--every", "2"], ["--archive"], [str(run)]):
        with pytest.raises(ConfigError, match="--memory stands alone"):
            run_clean(["--memory", *argv], "holdfast clean")


def test_the_archive_goes_with_what_it_occupied(run: Path) -> None:
    assert desk("rollback", "300", run, "--yes").returncode == 0
    found = desk_json("clean", run, "--archive", "--dry-run")
    assert [row["step"] for row in found["removed"]] == [700, 600, 500, 400]
    size = (run / "latest.pt").stat().st_size
    assert found["bytes_freed"] == 4 * size
    done = desk("clean", run, "--archive", "--yes")
    assert done.returncode == 0 and "in the archive" in done.stdout
    assert "Removed: 4, " in done.stdout and not (run / "archive").exists()
    assert desk("list", run).returncode == 0


def test_a_lock_that_is_held_ends_in_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "WAIT", 0.1)
    with Catalog(run).lock(), pytest.raises(RunLocked, match="Another process is changing"):
        run_clean([str(run), "--keep", "1", "--yes"], "holdfast clean")


def test_no_terminal_no_answer(run: Path) -> None:
    before = names_in(run)
    done = desk("clean", run, "--keep-best", "1", stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and "add --yes" in done.stderr
    assert names_in(run) == before
