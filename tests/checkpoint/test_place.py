"""A run directory that is deleted, renamed, replaced or another user's: every save fails and says
so, and there is never a second training in it."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast.checkpoint import Catalog
from holdfast.checkpoint.manager import CheckpointManager, run_lock
from holdfast.checkpoint.policy import alarm
from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.rundir.place import check_rights
from holdfast.checkpoint.save import saver
from holdfast.errors import ResourceError, RunLocked, SaveFailed
from tests.checkpoint.test_lock import Holder
from tests.support import Told, Toy, events, in_child, listener, make_run, said, tree_of

NOBODY = 65534


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(alarm, "RETRY", 0.0)


def refused(directory: Path) -> None:
    with pytest.raises(RunLocked), run_lock(directory):
        pass


def failures(told: Told) -> list[str]:
    return [fields["reason"] for event, fields in told if event == "failed"]


# --------------------------------------------------------------------------- gone while training


def test_a_deleted_directory_fails_the_save_loudly_and_is_not_made_anew(tmp_path: Path) -> None:
    run, toy = tmp_path / "run", Toy()
    told, tell = listener()
    with toy.manager(run, on_event=tell) as manager:
        manager.resume()
        toy.step()
        manager.save(step=1, strict=True)
        shutil.rmtree(run)
        toy.step()
        for _look_then_save in range(2):
            manager.after_step(2)
            manager.wait()
        (reason,) = failures(told)
        assert f"{run} was deleted or replaced" in reason
        assert manager.failing, "not only when the next save is due"
        assert manager.saved_step == 0, "what was announced is gone"
        with pytest.raises(SaveFailed, match="was deleted or replaced"):
            manager.save(step=2, strict=True)
    assert not run.exists()


def test_between_two_steps_a_save_notices_by_itself(tmp_path: Path) -> None:
    run, toy = tmp_path / "run", Toy()
    with toy.manager(run) as manager:
        manager.save(step=1, strict=True)
        shutil.rmtree(run)
        with pytest.raises(SaveFailed, match="was deleted or replaced"):
            manager.save(step=2, strict=True)


def test_a_directory_that_comes_back_with_the_same_inode_is_another_one(fast_path: Path) -> None:
    """File systems give the number of a deleted inode to the next one."""
    run, toy = fast_path / "run", Toy()
    with toy.manager(run) as manager:
        manager.save(step=1, strict=True)
        shutil.rmtree(run)
        run.mkdir()
        (run / ".run.lock").touch()
        assert manager.save(step=2) is None
        assert tree_of(run) == {".run.lock"}


def test_a_renamed_directory_keeps_all_it_has_and_is_saved_to_again_when_it_is_back(
    tmp_path: Path,
) -> None:
    run, away, toy = tmp_path / "run", tmp_path / "elsewhere", Toy()
    told, tell = listener()
    with toy.manager(run, on_event=tell) as manager:
        manager.save(step=1, strict=True)
        run.rename(away)
        before = tree_of(away)
        assert manager.save(step=2) is None
        (reason,) = failures(told)
        named = f"was renamed to {away}" if Path("/proc/self/fd").exists() else "was deleted"
        assert named in reason
        assert tree_of(away) == before
        assert not run.exists()
        away.rename(run)
        manager.save(step=3, strict=True)
        assert [entry.step for entry in manager.list()] == [3, 1]
    assert said(told).count("recovered") == 1


@pytest.mark.skipif(not shared_memory.usable(), reason="no shared memory here")
def test_what_was_announced_moves_with_a_renamed_directory_also_from_memory(tmp_path: Path) -> None:
    run, away = tmp_path / "run", tmp_path / "elsewhere"

    def killed() -> None:
        toy = Toy()
        manager = toy.manager(run, memory_every=1)
        manager.resume()
        toy.step()
        manager.save(step=1, strict=True)
        run.rename(away)
        for step in (2, 3):
            toy.step()
            manager.after_step(step)
            manager.wait()
        assert manager.memory_step == 3
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    with Toy(seed=5).manager(away) as manager:
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 3


def test_another_process_that_was_faster_keeps_the_directory(tmp_path: Path) -> None:
    run, toy = tmp_path / "run", Toy()
    told, tell = listener()
    with toy.manager(run, on_event=tell) as manager:
        manager.resume()
        manager.save(step=1, strict=True)
        (run / ".run.lock").unlink()
        holder = Holder(run / ".run.lock")
        before = tree_of(run)
        with pytest.raises(SaveFailed, match=f"process {holder.pid}"):
            manager.save(step=2, strict=True)
        manager.after_step(3)
        manager.wait()
        assert tree_of(run) == before, "nothing was written over it"
        assert said(told).count("failed") == 1
        holder.leave()
        manager.after_step(4)
        manager.wait()
        assert manager.saved_step == 4
    assert "recovered" in said(told)


def test_another_run_in_its_place_is_not_written_to(tmp_path: Path) -> None:
    run, toy = tmp_path / "run", Toy()
    make_run(tmp_path / "other", 3)
    before = {
        path: (tmp_path / "other" / path).read_bytes() for path in tree_of(tmp_path / "other")
    }
    with toy.manager(run) as manager:
        manager.save(step=1, strict=True)
        shutil.rmtree(run)
        (tmp_path / "other").rename(run)
        assert manager.save(step=2) is None
        manager.after_step(3)
    assert {path: (run / path).read_bytes() for path in tree_of(run)} == before


def test_a_directory_that_could_not_be_reached_for_a_while_has_its_history_again(
    tmp_path: Path,
) -> None:
    """Without it nothing would count as verified, and no old checkpoint would go any more."""
    run, away, toy = tmp_path / "disk" / "run", tmp_path / "away", Toy()
    with toy.manager(run, keep_last=2) as manager:
        manager.resume()
        for step in range(1, 6):
            if step == 2:
                run.parent.rename(away)
                run.parent.write_text("nothing can be made here")
            toy.step()
            assert (manager.save(step=step) is None) == (step == 2)
            if step == 2:
                run.parent.unlink()
                away.rename(run.parent)
        assert [(entry.step, entry.verified) for entry in manager.list()] == [(5, True), (4, True)]
    durable = [event["step"] for event in events(run) if event["event"] == "durable"]
    assert durable == [1, 3, 4, 5]


def test_a_removed_lock_file_is_made_again_and_nothing_else_happens(tmp_path: Path) -> None:
    run, toy = tmp_path / "run", Toy()
    told, tell = listener()
    with toy.manager(run, on_event=tell) as manager:
        manager.save(step=1, strict=True)
        (run / ".run.lock").unlink()
        manager.after_step(2)
        manager.wait()
        assert said(told)[-1] == "lock_renewed"
        assert in_child(lambda: refused(run)) == 0
        assert not manager.failing
        assert [entry.step for entry in manager.list()] == [1]


# -------------------------------------------------------------------------------- a changed user


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that every user can reach."""
    if os.name == "nt" or os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        yield Path(place)


def as_nobody(function: Callable[[], None]) -> int:
    def child() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        function()

    return in_child(child)


def refuses(directory: Path, name: str) -> Callable[[], None]:
    """A training in `directory` is refused, with `name` in the words, before it begins."""

    def check() -> None:
        with pytest.raises(ResourceError, match="belongs to root") as error:
            CheckpointManager(directory, {})
        assert str(directory / name) in str(error.value)
        assert f"chown -R {check_user()} {directory}" in str(error.value)

    return check


def check_user() -> str:
    import pwd

    return pwd.getpwuid(NOBODY).pw_name


def test_a_directory_of_another_user_is_refused(open_place: Path) -> None:
    run = open_place / "run"
    make_run(run, 1)
    before = tree_of(run)
    assert as_nobody(refuses(run, "")) == 0
    assert tree_of(run) == before


@pytest.mark.parametrize("name", [".run.lock", ".catalog.lock", "events.jsonl"])
def test_a_file_of_another_user_that_must_be_written(open_place: Path, name: str) -> None:
    run = open_place / "run"
    make_run(run, 1)
    for path in [run, *run.rglob("*")]:
        if path.name != name:
            os.chown(path, NOBODY, NOBODY)
    assert as_nobody(refuses(run, name)) == 0


def test_a_sticky_directory_lets_nobody_replace_what_is_anothers(open_place: Path) -> None:
    run = open_place / "run"
    make_run(run, 1)
    run.chmod(0o1777)
    for name in (".run.lock", ".catalog.lock", "events.jsonl"):
        (run / name).chmod(0o666)
    assert as_nobody(refuses(run, "latest.pt")) == 0
    run.chmod(0o777)
    assert as_nobody(lambda: check_rights(run)) == 0, "in an open one they can be replaced"


def test_read_only_checkpoints_of_another_user_are_gone_on_from(open_place: Path) -> None:
    """Root ran it first, and gave the directory away without its checkpoints."""
    run = open_place / "run"
    make_run(run, 2, keep_last=1)
    for path in [run, *(p for p in run.rglob("*") if p.suffix != ".pt")]:
        os.chown(path, NOBODY, NOBODY)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in run.glob("*.pt")}
    assert modes == {0o444}

    def child() -> None:
        toy = Toy(seed=5)
        with toy.manager(run, keep_last=1) as manager:
            resumed = manager.resume()
            assert resumed is not None
            assert resumed.step == 2
            for step in (3, 4):
                toy.step()
                assert manager.save(step=step) is not None

    assert as_nobody(child) == 0
    assert [entry.step for entry in Catalog(run).scan().entries] == [4, 3]


def test_a_directory_of_ones_own_that_allows_nothing(open_place: Path) -> None:
    run = open_place / "run"
    run.mkdir(mode=0o555)
    os.chown(run, NOBODY, NOBODY)

    def check() -> None:
        with pytest.raises(PermissionError) as error:
            check_rights(run)
        assert error.value.filename == str(run)

    assert as_nobody(check) == 0


def test_a_file_system_that_became_read_only_is_refused_at_once(
    small_disk: Callable[..., Path],
) -> None:
    disk = small_disk(100 << 20)
    make_run(disk / "run", 1)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(OSError, match="Read-only") as error:
        Toy().manager(disk / "run")
    assert error.value.filename == str(disk / "run")


def test_nothing_there_is_nobodys(tmp_path: Path) -> None:
    check_rights(tmp_path / "new")  # raises where it may not be used
    assert not (tmp_path / "new").exists(), "a look makes nothing"
