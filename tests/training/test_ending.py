"""Ends that were not planned: what is durable afterwards, what was said, and how it goes on."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import load
from holdfast.checkpoint.manager import CheckpointManager
from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.checkpoint.system import filesystem
from holdfast.errors import Diverged, Interrupted
from holdfast.monitor.run_view import RunView
from holdfast.training import ending, loop
from holdfast.training.trainer import Trainer
from tests.support import fail_with
from tests.training.runs import config_for, difference, final_state, train, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    for remains in shared_memory.remains():
        if remains.run is not None and tmp_path in [remains.run, *remains.run.parents]:
            remains.remove()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Any]:
    """The end of an epoch that nothing disturbs."""
    directory = tmp_path_factory.mktemp("reference") / "run"
    train(config_for(directory, corpus, epochs=1))
    return final_state(directory)


Loss = Callable[[Trainer, torch.Tensor], torch.Tensor]


def change_loss(monkeypatch: pytest.MonkeyPatch, change: Loss) -> None:
    """Let training losses (not those of an evaluation) be what `change` makes of them."""
    original = Trainer.loss

    def loss(self: Trainer, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found = original(self, inputs, targets)
        return change(self, found) if self.model.training else found

    monkeypatch.setattr(Trainer, "loss", loss)


def spoil(monkeypatch: pytest.MonkeyPatch, *places: tuple[int, int], by: float = math.nan) -> None:
    """Let the data of these steps (epoch, position) give a loss that is not a number."""
    change_loss(
        monkeypatch,
        lambda trainer, loss: (
            loss * by if (trainer.progress.epoch, trainer.progress.position) in places else loss
        ),
    )


def fail_in(monkeypatch: pytest.MonkeyPatch, step: int, error: Exception) -> None:
    """Raise `error` in the middle of `step`, after its backward."""

    def change(trainer: Trainer, loss: torch.Tensor) -> torch.Tensor:
        if trainer.progress.step + 1 == step:
            raise error
        return loss

    change_loss(monkeypatch, change)


def newest_step(directory: Path) -> int:
    newest = Catalog(directory).scan().newest
    return newest.step if newest is not None else 0


def history(directory: Path) -> list[str]:
    return [str(event["event"]) for event in Catalog(directory).events()]


# ------------------------------------------------------------------------- a loss that is no number


def test_a_nan_stops_before_it_changes_anything_and_says_what_to_do(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, (1, 7))
    with pytest.raises(Diverged, match=r"Step 8: the loss is nan\. .* step 4 is durable") as error:
        train(config_for(tmp_path / "run", corpus, temp_every_steps=4))
    assert "--on-nan rollback" in str(error.value)
    assert error.value.exit_code != 0
    state = load(tmp_path / "run" / "latest.pt")
    assert state["global_step"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["reason"]) == ("ended", "Diverged")
    view = RunView(tmp_path / "run")
    view.refresh()
    assert view.broke_off is None, "it was not killed"


@pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")
def test_the_last_good_step_comes_from_memory(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, (1, 7))
    with pytest.raises(Diverged, match="step 7 is durable"):
        train(config_for(tmp_path / "run", corpus, memory_every=1))
    assert newest_step(tmp_path / "run") == 7


@pytest.mark.parametrize("grad_clip", [0, 1.0])
def test_a_gradient_that_is_no_number_is_seen_under_a_finite_loss(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, grad_clip: float
) -> None:
    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(_context: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(_context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient * math.nan

    def change(trainer: Trainer, loss: torch.Tensor) -> torch.Tensor:
        return Spoil.apply(loss) if trainer.progress.step == 5 else loss  # type: ignore[no-any-return, no-untyped-call]

    change_loss(monkeypatch, change)
    with pytest.raises(Diverged, match="Step 6: the norm of the gradient is nan"):
        train(config_for(tmp_path / "run", corpus, grad_clip=grad_clip))


def test_a_roll_back_leaves_the_data_out_and_goes_on(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, (1, 6), (1, 13))
    run = tmp_path / "run"
    said = train(config_for(run, corpus, temp_every_steps=5, on_nan="rollback", epochs=1))
    assert "Step 7: the loss is nan. Going back to step 5; steps whose data is left out: 1." in said
    state = load(run / "latest.pt")
    assert state["history"]["epochs"] == [1]
    assert math.isfinite(state["train_loss"])
    assert state["progress"]["left_out"] == []
    newest = Catalog(run).scan().newest
    assert newest is not None
    assert newest.generation == 3
    events = list(Catalog(run).events())
    back = [(e["step"], e["back_to"]) for e in events if e["event"] == "diverged"]
    assert back == [(7, 5), (14, 10)]
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["event"] == "left_out"] == [7, 14]


def test_after_a_roll_back_the_way_is_that_of_a_run_without_that_data(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"temp_every_steps": 5, "on_nan": "rollback", "epochs": 1}
    with monkeypatch.context() as patch:
        spoil(patch, (1, 8))
        train(config_for(tmp_path / "spoilt", corpus, **options))

    def leave_out(self: Trainer) -> None:
        self.progress.left_out = [[1, 8]] if self.progress.step <= 8 else []
        original(self)

    original = loop.go_on
    monkeypatch.setattr(loop, "go_on", leave_out)
    train(config_for(tmp_path / "clean", corpus, **options))
    a, b = (final_state(tmp_path / name) for name in ("spoilt", "clean"))
    for state in (a, b):
        state.pop("progress")  # tokens of the step that was undone are counted once, too
    assert difference(a["model"], b["model"]) is None
    assert difference(a["optimizer"], b["optimizer"]) is None
    assert difference(a["rng"], b["rng"]) is None


def test_it_gives_up_where_going_back_does_not_help(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, *((1, position) for position in range(6, 20)))
    with pytest.raises(Diverged, match="Going back to step 5 has been tried 3 times"):
        train(config_for(tmp_path / "run", corpus, temp_every_steps=5, on_nan="rollback"))
    assert history(tmp_path / "run").count("diverged") == ending.MOST_ROLLBACKS + 1
    assert newest_step(tmp_path / "run") == 5


def test_with_nothing_to_go_back_to_it_stops(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, (1, 2))
    with pytest.raises(Diverged, match="no checkpoint from before it"):
        train(config_for(tmp_path / "run", corpus, on_nan="rollback"))


@pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")
def test_a_roll_back_leaves_nothing_of_the_abandoned_way_in_memory(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, (1, 6))
    run, found = tmp_path / "run", []
    original = Trainer.settle

    def look(self: Trainer, saved: dict[str, Any]) -> list[str]:
        found.append([each.directory.name for each in shared_memory.remains() if each.run == run])
        return original(self, saved)

    monkeypatch.setattr(Trainer, "settle", look)
    train(config_for(run, corpus, memory_every=1, on_nan="rollback", epochs=1))
    assert found == [[]]
    assert [each for each in shared_memory.remains() if each.run == run] == []


def test_a_spike_goes_back_behind_its_first_step(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves of steps that turn out to belong to a spike are not gone on from."""
    from holdfast.training import health

    monkeypatch.setattr(health, "WARM_UP", 8)
    spoil(monkeypatch, *((1, position) for position in range(10, 15)), by=3.0)
    run = tmp_path / "run"
    options = {"save_every": 6, "on_nan": "rollback", "epochs": 1}
    said = train(config_for(run, corpus, **options))
    assert "Step 15: the loss has been far above its mean" in said
    assert "Going back to step 6; steps whose data is left out: 5." in said
    archived = list((run / "archive").rglob("checkpoint_step_12.pt"))
    assert len(archived) == 1
    # A run that goes on from here leaves out what lies ahead, too.
    ahead = load(run / "checkpoint_step_12.pt", only="progress")["left_out"]
    assert ahead == [[1, 12], [1, 13], [1, 14]]


def test_ignore_goes_on_and_never_calls_it_best(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, (1, 3))
    said = train(config_for(tmp_path / "run", corpus, on_nan="ignore", epochs=1))
    assert "The loss of step 4 is nan." in said
    state = load(tmp_path / "run" / "latest.pt")
    assert math.isnan(state["val_loss"])
    assert state["best_loss"] is None
    assert not (tmp_path / "run" / "best_model.pt").exists()


# --------------------------------------------------------------------------------------- errors


def test_an_error_between_steps_loses_nothing(
    tmp_path: Path, corpus: Path, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "after_step", _raise_at(9, RuntimeError("a device has gone")))
        with pytest.raises(RuntimeError, match="a device has gone"):
            said = []
            _train_and_listen(config_for(run, corpus, epochs=1), said)
    assert "An error has ended training after step 9; step 9 is durable." in said[0]
    assert newest_step(run) == 9
    train(config_for(run, corpus, epochs=1))
    assert difference(reference, final_state(run)) is None


@pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")
def test_an_error_within_a_step_leaves_the_step_before_from_memory(
    tmp_path: Path, corpus: Path, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_in(patch, 9, RuntimeError("CUDA error"))
        with pytest.raises(RuntimeError, match="CUDA error"):
            train(config_for(run, corpus, memory_every=1, epochs=1))
    assert newest_step(run) == 8
    assert [each for each in shared_memory.remains() if each.run == run] == []
    train(config_for(run, corpus, epochs=1))
    assert difference(reference, final_state(run)) is None


def test_an_error_within_a_step_never_saves_half_of_it(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in(monkeypatch, 9, RuntimeError("CUDA error"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        train(config_for(tmp_path / "run", corpus, temp_every_steps=5))
    assert newest_step(tmp_path / "run") == 5


def test_an_error_in_the_sample_after_an_epoch_neither_loses_the_epoch_nor_counts_it_twice(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "sample", lambda _trainer: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config_for(run, corpus, epochs=1))
    assert "Epoch 1/1 results" in train(config_for(run, corpus, epochs=1))
    assert load(run / "latest.pt", only="history")["epochs"] == [1]


def test_where_saving_fails_as_well_the_first_error_stays_and_both_are_said(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(loop, "after_step", _raise_at(9, RuntimeError("a device has gone")))
    monkeypatch.setattr(filesystem, "write_file", fail_with(28))
    with pytest.raises(RuntimeError, match="a device has gone"):
        _train_and_listen(config_for(tmp_path / "run", corpus), said)
    assert "Step 9 could not be saved" in said[0]
    assert "An error has ended training after step 9; nothing is durable." in said[0]


def test_an_error_before_training_saves_nothing(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies there is not to be archived for the sake of a model that has learned nothing."""
    run = tmp_path / "run"
    train(config_for(run, corpus, epochs="none", num_steps=2))
    before = sorted(run.rglob("*.pt"))
    monkeypatch.setattr(CheckpointManager, "resume", _raise(RuntimeError("too early")))
    with pytest.raises(RuntimeError, match="too early"):
        train(config_for(run, corpus))
    assert sorted(run.rglob("*.pt")) == before


# --------------------------------------------------------------------------------------- signals


def test_a_signal_within_its_grace_saves_the_step(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "after_step", _signal_at(9, signal.SIGUSR1))
    with pytest.raises(Interrupted, match="step 9 is durable") as error:
        train(config_for(tmp_path / "run", corpus, grace=60))
    assert error.value.exit_code == 128 + signal.SIGUSR1
    assert newest_step(tmp_path / "run") == 9


@pytest.mark.parametrize("place", ["preparing", "model", "begin"])
def test_a_signal_before_the_first_step_is_heeded(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    from holdfast.training import models, session

    run = tmp_path / "run"
    owner, name = {
        "preparing": (session, "prepare_data"),
        "model": (models, "free_memory"),
        "begin": (CheckpointManager, "begin"),
    }[place]
    original = getattr(owner, name)

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, interrupted)
    steps: list[int] = []
    monkeypatch.setattr(Trainer, "one_step", lambda self: steps.append(self.progress.step))
    with pytest.raises(Interrupted) as error:
        train(config_for(run, corpus))
    assert error.value.exit_code == 143
    assert steps == []
    assert not list(run.rglob("*.pt"))


def test_a_second_interrupt_names_the_last_durable_step(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(loop, "after_step", _signal_at(9, signal.SIGINT, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match="the last durable step is 8"):
            train(config_for(tmp_path / "run", corpus, temp_every_steps=4))
    finally:
        signal.signal(signal.SIGINT, before)


def _raise(error: Exception) -> Callable[..., Any]:
    def fail(*_arguments: Any, **_keywords: Any) -> Any:
        raise error

    return fail


def _raise_at(step: int, error: Exception) -> Callable[[Trainer], None]:
    original = loop.after_step

    def after_step(self: Trainer) -> None:
        original(self)
        if self.progress.step == step:
            raise error

    return after_step


def _signal_at(step: int, *numbers: int) -> Callable[[Trainer], None]:
    original = loop.after_step

    def after_step(self: Trainer) -> None:
        original(self)
        if self.progress.step == step:
            self.manager.wait()
            for number in numbers:
                os.kill(os.getpid(), number)

    return after_step


def _train_and_listen(config: Any, said: list[str]) -> None:
    """`train`, and what was said although it ends with an error."""
    import io

    from holdfast.training import session
    from holdfast.training.console import Console

    stream = io.StringIO()
    try:
        with Console(stream=stream, terminal=False) as console:
            session.run(config, console, log=False, yes=True, command="holdfast train")
    finally:
        said.append(stream.getvalue())
