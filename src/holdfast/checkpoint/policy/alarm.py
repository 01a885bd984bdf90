"""The safety of training now: since when a durable state is wanted and missing, and what to do.

Pure: no disk and no clock. Times are seconds of one monotonic clock; what is told here comes from
the training thread and from the one that writes.
"""

from __future__ import annotations

import math
import threading

RETRY = 60.0  # seconds from a failed save to the next try: a full disk is not tried at every step
REPEAT = 10 * 60.0  # seconds until the same failure is worth another word
ESCALATE_AGAIN = 30 * 60.0  # seconds until a state that is still unsafe is said again


class Watch:
    """Knows what became of the saves that were asked for.

    `max_unsafe` minutes without a durable state that was wanted make training unsafe; 0: never.
    """

    def __init__(self, max_unsafe: float, now: float) -> None:
        self._limit = 60 * max_unsafe
        self._lock = threading.Lock()
        self._safe_at = now  # of the newest save that succeeded, or the beginning
        self._wanted_at: float | None = None  # when the oldest save was asked for that is not done
        self._failed_at = self._told_at = self._escalated_at = 0.0
        self._cause = ""
        self.failures = 0  # since the newest durable state
        self.reason = ""  # of the last of them
        self.alarmed = False  # True if it has been said that training is unsafe, and still is

    def asked(self, now: float) -> None:
        """Note that a save was asked for."""
        with self._lock:
            if self._wanted_at is None:
                self._wanted_at = now

    def failed(self, cause: str, reason: str, now: float) -> bool:
        """Note that a save has failed. Return True if a person should hear of it: the first time,
        for another cause than before, and again after `REPEAT` seconds."""
        with self._lock:
            news = not self.failures or cause != self._cause or now - self._told_at >= REPEAT
            self.failures += 1
            self._failed_at, self._cause, self.reason = now, cause, reason
            if news:
                self._told_at = now
            return news

    def saved(self, now: float, *, wanted: bool = False) -> tuple[int, float]:
        """Note that a state is durable, and was not found damaged when it was read back (it may be
        that the system could not read it). `wanted`: a newer one has been asked for already.

        Return how many saves had failed before it, and the seconds since the safe state before it.
        """
        with self._lock:
            over = self.failures, now - self._safe_at
            self._safe_at = now
            self._wanted_at = now if wanted else None
            self.failures, self.reason, self._cause, self.alarmed = 0, "", "", False
            return over

    def lost(self) -> None:
        """Note that what was durable is gone: another state is wanted as soon as possible."""
        with self._lock:
            self.failures += 1
            self._failed_at = -math.inf

    def retry_due(self, now: float) -> bool:
        """Return True if a save has failed and it is time to try again."""
        return self.failures > 0 and now - self._failed_at >= RETRY

    def unsafe(self, now: float) -> float:
        """Return the seconds since the newest durable state where saves have failed since it; where
        one is only slow, the seconds since it was asked for; 0.0 where nothing is wanted."""
        with self._lock:
            if self.failures:
                return max(0.0, now - self._safe_at)
            return 0.0 if self._wanted_at is None else max(0.0, now - self._wanted_at)

    def over_limit(self, now: float) -> bool:
        """Return True if training has been unsafe for the limit or longer."""
        return self._limit > 0 and self.unsafe(now) >= self._limit

    def escalate(self, now: float) -> tuple[bool, bool]:
        """Return two answers: is it time to say loudly that training is unsafe, and is that the
        first time since the newest durable state?"""
        if not self.over_limit(now):
            return False, False
        with self._lock:
            first, again = not self.alarmed, now - self._escalated_at >= ESCALATE_AGAIN
            if first or again:
                self.alarmed, self._escalated_at = True, now
            return first or again, first
