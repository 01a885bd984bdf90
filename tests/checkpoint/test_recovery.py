"""Which checkpoint a run goes on from, after whatever has happened to it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import load, verify
from holdfast.checkpoint import Catalog, Resumed
from holdfast.checkpoint.format import container
from holdfast.checkpoint.rundir import catalog, recovery
from holdfast.checkpoint.rundir.history import Known
from holdfast.checkpoint.system import filesystem
from holdfast.errors import (
    CheckpointError,
    DamagedCheckpoint,
    ForeignCheckpoint,
    HoldfastError,
    StateMismatch,
)
from tests.support import (
    Told,
    Toy,
    after,
    archived,
    assert_same,
    craft,
    cut,
    damage,
    events,
    identity,
    killed_at,
    make_run,
    snapshot,
    tree_of,
    write_state,
)


def resumed(directory: Path, source: Any = None, told: Told | None = None) -> tuple[Toy, Resumed]:
    """Resume into a fresh training."""
    toy = Toy(seed=5)
    tell = None if told is None else (lambda event, fields: told.append((event, fields)))
    with toy.manager(directory, on_event=tell) as manager:
        result = manager.resume(source)
    assert result is not None
    return toy, result


def is_at(toy: Toy, steps: int) -> None:
    """The training is where it was after `steps`, and goes on from there to the bit."""
    assert toy.now == steps
    toy.step()
    assert_same(snapshot(toy.state), snapshot(after(steps + 1).state))


# ------------------------------------------------------------------------------------------ intact


def test_the_newest_is_gone_on_from_whatever_modification_times_say(tmp_path: Path) -> None:
    make_run(tmp_path, 3)
    for age, name in enumerate(["checkpoint_step_3.pt", "checkpoint_step_1.pt"]):
        os.utime(tmp_path / name, (age, age))
    toy, result = resumed(tmp_path)
    assert (result.step, result.generation, result.steps_lost) == (3, 1, 0)
    assert result.skipped == []
    is_at(toy, 3)


def test_a_moved_directory_goes_on(tmp_path: Path) -> None:
    make_run(tmp_path / "here", 2)
    (tmp_path / "here").rename(tmp_path / "elsewhere 别处")
    toy, _result = resumed(tmp_path / "elsewhere 别处")
    is_at(toy, 2)


def test_a_directory_copied_without_links_goes_on_and_is_linked_again(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns(".*"))
    assert (tmp_path / "b" / "latest.pt").stat().st_nlink == 1
    toy, result = resumed(tmp_path / "b")
    assert result.generation == 1
    assert (tmp_path / "b" / "latest.pt").stat().st_nlink == 3
    is_at(toy, 2)


def test_a_single_file_copied_elsewhere_is_a_run(tmp_path: Path) -> None:
    """latest.pt alone: the next save takes that name, and the old state must not go with it."""
    make_run(tmp_path / "a", 2)
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "latest.pt", tmp_path / "b" / "latest.pt")
    toy = Toy(seed=5)
    with toy.manager(tmp_path / "b") as manager:
        manager.resume()
        toy.step()
        manager.save(step=3, strict=True)
        assert [entry.step for entry in manager.list()] == [3, 2]


@pytest.mark.parametrize("junk", [None, "", "{", '{"files": {"latest.pt": 7}}'])
def test_without_its_cache_it_goes_on_and_the_cache_is_rebuilt(
    tmp_path: Path, junk: str | None
) -> None:
    make_run(tmp_path, 2)
    cache = tmp_path / "metadata.json"
    cache.unlink()
    if junk is not None:
        cache.write_text(junk)
    toy, _result = resumed(tmp_path)
    assert set(json.loads(cache.read_text())["files"]) == {
        "checkpoint_step_1.pt", "checkpoint_step_2.pt", "latest.pt", "model.pt"
    }  # fmt: skip
    is_at(toy, 2)


@pytest.mark.parametrize("junk", [None, b"", b"garbage\n", b"\xff\xff", b'{"event": "durable"}\n'])
def test_without_its_history_it_goes_on(tmp_path: Path, junk: bytes | None) -> None:
    make_run(tmp_path, 2)
    (tmp_path / "events.jsonl").unlink()
    if junk is not None:
        (tmp_path / "events.jsonl").write_bytes(junk)
    toy, result = resumed(tmp_path)
    assert result.generation == 1
    is_at(toy, 2)


# ----------------------------------------------------------------------------------------- damaged


@pytest.mark.parametrize("harm", [damage, cut], ids=["a flipped bit", "truncated"])
def test_a_damaged_newest_is_set_aside_and_the_older_taken(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    make_run(tmp_path, 3, metric="x")
    harm(tmp_path / "checkpoint_step_3.pt")
    told: Told = []
    toy, result = resumed(tmp_path, told=told)
    assert (result.step, result.steps_lost, result.generation) == (2, 1, 2)
    assert result.minutes_lost >= 0
    (recorded,) = Catalog(tmp_path).events("resumed")
    assert (recorded["steps_lost"], recorded["minutes_lost"]) == (1, round(result.minutes_lost, 1))
    names = {"checkpoint_step_3.pt", "latest.pt", "model.pt"}
    assert {name for name, _why in result.skipped} == names
    assert tree_of(tmp_path / "quarantine") == {*names, "reasons.txt"}
    reasons = (tmp_path / "quarantine" / "reasons.txt").read_text()
    assert all(reason in reasons and "is damaged" not in reason for _name, reason in result.skipped)
    assert [event for event, _fields in told] == ["quarantined", "resumed"]
    assert set(told[0][1]["names"]) == names
    assert filesystem.same_data(tmp_path / "latest.pt", tmp_path / "checkpoint_step_2.pt")
    assert [e["event"] for e in events(tmp_path)][-2:] == ["quarantined", "resumed"]
    is_at(toy, 2)


def test_what_is_saved_after_going_back_is_newer_than_what_was_lost(tmp_path: Path) -> None:
    make_run(tmp_path, 9)
    for step in (5, 6, 7, 8, 9):
        damage(tmp_path / f"checkpoint_step_{step}.pt")
    toy = Toy(seed=5)
    with toy.manager(tmp_path, keep_last=0) as manager:
        result = manager.resume()
        assert result is not None
        assert (result.step, result.steps_lost, result.generation) == (4, 5, 2)
        toy.step()
        manager.save(step=5, strict=True)
    toy, result = resumed(tmp_path)
    assert (result.entry.generation, result.step, result.steps_lost) == (2, 5, 0)
    assert result.generation == 2
    is_at(toy, 5)


def test_what_was_lost_is_said_again_when_a_crash_came_before_the_next_save(
    tmp_path: Path,
) -> None:
    make_run(tmp_path, 3)
    damage(tmp_path / "checkpoint_step_3.pt")
    resumed(tmp_path)
    _toy, result = resumed(tmp_path)
    assert (result.step, result.steps_lost) == (2, 1)
    assert result.generation >= 2


def test_a_damaged_older_one_costs_nothing(tmp_path: Path) -> None:
    make_run(tmp_path, 3)
    cut(tmp_path / "checkpoint_step_1.pt")
    toy, result = resumed(tmp_path)
    assert (result.step, result.steps_lost) == (3, 0)
    assert [name for name, _why in result.skipped] == ["checkpoint_step_1.pt"]
    is_at(toy, 3)


def test_of_two_copies_the_intact_one_is_taken(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns(".*"))
    damage(tmp_path / "b" / "checkpoint_step_2.pt")
    toy, result = resumed(tmp_path / "b")
    assert (result.step, result.path.name, result.steps_lost) == (2, "latest.pt", 0)
    assert verify(tmp_path / "b" / "checkpoint_step_2.pt") is None, "its name was given back"
    is_at(toy, 2)


def test_a_file_overwritten_with_something_else_is_damaged(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    path = tmp_path / "checkpoint_step_2.pt"
    path.chmod(0o644)
    path.write_bytes(b"not a checkpoint at all" * 100)
    _toy, result = resumed(tmp_path)
    assert (result.step, result.steps_lost) == (1, 1)
    assert (tmp_path / "quarantine" / "latest.pt").exists()


def test_when_everything_is_damaged_nothing_is_started_over(tmp_path: Path) -> None:
    make_run(tmp_path, 3)
    for path in tmp_path.glob("checkpoint_*.pt"):
        damage(path)
    for _again in range(2):  # a job that is requeued must not begin anew the second time
        toy = Toy(seed=5)
        before = snapshot(toy.state)
        with (
            toy.manager(tmp_path) as manager,
            pytest.raises(DamagedCheckpoint, match="to begin anew, move quarantine/ away"),
        ):
            manager.resume()
        assert_same(snapshot(toy.state), before)
    assert "checkpoint_step_3.pt" in tree_of(tmp_path / "quarantine")


def test_what_a_later_version_wrote_is_not_passed_over(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    craft(tmp_path / "checkpoint_step_3.pt", '{"format_version":99}')
    with (
        Toy().manager(tmp_path) as manager,
        pytest.raises(CheckpointError, match="pip install --upgrade holdfast"),
    ):
        manager.resume()
    assert not (tmp_path / "quarantine").exists()


# -------------------------------------------------------------------------------- what is asked for


def test_going_back_archives_what_is_newer_and_begins_a_generation(tmp_path: Path) -> None:
    make_run(tmp_path, 4)
    told: Told = []
    toy, result = resumed(tmp_path, tmp_path / "checkpoint_step_2.pt", told)
    assert (result.step, result.generation, result.steps_lost) == (2, 2, 0)
    assert tree_of(archived(tmp_path)) == {
        "checkpoint_step_3.pt", "checkpoint_step_4.pt", "latest.pt", "model.pt"
    }  # fmt: skip
    assert [event for event, _fields in told] == ["archived", "resumed"]
    assert told[0][1]["count"] == 2
    assert [entry.step for entry in Catalog(tmp_path).scan().entries] == [2, 1]
    assert filesystem.same_data(tmp_path / "latest.pt", tmp_path / "checkpoint_step_2.pt")
    is_at(toy, 2)
    toy, result = resumed(tmp_path)
    assert (result.step, result.generation, result.steps_lost) == (2, 2, 0), "not lost: archived"


def test_the_parent_of_a_new_branch_is_recorded(tmp_path: Path) -> None:
    make_run(tmp_path, 3)
    toy = Toy(seed=5)
    with toy.manager(tmp_path) as manager:
        result = manager.resume("checkpoint_step_1.pt")
        assert result is not None
        toy.step()
        saved = manager.save(step=2, strict=True)
    assert saved is not None
    assert (saved.entry.generation, saved.entry.step) == (2, 2)
    assert saved.entry.parent == {
        "id": result.entry.id, "run_id": result.entry.run_id, "generation": 1, "step": 1
    }  # fmt: skip


@pytest.mark.parametrize("source", ["checkpoint_step_2.pt", "checkpoint_step_[12].pt", ".",
                                    "*.pt", "latest.pt"])  # fmt: skip
def test_files_globs_and_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    make_run(tmp_path / "run [1]", 2)
    monkeypatch.chdir(tmp_path)
    _toy, result = resumed(tmp_path / "run [1]", source if source != "." else "run [1]")
    assert (result.step, result.generation) == (2, 1)
    absolute = tmp_path / "run [1]" / "checkpoint_step_1.pt"
    _toy, result = resumed(tmp_path / "run [1]", str(absolute))
    assert result.step == 1


def test_a_file_from_elsewhere_begins_a_new_run_whose_parent_it_is(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 3)
    make_run(tmp_path / "b", 1)
    old = Catalog(tmp_path / "b").scan().entries[0].run_id
    toy = Toy(seed=5)
    with toy.manager(tmp_path / "b") as manager:
        result = manager.resume(tmp_path / "a" / "checkpoint_step_2.pt")
        assert result is not None
        assert (result.step, result.generation) == (2, 2)
        toy.step()
        saved = manager.save(step=3, strict=True)
    assert saved is not None
    assert saved.entry.run_id not in (old, result.entry.run_id)
    assert saved.entry.parent is not None
    assert saved.entry.parent["run_id"] == result.entry.run_id
    assert "checkpoint_step_1.pt" in tree_of(archived(tmp_path / "b"))
    assert_same(snapshot(toy.state), snapshot(after(3).state))
    assert len(Catalog(tmp_path / "a").scan().entries) == 3, "the other run is left alone"


def test_a_directory_elsewhere_means_its_newest_intact_one(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 3)
    damage(tmp_path / "a" / "checkpoint_step_3.pt")
    _toy, result = resumed(tmp_path / "b", tmp_path / "a")
    assert result.step == 2
    _toy, result = resumed(tmp_path / "c", tmp_path / "a" / "*.pt")
    assert result.step == 2
    assert not (tmp_path / "a" / "quarantine").exists(), "not ours to tidy"


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with Toy().manager(tmp_path) as manager:
        for source in ("gone.pt", "gone*.pt", tmp_path / "gone" / "x.pt"):
            with pytest.raises(CheckpointError, match="There is no checkpoint at"):
                manager.resume(source)


def test_a_damaged_file_that_was_asked_for_is_not_replaced_by_another(tmp_path: Path) -> None:
    make_run(tmp_path, 3)
    damage(tmp_path / "checkpoint_step_2.pt")
    with Toy().manager(tmp_path) as manager, pytest.raises(DamagedCheckpoint):
        manager.resume(tmp_path / "checkpoint_step_2.pt")
    _toy, result = resumed(tmp_path)
    assert result.step == 3


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "theirs.pt")
    with Toy().manager(tmp_path / "run") as manager, pytest.raises(ForeignCheckpoint):
        manager.resume(tmp_path / "theirs.pt")


HOSTILE: dict[str, Any] = {
    "no mapping": {"tree": [1, 2]},
    "wrong model": {"tree": {"dict": [["model", 7], ["optimizer", 7], ["losses", 7]]}},
    "random numbers of nonsense": {
        "tree": {"dict": [["rng", {"dict": [["python", 7]]}]]},
    },
    "settings of nonsense": {"tree": {"dict": []}, "configured": [1], "environment": 7},
    "threads of nonsense": {"tree": {"dict": []}, "environment": {"threads": 10**9}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_senseless_checkpoint_raises_our_errors_and_changes_nothing(
    tmp_path: Path, name: str
) -> None:
    craft(tmp_path / "evil.pt", {"tensors": [], **identity(5), **HOSTILE[name]})
    toy = Toy()
    before, threads = snapshot(toy.state), torch.get_num_threads()
    with toy.manager(tmp_path / "run") as manager, pytest.raises(HoldfastError):
        manager.resume(tmp_path / "evil.pt")
    assert_same(snapshot(toy.state), before)
    assert torch.get_num_threads() == threads


def test_random_numbers_of_nonsense_take_everything_back(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 2)
    state = load(tmp_path / "a" / "latest.pt")
    state["rng"]["torch"] = torch.zeros(3)
    write_state(tmp_path / "evil.pt", state, **identity(2))
    toy = Toy()
    before, stream = snapshot(toy.state), torch.get_rng_state()
    with toy.manager(tmp_path / "b") as manager, pytest.raises(StateMismatch, match="rng"):
        manager.resume(tmp_path / "evil.pt")
    assert_same(snapshot(toy.state), before)
    assert torch.equal(torch.get_rng_state(), stream)


def test_names_of_no_file_in_the_history_lose_no_run(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    with (tmp_path / "events.jsonl").open("a") as file:
        for event in (
            {"event": "rolled_back", "id": "a", "order": [1, 1, 1], "generation": 7,
             "source": "archive/\0"},
            {"event": "durable", "run_id": "a", "generation": 1, "step": 3, "names": ["\0.pt"]},
        ):  # fmt: skip
            file.write(json.dumps({"time": "2026-11-30T12:00:00+00:00", **event}) + "\n")
    _toy, result = resumed(tmp_path)
    assert result.step == 2


def test_a_history_of_strange_times_loses_no_run(tmp_path: Path) -> None:
    make_run(tmp_path, 2)
    lines = events(tmp_path)
    for line in lines:
        line["time"] = "yesterday"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "events.jsonl").write_text(text)
    damage(tmp_path / "checkpoint_step_2.pt")
    _toy, result = resumed(tmp_path)
    assert (result.steps_lost, result.minutes_lost) == (1, 0.0)
    assert recovery.lost(Known(), result.entry) == (0, 0.0)


# ------------------------------------------------------------------------- killed at every moment


@pytest.mark.parametrize(
    ("variant", "stride"),
    [("epoch", 1), ("temp", 3), ("epoch without links", 2), ("epoch once more", 2)],
)
def test_killed_at_any_moment_of_a_save_it_resumes_what_was_announced(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, stride: int
) -> None:
    """A save that writes, links, announces, verifies, prunes: killed before each call in turn."""
    kind, again = variant.split(maxsplit=1)[0], "once more" in variant
    if "without links" in variant:
        monkeypatch.setenv("HOLDFAST_DISABLE", "hardlinks,reflink")
    original = fast_path / "original"
    make_run(original, 3, kind=kind, keep_last=1)
    moment, seen = 1 - stride, set()
    while True:
        moment += stride
        directory = fast_path / str(moment)
        shutil.copytree(original, directory, ignore=shutil.ignore_patterns(".*"))
        ready, tell = os.pipe()

        def save(directory: Path = directory, tell: int = tell) -> None:
            def told(event: str, _fields: dict[str, Any]) -> None:
                if event == "durable":
                    os.write(tell, b"durable")

            toy = Toy(seed=5)
            with toy.manager(directory, keep_last=1, on_event=told) as manager:
                manager.resume()
                if not again:
                    toy.step()
                manager.save(step=toy.now, epoch=toy.now, kind=kind, strict=True)

        died = killed_at(moment, save)
        os.close(tell)
        announced = os.read(ready, 99) == b"durable"
        os.close(ready)
        toy, result = resumed(directory)
        seen.add((result.step, announced))
        assert result.step in ((3,) if again else (4,) if announced else (3, 4)), moment
        assert (result.skipped, result.steps_lost) == ([], 0), moment
        assert not list(filesystem.temporaries(directory)), "swept"
        newest = Catalog(directory).scan().entries[0]
        assert "latest.pt" in newest.names, moment
        is_at(toy, result.step)
        with toy.manager(directory, keep_last=1) as manager:
            manager.resume()
            toy.step()
            manager.save(step=toy.now, epoch=toy.now, kind=kind, strict=True)
            assert set(manager.verify().values()) == {None}
        shutil.rmtree(directory)
        if not died:
            break
    assert seen == ({(3, False), (3, True)} if again else {(3, False), (4, False), (4, True)})
    print(f"{moment} moments")
    assert moment > 20


def test_killed_at_any_moment_of_a_recovery_it_recovers(fast_path: Path) -> None:
    original = fast_path / "original"
    make_run(original, 3)
    damage(original / "checkpoint_step_3.pt")
    moment, died = 0, True
    while died:
        moment += 1
        directory = fast_path / str(moment)
        copy_with_links(original, directory)
        died = killed_at(moment, lambda directory=directory: resumed(directory))
        toy, result = resumed(directory)
        assert (result.step, result.steps_lost) == (2, 1), moment
        assert "checkpoint_step_3.pt" in tree_of(directory / "quarantine"), moment
        is_at(toy, 2)
        shutil.rmtree(directory)
    assert moment > 8


def test_killed_at_any_moment_of_going_back_nothing_is_lost(fast_path: Path) -> None:
    original = fast_path / "original"
    make_run(original, 4)
    moment, died = 0, True
    while died:
        moment += 1
        directory = fast_path / str(moment)
        copy_with_links(original, directory)
        died = killed_at(
            moment, lambda directory=directory: resumed(directory, "checkpoint_step_2.pt")
        )
        found = {load(p, only="global_step") for p in directory.rglob("*.pt")}
        assert found == {1, 2, 3, 4}, moment
        _toy, result = resumed(directory)
        assert result.step in (2, 3, 4), moment
        toy, result = resumed(directory, "checkpoint_step_2.pt")
        assert {load(p, only="global_step") for p in directory.rglob("*.pt")} == {1, 2, 3, 4}
        assert [entry.step for entry in Catalog(directory).scan().entries] == [2, 1], moment
        is_at(toy, 2)
        shutil.rmtree(directory)
    assert moment > 8


def copy_with_links(source: Path, target: Path) -> None:
    """Copy a run directory with its links."""
    target.mkdir()
    copied: dict[int, Path] = {}
    for path in sorted(source.rglob("*")):
        if path.is_dir() or path.name.startswith("."):
            continue
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        inode = path.stat().st_ino
        if inode in copied:
            os.link(copied[inode], place)
        else:
            shutil.copy2(path, place)
            copied[inode] = place


def test_the_seam_is_the_whole_of_what_changes_the_disk() -> None:
    """What the sweeps above count on: no other module opens a file for writing."""
    room = Path(container.__file__).parent
    for path in room.glob("*.py"):
        text = path.read_text("utf-8")
        if path.name not in ("filesystem.py", "lock.py", "memory.py"):  # the last is no disk
            for call in ("os.rename", "os.replace", ".rename(", "O_WRONLY", "O_RDWR", ".unlink(",
                         "write_text", "write_bytes", 'open("w', 'open("a'):  # fmt: skip
                assert call not in text, (path.name, call)
    assert catalog.filesystem is filesystem
