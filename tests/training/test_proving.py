"""`holdfast doctor --prove-resume`: real trainings in processes, straight and killed.

The mutants break one thing each; the proof must name it. The command itself, with processes that
are started as a user's are, is tested in tests/cli/test_doctor.py.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.state.randomness import RandomState
from holdfast.errors import CheckpointError, ConfigError, DataError
from holdfast.prove.resume import NOT_REPEATABLE, OUTSIDE
from holdfast.training import continuing, prove_worker
from holdfast.training.plan import Progress
from holdfast.training.prove_worker import Order
from holdfast.training.proving import Stage, TrainingProof, prove
from holdfast.training.trainer import Trainer
from tests.training.runs import config_for, train, write_corpus

STEPS, MORE = 3, 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text whose tokens are in the cache; and what a training imports is here to be forked."""
    place = tmp_path_factory.mktemp("corpus")
    text = write_corpus(place, passages=3)
    train(config_for(place / "run", text, epochs="none", num_steps=1, sample_tokens=0))
    return text


class Forked:
    """A worker that is this process, forked: it costs no start of a Python, and what a test has
    broken here is broken there."""

    def __init__(self, order: Order, errors: IO[bytes]) -> None:
        sys.stdout.flush()
        orders, self._alive = os.pipe()
        reading, answers = os.pipe()
        self._pid, self._status = os.fork(), None
        if self._pid == 0:
            os.close(self._alive)
            for fd, number in ((orders, 0), (answers, 1), (errors.fileno(), 2)):
                os.dup2(fd, number)
            sys.argv = ["prove_worker", order.to_json()]
            try:
                os._exit(prove_worker.main())
            finally:
                os.write(2, f"{sys.exc_info()[1]}\n".encode())
                os._exit(1)
        os.close(orders)
        os.close(answers)
        self.stdout: IO[str] | None = os.fdopen(reading, encoding="utf-8")

    def kill(self) -> None:
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int:
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._status

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_exc: object) -> None:
        assert self.stdout is not None
        self.stdout.close()
        os.close(self._alive)
        self.wait()


def proof_of(
    tmp_path: Path, corpus: Path, *, start: Any = Forked, **options: Any
) -> tuple[TrainingProof, list[Stage]]:
    """The proof, and what was told meanwhile."""
    seen: list[Stage] = []
    config = config_for(tmp_path / "run", corpus, **{"sample_tokens": 0, **options})
    place = tmp_path / "place"
    place.mkdir()
    try:
        found = prove(config, steps=STEPS, more=MORE, place=place, start=start,
                      progress=lambda stage: seen.append(replace(stage)))  # fmt: skip
    finally:
        assert list(place.iterdir()) == [], "nothing is left behind"
        assert not (tmp_path / "run").exists(), "the real run directory is not touched"
    return found, seen


def test_the_trainer_proves_itself(tmp_path: Path, corpus: Path) -> None:
    """With all that makes it hard, and snapshots in memory as a user has them."""
    before = {remains.directory for remains in shared_memory.remains()}
    proof, seen = proof_of(tmp_path, corpus, memory_every="auto")
    assert proof.equal and proof.proof.difference is None
    assert (proof.at, proof.what) == (None, None)
    assert proof.proof.tensors > 50 and proof.proof.killed
    assert list(dict.fromkeys(stage.name for stage in seen)) == [
        "straight", "interrupted", "resumed",
    ]  # fmt: skip
    assert [stage.step for stage in seen if stage.name == "resumed" and stage.step] == [4, 5]
    lefts = [stage.left for stage in seen if stage.left is not None]
    assert lefts and lefts[-1] == 0.0
    mine = {r for r in shared_memory.remains() if r.run and str(tmp_path) in str(r.run)}
    assert not {r.directory for r in mine} - before


def test_a_stream_that_is_not_restored_is_named_with_its_step(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RandomState, "load_state_dict", lambda _self, _state: None)
    proof, seen = proof_of(tmp_path, corpus)
    assert not proof.equal
    assert (proof.at, proof.what) == (STEPS + 1, "rng.torch")
    assert proof.proof.cause == OUTSIDE
    assert proof.proof.first is not None and proof.proof.first.index is not None
    assert seen[-1].name == "again"


def test_another_batch_is_named(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A position that is not restored: the trainer sees the data from the beginning again."""
    load = Progress.load_state_dict
    monkeypatch.setattr(
        Progress, "load_state_dict", lambda self, state: load(self, {**state, "position": 0})
    )
    proof, _seen = proof_of(tmp_path, corpus)
    assert (proof.at, proof.what) == (STEPS + 1, "batch")
    assert proof.values[0] != proof.values[1]
    assert proof.to_json()["first_step"]["what"] == "batch"


def test_a_machine_that_does_not_repeat_itself_is_told_apart(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.one_step

    @torch.no_grad()
    def noisy(self: Trainer) -> None:
        with torch.enable_grad():
            step(self)
        next(self.model.parameters()).add_(int.from_bytes(os.urandom(3), "big") * 1e-8)

    monkeypatch.setattr(Trainer, "one_step", noisy)
    proof, _seen = proof_of(tmp_path, corpus)
    assert proof.proof.cause == NOT_REPEATABLE
    assert proof.what == "loss" and proof.at is not None and proof.at <= STEPS


def test_a_run_that_starts_over_proves_nothing(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuing, "decide", lambda *_: continuing.Start(anew=True))
    with pytest.raises(CheckpointError, match="after step 3, and went on with step 1"):
        proof_of(tmp_path, corpus)


def test_a_run_that_is_too_short_says_so(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ConfigError, match="has only 4 steps"):
        proof_of(tmp_path, corpus, epochs="none", num_steps=4)


def test_what_a_training_complains_of_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt"):
        proof_of(tmp_path, tmp_path / "nothing.txt")


def test_a_training_that_dies_says_its_last_words(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_self: Trainer) -> None:
        os.write(2, b"it hurts\n")
        os._exit(3)

    monkeypatch.setattr(Trainer, "one_step", die)
    with pytest.raises(CheckpointError, match="status 3: it hurts"):
        proof_of(tmp_path, corpus)


def test_a_worker_ends_when_its_parent_does(tmp_path: Path) -> None:
    with (tmp_path / "errors").open("wb") as errors:
        worker = Forked(Order("no file", 1), errors)
        worker.__exit__()
    assert worker.wait() in (1, ConfigError.exit_code)


def test_a_waiting_worker_ends_when_its_parent_does() -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        os.dup2(reading, 0)
        prove_worker.end_with_parent()
        os._exit(9)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    os.close(reading)


def test_ctrl_c_leaves_no_training_behind(tmp_path: Path, corpus: Path) -> None:
    begun: list[Forked] = []

    def start(order: Order, errors: IO[bytes]) -> Forked:
        begun.append(Forked(order, errors))
        return begun[-1]

    def progress(stage: Stage) -> None:
        if stage.name == "interrupted" and stage.step:
            raise KeyboardInterrupt

    config = config_for(tmp_path / "run", corpus)
    with pytest.raises(KeyboardInterrupt):
        prove(config, steps=STEPS, more=MORE, place=tmp_path, progress=progress, start=start)
    assert [worker.wait() for worker in begun] == [0, -signal.SIGKILL]
    assert list(tmp_path.iterdir()) == []
