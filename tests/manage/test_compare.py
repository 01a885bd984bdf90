"""`holdfast compare`: the same and the different, and which is better."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdfast.errors import CheckpointError, HoldfastError
from holdfast.manage.compare.manifests import compare
from holdfast.manage.output import json_ready
from holdfast.table import Screen
from tests.manage.runs import Training, cut, make_run

CONFIG = {"model": {"model": "tiny"}, "training": {"learning_rate": 1e-3, "epochs": 4}}
OTHER = {"model": {"model": "tiny"}, "training": {"learning_rate": 2e-3, "epochs": 4, "seed": 7}}


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return make_run(tmp_path / "a", **CONFIG), make_run(tmp_path / "b", (1.5, 1.9), **OTHER)


def test_a_directory_stands_for_its_best_checkpoint(runs: tuple[Path, Path]) -> None:
    a, b = compare([str(run) for run in runs]).subjects
    assert (a.path.name, b.path.name) == ("model_epoch_2.pt", "model_epoch_1.pt")
    assert a.chosen == b.chosen == "best"
    text = "\n".join(compare([str(run) for run in runs]).lines(Screen()))
    assert f"A  {a.path} (the best of {runs[0]})" in text


def test_where_nothing_has_a_score_the_newest_is_taken_and_that_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (None, None))
    found = compare([str(run), str(run / "model_epoch_1.pt")])
    assert found.subjects[0].chosen == "newest" and found.subjects[0].entry.epoch == 2
    assert "where none has a score" in found.lines(Screen())[0]


def test_metrics_have_differences_to_the_first_and_a_winner(runs: tuple[Path, Path]) -> None:
    found = compare([str(runs[0]), str(runs[1]), str(runs[0] / "model_epoch_1.pt")])
    metrics = {metric.name: metric for metric in found.metrics}
    loss = metrics["val_loss"]
    assert loss.values == {"A": 2.0, "B": 1.5, "C": 4.0}
    assert (loss.difference("B", "A"), loss.better) == (-0.5, "B")
    assert metrics["perplexity"].better == "B"
    line = next(line for line in found.lines(Screen()) if line.startswith("val_loss"))
    assert line.split() == ["val_loss", "2.0000", "1.5000", "(-0.5000)", "4.0000", "(+2.0000)", "B"]


def test_a_run_says_itself_whether_its_metric_is_better_when_high(tmp_path: Path) -> None:
    paths = []
    for name, score in (("a", 0.5), ("b", 0.7)):
        scored = {"metric": "reward_error", "lower_is_better": False}
        with Training(tmp_path / name, scored=scored) as training:
            metrics = {"reward_error": score, "tokens": 10.0 * score, "loss": float("nan")}
            training.manager.save(step=1, metrics=metrics)
        paths.append(str(tmp_path / name))
    better = {metric.name: metric.better for metric in compare(paths).metrics}
    assert better == {"reward_error": "B", "tokens": None, "loss": None}


def test_only_the_settings_that_differ_are_shown(runs: tuple[Path, Path]) -> None:
    found = compare([str(run) for run in runs])
    assert found.config == {
        "training.learning_rate": {"A": 1e-3, "B": 2e-3},
        "training.seed": {"B": 7},
    }
    assert found.environment == {}
    lines = found.lines(Screen())
    assert lines[lines.index("Environment") + 1] == "no differences"
    assert any(line.split() == ["training.seed", "-", "7"] for line in lines)


def test_a_loop_without_a_configuration_is_compared_by_its_optimizers(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", (1.0,)), tmp_path / "b"
    with Training(b) as training:
        training.optimizer.param_groups[0]["lr"] = 0.5
        training.manager.close()
        training.manager = type(training.manager)(b, training.state)
        training.epoch(1, 1.0)
    assert compare([str(a), str(b)]).config == {"optimizer.0.lr": {"A": 1e-3, "B": 0.5}}


def test_a_different_environment_is_shown(runs: tuple[Path, Path]) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        make_run(runs[0].parent / "c", (1.0,))
    finally:
        torch.set_num_threads(threads)
    found = compare([str(runs[0]), str(runs[0].parent / "c")])
    assert found.environment == {"threads": {"A": threads, "B": threads + 1}}


def test_json_is_strict_and_complete(runs: tuple[Path, Path]) -> None:
    found = compare([str(run) for run in runs]).to_json()
    again = json.loads(json.dumps(json_ready(found), allow_nan=False))
    assert [c["label"] for c in again["checkpoints"]] == ["A", "B"]
    assert again["checkpoints"][0]["step"] == 200
    assert again["metrics"]["val_loss"] == {
        "values": {"A": 2.0, "B": 1.5}, "differences": {"B": -0.5}, "better": "B"
    }  # fmt: skip
    assert again["config"]["training.seed"] == {"B": 7}


def test_what_is_missing_empty_or_damaged_is_an_error_that_names_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (1.0, 2.0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(HoldfastError, match=r"no checkpoint at .*nowhere"):
        compare([str(run), str(tmp_path / "nowhere.pt")])
    with pytest.raises(HoldfastError, match=r"no checkpoints in .*empty"):
        compare([str(run), str(tmp_path / "empty")])
    cut(run / "model_epoch_1.pt")
    with pytest.raises(CheckpointError, match=r"model_epoch_1\.pt is damaged"):
        compare([str(run), str(run / "model_epoch_1.pt")])
