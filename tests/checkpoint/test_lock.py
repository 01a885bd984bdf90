"""Who works in a run directory: one process, named, and nobody once it is dead."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint import lock as lock_module
from holdfast.checkpoint.lock import FileLock
from holdfast.errors import RunLocked
from tests.support import die, in_child


def refused(path: Path) -> str:
    with pytest.raises(RunLocked) as error, FileLock(path):
        pass
    return str(error.value)


class Holder:
    """A forked process that holds a lock until it is told to go, or killed."""

    def __init__(self, path: Path) -> None:
        ready, tell = os.pipe()
        self._go, wait = None, None
        wait, self._go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with FileLock(path):
                os.write(tell, b"x")
                os.close(self._go)
                os.read(wait, 1)
            os._exit(0)
        os.close(wait)
        assert os.read(ready, 1) == b"x"

    def leave(self) -> None:
        os.close(self._go)
        os.waitpid(self.pid, 0)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._go)


def test_a_second_process_is_refused_and_told_who_owns_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / ".run.lock"
    holder = Holder(path)
    words = refused(path)
    assert f"process {holder.pid} on " in words
    assert str(path.parent) in words
    holder.leave()
    with FileLock(path) as held:
        assert held.held
    assert not held.held


def test_a_killed_owner_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / ".run.lock"
    Holder(path).kill()
    with FileLock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / ".run.lock"
    with FileLock(path):
        assert "this process" in refused(path)
        # Looking at the file and closing it again would have dropped a POSIX lock.
        assert in_child(lambda: refused(path)) == 0


def test_a_symlinked_path_is_the_same_lock(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "real")
    with FileLock(tmp_path / "real" / ".run.lock"):
        refused(tmp_path / "other" / ".run.lock")


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / ".catalog.lock"
    inside, most = 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _turn in range(5):
            with FileLock(path, wait=20):
                with guard:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.001)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_waiting_for_a_lock(tmp_path: Path) -> None:
    path = tmp_path / ".catalog.lock"
    holder = Holder(path)
    began = time.monotonic()
    with pytest.raises(RunLocked), FileLock(path, wait=0.1):
        pass
    assert time.monotonic() - began >= 0.1
    threading.Timer(0.1, holder.leave).start()
    with FileLock(path, wait=20):
        pass


def test_a_forked_child_neither_has_nor_frees_the_lock(tmp_path: Path) -> None:
    """A data-loader worker: with flock it would keep the lock of its dead parent."""
    path = tmp_path / ".run.lock"
    lock = FileLock(path)
    with lock:

        def child() -> None:
            assert not lock.held
            assert f"process {os.getppid()} on" in refused(path)
            lock.release()  # an inherited object, given up
            refused(path)

        assert in_child(child) == 0
        assert lock.held
        assert in_child(lambda: refused(path)) == 0


def test_a_child_that_outlives_its_parent_does_not_hold_the_lock(tmp_path: Path) -> None:
    path = tmp_path / ".run.lock"
    ready, tell = os.pipe()

    def owner() -> None:
        FileLock(path).acquire()
        if os.fork() == 0:
            os.write(tell, str(os.getpid()).encode())
            time.sleep(30)
            os._exit(0)
        time.sleep(0.05)
        die()

    assert in_child(owner) == -signal.SIGKILL
    grandchild = int(os.read(ready, 20))
    try:
        with FileLock(path):
            pass
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_a_full_disk_costs_the_name_and_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any) -> int:
        raise OSError(errno.ENOSPC, "full")

    path = tmp_path / ".run.lock"
    path.touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        lock = FileLock(path)
        lock.acquire()
    assert "this process" in refused(path)
    lock.release()
    lock.release()


def open_files() -> int:
    place = Path("/proc/self/fd")
    return len(list(place.iterdir())) if place.exists() else 0


def test_a_file_system_without_locks_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nolock(_fd: int) -> bool:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(lock_module, "_lock", nolock)
    before = open_files()
    with pytest.raises(OSError, match="no locks"), FileLock(tmp_path / ".run.lock"):
        pass
    assert open_files() == before, "no descriptor is left open"


@pytest.mark.parametrize("text", ["", "garbage", "[]", '{"pid": 1}', '{"since": "x"}', "\xff"])
def test_an_owner_that_cannot_be_read_is_unknown(tmp_path: Path, text: str) -> None:
    path = tmp_path / ".run.lock"
    holder = Holder(path)
    path.write_bytes(text.encode("latin-1"))
    assert "unknown process" in refused(path)
    holder.leave()


def test_a_lock_whose_file_is_gone_is_not_in_place_until_it_is_renewed(tmp_path: Path) -> None:
    path = tmp_path / ".run.lock"
    with FileLock(path) as held:
        assert held.in_place
        path.rename(tmp_path / "moved")
        assert not held.in_place
        path.touch()
        assert not held.in_place, "another file of that name"
        before = open_files()
        held.renew()
        assert held.held
        assert held.in_place
        assert open_files() == before
        assert in_child(lambda: refused(path)) == 0
        with FileLock(tmp_path / "moved"):
            pass
    with FileLock(path):
        pass


def test_a_lock_that_somebody_else_took_is_not_renewed(tmp_path: Path) -> None:
    path = tmp_path / ".run.lock"
    with FileLock(path) as held:
        path.unlink()
        holder = Holder(path)
        with pytest.raises(RunLocked, match=f"process {holder.pid}"):
            held.renew()
        assert held.held
        holder.leave()
        held.renew()
        assert held.in_place
