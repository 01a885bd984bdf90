"""The door to the disk: whole files or none, in the order that durability hangs on."""

from __future__ import annotations

import errno
import mmap
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint.system import filesystem
from holdfast.checkpoint.system.filesystem import (
    append_line,
    free_bytes,
    make_directory,
    move,
    publish,
    remove,
    replacing,
    same_data,
    sync_directory,
    temporaries,
    write_file,
    write_json,
)


def put(path: Path, data: bytes) -> Path:
    write_file(path, [(0, data)], len(data))
    return path


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def failing(number: int) -> Callable[..., Any]:
    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


# ------------------------------------------------------------------------------------- whole files


def test_a_file_is_written_whole_and_read_only(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_file(path, [(0, b"abc"), (3, memoryview(b"def")), (6, bytearray(b"g"))], 7)
    assert path.read_bytes() == b"abcdefg"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert names(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("size", [4096, 5000], ids=["pages", "no whole pages"])
def test_bytes_are_written_only_after_they_were_said_to_be_final(tmp_path: Path, size: int) -> None:
    """Whatever the buffer's size: a file that is not sealed by then would be a damaged one."""
    data, asked = mmap.mmap(-1, 8192), []

    def seal(end: int) -> None:
        asked.append(end)
        data[:end] = b"s" * end

    view = memoryview(data)[:size]
    write_file(tmp_path / "a.pt", [(0, view)], size, ready=seal)
    assert (tmp_path / "a.pt").read_bytes() == b"s" * size
    assert asked == [size]


def test_ranges_are_written_where_they_belong_and_nothing_else_is_touched(tmp_path: Path) -> None:
    path, pages = tmp_path / "a.pt", memoryview(mmap.mmap(-1, 5 * 4096))
    pages[:] = b"n" * len(pages)
    asked: list[int] = []
    path.write_bytes(b"o" * 8 * 4096)
    with path.open("r+b") as file:
        ranges = [(4096, pages[:8192]), (5 * 4096, pages[4096:8192])]
        filesystem.write_ranges(file.fileno(), ranges, ready=asked.append)
    expected = "onnoonoo"
    assert path.read_bytes().decode() == "".join(letter * 4096 for letter in expected)
    assert asked == [3 * 4096, 6 * 4096], "each is final before it is written"


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = put(tmp_path / "a.pt", b"old")
    with path.open("rb") as reader:
        put(path, b"new, and longer")
        assert reader.read() == b"old", "who had it open still reads the old one"
    assert path.read_bytes() == b"new, and longer"


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_file(path, [(0, b"")], 0)
    assert path.read_bytes() == b""


def test_a_file_of_any_length_has_its_name_when_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, calls = put(tmp_path / "a.tar", b"old"), []
    for name in ("sync_file", "rename", "sync_directory"):
        original = getattr(filesystem, name)

        def noted(*given: Any, name: str = name, original: Callable[..., Any] = original) -> Any:
            calls.append(name)
            return original(*given)

        monkeypatch.setattr(filesystem, name, noted)
    with replacing(target) as file:
        file.write(b"new, and ")
        file.write(b"longer")
        assert target.read_bytes() == b"old" and calls == []
        file.seek(0)
        assert file.read() == b"new, and longer", "it can be read back before it has its name"
    assert target.read_bytes() == b"new, and longer" and names(tmp_path) == ["a.tar"]
    assert calls == ["sync_file", "rename", "sync_directory"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_where_that_fails_the_old_one_stays_and_no_other(
    tmp_path: Path, error: BaseException
) -> None:
    target = put(tmp_path / "a.tar", b"old")
    with pytest.raises(type(error)), replacing(target) as file:
        file.write(b"half")
        raise error
    assert target.read_bytes() == b"old" and names(tmp_path) == ["a.tar"]


SEAMS = ["posix_fallocate", "pwrite", "fchmod", "fsync"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", SEAMS)
def test_a_failing_call_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    path = put(tmp_path / "a.pt", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(number))
        with pytest.raises(OSError) as error:
            put(path, b"new")
    assert error.value.errno == number
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.pt"]


def test_a_failing_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "a.pt", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            put(path, b"new")
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["a.pt"])


def test_a_failing_sync_of_the_directory_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def only_files(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, "directory")
        real(fd)

    monkeypatch.setattr(os, "fsync", only_files)
    with pytest.raises(OSError, match="directory"):
        put(tmp_path / "a.pt", b"new")
    assert not list(temporaries(tmp_path))


def test_a_file_system_that_cannot_sync_directories_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def only_files(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not here")
        real(fd)

    monkeypatch.setattr(os, "fsync", only_files)
    put(tmp_path / "a.pt", b"new")


def test_an_interrupt_leaves_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path / "a.pt", b"new")
    assert names(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:3], at))
    data = bytes(range(100))
    assert put(tmp_path / "a.pt", data).read_bytes() == data


def test_a_write_of_zero_bytes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_args: 0)
    with pytest.raises(OSError, match="zero bytes"):
        put(tmp_path / "a.pt", b"abc")
    assert names(tmp_path) == []


def test_large_pieces_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux writes at most 2 GiB a call."""
    monkeypatch.setattr(filesystem, "WRITE_MAX", 10)
    data = bytes(range(95))
    assert put(tmp_path / "a.pt", data).read_bytes() == data


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_space_that_cannot_be_claimed_ahead_is_written_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(number))
    assert put(tmp_path / "a.pt", b"abc").read_bytes() == b"abc"


def test_claiming_space_can_be_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_DISABLE", "reflink,fallocate")
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    assert put(tmp_path / "a.pt", b"abc").read_bytes() == b"abc"


@pytest.mark.parametrize(
    "name",
    ["a" * 252 + ".pt", "检查点" * 27 + ".pt", "two words\tand a tab.pt", "-rf.pt", "'\"$x`.pt",
     "line\nbreak.pt", os.fsdecode(b"\xff\xfe.pt")],
    ids=["255 bytes", "Chinese", "spaces", "dash", "quotes", "newline", "no UTF-8"],
)  # fmt: skip
def test_names_of_any_kind(tmp_path: Path, name: str) -> None:
    path = put(tmp_path / name, b"abc")
    assert publish(path, tmp_path / "latest.pt") == "link"
    moved = move(path, tmp_path / "quarantine" / name)
    assert moved.read_bytes() == b"abc"
    remove(moved)
    assert names(tmp_path) == ["latest.pt", "quarantine"]


def test_a_symlink_in_place_of_the_temporary_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    trap = tmp_path / ".holdfast-trap.tmp"
    trap.symlink_to(victim)
    monkeypatch.setattr(filesystem, "temporary_name", lambda *_arguments: trap)
    with pytest.raises(FileExistsError):
        put(tmp_path / "a.pt", b"evil")
    with pytest.raises(FileExistsError):
        publish(victim, tmp_path / "b.pt", copy=True)
    assert victim.read_bytes() == b"precious"


def test_a_symlink_in_place_of_the_history_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "events.jsonl").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        append_line(tmp_path / "events.jsonl", "evil")
    assert victim.read_bytes() == b"precious"


def test_temporaries_are_known_by_their_names(tmp_path: Path) -> None:
    (tmp_path / ".holdfast-1-abc.tmp").touch()
    (tmp_path / "a.pt").touch()
    assert [p.name for p in temporaries(tmp_path)] == [".holdfast-1-abc.tmp"]
    assert list(temporaries(tmp_path / "missing")) == []


# ------------------------------------------------------------------------------------------- names


def test_names_are_links_to_one_inode(tmp_path: Path) -> None:
    source = put(tmp_path / "a.pt", b"abc")
    assert publish(source, tmp_path / "latest.pt") == "link"
    assert same_data(source, tmp_path / "latest.pt")
    assert source.stat().st_nlink == 2


def test_replacing_a_link_by_a_link_to_the_same_inode_leaves_no_stray_name(tmp_path: Path) -> None:
    """rename(2) between two names of one inode does nothing and leaves both."""
    source = put(tmp_path / "a.pt", b"abc")
    for _again in range(3):
        assert publish(source, tmp_path / "latest.pt") == "link"
    assert names(tmp_path) == ["a.pt", "latest.pt"]
    assert source.stat().st_nlink == 2


def test_without_links_there_are_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_DISABLE", "hardlinks,reflink")
    source = put(tmp_path / "a.pt", b"abc" * 1000)
    copy = tmp_path / "latest.pt"
    assert publish(source, copy) == "copy"
    assert not same_data(source, copy)
    assert copy.read_bytes() == source.read_bytes()
    assert stat.S_IMODE(copy.stat().st_mode) == 0o444
    assert publish(source, tmp_path / "other.pt", copy=False) == ""
    assert names(tmp_path) == ["a.pt", "latest.pt"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP])
def test_links_that_are_refused_become_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", failing(number))
    source = put(tmp_path / "a.pt", b"abc")
    assert publish(source, tmp_path / "latest.pt") in ("reflink", "copy")
    assert (tmp_path / "latest.pt").read_bytes() == b"abc"


@pytest.mark.parametrize("call", ["sendfile", "fsync"])
def test_a_copy_that_fails_leaves_the_old_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setenv("HOLDFAST_DISABLE", "hardlinks,reflink")
    source, name = put(tmp_path / "a.pt", b"new"), put(tmp_path / "latest.pt", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(errno.ENOSPC))
        with pytest.raises(OSError, match="space"):
            publish(source, name)
    assert name.read_bytes() == b"old"
    assert names(tmp_path) == ["a.pt", "latest.pt"]


def test_publishing_what_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "gone.pt", tmp_path / "latest.pt")
    assert names(tmp_path) == []


def test_same_data_of_what_is_not_there(tmp_path: Path) -> None:
    assert not same_data(tmp_path / "a", tmp_path / "b")


def test_moving_never_overwrites(tmp_path: Path) -> None:
    first, second = put(tmp_path / "a.pt", b"1"), put(tmp_path / "b.pt", b"2")
    target = tmp_path / "archive" / "deep" / "a.pt"
    assert move(first, target) == target
    other = move(second, target)
    assert other != target
    assert (target.read_bytes(), other.read_bytes()) == (b"1", b"2")


def test_removing_twice_is_no_error(tmp_path: Path) -> None:
    path = put(tmp_path / "a.pt", b"abc")
    remove(path)
    remove(path)
    assert names(tmp_path) == []


def test_directories_are_made_with_their_parents(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    make_directory(deep)
    make_directory(deep)
    assert deep.is_dir()
    sync_directory(deep)
    assert free_bytes(deep) > 0


# -------------------------------------------------------------------------------------- small files


def test_lines_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_line(path, "one")
    append_line(path, "zwei 二")
    assert path.read_text("utf-8") == "one\nzwei 二\n"


def test_a_torn_last_line_is_closed_first(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"whole": 1}\n{"to')
    append_line(path, '{"next": 2}')
    assert path.read_bytes() == b'{"whole": 1}\n{"to\n{"next": 2}\n'


def test_json_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metadata.json"
    write_json(path, {"a": "汉"})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            write_json(path, {"b": 1})
    assert "汉" in path.read_text("utf-8")
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600


# ------------------------------------------------------------------------------------------- order


def calls_of_a_save(tmp_path: Path) -> list[str]:
    """The system calls of one write and its links, as the kernel saw them."""
    code = """
import sys
from pathlib import Path
from holdfast.checkpoint.system.filesystem import publish, sync_directory, write_file
here = Path(sys.argv[1])
write_file(here / "a.pt", [(0, b"x" * 5000), (5000, b"y")], 5001)
publish(here / "a.pt", here / "latest.pt")
sync_directory(here)
"""
    log = tmp_path / "trace"
    run = tmp_path / "run"
    run.mkdir()
    wanted = "pwrite64,fsync,fdatasync,rename,renameat,renameat2,link,linkat,fallocate,fchmod"
    subprocess.run(
        ["strace", "-f", "-y", "-e", f"trace={wanted}", "-o", log, sys.executable, "-c", code, run],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    calls = []
    for line in log.read_text().splitlines():
        found = re.match(r"\d+ +(\w+)\((.*)", line)
        if found and str(run) in line:
            is_directory = f"<{run}>)" in found[2]
            name = found[1].replace("renameat2", "rename").replace("linkat", "link")
            calls.append(f"{name} directory" if is_directory else name)
    return calls


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_data_then_sync_then_name_then_sync_of_the_directory(tmp_path: Path) -> None:
    assert calls_of_a_save(tmp_path) == [
        "fallocate", "pwrite64", "pwrite64", "fchmod", "fsync", "rename", "fsync directory",
        "link", "rename", "fsync directory",
    ]  # fmt: skip


def test_the_order_at_the_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without strace: at the one door through which every call goes."""
    said: list[str] = []

    def spy(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            said.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    for name in ("allocate", "write_all", "sync_file", "rename", "sync_directory"):
        spy(filesystem, name)
    put(tmp_path / "a.pt", b"abc")
    assert said == ["allocate", "write_all", "sync_file", "rename", "sync_directory"]
