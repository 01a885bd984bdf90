"""What `holdfast doctor` says of a run directory: who works there, damage, remains."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.system.lock import FileLock
from holdfast.errors import HoldfastError
from holdfast.formatting import format_bytes
from holdfast.manage.doctor import examine as doctor
from holdfast.manage.doctor.findings import BAD, OK, WARN, Finding
from holdfast.manage.rundir import look
from tests import support
from tests.manage.runs import make_run
from tests.support import Toy, in_child


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def about(directory: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.run_checks(look(directory))}


def test_a_healthy_run(run: Path) -> None:
    found = about(run)
    assert {name: f.state for name, f in found.items()} == {
        "lock": OK, "checkpoints": OK,
    }  # fmt: skip
    assert "none is damaged at first sight; the newest is step 400" in found["checkpoints"].found
    assert found["lock"].found == "nobody works in it"


def test_what_the_run_needs_is_known_to_every_check(run: Path) -> None:
    needed = format_bytes(look(run).entries[0].size)
    found = {finding.name: finding for finding in doctor.examine(run)}
    assert f"a checkpoint of this run has {needed}" in found["free_space"].found
    for name in ("free_space", "memory", "shared_memory", "write_speed"):
        assert "of this run" in found[name].found, name


def test_an_empty_directory_is_no_run(tmp_path: Path) -> None:
    assert {f.name: f.state for f in doctor.run_checks(look(tmp_path))} == {
        "lock": OK, "checkpoints": OK,
    }  # fmt: skip


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(HoldfastError, match="is not a directory"):
        list(doctor.examine(tmp_path / "file"))


# -------------------------------------------------------------------------------------- the lock


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs another process")
def test_who_works_there_is_named_and_not_disturbed(run: Path) -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        lock = FileLock(run / ".run.lock")
        lock.acquire()
        os.write(writing, b"x")
        signal.pause()
    try:
        os.read(reading, 1)
        before = (run / ".run.lock").read_bytes()
        found = doctor.lock(run)
        assert found.state == OK and f"process {pid} on " in found.found
        assert (run / ".run.lock").read_bytes() == before
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)
    assert doctor.lock(run).found == "nobody works in it"


def test_a_lock_of_this_process_is_not_lost_by_asking(run: Path) -> None:
    with FileLock(run / ".run.lock"):
        assert "this process" in doctor.lock(run).found

        def other() -> None:
            assert FileLock(run / ".run.lock").owner(), "it is still held"

        assert in_child(other) == 0


def test_asking_makes_no_lock_file(tmp_path: Path) -> None:
    assert FileLock(tmp_path / ".run.lock").owner() == ""
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- damage


def test_damage_is_named_with_what_to_do(run: Path) -> None:
    support.cut(run / "model_epoch_2.pt")
    found = about(run)["checkpoints"]
    assert found.state == WARN and "model_epoch_2.pt" in found.found
    assert "start the training" in found.advice


def test_damage_that_a_check_has_found_counts(run: Path) -> None:
    entry = look(run).entries[0]
    look(run).catalog.record("damaged", id=entry.id, step=entry.step)
    assert entry.names[0] in about(run)["checkpoints"].found


def test_nothing_intact_is_bad(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (4.0,))
    support.cut(run / "model_epoch_1.pt")
    assert about(run)["checkpoints"].state == BAD


def test_damage_of_earlier_days_is_remembered(run: Path) -> None:
    (run / "quarantine").mkdir(exist_ok=True)
    (run / "quarantine" / "model_epoch_1.pt").write_bytes(b"x")
    assert about(run)["quarantine"].state == WARN


# ------------------------------------------------------------------------------- memory


@pytest.mark.skipif(not shared_memory.usable(), reason="needs shared memory")
def test_a_step_that_is_only_in_memory_is_said(tmp_path: Path) -> None:
    """A killed training whose newest snapshot is not on the disk."""
    run = tmp_path / "run"

    def train() -> None:
        toy = Toy()
        manager = toy.manager(run, memory_every=1)
        manager.resume()
        toy.step()
        manager.save(step=1, strict=True)
        manager.prepare()
        manager.wait()
        toy.step()
        while manager.memory_step < 2:
            manager.after_step(2)
        support.die()

    try:
        assert in_child(train) == -signal.SIGKILL
        found = about(run)["remains"]
        assert found.state == WARN and "step 2 of a killed training" in found.found
    finally:
        for left in shared_memory.remains():
            if left.belongs_to(run):
                left.remove()
    assert "remains" not in about(run)
