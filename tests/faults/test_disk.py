"""The file system on paper: literal cases of what a power cut may leave and what it may not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.prove.disk import BLOCK, SECTOR, Disk, State, mix
from tests.faults.inject import Call

OLD, NEW = b"old", b"new"


def write(disk: Disk, path: str, content: bytes) -> None:
    disk.write(disk.open(path, truncate=True), 0, content)


def settled(**files: bytes) -> Disk:
    """A disk on which these files are durable."""
    disk = Disk()
    for path, content in files.items():
        write(disk, path, content)
        disk.sync(disk.find(path))
    disk.sync(disk.root)
    return disk


def shown(state: State) -> dict[str, bytes]:
    return {path: content for paths, content, _mode in state.files for path in paths}


def left(disk: Disk) -> list[dict[str, bytes]]:
    """Every distinct state that is offered for a cut now."""
    states = {state.digest: state for state in disk.states(random.Random(1), 200)}
    return [shown(state) for state in states.values()]


def test_nothing_pending_leaves_one_state() -> None:
    assert left(settled(a=OLD)) == [{"a": OLD}]


def test_a_synced_file_may_be_without_its_name() -> None:
    disk = settled()
    write(disk, "a", NEW)
    disk.sync(disk.find("a"))
    states = left(disk)
    assert {} in states
    assert {"a": NEW} in states
    assert len(states) == 2
    disk.sync(disk.root)
    assert left(disk) == [{"a": NEW}]


def test_a_durable_name_may_be_without_data() -> None:
    disk = settled()
    write(disk, "a", NEW)
    disk.sync(disk.root)
    states = left(disk)
    assert {"a": b""} in states
    assert {"a": bytes(3)} in states  # the size before the data
    assert {"a": NEW} in states
    assert {} not in states


def test_data_never_hides_what_was_durable_elsewhere() -> None:
    disk = settled(a=OLD)
    write(disk, "b", NEW)
    assert all(state["a"] == OLD for state in left(disk))


def test_a_rename_before_its_data() -> None:
    disk = settled(a=OLD)
    write(disk, "t", NEW)
    disk.rename("t", "a")
    states = left(disk)
    assert {"a": OLD} in states
    assert {"a": b""} in states
    assert {"a": NEW} in states
    assert all("a" in state for state in states)  # atomic: never without the name


def test_a_synced_file_renamed_is_the_old_or_the_new_one() -> None:
    disk = settled(a=OLD)
    write(disk, "t", NEW)
    disk.sync(disk.find("t"))
    disk.rename("t", "a")
    for state in left(disk):
        assert state["a"] in (OLD, NEW)
    disk.sync(disk.root)
    assert left(disk) == [{"a": NEW}]


def test_changes_of_two_names_come_in_any_order() -> None:
    disk = settled(a=OLD)
    write(disk, "b", NEW)
    disk.sync(disk.find("b"))
    disk.change({disk.slot("a"): None})
    states = left(disk)
    assert {} in states  # the removal, and not yet what was made before it
    assert {"a": OLD, "b": NEW} in states
    assert {"b": NEW} in states
    assert {"a": OLD} in states


def test_changes_of_one_name_keep_their_order() -> None:
    disk = settled(a=OLD)
    disk.change({disk.slot("a"): None})
    write(disk, "a", NEW)
    disk.sync(disk.find("a"))
    assert sorted(map(str, left(disk))) == sorted(map(str, [{"a": OLD}, {}, {"a": NEW}]))


def test_a_hard_link_shares_its_inode_whatever_the_order() -> None:
    disk = settled(a=OLD)
    disk.change({disk.slot("b"): disk.find("a")})
    disk.change({disk.slot("a"): None})
    states = left(disk)
    assert {"b": OLD} in states
    assert {"a": OLD} in states
    disk.sync(disk.root)
    [state] = {state.digest: state for state in disk.states(random.Random(1), 9)}.values()
    assert state.files == ((("b",), OLD, 0o644),)


def test_the_old_name_may_stay_with_the_old_inode() -> None:
    """latest.pt is linked anew: after a cut it is the old checkpoint beside the new one."""
    disk = settled(old=OLD)
    disk.change({disk.slot("latest"): disk.find("old")})
    disk.sync(disk.root)
    write(disk, "new", NEW)
    disk.sync(disk.find("new"))
    disk.sync(disk.root)
    disk.change({disk.slot("t"): disk.find("new")})
    disk.rename("t", "latest")
    states = left(disk)
    assert {"old": OLD, "latest": OLD, "new": NEW} in states
    assert {"old": OLD, "latest": NEW, "new": NEW} in states
    assert {"old": OLD, "latest": OLD, "new": NEW, "t": NEW} in states
    assert len(states) == 3


def test_a_rename_of_two_links_to_one_file_does_nothing() -> None:
    disk = settled(a=OLD)
    disk.change({disk.slot("b"): disk.find("a")})
    disk.rename("b", "a")
    assert shown(disk.now()) == {"a": OLD, "b": OLD}


def test_a_move_between_directories_is_atomic_and_one_sync_makes_it_durable() -> None:
    disk = settled(a=OLD)
    disk.apply(Call(1, 1, "mkdir", 0, 0, "/r/d", "/r/d"), "/r")
    disk.sync(disk.root)
    disk.rename("a", "d/a")
    assert sorted(map(str, left(disk))) == sorted(map(str, [{"a": OLD}, {"d/a": OLD}]))
    disk.sync(disk.find("d"))
    assert left(disk) == [{"d/a": OLD}]


def test_what_lies_in_a_directory_without_a_durable_name_is_gone() -> None:
    disk = settled()
    disk.apply(Call(1, 1, "mkdir", 0, 0, "/r/d", "/r/d"), "/r")
    write(disk, "d/a", NEW)
    disk.sync(disk.find("d/a"))
    disk.sync(disk.find("d"))
    assert {} in left(disk)
    disk.sync(disk.root)
    assert left(disk) == [{"d/a": NEW}]


def test_the_sync_of_another_directory_changes_nothing_here() -> None:
    disk = settled()
    disk.apply(Call(1, 1, "mkdir", 0, 0, "/r/d", "/r/d"), "/r")
    disk.sync(disk.root)
    write(disk, "d/a", NEW)
    disk.sync(disk.find("d/a"))
    disk.sync(disk.root)
    assert {} in left(disk)


def test_a_torn_write_leaves_some_sectors() -> None:
    disk = settled(a=b"o" * BLOCK)
    disk.write(disk.find("a"), 0, b"n" * BLOCK)
    states = [state["a"] for state in left(disk)]
    assert b"n" * (BLOCK // 2) + b"o" * (BLOCK // 2) in states
    for content in states:
        sectors = {content[at : at + SECTOR] for at in range(0, BLOCK, SECTOR)}
        assert sectors <= {b"n" * SECTOR, b"o" * SECTOR}


def test_blocks_of_a_longer_file_are_new_or_zeros() -> None:
    disk = settled()
    write(disk, "a", b"n" * 3 * BLOCK)
    disk.sync(disk.root)
    contents = [state["a"] for state in left(disk)]
    assert b"n" * 2 * BLOCK + bytes(BLOCK) in contents
    assert bytes(BLOCK) + b"n" * 2 * BLOCK in contents
    assert {len(content) for content in contents} == {0, 3 * BLOCK}


def test_an_append_keeps_what_was_there() -> None:
    disk = settled(log=b"one\n")
    disk.write(disk.find("log"), 4, b"two\n")
    assert {state["log"] for state in left(disk)} == {b"one\n", b"one\n" + bytes(4), b"one\ntwo\n"}


def test_space_that_was_claimed_holds_zeros() -> None:
    disk = settled(a=b"")
    disk.resize(disk.find("a"), 2 * SECTOR)
    disk.sync(disk.find("a"))
    disk.write(disk.find("a"), 0, b"n" * SECTOR)
    assert mix(disk.find("a"), SECTOR, lambda at: -1 if at else 0) == bytes(2 * SECTOR)


def test_truncation_is_no_more_durable_than_a_write() -> None:
    disk = settled(a=OLD)
    write(disk, "a", NEW)
    contents = [state["a"] for state in left(disk)]
    assert OLD in contents
    assert b"" in contents
    assert NEW in contents


@pytest.mark.parametrize("count", [3, 9])
def test_every_offered_set_of_changes_is_legal(count: int) -> None:
    disk = settled()
    for number in range(count):
        write(disk, f"t{number}", NEW)
        disk.rename(f"t{number}", "latest")
    for chosen in [*disk.sets(), *(disk.random_set(random.Random(n)) for n in range(50))]:
        for change in chosen:
            assert all(earlier in chosen for earlier in change.follows)


def test_a_state_is_built_with_its_links_and_read_back(tmp_path: Path) -> None:
    disk = settled(a=OLD, b=NEW)
    disk.apply(Call(1, 1, "mkdir", 0, 0, "/r/d", "/r/d"), "/r")
    disk.apply(Call(2, 1, "link", 0, 0, "/r/a", "/r/d/c"), "/r")
    disk.now().build(tmp_path)
    assert (tmp_path / "a").samefile(tmp_path / "d/c")
    assert Disk.read(tmp_path).now().digest == disk.now().digest


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"x"),
        lambda path: path.unlink(),
        lambda path: path.with_name("c").hardlink_to(path),
    ],
)
def test_a_digest_sees_names_links_and_bytes(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    settled(a=OLD, b=OLD).now().build(tmp_path)
    before = Disk.read(tmp_path).now().digest
    change(tmp_path / "a")
    assert Disk.read(tmp_path).now().digest != before


def test_a_recorded_inode_number_that_is_used_again_is_another_file() -> None:
    disk = settled()
    calls = [
        Call(1, 1, "open", 7, 0, "/r/a", ""),
        Call(2, 1, "write", 7, 0, "/r/a", "", OLD),
        Call(3, 1, "unlink", 0, 0, "/r/a", "/r/a"),
        Call(4, 1, "open", 7, 0, "/r/b", ""),
        Call(5, 1, "write", 7, 0, "/r/b", "", NEW),
        Call(6, 1, "fsync", 7, 0, "/r/b", ""),
    ]
    for call in calls:
        disk.apply(call, "/r")
    assert shown(disk.now()) == {"b": NEW}
    assert disk.find("b").versions == [NEW]


def test_an_unknown_call_is_not_passed_over() -> None:
    with pytest.raises(ValueError, match="mmap"):
        Disk().apply(Call(1, 1, "mmap", 0, 0, "/r/a", ""), "/r")
