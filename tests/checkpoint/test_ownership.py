"""A manager that nobody can close does not keep its directory, nor anything else."""

from __future__ import annotations

import gc
import linecache
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast import CheckpointManager, load
from holdfast.checkpoint import manager
from holdfast.checkpoint.manager import run_lock
from holdfast.checkpoint.rundir import ownership, shared_memory
from holdfast.checkpoint.system import filesystem
from holdfast.errors import RunLocked, SaveFailed
from tests.support import Toy, assert_same, in_child, snapshot

shared = pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")


def open_files() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ----------------------------------------------------------------------------------- taking over


def test_a_cell_that_is_run_again_takes_over_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the old one had under way is finished first, and it saves nothing any more."""
    toy = Toy()
    toy.step()
    old = toy.manager(tmp_path, io_limit=4e4)
    pending = old.save_async(step=1)
    with caplog.at_level(logging.WARNING, "holdfast"):
        new = Toy(seed=5).manager(tmp_path)
    assert pending.settled.done()
    assert f"{tmp_path}: an earlier manager of this process has been closed" in caplog.text
    resumed = new.resume()
    assert resumed is not None
    assert resumed.step == 1
    for save in (
        lambda: old.save(step=2),
        lambda: old.save_async(step=2),
        lambda: old.after_step(2),
        old.resume,
    ):
        with pytest.raises(SaveFailed, match="A newer manager of this process works in"):
            save()
    old.close()
    assert new.save(step=2, strict=True) is not None
    new.close()


def test_an_old_manager_in_a_with_block_ends_without_disturbing_the_new_one(tmp_path: Path) -> None:
    with Toy().manager(tmp_path) as old:
        old.after_step(1)
        with Toy().manager(tmp_path) as new:
            new.resume()
            new.save(step=7, strict=True)
    assert load(tmp_path / "latest.pt", only="global_step") == 7


def test_an_old_manager_in_a_with_block_takes_no_signal_any_more(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Toy().manager(tmp_path) as old:
        old.after_step(1)
        with Toy().manager(tmp_path):
            assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_manager_of_another_living_thread_is_left_alone(tmp_path: Path) -> None:
    made, done = threading.Event(), threading.Event()
    found: list[Any] = []

    def train() -> None:
        engine = Toy().manager(tmp_path)
        found.append(engine)
        made.set()
        assert done.wait(20)
        found.append(engine.save(step=3, strict=True))

    thread = threading.Thread(target=train)
    thread.start()
    assert made.wait(20)
    with pytest.raises(RunLocked, match="Another thread of this process"):
        Toy().manager(tmp_path)
    done.set()
    thread.join()
    assert found[1] is not None
    Toy().manager(tmp_path).close()  # that thread has ended, though its manager is still there


def test_a_lock_of_this_process_is_not_blamed_on_another(tmp_path: Path) -> None:
    with run_lock(tmp_path), pytest.raises(RunLocked) as error:
        Toy().manager(tmp_path)
    assert "nother process" not in str(error.value)
    assert "this process" in str(error.value).lower()


# --------------------------------------------------------------------------------------- garbage


def test_garbage_gives_everything_back(tmp_path: Path) -> None:
    """Nobody holds it: lock, descriptors, threads, buffers and shared memory are free again."""

    def refused() -> None:
        with pytest.raises(RunLocked):
            run_lock(tmp_path).acquire()

    def use() -> None:
        toy = Toy()
        held: list[CheckpointManager] = []
        engine = toy.manager(
            tmp_path, memory_every=1, overlap=True, on_event=lambda *_event: held and None
        )
        held.append(engine)  # its own listener knows it, as a trainer's does
        engine.resume()
        for _step in range(3):
            toy.step()
            engine.after_step(toy.now)
        engine.save_async(step=toy.now)
        assert in_child(refused) == 0

    tasks = Path("/proc/self/task")
    use()
    before, threads = open_files(), len(list(tasks.iterdir()))
    eventually(lambda: run_lock_is_free(tmp_path))
    use()
    eventually(lambda: run_lock_is_free(tmp_path))
    eventually(lambda: open_files() <= before and len(list(tasks.iterdir())) <= threads)
    assert load(tmp_path / "latest.pt", only="global_step") == 6, "what was under way is finished"
    device, inode = tmp_path.stat().st_dev, tmp_path.stat().st_ino
    assert not [
        left for left in shared_memory.remains() if (left.device, left.inode) == (device, inode)
    ]


def run_lock_is_free(directory: Path) -> bool:
    gc.collect()
    try:
        with run_lock(directory):
            return True
    except RunLocked:
        return False


def test_a_new_manager_waits_for_what_garbage_has_under_way(tmp_path: Path) -> None:
    toy = Toy()
    toy.step()
    expected = snapshot(toy.state)
    toy.manager(tmp_path, io_limit=4e4).save_async(step=1)
    other = Toy(seed=9)
    with other.manager(tmp_path) as engine:
        resumed = engine.resume()
        assert resumed is not None
        assert_same(snapshot(other.state), expected)


def test_garbage_that_saves_for_too_long_is_named_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "PATIENCE", 0.1)
    Toy().manager(tmp_path, io_limit=4e4).save_async(step=1)
    with pytest.raises(RunLocked, match="An earlier manager of this process is still saving in"):
        Toy().manager(tmp_path)
    eventually(lambda: not run_lock(tmp_path).taken)
    with Toy().manager(tmp_path) as engine:
        assert engine.saved_step == 0
        assert engine.resume() is not None


# ------------------------------------------------------------------- interrupted at any moment


class Stop(BaseException):
    """What a signal handler of the user's own may raise, anywhere."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """An interrupt that is raised at any line, also between two that no signal can part, may leave
    a handler of ours: the next test begins with Python's own."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_at(moment: int, work: Callable[[], Any]) -> bool:
    """Raise `Stop` before the `moment`-th line of the engine that `work` runs in this thread;
    whether it came to that."""
    lines = 0
    place = str(Path(manager.__file__).parent)

    def trace(frame: Any, event: str, _argument: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(place):
            return None
        # No signal comes between a descriptor's note and its close; locks have tests of their own.
        # Nor between the last line of a `with` block and its exit, which counts as the first again.
        code = frame.f_code
        line = linecache.getline(code.co_filename, frame.f_lineno).strip()
        close = "os.close(" in line or line.startswith("with ")
        if code.co_filename.endswith("lock.py") or code.co_name == "__del__" or close:
            return trace
        if event == "line":
            lines += 1
            if lines == moment:
                sys.settrace(None)
                raise Stop
        return trace

    sys.settrace(trace)
    try:
        work()
    except Stop:
        return True
    finally:
        sys.settrace(None)
    return lines >= moment


def test_an_interrupt_anywhere_in_the_constructor_leaves_nothing_behind(tmp_path: Path) -> None:
    toy = Toy()
    toy.manager(tmp_path).close()
    descriptors = 0
    moment = 1
    while interrupt_at(moment, lambda: toy.manager(tmp_path)):
        with toy.manager(tmp_path) as engine:
            assert engine.saved_step == 0
        descriptors = descriptors or open_files()
        moment += 1 + moment // 15
    assert moment > 100
    eventually(lambda: open_files() <= descriptors)


def test_after_an_interrupt_anywhere_in_close_a_second_one_closes_nothing_else(
    tmp_path: Path,
) -> None:
    toy = Toy()
    moment = 1
    while True:
        engine = toy.manager(tmp_path)
        engine.save(step=1)
        interrupted = interrupt_at(moment, engine.close)
        mine = [os.open("/dev/null", os.O_RDONLY) for _each in range(8)]
        engine.close()
        for fd in mine:
            os.fstat(fd)
            os.close(fd)
        with run_lock(tmp_path):
            pass
        if not interrupted:
            break
        moment += 1 + moment // 15


@pytest.mark.parametrize("memory_every", [0, pytest.param(1, marks=shared)])
def test_an_interrupt_anywhere_in_a_save_leaves_a_manager_that_saves(
    tmp_path: Path, memory_every: int
) -> None:
    """No wait for a copy that nobody finishes, and no torn state on the disk."""
    toy = Toy()
    engine = toy.manager(tmp_path, memory_every=memory_every, overlap="always")
    engine.resume()
    moment, step = 1, 0
    while True:
        step += 1
        toy.step()
        interrupted = interrupt_at(moment, lambda: engine.save_async(step=step))  # noqa: B023
        toy.step()  # changes what was being saved
        step += 1
        expected = snapshot(toy.state)
        assert engine.save(step=step, strict=True) is not None
        saved = load(tmp_path / "latest.pt")
        assert_same(dict(saved["model"]), expected["model"])
        if not interrupted:
            break
        moment += 1 + moment // 10
    engine.close()
    assert moment > 100


def test_a_thread_that_cannot_be_had_costs_time_and_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import _thread

    def refuse(*_args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    toy = Toy()
    with toy.manager(tmp_path, memory_every=1, overlap="always") as engine:
        engine.resume()
        for _step in range(4):
            toy.step()
            engine.after_step(toy.now)
        assert engine.save_async(step=4).settled.done()
        toy.step()
        assert engine.save(step=5, strict=True) is not None


def test_one_buffer_in_memory_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the newest snapshot, which nothing would ever free: the disk is waited for."""
    if not shared_memory.usable():
        pytest.skip("no /dev/shm on this system")
    made: list[int] = []
    slot = shared_memory.MemoryTier.slot

    def one(tier: shared_memory.MemoryTier, capacity: int) -> Any:
        if made:
            raise OSError(28, "No space left on device")
        made.append(capacity)
        return slot(tier, capacity)

    monkeypatch.setattr(shared_memory.MemoryTier, "slot", one)
    toy = Toy()
    with toy.manager(tmp_path, memory_every=1) as engine:
        engine.resume()
        for _step in range(3):
            toy.step()
            engine.after_step(toy.now)
        signal.alarm(30)
        try:
            assert engine.save(step=3, strict=True) is not None
            toy.step()
            pending = engine.save_async(step=4)
            engine.wait()
        finally:
            signal.alarm(0)
        assert pending.durable.result() is not None


# ------------------------------------------------------------------------------- forked children


def test_a_forked_child_waits_for_no_thread_of_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step, `wait()` and `close()` in a child come back while the parent is in mid-save."""
    write, gate = filesystem.write_file, threading.Event()

    def slow(*args: Any, **keywords: Any) -> None:
        assert gate.wait(30)
        write(*args, **keywords)

    monkeypatch.setattr(filesystem, "write_file", slow)
    toy = Toy()
    toy.step()
    with toy.manager(tmp_path, overlap="always") as engine:
        pending = engine.save_async(step=1)

        def child() -> None:
            signal.alarm(20)
            toy.step()
            engine.wait()
            with pytest.raises(SaveFailed):
                engine.after_step(2)
            engine.close()

        assert in_child(child) == 0
        gate.set()
        assert pending.settled.result(30) is not None
