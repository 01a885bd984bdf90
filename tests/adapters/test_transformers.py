"""Trainer, Seq2SeqTrainer and SFTTrainer with LoRA, killed and started again: to the bit as if they
never had been. The proof fails where the protection is a wrong one."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, GPT2LMHeadModel, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from holdfast import CheckpointManager, EverySteps, load
from holdfast.adapters.transformers import protect
from holdfast.errors import ConfigError
from tests.adapters import trainings
from tests.adapters.trainings import FINAL, causal, run, seq2seq, sft_lora
from tests.support import assert_same


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What an undisturbed training comes to; each is trained once."""
    known: dict[str, dict[str, Any]] = {}

    def of(make: Callable[..., Any], **settings: Any) -> dict[str, Any]:
        name = f"{make.__name__} {settings}"
        if name not in known:
            out = tmp_path_factory.mktemp("straight")
            status, said = run(make, out, **settings)
            assert status == 0, said
            known[name] = final(out)
        return known[name]

    return of


def final(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / FINAL, weights_only=False)
    return state


EACH_EPOCH = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}
EARLY = {**EACH_EPOCH, "num_train_epochs": 6, "load_best_model_at_end": True}


def stop_early(trainer: Any, out: Path) -> None:
    protect(trainer, out)
    trainer.add_callback(EarlyStoppingCallback(2, early_stopping_threshold=0.5))


KILLS = {
    "in the middle of an accumulation": (("substep_end", 3), 0),
    "right after a save": (("step_begin", 4), 2),
    "at the end of an epoch": (("epoch_end", 10), 0),
}


@pytest.mark.parametrize(("kill", "workers"), KILLS.values(), ids=KILLS)
def test_trainer_that_was_killed_ends_as_if_it_never_had_been(
    kill: tuple[str, int], workers: int, straight: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    status, said = run(causal, tmp_path, kill=kill, dataloader_num_workers=workers)
    assert status == -signal.SIGKILL, said
    status, said = run(causal, tmp_path, dataloader_num_workers=workers)
    assert status == 0, said
    assert_same(final(tmp_path), straight(causal))


@pytest.mark.parametrize("make", [seq2seq, sft_lora])
def test_others_that_were_killed_end_as_if_they_never_had_been(
    make: Callable[..., Any], straight: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    status, said = run(make, tmp_path, kill=("substep_end", 7))
    assert status == -signal.SIGKILL, said
    status, said = run(make, tmp_path)
    assert status == 0, said
    assert_same(final(tmp_path), straight(make))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_trainer_that_is_killed_at_50_random_moments_ends_as_if_it_never_had_been(
    straight: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw, kills, runs = random.Random(seed), 0, 0
    while kills < 50:
        out = tmp_path / str(runs)
        while (ended := run(causal, out, within=draw.uniform(0.2, 1.5)))[0]:
            assert ended[0] == -signal.SIGKILL, ended[1]
            kills += 1
        assert_same(final(out), straight(causal))
        runs += 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_the_step_that_it_comes_in_and_ends_the_process(
    number: int, straight: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    status, said = run(causal, tmp_path, kill=("substep_end", 5), number=number)
    assert (status, "step 6 is durable" in said) == (128 + number, True), said
    status, said = run(causal, tmp_path)
    assert status == 0, said
    assert_same(final(tmp_path), straight(causal))


@pytest.mark.parametrize("step", [4, 15])
def test_kill_in_an_evaluation_costs_no_step_and_the_evaluation_is_done_again(
    step: int, straight: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """15 is the last step of the training: only its duties and the ends are left to do."""
    assert run(causal, tmp_path, kill=("prediction_step", step))[0] == -signal.SIGKILL
    status, said = run(causal, tmp_path)
    assert (status, f"(step {step})" in said) == (0, True), said
    assert_same(final(tmp_path), straight(causal))


def test_kill_in_the_evaluation_of_an_epochs_end_leaves_that_to_the_next_start(
    straight: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Steps 5 and 15 end epochs; what an early stop says there must be heard."""
    for step, guard, settings in ((5, protect, EACH_EPOCH), (15, stop_early, EARLY)):
        out = tmp_path / str(step)
        ended = run(causal, out, kill=("prediction_step", step), guard=guard, **settings)
        assert ended[0] == -signal.SIGKILL, ended[1]
        status, said = run(causal, out, guard=guard, **settings)
        assert (status, f"(step {step})" in said) == (0, True), said
        assert_same(final(out), straight(causal, guard=guard, **settings))


def test_exception_in_the_middle_of_a_step_saves_the_step_before_it(
    straight: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    status, said = run(causal, tmp_path, kill=("substep_end", 5), number=0)
    assert (status, "step 5 is durable" in said) == (1, True), said
    status, said = run(causal, tmp_path)
    assert status == 0, said
    assert_same(final(tmp_path), straight(causal))


class Seen:
    """A state of a trainer's own: what it has seen decides how it learns."""

    def __init__(self) -> None:
        self.total = 0

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total = state["total"]


class Weighing:
    """Stands in front of a trainer's class, as the code of a user does."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *more: Any, **words: Any) -> Any:
        found = super().compute_loss(model, inputs, *more, **words)  # type: ignore[misc]
        if not model.training:
            return found
        self.seen.total += int(inputs["input_ids"].sum())
        return found * (1 + self.seen.total % 7)

    def __init__(self) -> None:
        self.seen = Seen()


def weighing(out: Path, **settings: Any) -> Any:
    trainer = causal(out, **settings)
    trainer.__class__ = type("Own", (Weighing, type(trainer)), {})
    Weighing.__init__(trainer)
    return trainer


def test_state_of_a_trainers_own_is_saved_where_it_is_given_by_name(
    straight: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def whole(trainer: Any, out: Path) -> None:
        protect(trainer, out, seen=trainer.seen)

    expected = straight(weighing)
    for guard, out in ((whole, tmp_path / "whole"), (protect, tmp_path / "part")):
        assert run(weighing, out, kill=("substep_end", 3), guard=guard)[0] == -signal.SIGKILL
        assert run(weighing, out, guard=guard)[0] == 0
    assert_same(final(tmp_path / "whole"), expected)
    with pytest.raises(AssertionError):
        assert_same(final(tmp_path / "part"), expected)


class Alone(TrainerCallback):  # type: ignore[misc]
    """The protection that a callback can give: it restores in `on_train_begin`."""

    def __init__(self, trainer: Any, out: Path) -> None:
        trainer.add_callback(self)
        self.out = out

    def on_train_begin(
        self, _args: Any, state: Any, _control: Any, model: Any, optimizer: Any, **more: Any
    ) -> None:
        parts = {"model": model, "optimizer": optimizer, "scheduler": more["lr_scheduler"]}
        self.manager = CheckpointManager(self.out, parts, save_when=[EverySteps(1)])
        resumed = self.manager.resume()
        state.global_step = resumed.step if resumed is not None else 0

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_more: Any) -> None:
        self.manager.after_step(state.global_step)
        self.manager.wait()


def test_callback_alone_cannot_do_it(
    straight: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    assert run(causal, tmp_path, kill=("substep_end", 3), guard=Alone)[0] == -signal.SIGKILL
    status, said = run(causal, tmp_path, guard=Alone)
    assert status == 0, said
    with pytest.raises(AssertionError):
        assert_same(final(tmp_path)["model"], straight(causal, guard=Alone)["model"])


def test_early_stop_is_one_and_the_best_model_is_loaded_also_after_kills(
    straight: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    undisturbed = straight(causal, guard=stop_early, **EARLY)
    end = undisturbed["logs"][-1]["step"]
    assert end < 30, "it has not stopped early"
    for kill in (("evaluate", 10), ("epoch_end", end), ("train_end", end)):
        status, said = run(causal, tmp_path, kill=kill, guard=stop_early, **EARLY)
        assert status == -signal.SIGKILL, said
    status, said = run(causal, tmp_path, guard=stop_early, **EARLY)
    assert status == 0, said
    assert_same(final(tmp_path), undisturbed)


def test_finished_training_that_is_started_again_trains_no_step_more(
    straight: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for _start in range(2):
        status, said = run(causal, tmp_path)
        assert status == 0, said
        assert_same(final(tmp_path), straight(causal))


def test_training_with_more_steps_than_before_goes_on(tmp_path: Path) -> None:
    settings = {"lr_scheduler_type": "constant", "eval_strategy": "no"}
    run(causal, tmp_path / "long", max_steps=8, **settings)
    for steps in (3, 8):
        status, said = run(causal, tmp_path / "short", max_steps=steps, **settings)
        assert status == 0, said
    for key in ("model", "optimizer", "batches"):
        assert_same(final(tmp_path / "short")[key], final(tmp_path / "long")[key])


def test_folders_of_trainer_are_weights_for_from_pretrained_and_as_many_as_wanted(
    tmp_path: Path,
) -> None:
    status, said = run(causal, tmp_path)
    assert status == 0, said
    folders = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert folders == ["checkpoint-12", "checkpoint-15"]
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-15")
    assert_same(dict(model.state_dict()), dict(final(tmp_path)["model"]))
    assert not [*tmp_path.glob("checkpoint-*/optimizer.pt")]
    kept = sorted(path.name for path in tmp_path.glob("checkpoint_step_*.pt"))
    assert kept == ["checkpoint_step_12.pt", "checkpoint_step_15.pt"]
    model.save_pretrained(tmp_path)  # as `trainer.save_model()` does
    GPT2LMHeadModel.from_pretrained(tmp_path)
    assert run(causal, tmp_path)[0] == 0


def test_saves_of_lora_have_what_trains_alone(tmp_path: Path) -> None:
    status, said = run(sft_lora, tmp_path, size=256, max_steps=4)
    assert status == 0, said
    state = load(tmp_path / "latest.pt")
    weights = sum(weight.nbytes for weight in state["model"].values())
    assert all("lora" in name for name in state["model"])
    whole = sum(weight.nbytes for weight in final(tmp_path)["model"].values())
    size = (tmp_path / "latest.pt").stat().st_size
    assert size < 4 * weights + 200_000 < whole / 10, (size, weights, whole)


def test_lora_does_not_go_on_upon_another_base_model(tmp_path: Path) -> None:
    def other(out: Path, **settings: Any) -> Any:
        trainer = sft_lora(out, **settings)
        with torch.no_grad():
            next(trainer.model.parameters()).add_(1)
        return trainer

    assert run(sft_lora, tmp_path, max_steps=2)[0] == 0
    status, said = run(other, tmp_path, max_steps=4)
    assert status == 1
    assert "The frozen weights are not those" in said


def test_resume_loads_no_batch_in_order_to_skip_it(tmp_path: Path) -> None:
    out, seen = tmp_path / "run", tmp_path / "seen.txt"

    class Told(trainings.Data):
        def __getitem__(self, index: int) -> dict[str, Any]:
            with seen.open("a") as file:
                print(index, file=file)
            return super().__getitem__(index)

    def telling(out: Path, **settings: Any) -> Any:
        trainer = causal(out, eval_strategy="no", save_strategy="no", **settings)
        trainer.train_dataset = Told(6000, noise=True)
        return trainer

    assert run(telling, out, max_steps=200, kill=("substep_end", 150))[0] == -signal.SIGKILL
    seen.unlink()
    status, said = run(telling, out, max_steps=151)
    assert status == 0, said
    steps = 151 - int(re.findall(r"\(step (\d+)\)", said)[0])
    # A step has three batches of two. Four samples more tell the dataset from another one.
    assert 0 < len(seen.read_text().split()) == 6 * steps + 4 < 6 * 100, said


@pytest.mark.parametrize(
    "setting", ["enable_jit_checkpoint", "ignore_data_skip", "auto_find_batch_size"]
)
def test_arguments_that_stand_against_an_exact_resume_are_refused_in_words(
    setting: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"^{setting}=True: "):
        protect(causal(tmp_path, **{setting: True}), tmp_path)


def test_what_protect_and_train_cannot_mean_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"takes a transformers.Trainer .*; this is a Linear"):
        protect(torch.nn.Linear(1, 1), tmp_path)
    with pytest.raises(ConfigError, match="name model is taken"):
        protect(causal(tmp_path), tmp_path, model=1)
    trainer = protect(causal(tmp_path), tmp_path / "run")
    with pytest.raises(ConfigError, match="Trainer that is not protected yet"):
        protect(trainer, tmp_path / "run")
    with pytest.raises(ConfigError, match="not protected"):
        trainer.train(trial={})
    weights = tmp_path / "checkpoint-4"
    weights.mkdir()
    (weights / "trainer_state.json").write_text("{}")
    with pytest.raises(ConfigError, match="has weights alone"):
        trainer.train(resume_from_checkpoint=str(weights))


def test_last_checkpoint_that_a_script_has_looked_for_means_the_newest_state(
    straight: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def looking(trainer: Any, out: Path) -> None:
        protect(trainer, out)
        train, last = trainer.train, get_last_checkpoint(out)
        trainer.train = lambda: train(resume_from_checkpoint=last)

    assert run(causal, tmp_path, kill=("substep_end", 6), guard=looking)[0] == -signal.SIGKILL
    status, said = run(causal, tmp_path, guard=looking)
    assert status == 0, said
    assert_same(final(tmp_path), straight(causal))
