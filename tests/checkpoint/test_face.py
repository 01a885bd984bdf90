"""The smallest steps from what people have: `save` for one file, `peek` at one value, and streams
that a loop seeds by itself."""

from __future__ import annotations

import logging
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import holdfast
from holdfast import CheckpointManager
from holdfast.checkpoint import Catalog
from holdfast.checkpoint.format.container import Reader
from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.system import filesystem
from holdfast.errors import (
    CheckpointError,
    ConfigError,
    DamagedCheckpoint,
    SaveFailed,
    UnsupportedValue,
)
from tests.support import Toy, assert_same, damage, die, fail_with, in_child, killed_at

# -------------------------------------------------------------------------------------------- save


def test_save_is_read_by_load_and_by_torch(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    value = {"model": model, "step": 7, "tags": ("a", None), "memory": np.arange(4)}
    holdfast.save(value, tmp_path / "new" / "folder" / "m.pt")
    ours = holdfast.load(tmp_path / "new" / "folder" / "m.pt")
    theirs = torch.load(tmp_path / "new" / "folder" / "m.pt", weights_only=True)
    expected = {**value, "model": model.state_dict(), "memory": torch.arange(4)}
    assert_same(ours, expected)
    assert_same(theirs, expected)
    holdfast.save(torch.ones(3), tmp_path / "tensor.pt")
    assert_same(holdfast.load(tmp_path / "tensor.pt"), torch.ones(3))


def test_save_killed_at_any_call_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    states = [{"step": step, "w": torch.full((5000,), float(step))} for step in (1, 2)]
    moment, seen = 0, set()
    while True:
        holdfast.save(states[0], path)
        moment += 1
        if not killed_at(moment, lambda: holdfast.save(states[1], path)):
            break
        found = holdfast.load(path)
        assert_same(found, states[found["step"] - 1])
        seen.add(found["step"])
    assert moment > 5
    assert seen == {1, 2}


def test_save_that_is_read_back_damaged_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.pt"
    holdfast.save({"step": 1}, path)
    true = filesystem.write_file

    def lies(target: Path, *args: Any, **kwargs: Any) -> None:
        true(target, *args, **kwargs)
        damage(target)

    monkeypatch.setattr(filesystem, "write_file", lies)
    with pytest.raises(SaveFailed, match=r"w\.pt was not saved"):
        holdfast.save({"step": 2}, path)
    monkeypatch.setattr(filesystem, "write_file", true)
    monkeypatch.setattr(filesystem, "allocate", fail_with(28))
    with pytest.raises(OSError, match="No space"):
        holdfast.save({"step": 2}, path)
    assert holdfast.load(path) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_save_follows_a_link_and_says_what_a_call_has_wrong(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "w.pt").symlink_to(tmp_path / "disk" / "true.pt")
    holdfast.save({"step": 1}, tmp_path / "w.pt")
    assert (tmp_path / "w.pt").is_symlink()
    assert holdfast.load(tmp_path / "disk" / "true.pt") == {"step": 1}
    with pytest.raises(ConfigError, match=r"save\(obj, path\).*this is a dict"):
        holdfast.save("w.pt", {"step": 1})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is a directory"):
        holdfast.save({"step": 1}, tmp_path)
    with pytest.raises(UnsupportedValue, match="inner/loss"):
        holdfast.save({"inner": {"loss": print}}, tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


# -------------------------------------------------------------------------------------------- peek


def run_with_config(directory: Path, *steps: int) -> None:
    state: dict[str, Any] = {"w": torch.zeros(4), "config": None, "sizes": {"a.b": [3, {"c": 4}]}}
    with CheckpointManager(directory, state) as manager:
        for step in steps:
            state["config"] = {"step": step}
            state["w"].fill_(step)
            manager.save(step=step, strict=True)


def everything_in(*places: Path) -> dict[str, tuple[int, int, bytes]]:
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes())
        for path in files
    }


def test_peek_reads_one_value_by_key_or_by_path(tmp_path: Path) -> None:
    run_with_config(tmp_path, 1, 2)
    assert holdfast.peek(tmp_path, "config") == {"step": 2}
    assert holdfast.peek(tmp_path, "config.step") == 2
    assert holdfast.peek(tmp_path, "sizes.a.b.0") == 3
    assert holdfast.peek(tmp_path, "sizes.a.b.1.c") == 4
    assert_same(holdfast.peek(tmp_path, "w"), torch.full((4,), 2.0))
    assert holdfast.peek(tmp_path / "none", "config") is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("conf", "has no conf. There are: epoch, global_step, w, config, sizes, rng"),
        ("config.stop", "has no config.stop. In config there are: step"),
        ("sizes.a.b.1.d", "has no sizes.a.b.1.d. In sizes.a.b.1 there are: c"),
        ("config.step.more", "has no config.step.more: config.step has nothing inside (int)"),
        ("", "peek needs the name of a value"),
    ],
)
def test_peek_says_which_keys_there_are(tmp_path: Path, name: str, words: str) -> None:
    run_with_config(tmp_path, 1)
    with pytest.raises(ConfigError) as error:
        holdfast.peek(tmp_path, name)
    assert words in str(error.value)


def test_peek_passes_over_a_damaged_newest_and_moves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_with_config(tmp_path, 1, 2)
    damage(tmp_path / "checkpoint_step_2.pt")  # far from the value that is asked for
    before = everything_in(tmp_path)
    assert holdfast.peek(tmp_path, "config") == {"step": 1}
    assert "checkpoint_step_2.pt" in caplog.text
    assert everything_in(tmp_path) == before
    damage(tmp_path / "checkpoint_step_1.pt")
    with pytest.raises(DamagedCheckpoint, match=r"Every checkpoint.*checkpoint_step_1"):
        holdfast.peek(tmp_path, "config")
    with pytest.raises(ConfigError, match=r"is a file; holdfast\.load"):
        holdfast.peek(tmp_path / "latest.pt", "config")


def test_peek_takes_nothing_older_for_what_cannot_be_read_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with_config(tmp_path, 1, 2)
    true = Reader.verify

    def fails(reader: Reader, **keywords: Any) -> None:
        if reader.path.name != "checkpoint_step_1.pt":
            raise OSError(5, "Input/output error")
        true(reader, **keywords)

    monkeypatch.setattr(Reader, "verify", fails)
    with pytest.raises(CheckpointError, match="cannot be read now"):
        holdfast.peek(tmp_path, "config")


@pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")
def test_peek_sees_what_a_killed_process_left_in_memory_and_leaves_it_there(
    tmp_path: Path,
) -> None:
    def run() -> None:
        toy = Toy()
        manager = toy.manager(tmp_path, memory_every=1)
        manager.resume()
        for _step in range(4):
            toy.step()
            if toy.now == 2:
                manager.save(step=2, strict=True)
            manager.after_step(toy.now)
        manager.wait_for_copy()
        die()

    assert in_child(run) == -signal.SIGKILL
    places = [each.directory for each in shared_memory.remains() if each.run == tmp_path]
    before = everything_in(tmp_path, *places)
    w = holdfast.peek(tmp_path, "model.weight")
    assert everything_in(tmp_path, *places) == before
    toy = Toy(seed=9)
    with toy.manager(tmp_path) as manager:
        resumed = manager.resume()
        assert resumed is not None
        assert resumed.step == 4
        assert_same(w, toy.state["model"].weight.detach())


def test_peek_knows_a_roll_back_that_was_interrupted(tmp_path: Path) -> None:
    """The line that decides it is written; no file has moved yet."""
    run_with_config(tmp_path, 1, 2, 3)
    catalog = Catalog(tmp_path)
    entry = next(entry for entry in catalog.scan().entries if entry.step == 2)
    catalog.record(
        "rolled_back",
        id=entry.id,
        run_id=entry.run_id,
        step=entry.step,
        generation=2,
        source=None,
        order=[entry.generation, entry.step, entry.sequence],
    )
    assert holdfast.peek(tmp_path, "config.step") == 2
    assert (tmp_path / "checkpoint_step_3.pt").exists()
    shutil.rmtree(tmp_path)


# ----------------------------------------------------------------------- loops that seed themselves


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def drawn() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def self_seeding(directory: Path, *, until: int, restore: bool) -> list[Any]:
    """Train as minimind does: seeded at each epoch, after what was loaded. Return what it drew."""
    torch.manual_seed(0)
    state: dict[str, Any] = {"w": torch.zeros(1)}
    result = []
    with CheckpointManager(directory, state, save_when=[holdfast.EverySteps(1)]) as manager:
        resumed = manager.resume()
        start = resumed.step if resumed else 0
        for epoch in range(start // 10, 2):
            seed_everything(42 + epoch)
            torch.randperm(100)
            if resumed is not None and restore:
                resumed.restore_rng()
            resumed = None
            for step in range(max(start, epoch * 10), min(until, epoch * 10 + 10)):
                result.append(drawn())
                torch.randn(1000)
                manager.after_step(step + 1)
    return result


WORDS = "seeded anew before the first step"


def test_a_loop_that_seeds_itself_goes_on_exactly_with_restore_rng(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight = self_seeding(tmp_path / "straight", until=20, restore=True)
    begun = self_seeding(tmp_path / "run", until=6, restore=True)
    rest = self_seeding(tmp_path / "run", until=20, restore=True)
    assert begun + rest == straight
    assert WORDS not in caplog.text


@pytest.mark.parametrize("until", [6, 16])
def test_streams_that_are_seeded_after_a_resume_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, until: int
) -> None:
    straight = self_seeding(tmp_path / "straight", until=20, restore=False)
    begun = self_seeding(tmp_path / "run", until=until, restore=False)
    caplog.set_level(logging.WARNING)
    rest = self_seeding(tmp_path / "run", until=20, restore=False)
    assert begun + rest != straight
    assert caplog.text.count(WORDS) == 1


@pytest.mark.parametrize("draws", [0, 1, 100_000])
def test_streams_that_are_only_drawn_from_are_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, draws: int
) -> None:
    """The usual loop: seeded at its beginning, before the resume."""
    for _start in range(2):
        torch.manual_seed(1337)
        with CheckpointManager(tmp_path, {"w": torch.zeros(1)}) as manager:
            resumed = manager.resume()
            step = resumed.step if resumed else 0
            torch.randn(draws)
            manager.after_step(step + 1)
    assert WORDS not in caplog.text


def test_restore_rng_says_where_there_are_no_streams(tmp_path: Path) -> None:
    for _start in range(2):
        with CheckpointManager(tmp_path, {"rng": 1}, rng=False) as manager:
            resumed = manager.resume()
            manager.save(step=1, strict=True)
    assert resumed is not None
    with pytest.raises(ConfigError, match="rng=False"):
        resumed.restore_rng()
