"""An occupied run directory, told to begin anew, killed -9 before the first save of the new run."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint import Catalog
from holdfast.checkpoint.rundir import shared_memory
from holdfast.training import loop
from holdfast.training.options.config import Config
from holdfast.training.options.presets import resolve
from holdfast.training.trainer import Trainer
from tests.support import die, in_child
from tests.training.runs import (
    Killed,
    config_for,
    difference,
    final_state,
    kill_after,
    train,
    write_corpus,
)

KILLED_AT = 8  # the old run has a temporary checkpoint of this very step, of the same name
NEW: dict[str, Any] = {"seed": 7, "num_steps": 20, "epochs": "none", "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A checkpoint of another directory, for --checkpoint."""
    directory = tmp_path_factory.mktemp("elsewhere")
    train(config_for(directory, corpus, num_steps=2, epochs="none", seed=3))
    return directory / "latest.pt"


@pytest.fixture
def run(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run that was killed after step 9, with checkpoints of the steps 4 and 8."""
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_after(9, patch)
        with pytest.raises(Killed):
            train(config_for(directory, corpus, temp_every_steps=4))
    yield directory
    for remains in shared_memory.remains():
        if remains.belongs_to(directory):
            remains.remove()


def kill_for_real(config: Config) -> None:
    """Train in a process of its own until it is killed with a whole snapshot of `KILLED_AT`."""
    original = loop.after_step

    def after_step(self: Trainer) -> None:
        original(self)
        if self.progress.step == KILLED_AT:
            self.manager.wait_for_copy()
            die()

    def work() -> None:
        loop.after_step = after_step
        train(config)

    assert in_child(work) == -signal.SIGKILL


def plain(directory: Path, corpus: Path) -> str:
    """`holdfast train --checkpoint-dir DIR`, and where the tokens are cached: nothing else."""
    flags = {"checkpoint_dir": str(directory), "cache_dir": str(corpus.parent / "cache")}
    return train(resolve(flags=flags), yes=True)


def files_of(directory: Path) -> dict[str, bytes]:
    """The files of the run there, without what belongs to the directory and not to a run."""
    ours = ("archive", "logs", "events.jsonl", "metadata.json")
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and path.relative_to(directory).parts[0] not in ours
        and path.suffix != ".lock"
    }


Begin = Callable[..., Config]


@pytest.fixture(params=["fresh", "checkpoint"])
def begin(request: pytest.FixtureRequest, corpus: Path, elsewhere: Path) -> Begin:
    """The configuration of `holdfast train --fresh`, or `--checkpoint FILE`."""
    options = {"fresh": {"fresh": True}, "checkpoint": {"checkpoint": str(elsewhere)}}
    return lambda directory, **more: config_for(
        directory, corpus, **NEW, **options[request.param], **more
    )


@pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")
def test_the_next_start_rescues_the_new_run_and_keeps_the_old_one_whole(
    tmp_path: Path, run: Path, corpus: Path, begin: Begin
) -> None:
    train(begin(tmp_path / "straight"))
    before = files_of(run)
    old = Catalog(run).scan().newest
    kill_for_real(begin(run, memory_every=1, temp_every_minutes=0))
    assert files_of(run) == before, "a kill before the first save has changed nothing"

    said = plain(run, corpus)
    assert f"step {KILLED_AT}" in said and "checkpoints were moved to" in said
    assert difference(final_state(tmp_path / "straight"), final_state(run)) is None
    assert old is not None
    (place,) = (run / "archive" / old.run_id[:8]).iterdir()
    kept = files_of(place)
    for name, data in before.items():  # latest.pt moves on, and step 8 is the name of two
        assert data in kept.values() if name.endswith(".pt") else kept[name] == data, name
    assert all(entry.run_id != old.run_id for entry in Catalog(run).scan().entries)
    assert '"started"' in (run / "metrics.jsonl").read_text().splitlines()[0]


def test_without_shared_memory_the_next_start_goes_on_with_the_old_run(
    tmp_path: Path, run: Path, corpus: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config_for(tmp_path / "straight", corpus))
    monkeypatch.setenv("HOLDFAST_DISABLE", "sharedmemory")
    before = files_of(run)
    kill_for_real(begin(run, memory_every=1))
    assert files_of(run) == before
    plain(run, corpus)
    assert not (run / "archive").exists()
    assert difference(final_state(tmp_path / "straight"), final_state(run)) is None
