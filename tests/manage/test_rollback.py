"""`holdfast rollback`: an earlier state becomes the newest, and nothing is removed."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint import Catalog
from holdfast.checkpoint.rundir import rollback, shared_memory
from holdfast.checkpoint.rundir.entries import ROLES
from holdfast.checkpoint.system import filesystem
from holdfast.checkpoint.system.lock import run_lock
from holdfast.errors import CheckpointError, DamagedCheckpoint, HoldfastError, RunLocked
from holdfast.manage.rollback import execute, plan, undo
from holdfast.table import Screen
from tests.manage.runs import copy_without_links, flip, make_run, names_in
from tests.support import (
    Toy,
    after,
    archived,
    assert_same,
    damage,
    die,
    events,
    everything,
    in_child,
    killed_at,
    snapshot,
    twin,
)
from tests.support import make_run as make_toy_run


def go_back(directory: Path, wanted: str) -> None:
    with run_lock(directory):
        execute(plan(directory, wanted))


def steps(directory: Path) -> list[int]:
    return [entry.step for entry in Catalog(directory).scan().entries]


def goes_on_from(directory: Path, step: int, generation: int) -> None:
    """The next start restores `step` to the bit, in `generation`, and calls nothing lost."""
    toy = Toy(seed=5)
    with toy.manager(directory, keep_last=0) as manager:
        resumed = manager.resume()
        assert resumed is not None
        told = (resumed.step, resumed.generation, manager.generation, resumed.steps_lost)
        assert told == (step, generation, generation, 0)
        assert resumed.skipped == []
        toy.step()
        assert_same(snapshot(toy.state), snapshot(after(step + 1).state))
        saved = manager.save(step=step + 1, strict=True)
    assert saved is not None
    assert (saved.entry.generation, saved.entry.step) == (generation, step + 1)
    assert saved.entry.parent is not None
    assert saved.entry.parent["step"] == step


# ---------------------------------------------------------------------------------- what it means


def test_the_chosen_one_is_the_newest_and_training_goes_on_in_a_new_generation(
    tmp_path: Path,
) -> None:
    make_toy_run(tmp_path, 4)
    go_back(tmp_path, "2")
    assert steps(tmp_path) == [2, 1]
    assert {p.name for p in archived(tmp_path).iterdir()} == {
        "checkpoint_step_3.pt", "checkpoint_step_4.pt", "latest.pt", "model.pt"
    }  # fmt: skip
    for role in ("latest.pt", "model.pt"):
        assert filesystem.same_data(tmp_path / role, tmp_path / "checkpoint_step_2.pt")
    (event,) = [e for e in events(tmp_path) if e["event"] == "rolled_back"]
    assert (event["step"], event["generation"]) == (2, 2)
    goes_on_from(tmp_path, 2, 2)
    goes_on_from(tmp_path, 3, 2)


def test_the_best_is_the_best_of_what_is_left(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")  # the second epoch is the best
    go_back(run, "100")
    for role in ROLES:
        assert filesystem.same_data(run / role, run / "model_epoch_1.pt"), role


def test_a_role_a_path_and_a_name_mean_a_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for wanted in ("best_model.pt", "model_epoch_2.pt", str(run / "model_epoch_2.pt"), "200"):
        shown = plan(run, wanted)
        assert (shown.chosen.step, [e.step for e in shown.newer]) == (200, [400, 300])
        assert shown.generation == 2 and shown.changes
    assert not (run / "archive").exists()


def test_a_second_going_back_begins_another_generation(tmp_path: Path) -> None:
    make_toy_run(tmp_path, 4)
    go_back(tmp_path, "3")
    go_back(tmp_path, "1")
    assert steps(tmp_path) == [1]
    assert {p.name for p in archived(tmp_path).parent.iterdir()} == {"generation_1", "generation_2"}
    goes_on_from(tmp_path, 1, 3)


def test_it_is_undone_by_naming_the_file_in_the_archive(tmp_path: Path) -> None:
    make_toy_run(tmp_path, 4)
    go_back(tmp_path, "2")
    goes_on_from(tmp_path, 2, 2)  # saves another step 3
    go_back(tmp_path, str(archived(tmp_path) / "checkpoint_step_4.pt"))
    assert steps(tmp_path) == [4, 2, 1]
    assert (archived(tmp_path) / "checkpoint_step_4.pt").exists()
    assert (archived(tmp_path, 2) / "checkpoint_step_3.pt").exists()
    assert filesystem.same_data(tmp_path / "latest.pt", tmp_path / "checkpoint_step_4.pt")
    goes_on_from(tmp_path, 4, 3)


def test_what_is_brought_back_takes_nobodys_name(tmp_path: Path) -> None:
    make_toy_run(tmp_path, 4)
    go_back(tmp_path, "3")
    goes_on_from(tmp_path, 3, 2)
    taken, old = tmp_path / "checkpoint_step_2.pt", archived(tmp_path) / "old.pt"
    taken.rename(old)
    taken.write_bytes((tmp_path / "checkpoint_step_1.pt").read_bytes())
    go_back(tmp_path, str(old))
    (newest, other) = Catalog(tmp_path).scan().entries
    assert (newest.step, other.step) == (2, 1)
    assert newest.names[0] == f"checkpoint_step_2-{newest.id[:8]}.pt"
    assert "checkpoint_step_2.pt" in other.names
    goes_on_from(tmp_path, 2, 3)


def test_a_temporary_one_can_be_gone_back_to(tmp_path: Path) -> None:
    toy = Toy()
    with toy.manager(tmp_path, keep_last=0) as manager:
        manager.resume()
        for kind in ("step", "temp", "temp"):
            toy.step()
            manager.save(step=toy.now, kind=kind, strict=True)
    go_back(tmp_path, "2")
    assert steps(tmp_path) == [2, 1]
    assert filesystem.same_data(tmp_path / "latest.pt", tmp_path / "temp" / "temp_step2.pt")
    assert (archived(tmp_path) / "temp" / "temp_step3.pt").exists()
    goes_on_from(tmp_path, 2, 2)


def test_without_links_copies_go_and_come_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_without_links(make_run(tmp_path / "run"), tmp_path / "copy")
    monkeypatch.setenv("HOLDFAST_DISABLE", "hardlinks,reflink")
    before = {path.name for path in run.glob("*.pt")}
    go_back(run, "200")
    assert steps(run) == [200, 100]
    assert {path.name for path in run.glob("*.pt")} == before - {
        "model_epoch_3.pt", "model_epoch_4.pt"
    }  # fmt: skip
    assert (run / "latest.pt").read_bytes() == (run / "model_epoch_2.pt").read_bytes()


def test_the_newest_is_nothing_to_go_back_behind(tmp_path: Path) -> None:
    make_toy_run(tmp_path, 2)
    before = events(tmp_path)
    shown = plan(tmp_path, "latest.pt")
    assert not shown.changes and shown.generation == 1
    go_back(tmp_path, "1")
    assert not plan(tmp_path, "1").changes, "it has been done"
    assert events(tmp_path)[: len(before)] == before
    goes_on_from(tmp_path, 1, 2)


def test_what_retention_took_long_ago_is_not_called_lost_afterwards(tmp_path: Path) -> None:
    make_toy_run(tmp_path, 6)
    for step in (4, 5):  # removed by hand: the history announces them and tells no end of them
        (tmp_path / f"checkpoint_step_{step}.pt").unlink()
    go_back(tmp_path, "3")
    goes_on_from(tmp_path, 3, 2)


# ------------------------------------------------------------------------------------ refused


def test_a_damaged_state_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    make_toy_run(tmp_path, 3)
    damage(tmp_path / "checkpoint_step_1.pt")
    before, told = names_in(tmp_path), events(tmp_path)
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint_step_1\.pt is damaged"):
        go_back(tmp_path, "1")
    assert (names_in(tmp_path), events(tmp_path)) == (before, told)


def test_of_two_copies_the_damaged_one_is_set_aside(tmp_path: Path) -> None:
    run = copy_without_links(make_run(tmp_path / "run"), tmp_path / "copy")
    flip(run / "best_model.pt")  # a copy of the second epoch
    go_back(run, "200")
    assert (run / "quarantine" / "best_model.pt").exists()
    assert filesystem.same_data(run / "best_model.pt", run / "model_epoch_2.pt")


def test_a_step_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (5.0, 4.0, 3.0, 2.0, 1.0))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 290.* 100, 200, 300, 400"):
        plan(run, "290")
    go_back(run, "200")
    with pytest.raises(CheckpointError, match=r"100, 200\. Step 400 lies in the archive: .*_4\.pt"):
        plan(run, "400")


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", (1.0,))
    with pytest.raises(CheckpointError, match="is no checkpoint of"):
        plan(run, str(other / "model_epoch_1.pt"))
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        plan(run, "model_epoch_9.pt")
    with pytest.raises(HoldfastError, match="There is no directory"):
        plan(tmp_path / "nothing", "1")


def test_while_a_training_runs_it_is_refused(tmp_path: Path) -> None:
    make_toy_run(tmp_path, 2)
    with Toy().manager(tmp_path), pytest.raises(RunLocked):
        go_back(tmp_path, "1")


@pytest.mark.parametrize("line", [
    {"order": [1, 1, 1], "generation": "2"}, {"order": [1, 1], "generation": 2}, {"generation": 2},
    {"order": [1, True, 1], "generation": 2},
    {"order": [1, 1, 1], "generation": 2, "source": "archive/../../x.pt"},
])  # fmt: skip
def test_a_line_of_nonsense_in_the_history_moves_nothing(
    tmp_path: Path, line: dict[str, Any]
) -> None:
    make_toy_run(tmp_path, 2)
    Catalog(tmp_path).record("rolled_back", id="x", **line)
    rollback.finish(Catalog(tmp_path), Catalog(tmp_path).scan())
    assert steps(tmp_path) == [2, 1]


# ----------------------------------------------------------------------------- states of other runs


def test_the_undo_names_the_file_of_this_run(tmp_path: Path) -> None:
    """Two runs, one after the other, archive the same names."""
    ids = []
    for _run in range(2):
        make_toy_run(tmp_path, 2)
        ids.append(Catalog(tmp_path).scan().entries[0].id)
        with run_lock(tmp_path):
            done = execute(plan(tmp_path, "1"))
        path = undo(done)
        assert path is not None
        assert Catalog(path.parent).scan().entries[0].id == ids[-1]
    shown = plan(tmp_path, str(path))
    assert (shown.other_run, shown.chosen.id) == (None, ids[1])


def test_a_state_of_another_run_is_said_to_be_one_and_nothing_of_this_run_stays_beside_it(
    tmp_path: Path,
) -> None:
    make_toy_run(tmp_path, 4)
    (tmp_path / "other").mkdir()
    make_toy_run(tmp_path / "other", 2)
    theirs = Catalog(tmp_path / "other").scan().entries[0]
    ours = Catalog(tmp_path).scan().entries[0].run_id
    filesystem.move(tmp_path / "other" / theirs.names[0], tmp_path / "archive" / "theirs.pt")
    shutil.rmtree(tmp_path / "other")
    shown = plan(tmp_path, "archive/theirs.pt")
    assert shown.other_run == ours and shown.to_json(done=False)["other_run"] == ours
    text = "\n".join(shown.lines(Screen(width=200)))
    assert f"another run ({theirs.run_id[:8]}) than the one here ({ours[:8]})" in text
    go_back(tmp_path, "archive/theirs.pt")
    assert [entry.run_id for entry in Catalog(tmp_path).scan().entries] == [theirs.run_id]
    goes_on_from(tmp_path, 2, 2)


def test_where_the_state_to_bring_back_is_gone_nothing_makes_way(tmp_path: Path) -> None:
    make_toy_run(tmp_path, 3)
    Catalog(tmp_path).record(
        "rolled_back", id="x", run_id="y", generation=2, order=[1, 1, 1], source="archive/gone.pt"
    )
    rollback.finish(Catalog(tmp_path), Catalog(tmp_path).scan())
    assert steps(tmp_path) == [3, 2, 1]


# ------------------------------------------------------------------------- killed at every moment


@pytest.mark.parametrize("wanted", ["2", "what was archived"])
@pytest.mark.parametrize("again", [False, True], ids=["the next start", "asking again"])
def test_a_crash_at_any_moment_leaves_one_or_the_other(
    fast_path: Path, wanted: str, again: bool
) -> None:
    """The run has gone back or it has not, the next start says which, and nothing is lost."""
    goal, outcomes = (2 if wanted == "2" else 4), set()
    template = fast_path / "template"
    make_toy_run(template, 4)
    if wanted != "2":
        go_back(template, "3")
        place = archived(template).relative_to(template)
        wanted = str(place / "checkpoint_step_4.pt")
    first, known, ids = (
        steps(template)[0],
        Catalog(template).scan().generation,
        everything(template),
    )
    for moment in range(1, 200):
        run = twin(template, fast_path / str(moment))
        died = killed_at(moment, lambda run=run: go_back(run, wanted))  # type: ignore[misc]
        if again:
            go_back(run, wanted)
            assert steps(run)[0] == goal
        toy = Toy(seed=5)
        with toy.manager(run) as manager:
            resumed = manager.resume()
        assert resumed is not None
        went = (resumed.step, resumed.generation) == (goal, known + 1)
        assert went or (resumed.step, resumed.generation) == (first, known), moment
        assert resumed.steps_lost == 0
        assert everything(run) == ids, moment
        assert filesystem.same_data(run / "latest.pt", resumed.path)
        outcomes.add(went)
        if not died:
            break
    assert went, "it was not interrupted"
    assert moment > 10
    assert outcomes == ({True} if again else {True, False})


def test_a_full_disk_goes_back_or_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_toy_run(tmp_path, 3)
    before = names_in(tmp_path)

    def full(path: Path, line: str) -> None:
        if "rolled_back" in line:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "append_line", full)
        with pytest.raises(OSError, match="No space"):
            go_back(tmp_path, "1")
    assert names_in(tmp_path) == before
    goes_on_from(tmp_path, 3, 1)


# ------------------------------------------------------------------------------- the memory tier


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Whatever a test leaves in shared memory goes with it."""
    yield
    for remains in shared_memory.remains():
        run = remains.run  # read once: tests of others come and go there
        if run is not None and tmp_path in [run, *run.parents]:
            remains.remove()


def killed_in_memory(directory: Path) -> None:
    """Steps 1 and 2 are on the disk, 3 to 5 were in shared memory when the training was killed."""

    def run() -> None:
        toy = Toy()
        manager = toy.manager(directory, memory_every=1, keep_last=0)
        manager.resume()
        for _step in range(5):
            toy.step()
            if toy.now <= 2:
                manager.save(step=toy.now, strict=True)
            else:
                manager.after_step(toy.now)
        manager.wait()
        die()

    assert in_child(run) == -signal.SIGKILL


@pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("wanted", [1, 2])
def test_what_a_killed_training_left_in_memory_goes_to_the_archive(
    tmp_path: Path, wanted: int
) -> None:
    killed_in_memory(tmp_path)
    shown = plan(tmp_path, str(wanted))
    assert (shown.in_memory, shown.changes) == (5, True)
    go_back(tmp_path, str(wanted))
    assert steps(tmp_path)[0] == wanted
    assert (archived(tmp_path) / "temp" / "temp_step5.pt").exists()
    assert not [r for r in shared_memory.remains() if r.run == tmp_path]
    goes_on_from(tmp_path, wanted, 2)


# ----------------------------------------------------------------------------------- what is told


def test_the_documented_form(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run_id = Catalog(run).scan().entries[0].run_id
    found = json.loads(json.dumps(plan(run, "200").to_json(done=False)))
    assert set(found) == {
        "directory", "done", "id", "step", "file", "generation", "to", "archived",
        "archived_from_memory", "other_run",
    }  # fmt: skip
    assert (found["step"], found["file"], found["generation"]) == (200, "model_epoch_2.pt", 2)
    assert found["to"] == f"archive/{run_id[:8]}/generation_1"
    assert [row["step"] for row in found["archived"]] == [400, 300]
