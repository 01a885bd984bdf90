"""Mistakes of a call are answered in words where the call is made."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdfast import AnyOf, CheckpointManager, EveryMinutes, EverySteps, RiskAware
from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.errors import ConfigError, SaveFailed, UnsupportedValue


@pytest.mark.parametrize(("options", "word"), [
    ({"save_when": EverySteps(5)}, "list of policies"),
    ({"save_when": [3]}, "no policy"),
    ({"save_when": [EverySteps]}, "no policy"),
    ({"save_when": "epoch"}, "list of policies"),
    ({"memory_every": "auot"}, "'auto'"),
    ({"memory_every": -1}, "memory_every=-1"),
    ({"memory_every": 1.5}, "memory_every=1.5"),
    ({"keep_last": -1}, "keep_last=-1"),
    ({"keep_last": None}, "keep_last=None"),
    ({"overlap": "allways"}, "'always'"),
    ({"io_limit": -5}, "io_limit=-5"),
    ({"max_unsafe": "10"}, "max_unsafe='10'"),
    ({"reserve": float("nan")}, "reserve=nan"),
    ({"metric": None}, "metric=None"),
    ({"on_event": 3}, "on_event=3"),
])  # fmt: skip
def test_an_option_that_cannot_be_meant(options: Any, word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=word):
        CheckpointManager(tmp_path / "run", {"n": 1}, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("state", [torch.nn.Linear(1, 1), [1], None, (torch.ones(1),)])
def test_a_state_that_is_no_dictionary(state: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="A state is a dictionary"):
        CheckpointManager(tmp_path, state)


@pytest.mark.parametrize("make", [
    lambda: EverySteps(0), lambda: EverySteps(-3), lambda: EverySteps(2.5),  # type: ignore[arg-type]
    lambda: EverySteps("5"), lambda: EveryMinutes(-1), lambda: EveryMinutes("1"),  # type: ignore[arg-type]
    lambda: RiskAware(write_budget=-1), lambda: RiskAware(time_share=-0.1),
])  # fmt: skip
def test_a_policy_that_cannot_be_meant(make: Any) -> None:
    with pytest.raises(ConfigError, match="it is a"):
        make()


@pytest.mark.parametrize(("arguments", "word"), [
    ({"step": 1, "kind": "epochs"}, "kind='epochs'"),
    ({"step": 1, "kind": "epoch"}, "needs to know of which"),
    ({"step": 1, "kind": "epoch", "epoch": -1}, "epoch=-1"),
    ({"step": -1}, "step=-1"),
    ({"step": "7"}, "step='7'"),
    ({"step": 1.5}, "step=1.5"),
    ({"step": None}, "step=None"),
    ({"step": torch.ones(2)}, "step=tensor"),
    ({"step": 1, "reason": 3}, "reason=3"),
    ({"step": 1, "epoch": "first"}, "epoch='first'"),
])  # fmt: skip
@pytest.mark.parametrize("method", ["save", "save_async"])
def test_a_save_that_cannot_be_meant(
    method: str, arguments: Any, word: str, tmp_path: Path
) -> None:
    with CheckpointManager(tmp_path, {"n": 1}) as manager:
        with pytest.raises(ConfigError, match=word):
            getattr(manager, method)(**arguments)
        assert manager.save(step=1, strict=True) is not None


def test_what_is_no_source_and_no_policy(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, {"n": 1}) as manager, pytest.raises(ConfigError, match="glob"):
        manager.resume(5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="list of policies"):
        AnyOf(EverySteps(3))  # type: ignore[arg-type]


def test_numbers_of_numpy_and_torch_are_steps(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, {"n": 1}) as manager:
        for step in (np.int64(1), torch.tensor(2), 3.0):
            manager.save(step=step, epoch=np.int32(1), strict=True)  # type: ignore[arg-type]
        assert manager.list()[0].step == 3


def test_epochs_may_be_counted_from_zero_and_none_takes_the_place_of_another(
    tmp_path: Path,
) -> None:
    with CheckpointManager(tmp_path, {"n": 1}) as manager:
        for step in (1, 2):  # the same number twice: the first is not silently replaced
            saved = manager.end_epoch(0, step=step).durable.result()
            assert saved is not None and saved.path.name == "model_epoch_0.pt"
    assert {entry.step for entry in Catalog(tmp_path).scan().entries} == {1, 2}


def test_a_closed_manager_resumes_nothing(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, {"n": 1}) as manager:
        manager.save(step=1, strict=True)
    with pytest.raises(SaveFailed, match="was closed"):
        manager.resume()


def test_a_metric_that_never_comes_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with CheckpointManager(tmp_path, {"n": 1}, metric="val_los") as manager:
        for step in (1, 2):
            manager.save(step=step, metrics={"loss": 1.0}, strict=True)
    said = [record.getMessage() for record in caplog.records if "val_los" in record.getMessage()]
    assert len(said) == 1
    assert "loss; val_los" in said[0]


def test_the_states_own_step_is_kept_and_a_difference_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    state = {"global_step": 0, "epoch": 1}
    with CheckpointManager(tmp_path, state) as manager:
        for step in (1, 2):
            state["global_step"] = step
            manager.save(step=step, epoch=1, strict=True)
        assert caplog.records == []
        for step in (5, 6):
            manager.save(step=step, epoch=2, strict=True)
    assert len(caplog.records) == 2
    assert "own global_step is 2, and the save was given 5" in caplog.text
    assert "own epoch is 1, and the save was given 2" in caplog.text
    state = {"global_step": 0, "epoch": 0}
    with CheckpointManager(tmp_path, state) as manager:
        manager.resume()
    assert state == {"global_step": 2, "epoch": 1}


@pytest.mark.parametrize("directory", ["", None, 5])
def test_a_run_directory_that_is_no_path(directory: Any) -> None:
    with pytest.raises(ConfigError, match="The run directory is a path"):
        CheckpointManager(directory, {"n": 1})


def test_a_home_directory_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with CheckpointManager("~/runs", {"n": 1}) as manager:
        manager.save(step=1)
    assert (tmp_path / "runs" / "latest.pt").exists() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("kind", [torch.nn.Linear, torch.optim.Adam])
def test_a_class_in_place_of_an_object(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedValue, match="layers/0 is a"):
        CheckpointManager(tmp_path, {"layers": [kind]})


def test_metrics_that_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CheckpointManager(tmp_path, {"n": 1}) as manager:
        with pytest.raises(ConfigError, match="metrics are a dictionary"):
            manager.save(step=1, metrics=[0.5])  # type: ignore[arg-type]
        for step in (1, 2):
            manager.save(step=step, metrics={"val_loss": torch.ones(2)})  # type: ignore[dict-item]
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [text for text in told if "is no number: tensor([1., 1.])" in text] == told


def test_what_state_dict_gave_once_is_said_not_to_follow(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The habit of `torch.save({"optimizer": optimizer.state_dict()})`."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    with CheckpointManager(tmp_path, {"model": model, **state}) as manager:
        manager.save(step=1)
        manager.save(step=2)
    told = [r.getMessage() for r in caplog.records if "does not follow the training" in r.message]
    assert len(told) == 2, "each once"
    caplog.clear()
    fresh = {"optimizer": optimizer.state_dict()}
    with CheckpointManager(tmp_path / "b", fresh) as manager:
        fresh["optimizer"] = optimizer.state_dict()  # asked anew before each save: that follows
        manager.save(step=1)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_without_a_listener_warnings_are_sentences(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"n": 1}
    with CheckpointManager(tmp_path, state) as manager:
        manager.save(step=5)
        manager.save(step=3)
    with CheckpointManager(tmp_path, state) as manager:  # resume() forgotten
        manager.save(step=1)
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(told) == 2 and all(text.startswith(f"{tmp_path}: ") for text in told)
    assert "Step 3 comes after step 5." in told[0]
    assert "checkpoints were moved to" in told[1]
