"""When training is unsafe, when to try again, and what a person should hear; pure."""

from __future__ import annotations

from holdfast.checkpoint.policy.alarm import ESCALATE_AGAIN, REPEAT, RETRY, Watch


def test_without_a_wanted_save_nothing_is_unsafe_however_long_it_takes() -> None:
    watch = Watch(10, 0.0)
    assert watch.unsafe(1e6) == 0
    assert watch.escalate(1e6) == (False, False)
    assert not watch.retry_due(1e6)


def test_what_counts_is_the_time_since_the_newest_durable_state() -> None:
    """An epoch of five hours whose checkpoint fails: five hours would be lost now."""
    watch = Watch(60, 0.0)
    watch.asked(5 * 3600.0)
    assert not watch.over_limit(5 * 3600.0)
    watch.failed("ENOSPC", "full", 5 * 3600.0)
    assert watch.unsafe(5 * 3600.0) == 5 * 3600
    assert watch.escalate(5 * 3600.0) == (True, True)


def test_a_save_that_does_not_end_is_unsafe_from_when_it_was_asked_for() -> None:
    watch = Watch(10, 0.0)
    watch.asked(1000.0)
    watch.asked(1200.0)
    assert not watch.over_limit(1599.0)
    assert watch.over_limit(1600.0)
    watch.saved(1700.0, wanted=True)
    assert not watch.over_limit(2299.0)
    assert watch.over_limit(2300.0), "the newer one hangs as well"
    watch.saved(2400.0)
    assert watch.unsafe(1e6) == 0


def test_it_is_said_once_again_after_a_while_and_anew_the_next_time() -> None:
    watch = Watch(1, 0.0)
    watch.failed("EIO", "broken", 10.0)
    said = [now for now in range(0, 4 * int(ESCALATE_AGAIN), 10) if watch.escalate(float(now))[0]]
    assert said == [60 + i * int(ESCALATE_AGAIN) for i in range(4)]
    watch.saved(1e5)
    watch.failed("EIO", "broken", 1e5 + 30)
    assert watch.escalate(1e5 + 60) == (True, True)


def test_zero_means_never() -> None:
    watch = Watch(0, 0.0)
    watch.failed("EIO", "broken", 0.0)
    assert watch.escalate(1e9) == (False, False)


def test_a_failure_is_news_once_for_another_cause_and_after_a_while() -> None:
    watch = Watch(0, 0.0)
    assert watch.failed("ENOSPC", "3 MB free", 0.0)
    assert not watch.failed("ENOSPC", "2 MB free", 60.0)
    assert watch.failed("EROFS", "read-only", 120.0)
    assert not watch.failed("EROFS", "read-only", 180.0)
    assert watch.failed("EROFS", "read-only", 120.0 + REPEAT)
    assert watch.saved(2000.0) == (5, 2000.0)
    assert watch.failed("EROFS", "read-only", 2001.0), "it had worked meanwhile"


def test_a_retry_is_due_a_minute_after_each_failure_and_after_a_loss_at_once() -> None:
    watch = Watch(0, 0.0)
    watch.failed("EIO", "broken", 100.0)
    assert not watch.retry_due(99.9 + RETRY)
    assert watch.retry_due(100.0 + RETRY)
    watch.failed("EIO", "broken", 200.0)
    assert not watch.retry_due(100.0 + RETRY + 50)
    watch.saved(300.0)
    assert not watch.retry_due(1e6)
    watch.lost()
    assert watch.retry_due(301.0)


def test_a_clock_that_stands_or_goes_back_makes_no_negative_time() -> None:
    watch = Watch(1, 1000.0)
    watch.failed("EIO", "broken", 1000.0)
    assert watch.unsafe(10.0) == 0
