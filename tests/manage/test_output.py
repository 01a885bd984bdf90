"""Files that the user names: whole or not at all, and what is no plain file is written through."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from holdfast.manage.output import write_output


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_bytes(b"old and longer")
    write_output(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["out.csv"]
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(FileNotFoundError) as raised:
        write_output(tmp_path / "no" / "out.csv", b"new")
    assert raised.value.filename == str(tmp_path / "no" / "out.csv")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """/dev/stdout is one: replaced by a file it would be gone for the whole machine."""
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    write_output(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_output(pipe, b"data")
    reader.join(10)
    assert got == [b"data"] and pipe.is_fifo()
