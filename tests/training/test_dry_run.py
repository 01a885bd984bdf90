"""The dry run tells the truth: the bytes of a file, the time of a run; and it saves nothing."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from holdfast import load
from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.system import filesystem
from holdfast.errors import ResourceError
from holdfast.training import loop
from holdfast.training.console import Console
from holdfast.training.dry_run import Estimate, dry_run
from holdfast.training.options.config import OPTIONS
from holdfast.training.trainer import Trainer
from tests.training.runs import config_for, train, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def try_out(directory: Path, corpus: Path, **options: Any) -> tuple[Estimate, str]:
    said = io.StringIO()
    with Console(stream=said, terminal=False) as console:
        estimate = dry_run(config_for(directory, corpus, **options), console)
    return estimate, said.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 1},
        {"epochs": 4, "keep_last_n": 0, "eval_every": 7, "save_every": 9},
        pytest.param(
            {"model": "mini", "epochs": "none", "num_steps": 2, "sample_tokens": 0},
            marks=pytest.mark.slow,
        ),
        {"epochs": "none", "num_steps": 12, "vocab_size": 700, "learning_rate": 0.0123456789},
    ],
    ids=["one epoch", "many epochs", "mini", "steps"],
)
def test_the_size_is_that_of_every_real_file_to_the_byte(
    tmp_path: Path, corpus: Path, options: dict[str, Any]
) -> None:
    estimate, said = try_out(tmp_path / "run", corpus, **options)
    assert f"({estimate.checkpoint_bytes:,} bytes)" in said
    train(config_for(tmp_path / "run", corpus, temp_every_steps=5, **options))
    sizes = {path.stat().st_size for path in (tmp_path / "run").rglob("*.pt")}
    assert sizes == {estimate.checkpoint_bytes}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temp_every_minutes": "none"}, "rolling checkpoints: every 1 min 00 s"),
        ({"temp_every_minutes": 0}, "rolling checkpoints: none"),
        ({"temp_every_minutes": 12}, "rolling checkpoints: every 12 min 00 s"),
    ],
    ids=str,
)
def test_it_says_how_often_rolling_checkpoints_come(
    tmp_path: Path, corpus: Path, options: dict[str, Any], says: str
) -> None:
    _estimate, said = try_out(tmp_path / "run", corpus, sample_tokens=0, **options)
    assert says in said


def test_it_saves_nothing(tmp_path: Path, corpus: Path) -> None:
    try_out(tmp_path / "a" / "run", corpus)
    assert not (tmp_path / "a").exists()


def test_it_leaves_a_run_that_is_there_as_it_is(tmp_path: Path, corpus: Path) -> None:
    train(config_for(tmp_path / "run", corpus, epochs=1))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    try_out(tmp_path / "run", corpus, epochs=2)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("first", "then", "share"),
    [
        ({"epochs": 2}, {"epochs": 3}, 1 / 2),
        ({"epochs": "none", "num_steps": 12}, {"epochs": "none", "num_steps": 18}, 1 / 2),
        ({"epochs": 1}, {"epochs": 1}, 0),
    ],
    ids=["epochs", "steps", "finished"],
)
def test_of_a_run_that_goes_on_only_what_is_left_is_counted(
    tmp_path: Path, corpus: Path, first: dict[str, Any], then: dict[str, Any], share: float
) -> None:
    train(config_for(tmp_path / "run", corpus, sample_tokens=0, **first))
    done = load(tmp_path / "run" / "latest.pt", only="global_step")
    estimate, said = try_out(tmp_path / "run", corpus, price_per_hour=3600, **then)
    assert (estimate.done_steps, estimate.steps) == (done, round(share * done))
    assert estimate.cost == pytest.approx(estimate.total_seconds)
    if share == 0:
        assert estimate.total_seconds == 0
    assert f"{estimate.steps} steps that are left; {done} are done" in said
    assert "nothing durable" not in said


def test_it_shows_what_is_in_force_and_where_from(tmp_path: Path, corpus: Path) -> None:
    _estimate, said = try_out(tmp_path / "run", corpus, price_per_hour=3600)
    rows = [" ".join(line.split()) for line in said.splitlines()]
    assert any(row.endswith("learning_rate 1e-3 flag") for row in rows)
    assert any(row.endswith("weight_decay 0.1 default") for row in rows)
    for words in ("parameters: ", "peak memory: ", "tokens/s", "time for an epoch: ", "cost: "):
        assert words in said
    assert "Dry run: nothing was saved." in said


def test_for_scripts_it_is_every_figure_and_every_option_with_its_source(
    tmp_path: Path, corpus: Path
) -> None:
    options = {"price_per_hour": 2, "temp_every_minutes": 0, "sample_tokens": 0}
    estimate, _said = try_out(tmp_path / "run", corpus, **options)
    found = json.loads(json.dumps(estimate.to_json(), allow_nan=False))
    assert found["checkpoint_bytes"] == estimate.checkpoint_bytes
    assert found["temp_seconds"] is None, "there are no rolling checkpoints"
    assert found["cost"] == pytest.approx(2 * found["total_seconds"] / 3600)
    assert found["configuration"]["weight_decay"] == {"value": 0.1, "from": "default"}
    assert found["configuration"]["price_per_hour"] == {"value": 2.0, "from": "flag"}
    assert set(found["configuration"]) == set(OPTIONS)


@pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")
@pytest.mark.usefixtures("shape_as_shipped")
def test_the_memory_for_snapshots_is_what_was_said(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate, said = try_out(tmp_path / "run", corpus, epochs=1, memory_every=1)
    assert "in shared memory" in said
    found: list[int] = []
    original = loop.after_step

    def after_step(self: Trainer) -> None:
        original(self)
        if self.progress.step == 8:
            self.manager.wait()
            found.extend(r.size for r in shared_memory.remains() if r.run == tmp_path / "run")

    monkeypatch.setattr(loop, "after_step", after_step)
    train(config_for(tmp_path / "run", corpus, epochs=1, memory_every=1))
    assert found == [pytest.approx(estimate.snapshot_bytes, rel=0.02)]


@pytest.mark.usefixtures("shape_as_shipped")
def test_a_small_shared_memory_is_said_beforehand(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: 64 << 20)  # Docker's default
    estimate, said = try_out(tmp_path / "run", corpus, epochs=1, memory_every="auto")
    assert "none that outlives a kill" in said
    assert estimate.snapshot_bytes == estimate.checkpoint_bytes


def test_the_run_never_needs_more_disk_than_it_says(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"epochs": 4, "keep_last_n": 2, "temp_every_steps": 5}
    estimate, _said = try_out(tmp_path / "run", corpus, **options)
    most = 0
    write_file = filesystem.write_file

    def watched(*arguments: Any, **keywords: Any) -> None:
        nonlocal most
        write_file(*arguments, **keywords)
        files = [p.stat() for p in (tmp_path / "run").rglob("*.pt")]
        most = max(most, sum({s.st_ino: s.st_size for s in files}.values()))

    monkeypatch.setattr(filesystem, "write_file", watched)
    train(config_for(tmp_path / "run", corpus, **options))
    assert 0 < most <= estimate.run_bytes


def test_too_small_a_disk_is_refused_with_the_numbers(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "free_bytes", lambda _directory: 1 << 20)
    with pytest.raises(
        ResourceError, match=r"needs .* MiB on the disk .* which has 1\.00 MiB free"
    ):
        try_out(tmp_path / "run", corpus)


@pytest.mark.slow
def test_the_time_is_within_a_quarter_of_the_real_run(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Estimated before and after, so that a machine that changes its speed meanwhile is noticed."""
    corpus = write_corpus(tmp_path_factory.mktemp("more"), passages=40)
    options = {"epochs": 2, "context_length": 64, "sample_tokens": 20}
    seconds = 0.0
    original = loop.train

    def timed(self: Trainer) -> None:
        nonlocal seconds
        began = time.perf_counter()
        original(self)
        seconds = time.perf_counter() - began

    before, _said = try_out(tmp_path / "run", corpus, **options)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", timed)
        train(config_for(tmp_path / "run", corpus, **options))
    after, _said = try_out(tmp_path / "other", corpus, **options)
    estimates = sorted([before.total_seconds, after.total_seconds])
    print(f"estimated {estimates[0]:.1f} and {estimates[1]:.1f} s, took {seconds:.1f} s")
    assert 0.75 * estimates[0] <= seconds <= 1.25 * estimates[1]


def test_no_step_beyond_the_plan_is_shown(tmp_path: Path, corpus: Path) -> None:
    """More steps are timed than a short plan has; the last one is made again."""
    config = config_for(tmp_path / "run", corpus, epochs="none", num_steps=4, sample_tokens=0)
    with Console(stream=io.StringIO(), terminal=False) as console:
        dry_run(config, console)
        assert 0 < console.status.step <= 4
