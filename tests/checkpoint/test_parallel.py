"""Threads that share a piece of work, and threads that let others go first."""

from __future__ import annotations

import _thread
import ctypes
import platform
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial

import pytest

from holdfast.checkpoint.system import threads
from holdfast.checkpoint.system.threads import Helper, together, yield_the_disk


def test_all_threads_take_part_and_all_work_is_done() -> None:
    left = deque(range(200))
    names: set[int] = set()

    def work() -> None:
        while left:
            left.pop()
            names.add(threading.get_ident())
            time.sleep(0.001)

    together(work, 3)
    assert not left
    assert len(names) == 3


def test_the_first_exception_is_raised_when_the_others_have_ended() -> None:
    ended = []
    begun = threading.Barrier(3)

    def work() -> None:
        begun.wait(20)
        if threading.current_thread() is threading.main_thread():
            raise OSError("mine")
        time.sleep(0.1)
        ended.append(1)

    with pytest.raises(OSError, match="mine"):
        together(work, 3)
    assert ended == [1, 1]


@pytest.mark.parametrize("begins", [True, False])
def test_who_is_done_holds_nothing_of_what_was_worked_on(
    monkeypatch: pytest.MonkeyPatch, begins: bool
) -> None:
    """The thread ends a moment later, and a state in memory would wait for that moment."""
    if not begins:
        monkeypatch.setattr(_thread, "start_new_thread", lambda *_args: None)
    state = {1}  # anything that a weak reference may point at
    held = weakref.ref(state)
    helper = Helper(partial(len, state))
    del state
    helper.finish(20 if begins else 0)
    assert held() is None


def test_a_system_without_more_threads_has_the_work_done_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    calls: list[int] = []
    together(lambda: calls.append(1), 4)
    assert calls == [1]


def test_nobody_waits_for_a_thread_that_died_before_its_first_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where memory has run out: the system gave a thread, and Python had nothing left for it."""
    begun: list[Callable[[], None]] = []
    monkeypatch.setattr(_thread, "start_new_thread", lambda run, _args: begun.append(run))
    calls: list[int] = []
    together(lambda: calls.append(1), 4)
    assert calls == [1]
    helper = Helper(lambda: calls.append(2))
    assert not helper.busy
    assert not helper.wait(0.01)
    helper.finish()
    begun[-1]()
    assert calls == [1], "what was finished before it had begun does nothing any more"


def test_an_interrupt_stops_the_others_first(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    def work() -> None:
        if threading.current_thread() is threading.main_thread():
            return
        assert stop.wait(20)

    finish = Helper.finish

    def interrupted(helper: Helper) -> None:
        if not stop.is_set():
            raise KeyboardInterrupt
        finish(helper)

    monkeypatch.setattr(Helper, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        together(work, 3, stop=stop.set)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a system call of Linux")
def test_threads_inherit_the_low_priority_of_the_disk_thread() -> None:
    if platform.machine() not in threads.IOPRIO_SET:
        pytest.skip(f"the number of the system call is not known for {platform.machine()}")
    get = threads.IOPRIO_SET[platform.machine()] + 1
    found: list[int] = []

    both = threading.Barrier(2)

    def look() -> None:
        both.wait(20)
        found.append(ctypes.CDLL(None).syscall(get, 1, 0))

    def gentle() -> None:
        assert yield_the_disk()
        together(look, 2)

    thread = threading.Thread(target=gentle)
    thread.start()
    thread.join()
    assert found == [2 << 13 | 7] * 2
    found.append(ctypes.CDLL(None).syscall(get, 1, 0))
    assert found[-1] != found[0], "the training thread keeps its own"
