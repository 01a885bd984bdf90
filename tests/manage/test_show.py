"""`holdfast show`: all that a checkpoint says of itself, and the truth about one that is broken."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len

from holdfast.checkpoint.format.container import Reader
from holdfast.errors import CheckpointError
from holdfast.manage.listing import listing_of
from holdfast.manage.pin import pin
from holdfast.manage.rundir import look
from holdfast.manage.showing.show import DAMAGED, FOREIGN, OURS, Shown, commands_for, show
from holdfast.manage.showing.text import lines
from holdfast.table import Screen
from tests.manage.runs import Training, cut, desk, flip, make_run

PIPE = Screen()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("show") / "run", config={"training": {"epochs": 4}})


def text_of(shown: Shown, screen: Screen = PIPE, *, tensors: bool = False) -> str:
    return "\n".join(lines(shown, screen, tensors=tensors))


def test_a_directory_stands_for_its_newest_and_everything_is_told(run: Path) -> None:
    shown = show(run)
    assert shown.path.name == "model_epoch_4.pt" and shown.state == OURS
    text = text_of(shown)
    for part in (
        "verified: read back from the disk", "epoch 4, step 400", "📌 latest",
        "model_epoch_4.pt, latest.pt, model.pt", "val_loss=2.5000 (decides which is best)",
        "config.training.epochs=4", f"torch={torch.__version__}", "Parameters: 36 in 2 tensors",
        "\nweight  ", "\noptimizer  ", "holdfast verify ",
    ):  # fmt: skip
        assert part in text, part
    assert "\x1b" not in text
    assert "model/weight" not in text and "optimizer/state/0/exp_avg" in text_of(
        shown, tensors=True
    )


def test_the_sections_add_up_to_the_file(run: Path) -> None:
    told = show(run / "best_model.pt").to_json(tensors=True)
    sections = {section["name"]: section for section in told["sections"]}
    assert sections["model"]["bytes"] == 4 * 36 and sections["model"]["kind"] == "model"
    assert sections["optimizer"]["bytes"] == 2 * 4 * 36 + 2 * 4
    with Reader(run / "best_model.pt") as reader:
        data = sum(r.size for r in reader.records if r.name.startswith("checkpoint/data/"))
    assert sum(section["bytes"] for section in told["sections"]) == data < told["size"]
    assert sum(tensor["bytes"] for tensor in told["tensors"]) == data


def test_the_names_and_marks_are_those_of_the_run_it_lies_in(run: Path, tmp_path: Path) -> None:
    best = show(run / "model_epoch_2.pt").to_json()
    assert best["checkpoint"]["names"] == ["model_epoch_2.pt", "best_model.pt"]
    assert (best["checkpoint"]["best"], best["checkpoint"]["latest"]) == (True, False)
    assert best["run"] == str(run)
    assert best["checkpoint"] in listing_of(look(run)).to_json()["checkpoints"]  # one form
    alone = tmp_path / "x.pt"
    alone.write_bytes((run / "model_epoch_2.pt").read_bytes())
    told = show(alone).to_json()
    assert told["run"] is None and told["checkpoint"]["names"] == []
    assert "never read back here" in text_of(show(alone))


def test_a_pinned_one_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (1.0, 2.0))
    assert any("holdfast pin" in command for _purpose, command in commands_for(show(run)))
    pin(run, "model_epoch_2.pt", remove=False)
    assert "🔒 pinned" in text_of(show(run))
    assert not any("holdfast pin" in command for _purpose, command in commands_for(show(run)))


def test_the_commands_can_be_copied(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run's 'name'", (1.0, 2.0))
    commands = [command for _purpose, command in commands_for(show(run / "model_epoch_1.pt"))]
    assert [shlex.split(command)[:2] for command in commands] == [
        ["holdfast", "rollback"], ["python", "-c"], ["holdfast", "verify"],
        ["holdfast", "compare"], ["holdfast", "pin"],
    ]  # fmt: skip
    for command in commands:
        words = shlex.split(command)
        if words[0] == "holdfast":
            assert desk(*words[1:], *(["--dry-run"] if words[1] == "rollback" else [])
                        ).returncode == 0, command  # fmt: skip
    loading = shlex.split(commands[1])
    subprocess.run([sys.executable, *loading[1:]], check=True, timeout=60)


def test_a_checkpoint_of_a_language_model_offers_to_write_serve_and_export(tmp_path: Path) -> None:
    with Training(tmp_path / "run") as training:
        training.state |= {"model_config": {"vocab_size": 9}, "tokenizer": {"tokenizer.json": "{}"}}
        training.epoch(1, 1.0)
    words = {command.split()[1] for _purpose, command in commands_for(show(tmp_path / "run"))}
    assert words == {"train", "verify", "pin", "generate", "serve", "export"}
    assert "vocab_size=9" in text_of(show(tmp_path / "run"))


def test_tables_fit_the_terminal(run: Path) -> None:
    for width in (60, 80, 120):
        screen = Screen(width, colour=False)
        found = text_of(show(run), screen).split("What can be done")[0].splitlines()[1:]
        wide = [line for line in found if cell_len(line) > width]
        assert not [line for line in wide if not line.startswith("  ")], width  # facts may be long


# ------------------------------------------------------------------------------- what is broken


def test_a_cut_file_says_what_of_it_is_whole(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes((run / "model_epoch_1.pt").read_bytes())
    cut(path)
    shown = show(path)
    assert shown.state == DAMAGED and shown.inside is None and shown.records
    text = text_of(shown)
    assert "its end is missing" in text and "of the records in front" in text and "whole" in text
    assert [r["whole"] for r in shown.to_json()["records"]].count(True) > 0
    assert desk("show", path).returncode == desk("show", path, "--json").returncode == 4


def test_a_header_that_is_wrong_is_found_and_the_manifest_still_told(
    run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes((run / "model_epoch_1.pt").read_bytes())
    flip(path, 12)
    shown = show(path)
    assert shown.state == DAMAGED and shown.inside is not None
    text = text_of(shown)
    assert "DAMAGED: " in text and "the header of record" in text and "epoch 1, step 100" in text


def test_damage_that_a_check_has_found_is_remembered(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    flip(run / "model_epoch_1.pt")
    assert show(run / "model_epoch_1.pt").state == OURS  # its contents are not read here
    assert desk("verify", run / "model_epoch_1.pt").returncode == 4
    shown = show(run / "model_epoch_1.pt")
    assert shown.state == DAMAGED
    assert {command.split()[1] for _purpose, command in commands_for(shown)} == {"verify", "list"}
    flip(run / "model_epoch_4.pt")
    with Training(run):  # resuming sets the damaged one aside
        pass
    (aside,) = (run / "quarantine").rglob("model_epoch_4.pt")
    assert show(aside).state == DAMAGED and "quarantine/" in str(show(aside).reason)


def test_what_was_announced_as_ours_and_is_something_else_now_is_damaged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "model_epoch_1.pt").chmod(0o644)
    (run / "model_epoch_1.pt").write_bytes(b"overwritten" * 100)
    assert show(run / "model_epoch_1.pt").state == DAMAGED


def test_a_file_of_somebody_else_is_told_and_no_error(tmp_path: Path) -> None:
    path = tmp_path / "theirs.pt"
    torch.save({"model": torch.nn.Linear(64, 64).state_dict()}, path)
    shown = show(path)
    assert shown.state == FOREIGN and shown.inside is None and commands_for(shown) == []
    text = text_of(shown)
    assert "not a checkpoint of ours" in text and "theirs/data/0" in text and "16.0 KiB" in text
    assert "torch._utils._rebuild_tensor_v2" in text and "nothing was unpickled" in text
    done = desk("show", path)
    assert (done.returncode, done.stderr) == (0, "")
    path.write_text("hello")
    assert "no ZIP archive and no pickle" in text_of(show(path))


def test_nothing_there_is_one_line_and_four(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no checkpoint at .*nothing\.pt"):
        show(tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="There are no checkpoints in"):
        show(tmp_path)
    done = desk("show", tmp_path)
    assert done.returncode == 4 and len(done.stderr.splitlines()) == 1


def test_a_name_or_a_value_cannot_drive_the_terminal(tmp_path: Path) -> None:
    with Training(tmp_path / "run", config={"note": "\x1b[2J\nx"}) as training:
        training.epoch(1, 1.0)
    path = tmp_path / "a\x1b[2Jb.pt"
    path.write_bytes((tmp_path / "run" / "latest.pt").read_bytes())
    assert "\x1b" not in text_of(show(path))


def test_a_pipe_is_no_checkpoint_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for command, status in (("show", 4), ("compare", 1), ("verify", 1)):
        sources = [tmp_path / "pipe.pt"] * (2 if command == "compare" else 1)
        done = desk(command, *sources)
        assert (done.returncode, "There is no checkpoint at" in done.stderr) == (status, True)


def test_an_error_cannot_drive_the_terminal_and_a_directory_is_said_to_be_one(
    tmp_path: Path,
) -> None:
    done = desk("show", tmp_path / "a\x1b[31mb.pt")
    assert (done.returncode, "\x1b" in done.stderr) == (4, False)
    done = desk("unpack", tmp_path, "--lang", "zh")
    assert (done.returncode, "目录" in done.stderr) == (1, True)
