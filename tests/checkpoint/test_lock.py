"""Who works in a run directory: one process, named, and nobody once it is dead."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint.system.lock import FileLock
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
        assert in_child(lambda: refused(path)) == 0


def test_reading_or_copying_the_lock_file_does_not_drop_the_lock(tmp_path: Path) -> None:
    """A backup, an upload or an archive of the run directory, made by the training itself."""
    run = tmp_path / "run"
    with FileLock(run / ".run.lock"):
        shutil.copytree(run, tmp_path / "copy")
        with tarfile.open(tmp_path / "run.tar", "w") as archive:
            archive.add(run)
        (run / ".run.lock").read_bytes()
        with (run / ".run.lock").open("a"):
            pass
        assert in_child(lambda: refused(run / ".run.lock")) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="flock elsewhere")
def test_locks_of_earlier_versions_exclude_ours_and_are_excluded(tmp_path: Path) -> None:
    """Those are record locks of the process."""
    path = tmp_path / ".run.lock"
    with FileLock(path):

        def earlier() -> None:
            with path.open("r+b") as file, pytest.raises(BlockingIOError):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

        assert in_child(earlier) == 0
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        file = path.open("r+b")
        fcntl.lockf(file, fcntl.LOCK_EX)
        os.write(tell, b"x")
        time.sleep(60)
    os.read(ready, 1)
    try:
        refused(path)
        assert FileLock(path).taken
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not FileLock(path).taken


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can be asked")
def test_asking_takes_nothing_and_makes_nothing(tmp_path: Path) -> None:
    path = tmp_path / ".run.lock"
    assert not FileLock(path).taken
    assert not path.exists()
    holder = Holder(path)
    assert FileLock(path).taken
    assert not FileLock(path).in_this_process
    holder.leave()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            FileLock(path).owner()

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        for _time in range(500):
            with FileLock(path):
                pass
    finally:
        stop.set()
        asker.join()


def test_a_lock_file_that_is_removed_while_it_is_taken_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two processes would hold "the" lock, one of them of a file that nobody sees."""
    path = tmp_path / ".run.lock"
    real, removed = fcntl.fcntl, []

    def lock(fd: int, *args: Any) -> Any:
        if not removed:
            path.unlink()
            removed.append(fd)
        return real(fd, *args)

    monkeypatch.setattr(fcntl, "fcntl", lock)
    with FileLock(path) as held:
        assert held.in_place
        assert in_child(lambda: refused(path)) == 0


def test_without_locks_of_open_files_flock_does_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def old_kernel(*_args: Any) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    path = tmp_path / ".run.lock"
    monkeypatch.setattr(fcntl, "fcntl", old_kernel)
    with FileLock(path) as held:
        path.read_bytes()
        refused(path)
        assert in_child(lambda: refused(path)) == 0
        assert in_child(held.release) == 0
        assert in_child(lambda: refused(path)) == 0
    with FileLock(path):
        pass


def test_a_fork_in_the_middle_of_taking_a_lock_inherits_none(tmp_path: Path) -> None:
    """Data-loader workers are begun by one thread while another one saves."""
    path, stop = tmp_path / ".catalog.lock", threading.Event()

    def work() -> None:
        while not stop.is_set():
            with FileLock(path):
                pass

    worker = threading.Thread(target=work)
    worker.start()
    children = []
    try:
        for _time in range(30):
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
                os._exit(0)
            children.append(pid)
        stop.set()
        worker.join()
        with FileLock(path):
            pass
    finally:
        stop.set()
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


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
    def nolock(*_args: Any) -> int:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "fcntl", nolock)
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
