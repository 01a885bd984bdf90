"""Signals become a flag and go back to whom they belonged; Ctrl-C is deferred, never swallowed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from holdfast.checkpoint.system.signals import SignalGuard, deferred_interrupt
from tests.support import in_child

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ALL}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ALL)
def test_a_signal_sets_the_flag(number: int) -> None:
    told: list[int] = []
    with SignalGuard(told.append) as guard:
        assert guard.requested is None
        send(number)
        assert guard.requested == number
        if number != signal.SIGINT:
            send(number)
    assert told == [number], "told once"


def test_a_second_interrupt_leaves_at_once() -> None:
    with SignalGuard() as guard:
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert guard.requested == signal.SIGINT


def test_handlers_that_were_there_are_called_and_given_back() -> None:
    called: list[int] = []

    def mine(number: int, _frame: FrameType | None) -> None:
        called.append(number)

    signal.signal(signal.SIGTERM, mine)
    with SignalGuard() as guard:
        send(signal.SIGTERM)
        assert (guard.requested, called) == (signal.SIGTERM, [signal.SIGTERM])
    assert signal.getsignal(signal.SIGTERM) is mine
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_what_is_ignored_stays_ignored() -> None:
    """nohup ignores SIGHUP: a closed terminal must not end the run."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with SignalGuard() as guard:
        send(signal.SIGHUP)
        assert guard.requested is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_handler_that_python_did_not_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGUSR1 else real(n))
    before = real(signal.SIGUSR1)
    with SignalGuard():
        assert real(signal.SIGUSR1) is before


def test_handlers_go_back_when_training_fails() -> None:
    with pytest.raises(ZeroDivisionError), SignalGuard():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def interrupted() -> None:
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_a_forked_child_dies_as_if_there_were_no_guard() -> None:
    with SignalGuard() as guard:
        assert in_child(lambda: send(signal.SIGTERM)) == -signal.SIGTERM
        assert in_child(interrupted) == 0
        assert guard.requested is None


def test_another_thread_may_hold_a_guard_that_guards_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with SignalGuard():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_guards_can_be_nested() -> None:
    with SignalGuard() as outer, SignalGuard() as inner:
        send(signal.SIGTERM)
        assert inner.requested == outer.requested == signal.SIGTERM


# ---------------------------------------------------------------------------------------- deferring


def test_an_interrupt_is_held_back_and_then_raised() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        with deferred_interrupt():
            send(signal.SIGINT)
            done.append("the rest of the block")
        done.append("never")
    assert done == ["the rest of the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_an_interrupt_nothing_happens() -> None:
    with deferred_interrupt():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_block_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError), deferred_interrupt():
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt) as error, deferred_interrupt():
        send(signal.SIGINT)
        raise ZeroDivisionError
    assert isinstance(error.value.__context__, ZeroDivisionError)


def test_a_handler_of_the_users_own_is_left_in_charge() -> None:
    called: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _frame: called.append(number))
    with deferred_interrupt():
        send(signal.SIGINT)
        assert called == [signal.SIGINT]


def test_deferring_twice_and_in_a_thread() -> None:
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():
        with deferred_interrupt():
            send(signal.SIGINT)
        inner_left = True
    assert inner_left
    thread = threading.Thread(target=lambda: deferred_interrupt().__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
