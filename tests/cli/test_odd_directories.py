"""Every command answers, in time and in words, about a directory that holds something else."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.cli.main import main
from tests.manage.runs import Training

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(os.name == "nt", reason="needs FIFOs and symbolic links"),
]

FILES = ("events.jsonl", "metadata.json", "config.json", "metrics.jsonl", "training_history.json")
COMMANDS = (
    "list", "show", "history", "compare", "verify", "clean --dry-run", "monitor --once",
    "monitor --once --json", "report --out {here}/report.html",
    "export --to weights --out {here}/weights.pt",
)  # fmt: skip
ABSURD = ("[" * 900 + "]" * 900, "9" * 400, "-" + "9" * 400, '"x"', "1e999")
FIELDS = ("step", "time", "reason", "names", "seconds", "generation", "loss")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(40 << 30)


ODD: dict[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "way-out": lambda path: path.symlink_to("/etc/passwd"),
    "sparse": sparse,
    "directory": Path.mkdir,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "run"
    with Training(directory, model={"model": "tiny"}) as training:
        training.epoch(1, 3.0)
        training.epoch(2, 2.0)
    (directory / "metrics.jsonl").write_text(
        '{"time":"2026-01-01T00:00:00+00:00","event":"step"}\n'
    )
    return directory


@pytest.fixture
def run(tmp_path: Path, original: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def ask(command: str, run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run `command` on `run`; returns the status and what stands on stderr."""
    name, *words = command.format(here=run.parent).split()
    target = run / "latest.pt" if name in ("show", "compare", "export") else run
    targets = [str(target)] * (2 if name == "compare" else 1)
    status = main([name, *targets, *words])
    return status, capsys.readouterr().err


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none_holds_no_command_up(
    name: str, kind: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).unlink(missing_ok=True)
    ODD[kind](run / name)
    for command in COMMANDS:
        status, said = ask(command, run, capsys)
        assert "root:" not in said and "Traceback" not in said, command
        assert status == 0 or len(said.splitlines()) <= 1, (command, said)


@pytest.mark.parametrize(
    "value", ["[" * 900 + "]" * 900, "9" * 400, "-" + "9" * 400, '"x"', "1e999"]
)
@pytest.mark.parametrize(
    "field", ["step", "time", "reason", "names", "seconds", "generation", "loss"]
)
def test_absurd_values_end_no_command(
    field: str, value: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, event in (("events.jsonl", "failed"), ("events.jsonl", "durable"),
                        ("events.jsonl", "resumed"), ("metrics.jsonl", "step"),
                        ("metrics.jsonl", "evaluation")):  # fmt: skip
        line = {"time": "2026-01-01T00:00:00+00:00", "event": event, "step": 1, "id": "a"}
        text = json.dumps({**line, field: "HERE"}).replace('"HERE"', value)
        with (run / name).open("a") as file:
            file.write(text + "\n")
    for command in ("list", "history", "monitor --once --json", "monitor --once",
                    "report --out {here}/report.html", "clean --dry-run"):  # fmt: skip
        status, said = ask(command, run, capsys)
        assert status in (0, 9) and not said, (command, said)  # 9: the run needs a person


def test_a_link_to_a_disk_that_is_not_mounted_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "runs"
    link.symlink_to("/nonexistent/disk")
    for target in (link, link / "a"):
        for command in (["train", "--preset", "quick", "--checkpoint-dir"],
                        ["train", "--dry-run", "--preset", "quick", "--checkpoint-dir"],
                        ["list"], ["history"], ["clean"], ["monitor", "--once"]):  # fmt: skip
            assert main([*command, str(target)]) != 0
            said = capsys.readouterr().err
            assert f"{link} -> /nonexistent/disk: the link leads to nothing" in said, said
    assert not Path("/nonexistent").exists()


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl"])
def test_the_dashboard_shows_its_other_runs(name: str, tmp_path: Path, original: Path) -> None:
    from holdfast.monitor.web.hub import Hub

    for each in ("good", "odd"):
        shutil.copytree(original, tmp_path / each)
    (tmp_path / "odd" / name).unlink()
    os.mkfifo(tmp_path / "odd" / name)

    async def looked() -> tuple[list[str], dict[str, str]]:
        hub = Hub([tmp_path])
        await hub.fresh()
        return [row["name"] for row in hub.rows()], hub.problems()

    rows, troubles = asyncio.run(looked())
    assert rows == ["good"]
    assert "not a regular file" in troubles[str(tmp_path / "odd")]
