"""`holdfast clean --memory`: what killed trainings have left goes; what only it has stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.checkpoint.rundir import shared_memory
from holdfast.cli.main import main
from holdfast.manage.cleaning import leftovers
from tests.checkpoint.test_memory import killed
from tests.support import Toy, damage

pytestmark = pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")


@pytest.fixture(autouse=True)
def only_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other tests, and other trainings, have their own in shared memory: hands off."""
    real = shared_memory.remains

    def mine() -> list[shared_memory.Remains]:
        found = [(remains, remains.run) for remains in real()]
        return [r for r, run in found if run is not None and tmp_path in [run, *run.parents]]

    monkeypatch.setattr(shared_memory, "remains", mine)
    yield
    for remains in mine():
        remains.remove()


def reasons() -> list[str]:
    return [row.reason for row in leftovers.plan().rows]


def test_what_only_the_memory_has_stays(tmp_path: Path) -> None:
    killed(tmp_path, 3)
    assert reasons() == ["unsaved"]
    assert not leftovers.execute(leftovers.plan()).going
    with Toy(seed=9).manager(tmp_path) as manager:
        resumed = manager.resume()
    assert resumed is not None
    assert resumed.step == 3


def test_what_is_on_the_disk_goes(tmp_path: Path) -> None:
    killed(tmp_path, 3)
    (remains,) = shared_memory.remains()
    copy = tmp_path / "copy"
    shutil.copytree(remains.directory, copy)
    with Toy(seed=9).manager(tmp_path) as manager:
        manager.resume()  # makes it durable, and removes it
    shutil.copytree(copy, remains.directory)
    assert reasons() == ["saved"]
    done = leftovers.execute(leftovers.plan())
    assert [row.step for row in done.going] == [3]
    assert done.freed > 0
    assert not remains.directory.exists()


def test_memory_does_not_go_for_a_file_that_is_damaged(tmp_path: Path) -> None:
    """Its manifest says that the step is on the disk; the memory has the only intact one."""
    killed(tmp_path, 3)
    (remains,) = shared_memory.remains()
    copy = tmp_path / "copy"
    shutil.copytree(remains.directory, copy)
    with Toy(seed=9).manager(tmp_path) as manager:
        manager.resume()
    shutil.copytree(copy, remains.directory)
    damage(tmp_path / "latest.pt")
    assert not leftovers.execute(leftovers.plan()).going
    with Toy(seed=9).manager(tmp_path) as manager:
        resumed = manager.resume()
    assert resumed is not None
    assert (resumed.step, resumed.steps_lost) == (3, 0)


def test_what_belongs_to_no_run_any_more_goes(tmp_path: Path) -> None:
    killed(tmp_path / "run", 3)
    shutil.rmtree(tmp_path / "run")
    assert reasons() == ["gone"]


def test_what_a_training_uses_stays(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, memory_every=1) as manager:
        manager.resume()
        toy.step()
        manager.after_step(1)
        manager.wait()
        assert reasons() == ["in_use"]
        assert not leftovers.execute(leftovers.plan()).going


def test_a_trap_of_somebody_else_is_no_remains(tmp_path: Path) -> None:
    """A link, or a name that is not ours, in a directory that everybody may write."""
    trap = shared_memory.PLACE / "holdfast-0-1-2-00000000-g1"
    trap.symlink_to(tmp_path)
    try:
        assert all(remains.directory != trap for remains in shared_memory.remains())
    finally:
        trap.unlink()


def test_the_command_shows_asks_and_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(tmp_path / "run", 3)
    assert main(["clean", "--memory", "--dry-run", "--lang", "en"]) == 0
    shown = capsys.readouterr().out
    assert str(tmp_path / "run") in shown
    assert "newer than what is on the disk" in shown
    shutil.rmtree(tmp_path / "run")
    assert main(["clean", "--memory", "--json", "--yes"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["done"], [row["reason"] for row in told["memory"]]) == (True, ["gone"])
    assert told["bytes_freed"] > 0
    assert main(["clean", "--memory", "--lang", "zh"]) == 0
    assert "共享内存" in capsys.readouterr().out
    assert main(["clean", "--memory", "--temp", "--lang", "en"]) == 2
