"""The engine's benchmark: every peer's save comes back equal, and the times mean what they say.

Speed itself is not tested here.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engine import measure, report, training_loss
from benchmarks.engine import run as run_module
from benchmarks.engine.frameworks import PEERS, Dcp
from benchmarks.engine.limits import Disk, Memory
from benchmarks.engine.measure import Progress, Ratio, Series, interleave, interval
from benchmarks.engine.peers import Ours, OursOverlapped, Peer, TorchSave
from benchmarks.engine.run import DISK, Options, Report, machine, run
from benchmarks.engine.watch import ROOT, Watcher
from benchmarks.engine.workload import SHAPES, Model, Workload

PROGRAM = [sys.executable, "-m", "benchmarks.engine"]
HEAVY = ("DCP async process", "Orbax async", "Lightning", "transformers.Trainer")


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times do not matter here: no waiting for the disk between two measurements."""
    monkeypatch.setattr(measure, "PAUSE", 0.0)
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(run_module, "LEAST_SECONDS", 0.1)
    monkeypatch.setattr(training_loss, "INTERVAL", 0.2)


@pytest.fixture
def work() -> Workload:
    return Workload("tiny")


# ---------------------------------------------------------------------------------- what is saved


def test_the_state_is_that_of_gpt2_small_with_adamw() -> None:
    """124,046,592 parameters and 592 tensors: what the bars were set for."""
    with torch.device("meta"):
        parameters = list(Model(SHAPES["124m"]).parameters())
    count = sum(parameter.numel() for parameter in parameters)
    assert count == 124_046_592
    assert len(parameters) * 4 == 592  # each with two averages and a counter of steps
    assert 4 * (3 * count + len(parameters)) == 1_488_559_696


LIGHT = [name for name in PEERS if name not in HEAVY]


@pytest.mark.parametrize(
    "names", [pytest.param(LIGHT, id="light"),
              *(pytest.param([name], marks=pytest.mark.slow, id=name) for name in HEAVY)],
)  # fmt: skip
def test_what_a_peer_saves_comes_back_equal(names: list[str], tmp_path: Path) -> None:
    here = [name for name in names if not PEERS[name].missing()]
    if not here:
        pytest.skip(f"not installed: {names}")
    done = subprocess.run(
        [sys.executable, "-c", _ROUND_TRIP, str(tmp_path), *here],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    times = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(times) == len(here)
    for stall, durable in times:
        assert 0 < stall <= durable


# Each in a fork of a process that has imported what all of them need: some change theirs for good.
_ROUND_TRIP = """
import json, os, sys, torch
from pathlib import Path
from benchmarks.engine.frameworks import PEERS
from benchmarks.engine.workload import Workload

def round_trip(name):
    work = Workload("tiny")
    peer = PEERS[name](work, Path(sys.argv[1], name, "saves"))
    for number in (1, 2):
        peer.prepare()
        before = {name: tensor.clone() for name, tensor in work.tensors().items()}
        timing = peer.save(number)
        peer.settle()
        loaded = peer.load(number)
        for name, tensor in before.items():
            assert torch.equal(loaded[name], tensor), name
        peer.remove(number)
        work.step()
    peer.close()
    print(json.dumps([timing.stall, timing.durable]), flush=True)

if __name__ == "__main__":
    import torch._dynamo  # by the first step of any optimizer
    for name in sys.argv[2:]:
        if len(sys.argv) == 3:
            round_trip(name)
        elif os.fork() == 0:
            round_trip(name)
            sys.exit()
        elif os.wait()[1]:
            sys.exit(f"{name} failed")
"""


# ------------------------------------------------------------------------ what the times stand for


def test_time_in_an_optimizers_hooks_counts_as_stall(work: Workload, tmp_path: Path) -> None:
    peer = OursOverlapped(work, tmp_path / "run")
    slow = work.optimizer.register_step_pre_hook(lambda *_arguments: time.sleep(0.2))
    try:
        assert peer.save(1).stall > 0.2
        slow.remove()
        assert peer.save(2).stall < 0.2
    finally:
        slow.remove()
        peer.close()


def test_the_observer_waits_for_the_name_and_ignores_everything_else(tmp_path: Path) -> None:
    (tmp_path / "old.pt").write_bytes(b"old")
    watcher = Watcher(tmp_path)
    try:
        for number in (1, 2):
            watcher.arm()
            (tmp_path / f".{number}.tmp").write_bytes(b"new")
            time.sleep(0.1)
            renamed = time.monotonic()
            (tmp_path / f".{number}.tmp").rename(tmp_path / f"{number}.pt")
            assert renamed < watcher.seen() <= time.monotonic()
    finally:
        watcher.close()


class _Forgetful(Peer):
    """Writes and does not sync."""

    name = "forgetful"

    def begin(self, target: Path) -> Any:
        target.mkdir()
        (target / "data").write_bytes(b"x")
        return lambda: None

    def load(self, target: Path) -> None:
        raise AssertionError("nothing here reads it back")


def test_files_and_directories_of_a_peer_that_does_not_sync_are_synced_in_its_time(
    work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())), fsync(fd)),
    )
    _Forgetful(work, tmp_path / "p").save(1)
    place = tmp_path.resolve() / "p"
    assert synced == [str(place / "save_1" / "data"), str(place / "save_1"), str(place)]


@pytest.mark.parametrize("direct", [True, False])
def test_the_limit_of_the_disk_writes_and_reads_the_state(
    work: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    real = os.open

    def without_direct_io(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O")
        return real(path, flags, mode)

    if not direct:
        monkeypatch.setattr(os, "open", without_direct_io)
    memory = Memory(work)
    disk = Disk(tmp_path, memory.buffer)
    assert disk.write() > 0
    assert disk.path.read_bytes() == memory.buffer[:]
    memory.buffer[: len(memory.buffer)] = bytes(len(memory.buffer))
    assert disk.read() > 0
    assert disk.path.read_bytes() == memory.buffer[:]
    assert direct or not disk.direct
    disk.close()
    memory.close()
    assert list(tmp_path.iterdir()) == []


def test_the_limit_of_memory_copies_every_tensor(work: Workload) -> None:
    memory = Memory(work)
    work.step()
    assert memory.copy() > 0
    assert all(torch.equal(a, b) for a, b in zip(memory.views, memory.sources, strict=True))
    memory.close()


# -------------------------------------------------------------------------- what is concluded


def test_an_interval_takes_the_ranks_of_the_binomial_distribution() -> None:
    """n = 15: the 4th smallest and the 4th largest, 96.5 % (a table of the sign test)."""
    values = [float(i) for i in range(1, 16)]
    random.Random(1).shuffle(values)
    assert interval(values) == (4.0, 12.0)
    assert interval(values[:5]) == (None, None)
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (1.0, 6.0)


def test_a_ratio_is_formed_from_the_rounds_that_have_both() -> None:
    rounds = [
        {"a": {"s": 2.0}, "b": {"s": 1.0}},
        {"a": {"s": 100.0}},
        {"a": {"s": 6.0}, "b": {"s": 2.0}, "c": {"other": 1.0}},
    ]
    series = Series(rounds)
    assert series.ratio(("a", "s"), ("b", "s")) == Ratio(4.0 / 1.5, None, None)
    assert series.ratio(("a", "s"), ("c", "s")) is None


def test_rounds_are_shuffled_by_the_seed_and_a_failure_stops_no_other() -> None:
    def order(seed: int) -> tuple[list[str], Series]:
        calls: list[str] = []

        def measure(name: str) -> Any:
            def act(number: int) -> dict[str, float]:
                calls.append(name)
                if name == "c" and number == 2:
                    raise RuntimeError("no room\nmore")
                return {"s": 1.0}

            return act

        series = Series()
        contenders = {name: measure(name) for name in "abc"}
        interleave(contenders, range(1, 4), random.Random(seed), series, Progress())
        return calls, series

    calls, series = order(7)
    assert calls == order(7)[0]
    assert len(series.values("a", "s")) == len(series.values("b", "s")) == 3
    assert len(series.values("c", "s")) == 1
    assert series.failed == {"c": "failed: no room"}
    assert any(order(seed)[0] != calls for seed in range(5))


def test_training_lost_is_what_the_steps_would_not_have_taken() -> None:
    without, saving = {"elapsed": 10.0, "steps": 10.0}, {"elapsed": 13.5, "steps": 12.0}
    series = Series([{training_loss.WITHOUT: without, "x": saving}])
    assert training_loss.lost(series).values("x", "lost") == [1.5]


class _Slow(TorchSave):
    """Leaves the training thread alone and takes half a second."""

    name = "slow"

    def begin(self, target: Path) -> Any:
        target.touch()
        return lambda: time.sleep(0.5)


def test_a_block_of_training_ends_when_the_save_is_done(work: Workload, tmp_path: Path) -> None:
    alone = training_loss.block(work, None, 2)(1)
    assert alone["steps"] == 2
    found = training_loss.block(work, _Slow(work, tmp_path / "s"), 2)(1)
    assert found["elapsed"] >= 0.5
    assert list((tmp_path / "s").iterdir()) == []


# ------------------------------------------------------------------------------- the whole of it


def test_a_run_fills_every_table_and_leaves_nothing_behind(tmp_path: Path) -> None:
    names = (Ours.name, OursOverlapped.name, TorchSave.name, Dcp.name)
    parts = ("save", "load", "training", "regular")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    made = Report(Options(("tiny",), 1, parts, names), machine(scratch))
    run(made, scratch, Progress())
    assert made.complete
    assert list(scratch.iterdir()) == []
    result = made.results[0]
    assert all(not series.failed for series in result.series.values())
    assert set(result.part("save").rounds[0]) >= {DISK, *names}
    text = "\n".join(report.lines(made))
    for title in ("Saving", "Loading", "Training lost", "every 30 s"):
        assert title in text
    report.write(made, tmp_path / "out")
    written = {path.suffix: path for path in (tmp_path / "out").iterdir()}
    assert written.keys() == {".json", ".txt", ".png"}
    found = json.loads(written[".json"].read_text())
    assert found["results"][0]["series"]["save"]["rounds"][0][Ours.name]["durable"] > 0
    assert str(tmp_path) not in written[".json"].read_text()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    options = "--size 10m --rounds 500 --parts save --only holdfast torch.save"
    process = subprocess.Popen(
        [*PROGRAM, *options.split(), "--dir", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    process.kill()
    process.wait()


def test_ctrl_c_prints_what_there_is_and_leaves_no_files(
    running: subprocess.Popen[str], tmp_path: Path
) -> None:
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".holdfast-bench-*/10m/limit/limit.bin")):
        assert running.poll() is None and time.monotonic() < deadline, running.stderr
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)
    out, problems = running.communicate(timeout=60)
    assert running.returncode == 130, problems
    assert "interrupted" in out
    assert "Traceback" not in problems
    assert list(tmp_path.iterdir()) == []
