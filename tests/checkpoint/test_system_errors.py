"""An error of the system says nothing about a file: it is tried again, then told, and the file
stays a candidate. Only bytes that were read and are wrong condemn one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint import Catalog, load
from holdfast.checkpoint.format import reading
from holdfast.checkpoint.rundir import shared_memory
from holdfast.errors import CheckpointError
from holdfast.manage import verify
from tests.support import Told, Toy, craft, damage, die, events, in_child, make_run, said, tree_of

ERRORS = (errno.EIO, errno.EMFILE, errno.ENOMEM, errno.EINTR, errno.EACCES, errno.ESTALE)
LONG = 10**6


class Trouble:
    """Lets the system fail `times` times when one of these files is opened or read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times, self.number, self.call = 0, errno.EIO, "open"
        self._wanted: set[tuple[int, int]] = set()
        self._named = ""
        for call in ("open", "preadv"):
            monkeypatch.setattr(os, call, self._failing(call, getattr(os, call)))

    def meet(self, path: Path, times: int = LONG, *, number: int = errno.EIO,
             call: str = "open") -> None:  # fmt: skip
        """`path` under all of its names."""
        found = path.stat()
        self._wanted = {(found.st_dev, found.st_ino)}
        self.times, self.number, self.call = times, number, call

    def meet_named(self, name: str, times: int = LONG, *, number: int = errno.EIO,
                   call: str = "open") -> None:  # fmt: skip
        """What will be opened for reading as `name`."""
        self._named, self.times, self.number, self.call = name, times, number, call

    def _failing(self, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def fail(what: Any, *args: Any, **kwargs: Any) -> Any:
            if self.times and call == self.call and self._is_wanted(what, args):
                self.times -= 1
                raise OSError(self.number, os.strerror(self.number))
            return real(what, *args, **kwargs)

        return fail

    def _is_wanted(self, what: Any, args: tuple[Any, ...]) -> bool:
        reads = not isinstance(what, int)
        if reads and args and args[0] & (os.O_WRONLY | os.O_RDWR | os.O_DIRECTORY):
            return False
        path = Path(f"/proc/self/fd/{what}").readlink() if isinstance(what, int) else Path(what)
        if self._named and path.name == self._named:
            return True
        try:
            found = path.stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) in self._wanted


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch) -> Trouble:
    monkeypatch.setattr(reading, "PAUSES", (0.001, 0.001, 0.001))
    return Trouble(monkeypatch)


def start(directory: Path, source: Any = None) -> tuple[Toy, Any, Told]:
    toy, told = Toy(seed=5), Told()
    with toy.manager(directory, on_event=lambda *event: told.append(event)) as manager:
        result = manager.resume(source)
    return toy, result, told


def set_aside(directory: Path) -> set[str]:
    return tree_of(directory / "quarantine") | tree_of(directory / "archive")


# ------------------------------------------------------------------------------------ after a save


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_one_error_of_a_read_back_is_not_even_told(
    tmp_path: Path, trouble: Trouble, number: int, call: str
) -> None:
    toy, told = make_run(tmp_path, 2), Told()
    trouble.meet_named("checkpoint_step_3.pt", 1, number=number, call=call)
    with toy.manager(tmp_path, on_event=lambda *event: told.append(event)) as manager:
        manager.resume()
        saved = manager.save(step=3, strict=True)
        assert saved is not None
        assert manager.list()[0].verified
    assert trouble.times == 0
    assert not {"unverified", "failed", "quarantined"} & set(said(told))


@pytest.mark.parametrize("number", ERRORS)
def test_what_cannot_be_read_back_stays_and_nothing_older_goes(
    tmp_path: Path, trouble: Trouble, number: int
) -> None:
    toy, told = Toy(), Told()
    with toy.manager(tmp_path, keep_last=1, on_event=lambda *e: told.append(e)) as manager:
        for step in (1, 2, 3):
            if step == 3:
                trouble.meet_named("checkpoint_step_3.pt", number=number)
            toy.step()
            assert manager.save(step=step, strict=True) is not None
        newest = manager.list()[0] if trouble.times == 0 else None
        assert newest is None, "it is still failing"
        trouble.times = 0
        entries = manager.list()
        assert [(entry.step, entry.verified) for entry in entries] == [
            (3, False), (2, True), (1, True),
        ]  # fmt: skip
        assert said(told).count("unverified") == 1
        assert (tmp_path / "latest.pt").samefile(manager.catalog.path(entries[0]))
        toy.step()
        manager.save(step=4, strict=True)
        found = [(entry.step, entry.verified) for entry in manager.list()]
        assert found == [(4, True), (3, True)], "what was owed is made up for"
    assert set_aside(tmp_path) == set()


def test_of_what_is_owed_only_the_damaged_copy_is_set_aside(
    tmp_path: Path, trouble: Trouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without links the best one lies here twice."""
    monkeypatch.setenv("HOLDFAST_DISABLE", "hardlinks,reflink")
    toy = Toy()
    with toy.manager(tmp_path) as manager:
        for step in (1, 2, 3):
            if step == 2:
                trouble.meet_named("checkpoint_step_2.pt")
            toy.step()
            manager.save(step=step, metrics={"val_loss": abs(step - 2.0)}, strict=True)
            if step == 2:
                trouble.times = 0
                damage(tmp_path / "checkpoint_step_2.pt")
        assert [(e.step, e.verified) for e in manager.list()] == [(3, True), (2, True), (1, True)]
        assert load(tmp_path / "best_model.pt", only="global_step") == 2


def test_memory_is_not_given_back_for_what_was_not_verified(
    tmp_path: Path, trouble: Trouble
) -> None:
    toy = Toy()
    with toy.manager(tmp_path) as manager:
        toy.step()
        manager.save(step=1, strict=True)
        trouble.meet_named("checkpoint_step_2.pt")
        toy.step()
        pending = manager.save_async(step=2, kind="step")
        manager.wait()
        saved = pending.settled.result()
        assert saved is not None
        assert not saved.entry.verified


# ------------------------------------------------------------------------------------------ a start


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("call", ["open", "preadv"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_start_tries_again(
    tmp_path: Path, trouble: Trouble, number: int, call: str, times: int
) -> None:
    make_run(tmp_path, 3)
    trouble.meet(tmp_path / "latest.pt", times, number=number, call=call)
    toy, result, _told = start(tmp_path)
    assert (toy.now, result.generation, result.skipped) == (3, 1, [])
    assert set_aside(tmp_path) == set()


@pytest.mark.parametrize("number", ERRORS)
def test_a_start_reads_the_history_again(tmp_path: Path, trouble: Trouble, number: int) -> None:
    make_run(tmp_path, 3)
    trouble.meet(tmp_path / "events.jsonl", 3, number=number)
    toy, result, _told = start(tmp_path)
    assert trouble.times == 0
    assert (toy.now, result.generation, result.skipped) == (3, 1, [])


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_the_newest_that_cannot_be_read_is_not_passed_over(
    tmp_path: Path, trouble: Trouble, number: int, call: str
) -> None:
    make_run(tmp_path, 3)
    before = tree_of(tmp_path)
    trouble.meet(tmp_path / "latest.pt", number=number, call=call)
    with pytest.raises(CheckpointError, match="cannot be read now"):
        start(tmp_path)
    assert tree_of(tmp_path) - {".catalog.lock"} == before - {".catalog.lock"}
    trouble.times = 0
    assert start(tmp_path)[0].now == 3, "it has lost nothing"


def test_another_one_may_be_named_and_the_unread_one_does_not_come_back(
    tmp_path: Path, trouble: Trouble
) -> None:
    make_run(tmp_path, 3)
    trouble.meet(tmp_path / "latest.pt")
    toy = Toy(seed=5)
    with toy.manager(tmp_path, keep_last=1) as manager:
        result = manager.resume(tmp_path / "checkpoint_step_2.pt")
        assert result is not None
        assert (toy.now, result.generation) == (2, 2)
        for step in (3, 4, 5):
            toy.step()
            manager.save(step=step, strict=True)
    trouble.times = 0
    everything = {entry.step: entry.generation for entry in Catalog(tmp_path).scan().entries}
    assert everything[5] == 2
    assert 1 in {entry.generation for entry in Catalog(tmp_path).scan().entries}, "it is there"
    assert start(tmp_path)[0].now == 5


def test_an_older_one_that_cannot_be_read_is_told_and_stays(
    tmp_path: Path, trouble: Trouble
) -> None:
    make_run(tmp_path, 3)
    trouble.meet(tmp_path / "checkpoint_step_1.pt")
    toy, result, told = start(tmp_path)
    assert (toy.now, result.generation) == (3, 1)
    (fields,) = [fields for event, fields in told if event == "unread"]
    assert fields["name"] == "checkpoint_step_1.pt"
    assert (tmp_path / "checkpoint_step_1.pt").exists()
    (tmp_path / "events.jsonl").unlink()  # now nothing says how old it is
    with pytest.raises(CheckpointError, match=r"checkpoint_step_1\.pt cannot be read now"):
        start(tmp_path)


def test_behind_a_damaged_newest_one_that_cannot_be_read_is_not_passed_over(
    tmp_path: Path, trouble: Trouble
) -> None:
    make_run(tmp_path, 3)
    damage(tmp_path / "latest.pt")
    trouble.meet(tmp_path / "checkpoint_step_2.pt")
    for _again in range(2):
        with pytest.raises(CheckpointError, match=r"checkpoint_step_2\.pt cannot be read now"):
            start(tmp_path)
    trouble.times = 0
    assert start(tmp_path)[0].now == 2


def test_one_that_cannot_be_read_is_no_damage_where_all_others_are_damaged(
    tmp_path: Path, trouble: Trouble
) -> None:
    make_run(tmp_path, 2)
    damage(tmp_path / "latest.pt")
    trouble.meet(tmp_path / "checkpoint_step_1.pt")
    with pytest.raises(CheckpointError, match="cannot be read now"):
        start(tmp_path)
    trouble.times = 0
    assert start(tmp_path)[0].now == 1


def test_nothing_is_started_over_where_all_cannot_be_read(tmp_path: Path, trouble: Trouble) -> None:
    make_run(tmp_path, 1)
    trouble.meet(tmp_path / "latest.pt")
    with pytest.raises(CheckpointError, match="cannot be read now"):
        start(tmp_path)


def test_an_intact_copy_makes_up_for_one_that_cannot_be_read(
    tmp_path: Path, trouble: Trouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_DISABLE", "hardlinks,reflink")
    make_run(tmp_path, 2)
    trouble.meet(tmp_path / "checkpoint_step_2.pt", call="preadv")
    toy, result, _told = start(tmp_path)
    assert (toy.now, result.generation) == (2, 1)


def test_a_newest_elsewhere_that_cannot_be_read_is_not_passed_over(
    tmp_path: Path, trouble: Trouble
) -> None:
    make_run(tmp_path / "a", 3)
    trouble.meet(tmp_path / "a" / "latest.pt")
    for source in (tmp_path / "a", tmp_path / "a" / "checkpoint_step_*.pt"):
        with pytest.raises(CheckpointError, match="cannot be read now"):
            start(tmp_path / "b", source)


def test_a_name_that_moves_is_not_the_last_name_of_what_cannot_be_read(
    tmp_path: Path, trouble: Trouble
) -> None:
    toy = make_run(tmp_path, 2)
    (tmp_path / "checkpoint_step_2.pt").unlink()  # only latest.pt and model.pt are left of it
    trouble.meet(tmp_path / "latest.pt")
    with toy.manager(tmp_path) as manager:
        manager.resume(tmp_path / "checkpoint_step_1.pt")
        toy.step()
        manager.save(step=9, strict=True)
    trouble.times = 0
    steps = {entry.step for entry in Catalog(tmp_path).scan().entries}
    assert 2 in steps
    assert load_step(tmp_path / "latest.pt") == 9


def load_step(path: Path) -> int:
    return next(e.step for e in Catalog(path.parent).scan().entries if path.name in e.names)


# ----------------------------------------------------------------------------------------- the desk


def test_verify_does_not_call_it_damaged_and_retention_is_not_told(
    tmp_path: Path, trouble: Trouble
) -> None:
    make_run(tmp_path, 2)
    trouble.meet(tmp_path / "latest.pt", call="preadv")
    verdicts = list(verify.verify(verify.targets_of([tmp_path])))
    assert {verdict.state for verdict in verdicts} == {verify.UNREADABLE, verify.INTACT}
    assert "damaged" not in {event["event"] for event in events(tmp_path)}


def test_what_was_found_damaged_does_not_count_as_verified_any_more(tmp_path: Path) -> None:
    make_run(tmp_path, 3)
    copy = tmp_path.with_name("copy")
    shutil.copytree(tmp_path, copy)
    damage(tmp_path / "checkpoint_step_2.pt")
    list(verify.verify(verify.targets_of([tmp_path])))
    marks = {entry.step: entry.verified for entry in Catalog(tmp_path).scan().entries}
    assert marks == {1: True, 2: False, 3: True}


def test_a_checkpoint_of_a_later_version_keeps_its_place(tmp_path: Path) -> None:
    """It is intact for all we know: as good as one that cannot be read."""
    toy = make_run(tmp_path, 1)
    (tmp_path / "latest.pt").unlink()
    craft(tmp_path / "latest.pt", '{"format_version":99}')
    with toy.manager(tmp_path) as manager:
        manager.resume(tmp_path / "checkpoint_step_1.pt")
        toy.step()
        manager.save(step=2, strict=True)
    assert [name for name, _why in Catalog(tmp_path).scan().unreadable] == ["unread_latest.pt"]


@pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")
def test_memory_is_not_given_back_for_a_rescue_that_could_not_be_read_back(
    tmp_path: Path, trouble: Trouble
) -> None:
    def run() -> None:
        toy = Toy()
        manager = toy.manager(tmp_path, memory_every=1)
        manager.resume()
        toy.step()
        manager.after_step(1)
        manager.wait()
        die()

    def left() -> list[shared_memory.Remains]:
        return [each for each in shared_memory.remains() if each.belongs_to(tmp_path)]

    in_child(run)
    trouble.meet_named("temp_step1.pt", call="preadv")
    with pytest.raises(CheckpointError, match="cannot be read now"):
        start(tmp_path)
    assert left()
    trouble.times = 0
    toy, resumed, _told = start(tmp_path)
    assert (resumed.step, toy.now) == (1, 1)
    assert not left()
    assert Catalog(tmp_path).scan().entries[0].verified
