"""Starting, going on, going back, starting over: what a second start does with what it finds."""

from __future__ import annotations

import io
import json
import math
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import load
from holdfast.checkpoint.manager import run_lock
from holdfast.checkpoint.policy import RiskAware
from holdfast.checkpoint.policy.when import EveryMinutes, EverySteps
from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.errors import (
    CheckpointError,
    DamagedCheckpoint,
    DataError,
    ForeignCheckpoint,
    ResourceError,
    RunLocked,
    SaveFailed,
    StateMismatch,
)
from holdfast.training import continuing, loop, session
from holdfast.training.console import Console
from holdfast.training.options.config_files import save_config
from holdfast.training.options.presets import resolve
from holdfast.training.session import save_policies
from holdfast.training.trainer import Trainer
from holdfast.training.unattended import RESTART
from tests.checkpoint.counting import counted
from tests.training.runs import (
    HARD,
    Killed,
    config_for,
    difference,
    final_state,
    kill_after,
    train,
    write_corpus,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    directory = tmp_path_factory.mktemp("finished") / "run"
    train(config_for(directory, corpus, save_every=7))
    return directory


@pytest.fixture
def run(tmp_path: Path, finished: Path) -> Path:
    """A copy of a finished run of two epochs, to be changed at will."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def damage(path: Path) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[5000] ^= 4
    path.write_bytes(data)


# ----------------------------------------------------------------------------- the run directory


def test_the_run_directory_is_as_designed(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert names >= {
        "model_epoch_1.pt", "model_epoch_2.pt", "best_model.pt", "latest.pt", "model.pt",
        "events.jsonl", "training_history.json", "metrics.jsonl", "metadata.json", "config.json",
        "tokenizer",
    }  # fmt: skip
    assert (finished / "latest.pt").samefile(finished / "model_epoch_2.pt")
    history = json.loads((finished / "training_history.json").read_text())
    assert list(history) == ["train_loss", "val_loss", "epochs"]
    assert history["epochs"] == [1, 2]
    assert history == load(finished / "latest.pt", only="history")


def test_a_checkpoint_has_the_promised_keys_and_opens_with_torch(finished: Path) -> None:
    state = torch.load(finished / "latest.pt", weights_only=True)
    assert set(state) >= {
        "model", "model_config", "optimizer", "scheduler", "scaler", "rng", "data", "epoch",
        "global_step", "best_loss", "train_loss", "val_loss", "history", "tokenizer", "config",
    }  # fmt: skip
    assert state["history"]["epochs"] == [1, 2]
    assert state["epoch"] == 2


def test_metrics_have_a_line_an_interval_and_an_event(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["event"] == "step"]
    assert steps == list(range(1, steps[-1] + 1))
    assert [line["event"] for line in lines].count("epoch") == 2
    assert all(math.isfinite(line["loss"]) for line in lines if line["event"] == "step")


def test_one_file_is_enough_to_build_model_and_tokenizer(finished: Path) -> None:
    import transformers

    from holdfast.training.text.tokenizer import TextTokenizer

    state = torch.load(finished / "best_model.pt", weights_only=True)
    tokenizer = TextTokenizer.from_state(state["tokenizer"])
    assert tokenizer.decode(tokenizer.encode("今天下雨。")) == "今天下雨。"
    settings = transformers.AutoConfig.for_model(**state["model_config"])
    model = transformers.AutoModelForCausalLM.from_config(settings)
    model.load_state_dict(state["model"])


def test_the_tokenizer_directory_is_hugging_faces(finished: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "tokenizer")
    assert tokenizer.decode(tokenizer("今天下雨。")["input_ids"]) == "今天下雨。"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temp_every_minutes": "none"}, [RiskAware]),
        ({"temp_every_minutes": 0}, []),
        ({"temp_every_minutes": 5}, [EveryMinutes]),
        ({"temp_every_steps": 5, "temp_every_minutes": "none"}, [EverySteps]),
        ({"temp_every_steps": 5, "temp_every_minutes": 5}, [EverySteps, EveryMinutes]),
    ],
    ids=str,
)
def test_the_tool_chooses_when_to_save_where_nothing_was_said(
    corpus: Path, options: dict[str, Any], expected: list[type]
) -> None:
    config = config_for(Path("run"), corpus, **options)
    assert [type(policy) for policy in save_policies(config.checkpoint)] == expected


@pytest.mark.usefixtures("shape_as_shipped")
def test_what_it_chose_is_said_with_its_numbers(tmp_path: Path, corpus: Path) -> None:
    said = train(config_for(tmp_path / "run", corpus, temp_every_minutes="none", write_budget=10))
    assert said.count("Rolling checkpoints every ") == 1
    assert "so that no more than --write-budget is written" in said


# ------------------------------------------------------------------------------------ going on


def test_a_finished_run_says_so_and_how_to_go_on(run: Path, corpus: Path) -> None:
    before = (run / "latest.pt").read_bytes()
    said = train(config_for(run, corpus, save_every=7))
    assert "This run is finished" in said
    assert "--resume --epochs 4" in said
    assert (run / "latest.pt").read_bytes() == before


def test_more_epochs_go_on_from_the_end(run: Path, corpus: Path) -> None:
    train(config_for(run, corpus, epochs=3))
    assert load(run / "latest.pt", only="history")["epochs"] == [1, 2, 3]
    assert (run / "model_epoch_3.pt").exists()


def test_options_that_are_not_given_are_the_runs_own(run: Path) -> None:
    """`train --checkpoint-dir X --resume --epochs 3` and nothing else."""
    from holdfast.training.options.presets import resolve

    config = resolve(flags={"checkpoint_dir": str(run), "resume": "auto", "epochs": "3"})
    train(config)
    saved = load(run / "latest.pt", only="config")
    assert saved["model"]["context_length"] == 16
    assert saved["training"]["gradient_accumulation"] == 3


def test_a_changed_learning_rate_takes_effect_and_is_shown(run: Path, corpus: Path) -> None:
    said = train(config_for(run, corpus, epochs=3, learning_rate=5e-4, schedule="constant"))
    assert "learning_rate 1e-3 5e-4" in " ".join(said.split())
    rates = [
        json.loads(line).get("learning_rate")
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert [rate for rate in rates if rate][-1] == pytest.approx(5e-4)
    assert load(run / "latest.pt", only="scheduler")["base_lrs"] == [5e-4, 5e-4]


@pytest.mark.parametrize(
    "options", [{"model": "mini"}, {"context_length": 8}, {"vocab_size": 280}], ids=str
)
def test_another_model_is_refused_with_the_words_of_the_difference(
    run: Path, corpus: Path, options: dict[str, Any]
) -> None:
    before = sorted(p.name for p in run.rglob("*.pt"))
    with pytest.raises(StateMismatch) as error:
        train(config_for(run, corpus, epochs=3, **options))
    (name, value), *_rest = options.items()
    assert f"--{name.replace('_', '-')}" in str(error.value)
    assert str(value) in str(error.value)
    assert sorted(p.name for p in run.rglob("*.pt")) == before


def test_another_batch_size_keeps_the_position_in_samples(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_after(8, patch)
        with pytest.raises(Killed):
            train(config_for(directory, corpus, temp_every_steps=8))
    positions: list[int] = []
    original = Trainer.one_step

    def one_step(self: Trainer) -> None:
        positions.append(self.progress.position)
        original(self)

    monkeypatch.setattr(Trainer, "one_step", one_step)
    said = train(config_for(directory, corpus, batch_size=4))
    assert positions[0] == 4  # 8 steps of 2 x 3 samples are 4 steps of 4 x 3
    assert "step 8 of the epoch becomes step 4; 0 samples are seen again" in said


@pytest.mark.parametrize(("first", "second"), [(2, 4), (4, 2)])
def test_settings_come_from_the_checkpoint_that_is_restored(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, first: int, second: int
) -> None:
    """The newest, of a start with other settings, is damaged where only its state can tell."""
    directory = tmp_path / "run"
    for step, batch, rate in ((4, first, 0.003), (8, second, 0.001)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(step, patch)
            train(config_for(directory, corpus, temp_every_steps=4, batch_size=batch,
                             learning_rate=rate))  # fmt: skip
    contents = Catalog(directory).scan()
    damage(directory / contents.entries[0].names[0])
    found: list[tuple[int, int, float]] = []

    def one_step(self: Trainer) -> None:
        options = self.config.training
        found.append((self.progress.position, options.batch_size, options.learning_rate))
        raise Killed

    monkeypatch.setattr(Trainer, "one_step", one_step)
    of_the_run = ("batch_size", "learning_rate")
    flags = {name: value for name, value in HARD.items() if name not in of_the_run}
    monkeypatch.setattr("tests.training.runs.HARD", flags)
    with pytest.raises(Killed):
        train(config_for(directory, corpus))
    assert found == [(4, first, 0.003)]
    assert json.loads((directory / "config.json").read_text())["training"]["batch_size"] == first
    resumed = list(Catalog(directory).events("resumed"))
    assert resumed[-1]["step"] == 4
    assert resumed[-1]["steps_lost"] == 4


def test_other_data_begins_the_epoch_anew_and_says_so(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_after(8, patch)
        with pytest.raises(Killed):
            train(config_for(directory, corpus, temp_every_steps=8))
    (tmp_path / "other").mkdir()
    said = train(config_for(directory, write_corpus(tmp_path / "other", passages=7)))
    assert "epoch 1 begins anew" in said


def test_data_that_is_gone_is_found_in_the_cache_by_its_content(run: Path, corpus: Path) -> None:
    config = config_for(run, corpus, epochs=3, data_file=str(run / "gone.txt"))
    assert "gone" in train(config)
    with pytest.raises(DataError):
        train(config_for(run, corpus, epochs=4, data_file=str(run / "gone.txt"),
                         cache_dir=str(run / "empty")))  # fmt: skip


# ------------------------------------------------------------------------- going back and elsewhere


def test_going_back_begins_a_generation_and_archives_what_is_newer(run: Path, corpus: Path) -> None:
    newest = final_state(run)
    said = train(config_for(run, corpus, checkpoint=str(run / "model_epoch_1.pt"), epochs=1))
    contents = Catalog(run).scan()
    assert contents.newest is not None
    assert contents.newest.generation == 2
    assert contents.newest.parent is not None
    assert contents.newest.parent["step"] == newest["global_step"] // 2
    assert "were moved to" in said
    archived = list((run / "archive").rglob("model_epoch_2.pt"))
    assert len(archived) == 1
    assert difference(newest["model"], load(archived[0], only="model")) is None
    # The same way forward from the same state: bit-identical again.
    assert difference(newest, final_state(run)) is None


def test_weights_from_elsewhere_begin_a_new_run(run: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    weights = load(run / "best_model.pt", only="model")
    monkey = {}

    original = loop.train

    def watch(self: Trainer) -> None:
        monkey.update({k: v.clone() for k, v in self.model.state_dict().items()})
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", watch)
        train(config_for(other, corpus, checkpoint=str(run / "best_model.pt"), epochs=1))
    assert difference(dict(weights), monkey) is None
    newest = Catalog(other).scan().newest
    assert newest is not None
    assert newest.generation == 1
    assert newest.run_id != Catalog(run).scan().entries[0].run_id


@pytest.mark.parametrize("key", ["model", "model_state_dict", None])
def test_weights_in_the_forms_of_other_scripts(
    run: Path, corpus: Path, tmp_path: Path, key: str | None
) -> None:
    weights = dict(torch.load(run / "best_model.pt", weights_only=True)["model"])
    torch.save({key: weights, "epoch": 3} if key else weights, tmp_path / "their.pt")
    said = train(config_for(tmp_path / "new", corpus, checkpoint=str(tmp_path / "their.pt"),
                            epochs=1))  # fmt: skip
    assert "from the weights of" in said


def test_resuming_a_file_of_another_directory_continues_it_here(
    run: Path, corpus: Path, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    train(config_for(here, corpus, resume=str(run / "model_epoch_1.pt")))
    assert difference(final_state(run)["model"], final_state(here)["model"]) is None
    newest = Catalog(here).scan().newest
    assert newest is not None
    assert newest.parent is not None
    assert newest.parent["run_id"] == Catalog(run).scan().entries[0].run_id


@pytest.mark.parametrize("form", ["model_epoch_*.pt", "."])
def test_resume_takes_a_glob_or_a_directory(run: Path, corpus: Path, form: str) -> None:
    said = train(config_for(run, corpus, resume=str(run / form)))
    assert "This run is finished" in said


def test_fresh_moves_the_old_run_to_the_archive(run: Path, corpus: Path) -> None:
    old = final_state(run)
    train(config_for(run, corpus, fresh=True, epochs=1))
    (archived,) = (run / "archive").rglob("model_epoch_2.pt")
    assert difference(old["model"], load(archived, only="model")) is None
    assert not (run / "model_epoch_2.pt").exists()
    assert load(run / "latest.pt", only="history")["epochs"] == [1]


def test_declining_to_go_on_archives_too_and_nothing_is_overwritten(
    run: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.training import continuing

    start = continuing.decide(config_for(run, corpus), Catalog(run).scan(), lambda _q: False)
    assert start.anew
    assert start.saved is None


# -------------------------------------------------------------------------------------- bad input


def test_a_damaged_newest_is_set_aside_and_the_older_one_taken(run: Path, corpus: Path) -> None:
    reference = final_state(run)
    damage(run / "model_epoch_2.pt")
    shutil.copy(run / "model_epoch_2.pt", run / "latest.pt.copy")
    for name in ("latest.pt", "model.pt", "best_model.pt"):
        if (run / name).exists():
            (run / name).unlink()
    said = train(config_for(run, corpus))
    assert "Moved to quarantine" in said
    assert "steps" in said
    assert list((run / "quarantine").rglob("model_epoch_2.pt"))
    assert "model_epoch_2.pt" in (run / "quarantine" / "reasons.txt").read_text()
    assert difference(reference, final_state(run)) is None


def test_all_damaged_never_starts_over(run: Path, corpus: Path) -> None:
    paths = list(run.rglob("*.pt"))  # copytree has made a file of every link
    for path in paths:
        damage(path)
    with pytest.raises(DamagedCheckpoint, match="--fresh"):
        train(config_for(run, corpus))
    assert len(list((run / "quarantine").rglob("*.pt"))) == len(paths)
    with pytest.raises(DamagedCheckpoint, match="--fresh"):  # and not the second time either
        train(config_for(run, corpus))


def test_a_pickle_with_code_is_never_run(run: Path, corpus: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (tmp_path / "executed",)

    for name, save in {
        "zip.pt": lambda path: torch.save({"model": Bomb()}, path),
        "legacy.pt": lambda path: path.write_bytes(pickle.dumps({"model": Bomb()})),
    }.items():
        save(tmp_path / name)
        for option in ("checkpoint", "resume"):
            with pytest.raises(CheckpointError) as error:
                train(config_for(tmp_path / "new", corpus, **{option: str(tmp_path / name)}))
            assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("size", [0, 10, 5000, 60_000])
def test_a_truncated_checkpoint_is_refused(
    run: Path, corpus: Path, tmp_path: Path, size: int
) -> None:
    cut = tmp_path / "cut.pt"
    cut.write_bytes((run / "model_epoch_1.pt").read_bytes()[:size])
    for option in ("checkpoint", "resume"):
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            train(config_for(tmp_path / "new", corpus, **{option: str(cut)}))
    assert not list((tmp_path / "new").glob("*.pt"))


def test_another_models_weights_are_refused_before_anything_changes(
    corpus: Path, tmp_path: Path
) -> None:
    torch.save({"model": {"layer.weight": torch.zeros(3)}}, tmp_path / "their.pt")
    with pytest.raises(StateMismatch, match="not in the checkpoint"):
        train(config_for(tmp_path / "new", corpus, checkpoint=str(tmp_path / "their.pt")))


def test_a_text_file_that_calls_itself_pt(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("not a checkpoint" * 100)
    with pytest.raises(ForeignCheckpoint):
        train(config_for(tmp_path / "new", corpus, checkpoint=str(tmp_path / "x.pt")))


def test_a_file_that_is_not_there(corpus: Path, tmp_path: Path) -> None:
    for option in ("checkpoint", "resume"):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            train(config_for(tmp_path / "new", corpus, **{option: "nowhere.pt"}))


def test_two_on_one_directory_is_a_clear_error(run: Path, corpus: Path) -> None:
    with run_lock(run), pytest.raises(RunLocked, match="in use by this process already"):
        train(config_for(run, corpus))


def test_a_disk_that_cannot_hold_one_checkpoint_is_said_before_step_one(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.checkpoint.system import filesystem

    monkeypatch.setattr(filesystem, "free_bytes", lambda _directory: 1 << 20)
    with pytest.raises(ResourceError, match="1 MB free"):
        train(config_for(tmp_path / "new", corpus))


def test_the_room_for_what_the_optimizer_makes_is_asked_for_before_step_one(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its moments are two thirds of each checkpoint, and not there at the start."""
    from holdfast.checkpoint.rundir import space

    asked: list[int] = []
    monkeypatch.setattr(
        space, "check_room", lambda _catalog, _contents, needed: asked.append(needed)
    )
    directory = tmp_path / "new"
    train(config_for(directory, corpus))
    train(config_for(directory, corpus, epochs=3, resume="auto"))
    size = (directory / "latest.pt").stat().st_size
    assert len(asked) == 2
    assert size <= asked[0] < 1.1 * size
    assert asked[1] == size, "after a resume they are there"


def test_a_failed_save_is_told_and_training_goes_on(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from holdfast.checkpoint.system import filesystem

    original, failed = filesystem.sync_file, []

    def sync_file(fd: int) -> None:
        import os

        size = os.fstat(fd).st_size
        if size > 1 << 20 and not failed:
            failed.append(size)
            raise OSError(errno.ENOSPC, "No space left on device")
        original(fd)

    monkeypatch.setattr(filesystem, "sync_file", sync_file)
    said = train(config_for(tmp_path / "new", corpus, temp_every_steps=4))
    assert failed
    assert "Step 4 could not be saved" in said
    assert "No space left" in said
    events = list(Catalog(tmp_path / "new").events())
    assert [e["step"] for e in events if e["event"] == "failed"] == [4]
    assert load(tmp_path / "new" / "latest.pt", only="history")["epochs"] == [1, 2]


def test_an_end_that_cannot_be_saved_is_no_success_and_goes_on_when_there_is_room(
    tmp_path: Path, corpus: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up before the last epoch's checkpoint."""
    from holdfast.checkpoint.system import filesystem

    original = Trainer.evaluate

    def fill_disk(self: Trainer, **keywords: Any) -> dict[str, float]:
        if self.progress.epoch == 2:
            patch.setattr(filesystem, "free_bytes", lambda _directory: 0)
        return original(self, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", fill_disk)
        with pytest.raises(SaveFailed, match="run the same command again"):
            train(config_for(tmp_path / "new", corpus))
    state = load(tmp_path / "new" / "latest.pt")
    assert state["history"]["epochs"] == [1]
    train(config_for(tmp_path / "new", corpus))
    assert difference(final_state(finished), final_state(tmp_path / "new")) is None


def test_a_run_that_nobody_can_save_any_more_stops_if_so_asked_and_is_told(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.checkpoint.system import filesystem

    original, told = loop.after_step, tmp_path / "told"

    def fill_disk(self: Trainer) -> None:
        if self.progress.step == 5:
            self.manager.wait()  # a slow disk is not what this is about
            monkeypatch.setattr(filesystem, "free_bytes", lambda _directory: 0)
        if self.progress.step == 9:
            time.sleep(1.5)  # longer than --max-unsafe
        original(self)

    monkeypatch.setattr(loop, "after_step", fill_disk)
    options = {"temp_every_steps": 4, "max_unsafe": 0.02, "on_unsafe": "stop",
               "notify": f"sh -c 'echo $HOLDFAST_EVENT $HOLDFAST_STEP >> {told}'"}  # fmt: skip
    with pytest.raises(SaveFailed, match="the last durable step is 4") as error:
        train(config_for(tmp_path / "new", corpus, **options))
    assert error.value.exit_code == 4
    assert sorted(told.read_text().splitlines()) == ["crashed 4", "unsafe 4"]
    events = [e["event"] for e in Catalog(tmp_path / "new").events()]
    assert "unsafe" in events
    assert load(tmp_path / "new" / "latest.pt", only="global_step") == 4


def test_a_finished_run_is_told_and_the_command_is_in_no_checkpoint(
    tmp_path: Path, corpus: Path
) -> None:
    """A checkpoint is given to others: they must neither read a password there nor run anything."""
    told = tmp_path / "told"
    command = f"sh -c 'echo $HOLDFAST_EVENT >> {told}' secret-token"
    new = tmp_path / "new"
    train(config_for(new, corpus, notify=command))
    assert told.read_text() == "finished\n"
    for path in new.rglob("*"):
        assert not path.is_file() or b"secret-token" not in path.read_bytes(), path
    train(config_for(new, corpus, notify=command))
    assert told.read_text() == "finished\n", "it was finished before"


def test_a_run_directory_deleted_while_training_fails_every_save_and_the_end_says_so(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.checkpoint.save import saver

    new, original = tmp_path / "new", loop.after_step

    def delete(self: Trainer) -> None:
        if self.progress.step == 3:
            shutil.rmtree(new)
        original(self)

    monkeypatch.setattr(loop, "after_step", delete)
    monkeypatch.setattr(saver, "LOOK_EVERY", 0.0)
    said = io.StringIO()
    with (
        Console(stream=said, terminal=False) as console,
        pytest.raises(SaveFailed, match="the last durable step is 0"),
    ):
        session.run(config_for(new, corpus), console, log=False, yes=True, command="holdfast train")
    assert said.getvalue().count("was deleted or replaced while training") == 1
    assert not new.exists()


# ------------------------------------------------------------------------------- ends and limits


def test_early_stopping_stops_and_is_final(tmp_path: Path, corpus: Path) -> None:
    options = {"epochs": 30, "patience": 2, "learning_rate": 0.05, "warmup_ratio": 0}
    said = train(config_for(tmp_path / "new", corpus, **options))
    assert "stopping early" in said
    history = load(tmp_path / "new" / "latest.pt", only="history")
    assert len(history["epochs"]) < 30
    assert "This run is finished" in train(config_for(tmp_path / "new", corpus, **options))


def test_best_is_decided_at_every_evaluation(tmp_path: Path, corpus: Path) -> None:
    train(config_for(tmp_path / "new", corpus, epochs=1, eval_every=4))
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(x)["val_loss"] for x in lines if json.loads(x)["event"] == "evaluation"]
    assert len(losses) > 3
    best = Catalog(tmp_path / "new").scan().best
    assert best is not None
    assert best.loss == min(losses)
    assert (tmp_path / "new" / "best_model.pt").samefile(tmp_path / "new" / best.names[0])


def test_keep_last_n_keeps_the_last_the_best_and_the_newest(tmp_path: Path, corpus: Path) -> None:
    train(config_for(tmp_path / "a", corpus, epochs=5, keep_last_n=2))
    kept = {p.name for p in (tmp_path / "a").glob("model_epoch_*.pt")}
    best = Catalog(tmp_path / "a").scan().best
    assert best is not None
    assert kept == {"model_epoch_4.pt", "model_epoch_5.pt", best.names[0]}
    train(config_for(tmp_path / "b", corpus, epochs=4, keep_last_n=0))
    assert len(list((tmp_path / "b").glob("model_epoch_*.pt"))) == 4


def test_without_epoch_checkpoints_best_and_newest_remain(tmp_path: Path, corpus: Path) -> None:
    train(config_for(tmp_path / "a", corpus, epochs=3, save_every_epoch=False))
    assert not list((tmp_path / "a").glob("model_epoch_*.pt"))
    assert load(tmp_path / "a" / "latest.pt", only="history")["epochs"] == [1, 2, 3]
    assert (tmp_path / "a" / "best_model.pt").exists()


def test_without_validation_there_is_no_best_but_everything_else(
    tmp_path: Path, corpus: Path
) -> None:
    train(config_for(tmp_path / "a", corpus, epochs=1, val_fraction=0))
    assert load(tmp_path / "a" / "latest.pt", only="history")["val_loss"] == [None]
    assert not (tmp_path / "a" / "best_model.pt").exists()


def test_an_original_sectioned_config_trains_by_steps(tmp_path: Path, corpus: Path) -> None:
    from holdfast.training.options.presets import resolve

    file = tmp_path / "config.json"
    file.write_text(json.dumps({
        "model": {"name": "tiny", "context_length": 16, "vocab_size": 300},
        "training": {"batch_size": 4, "num_steps": 20, "save_every": 10, "resume_from": None,
                     "checkpoint_dir": str(tmp_path / "run")},
    }))  # fmt: skip
    config = resolve(file=file, flags={"data_file": str(corpus), "sample_tokens": "0",
                                       "cache_dir": str(tmp_path / "cache")})  # fmt: skip
    train(config)
    steps = sorted(e.step for e in Catalog(tmp_path / "run").scan().entries)
    assert steps == [10, 20]
    assert (tmp_path / "run" / "best_model.pt").exists()


# --------------------------------------------------------------------------------- other doors


def test_any_causal_model_of_transformers_goes_on_training(tmp_path: Path, corpus: Path) -> None:
    """`--model DIR`: a Hugging Face directory with its own tokenizer."""
    import transformers

    from holdfast.training.text.tokenizer import train_tokenizer

    their = tmp_path / "their model"
    tokenizer = train_tokenizer(corpus.read_text("utf-8").split("\n\n"), 300)
    tokenizer.save(their)
    settings = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(their)
    options = {"model": str(their), "epochs": 1, "dropout": "none", "vocab_size": "none"}
    train(config_for(tmp_path / "run", corpus, **options))
    state = load(tmp_path / "run" / "latest.pt")
    assert state["model_config"]["hidden_size"] == 32
    assert state["tokenizer"] == tokenizer.to_state()
    assert "This run is finished" in train(config_for(tmp_path / "run", corpus, **options))


def board_steps(run: Path) -> dict[str, list[int]]:
    """The steps at which TensorBoard shows a point of each curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [point.step for point in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_tensorboard_has_every_point_after_a_resume_and_none_of_an_older_run(
    tmp_path: Path, corpus: Path
) -> None:
    options = {"tensorboard": True, "log_every": 1, "eval_every": 2, "epochs": None}
    train(config_for(tmp_path / "run", corpus, num_steps=4, **options))
    train(config_for(tmp_path / "run", corpus, num_steps=6, resume="auto", **options))
    steps = board_steps(tmp_path / "run")
    assert steps["loss"] == steps["learning_rate"] == [1, 2, 3, 4, 5, 6]
    assert sorted(set(steps["val_loss"])) == [2, 4, 6]
    train(config_for(tmp_path / "run", corpus, num_steps=2, fresh=True, **options))
    steps = board_steps(tmp_path / "run")
    assert steps["loss"] == [1, 2] and set(steps["val_loss"]) == {2}


def test_with_checkpoint_epochs_and_steps_count_from_that_file(
    run: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(run / "model_epoch_1.pt")
    per_epoch = first["global_step"]
    options = {"checkpoint": str(run / "model_epoch_1.pt"), "epochs": 1, "learning_rate": 5e-5}
    said = train(config_for(run, corpus, **options))
    assert f"count from step {per_epoch} of model_epoch_1.pt" in said
    state = load(run / "latest.pt")
    assert (state["epoch"], state["global_step"]) == (2, 2 * per_epoch)
    assert "finished" in train(config_for(run, corpus, epochs="2", resume="auto"))
    # The same words again, by a supervisor after a crash: counted once, from the first start.
    monkeypatch.setenv(RESTART, "an earlier one")
    assert "This run is finished: " in train(config_for(run, corpus, **options))
    assert load(run / "latest.pt")["global_step"] == 2 * per_epoch


def test_a_finished_run_repeats_in_its_advice_what_was_asked_for(run: Path, corpus: Path) -> None:
    said = train(config_for(run, corpus, learning_rate=5e-5, dropout="none"))
    advice = next(line for line in said.splitlines() if "To train further" in line)
    assert "--learning-rate 5e-5" in advice and "--dropout none" in advice


def test_another_model_is_refused_by_the_option_that_wants_it(run: Path, corpus: Path) -> None:
    flags = {"checkpoint_dir": str(run), "data_file": str(corpus)}
    with pytest.raises(StateMismatch, match=r"model \(set by --preset\) was \S+ and is now gpt2"):
        train(resolve(preset="standard", flags=flags))
    questions: list[tuple[str, bool]] = []

    def ask(question: str, *, default: bool = True) -> bool:
        questions.append((question, default))
        return True

    contents = Catalog(run).scan()
    start = continuing.decide(resolve(preset="standard", flags=flags), contents, ask)
    assert start.anew and start.saved is None  # "yes" begins the run that was asked for
    assert "another model" in questions[0][0] and questions[0][1] is False


@pytest.mark.usefixtures("shape_as_shipped")
def test_a_model_that_cannot_fit_is_refused_before_it_is_built(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.training import models

    monkeypatch.setattr(models, "free_memory", lambda _device: 10_000_000)
    with pytest.raises(ResourceError, match=r"9\.54 MiB is free"):
        train(config_for(tmp_path / "run", corpus))


@pytest.mark.parametrize("form", ["jsonl", "parquet", "txt.gz", "folder"])
def test_other_forms_of_the_same_text_give_the_same_tokens(
    tmp_path: Path, corpus: Path, form: str
) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = corpus.read_text("utf-8").split("\n\n")
    path = tmp_path / f"data.{form}"
    if form == "jsonl":
        lines = [json.dumps({"text": d}, ensure_ascii=False) for d in documents]
        path.write_text("\n".join(lines), "utf-8")
    elif form == "parquet":
        pq.write_table(pa.table({"text": documents}), path)
    elif form == "txt.gz":
        path.write_bytes(gzip.compress(corpus.read_bytes()))
    else:
        path = tmp_path / "folder"
        path.mkdir()
        shutil.copy(corpus, path / "a.txt")
    said = train(config_for(tmp_path / "run", path, num_steps=1, epochs="none"))
    expected = train(config_for(tmp_path / "plain", corpus, num_steps=1, epochs="none"))

    def tokens(text: str) -> str:
        return text.partition("documents, ")[2].partition(")")[0]

    assert tokens(said) == tokens(expected)


def test_the_sample_text_is_found_from_everywhere_also_by_the_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no data/ here
    flags = {name: str(value) for name, value in HARD.items() if name != "epochs"}
    flags |= {"cache_dir": "cache", "checkpoint_dir": "run"}
    train(resolve(flags={**flags, "num_steps": "1"}))
    said = train(resolve(flags={**flags, "num_steps": "2"}))
    assert "from checkpoint_step_1.pt" in said
    assert "is gone" not in said


def test_a_saved_configuration_trains_outside_the_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the text that is bundled, as it lies in a clone."""
    monkeypatch.chdir(tmp_path)
    save_config(resolve(flags={}), tmp_path / "saved.json")
    small = {"context_length": "16", "vocab_size": "300", "num_steps": "1", "sample_tokens": "0"}
    assert "Finished: 1 steps" in train(resolve(file=tmp_path / "saved.json", flags=small))


# ------------------------------------------------------------------------- how much a start reads


def test_a_start_scans_once_and_reads_the_history_once(run: Path, corpus: Path) -> None:
    def start() -> None:
        loop.train = lambda _trainer: None
        train(config_for(run, corpus, resume="auto", epochs=5))

    counts = counted(run, start)
    assert (counts["scans"], counts["history"]) == (1, 1), counts
