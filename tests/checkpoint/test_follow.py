"""A file of JSON lines that somebody else writes is read as it grows, whatever happens to it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint.system.follow import Follower


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lines.jsonl"


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def numbers(lines: list[dict[str, Any]]) -> list[int]:
    return [line["n"] for line in lines]


def test_each_line_is_handed_out_once(path: Path) -> None:
    follower = Follower(path)
    append(path, '{"n": 1}\n{"n": 2}\n')
    assert numbers(follower.new()) == [1, 2]
    assert follower.new() == []
    append(path, '{"n": 3}\n')
    assert numbers(follower.new()) == [3]
    assert not follower.restarted


def test_a_file_that_is_not_there_yet_is_waited_for(path: Path) -> None:
    follower = Follower(path)
    assert follower.new() == []
    assert not follower.restarted
    append(path, '{"n": 1}\n')
    assert numbers(follower.new()) == [1]
    assert not follower.restarted


def test_a_line_that_is_being_written_waits_for_its_end(path: Path) -> None:
    follower = Follower(path)
    whole = '{"n": 1, "text": "今天天气"}\n'.encode()
    for i in range(1, len(whole)):
        path.write_bytes(whole[:i])
        assert follower.new() == [], f"after {i} bytes"
    path.write_bytes(whole)
    assert follower.new() == [{"n": 1, "text": "今天天气"}]


@pytest.mark.parametrize(
    "damage", ['{"n": 2, "te', "\x00" * 50, "[1, 2]", "null", "[" * 5000, "\udcff{"]
)
def test_a_damaged_line_is_passed_over(path: Path, damage: str) -> None:
    path.write_bytes(f'{{"n": 1}}\n{damage}\n{{"n": 3}}\n'.encode("utf-8", "surrogatepass"))
    assert numbers(Follower(path).new()) == [1, 3]


def test_what_follows_on_a_torn_line_is_found(path: Path) -> None:
    """A power cut tore a line, and the next start went on writing behind it."""
    append(path, '{"time": "a", "n": 1}\n{"time": "b", "n"')
    follower = Follower(path)
    assert numbers(follower.new()) == [1]
    append(path, '{"time": "c", "n": 3, "text": "{\\"time\\": 0}"}\n')
    assert numbers(follower.new()) == [3]


def test_a_file_that_was_replaced_is_read_from_its_beginning(path: Path) -> None:
    follower = Follower(path)
    append(path, '{"n": 1}\n{"n": 2}\n')
    follower.new()
    other = path.with_name("other")
    other.write_text('{"n": 7}\n{"n": 8}\n{"n": 9}\n')
    other.replace(path)
    assert numbers(follower.new()) == [7, 8, 9]
    assert follower.restarted
    assert follower.new() == []
    assert not follower.restarted


def test_a_file_that_was_cut_is_read_from_its_beginning(path: Path) -> None:
    follower = Follower(path)
    append(path, '{"n": 1}\n{"n": 2}\n{"n"')
    follower.new()
    os.truncate(path, 0)
    append(path, '{"n": 5}\n')
    assert numbers(follower.new()) == [5]
    assert follower.restarted


def test_a_new_file_with_the_inode_of_the_old_one_is_noticed(path: Path) -> None:
    """A file system gives a free inode away again at once; the new file may be longer already."""
    follower = Follower(path)
    append(path, '{"time": "1", "n": 1}\n')
    follower.new()
    with path.open("r+") as file:  # the same inode, other bytes, and more of them
        file.write('{"time": "2", "n": 4}\n{"time": "3", "n": 5}\n')
    assert numbers(follower.new()) == [4, 5]
    assert follower.restarted


def test_a_file_that_disappears_is_said_once_and_read_again_when_it_is_back(path: Path) -> None:
    follower = Follower(path)
    append(path, '{"n": 1}\n')
    follower.new()
    path.unlink()
    assert follower.new() == []
    assert follower.restarted
    assert follower.new() == []
    assert not follower.restarted
    append(path, '{"n": 2}\n')
    assert numbers(follower.new()) == [2]


def test_a_directory_that_became_a_file_is_no_line(tmp_path: Path) -> None:
    place = tmp_path / "run"
    place.mkdir()
    append(place / "lines.jsonl", '{"n": 1}\n')
    follower = Follower(place / "lines.jsonl")
    follower.new()
    (place / "lines.jsonl").unlink()
    place.rmdir()
    place.write_text("")
    assert follower.new() == []
    assert follower.restarted


def test_a_long_file_is_read_in_pieces_and_loses_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(200_000)))  # 3 MB
    follower, seen = Follower(path), []
    while True:
        lines = follower.new()
        assert len(lines) < 100_000
        seen += [line["n"] for line in lines]
        if not follower.more:
            break
    assert seen == list(range(200_000))
    assert follower.new() == []
