"""Several threads at one piece of work, for as long as it takes; and threads that step back.

Not an executor's: those refuse new work once the main thread has ended, and a save that is under
way then is still to be finished. Not `threading.Thread` either: its `start` waits until the
new thread has begun, and blocks forever if that dies for lack of memory before its first line.
Without a new thread the caller does the work itself: nothing here waits for a thread that has not
begun.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import logging
import platform
import queue
import sys
import threading
from collections.abc import Callable
from functools import partial

log = logging.getLogger("holdfast")

Job = Callable[[], None]

BEGINS_WITHIN = 5.0  # seconds; a thread that has not by then has died of a lack of memory

IOPRIO_SET = {"x86_64": 251, "aarch64": 30}  # the number of the system call, by processor
_THIS_THREAD, _BEST_EFFORT, _LOWEST = 1, 2 << 13, 7  # linux/ioprio.h


def yield_the_disk() -> bool:
    """Give the reads and writes of this thread, and of those that it starts, the lowest priority.

    Return True if the system accepts it. Not every disk scheduler knows priorities.
    """
    number = IOPRIO_SET.get(platform.machine())
    if not sys.platform.startswith("linux") or number is None:
        return False
    return int(ctypes.CDLL(None).syscall(number, _THIS_THREAD, 0, _BEST_EFFORT | _LOWEST)) == 0


class Helper:
    """Run `work()` in a new thread without waiting for it to start.

    Raises `RuntimeError` or `MemoryError` where the system gives no thread.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self._change = threading.Condition()
        self._begun = self._over = False
        _thread.start_new_thread(self._run, ())

    @property
    def busy(self) -> bool:
        """True if the work has begun and is not done."""
        return self._begun and not self._over

    def begins(self, patience: float) -> bool:
        """Return True if the work has begun; if not within `patience` seconds, it never will."""
        with self._change:
            self._change.wait_for(lambda: self._begun or self._over, patience)
            if not self._begun:
                self._work, self._over = None, True
            return self._begun

    def finish(self, patience: float = 0.0) -> None:
        """Return when the work is done; if not begun within `patience` seconds, it never will."""
        self.begins(patience)
        with self._change:
            self._change.wait_for(lambda: self._over)

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds`; return True if the work is done."""
        with self._change:
            return self._change.wait_for(lambda: self._over, seconds)

    def _run(self) -> None:
        with self._change:
            if self._over:
                return
            self._begun = True
            self._change.notify_all()
            work, self._work = self._work, None
        try:
            assert work is not None, "it is done once"
            work()
        finally:
            # Drop the reference before waiters are told: the thread ends a moment later than the
            # work, and would keep a state in memory until then.
            work = None
            with self._change:
                self._over = True
                self._change.notify_all()


class Worker:
    """Does jobs one after another in a thread of its own; in the caller's where there is none.

    The thread holds the queue and the job at hand, nothing else: an owner that is forgotten while
    nothing is under way is garbage. An exception of a job is logged.
    """

    def __init__(self, first: Callable[[], object] = bool) -> None:
        """`first` is called in the thread before any job."""
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._first = first
        self._helper: Helper | None = None

    def begin(self) -> None:
        """Begin the thread: now, since later there may be no memory for one."""
        if not _ending:
            with contextlib.suppress(RuntimeError, MemoryError):  # the system gives none
                self._helper = Helper(partial(_work, self._jobs, self._first))

    def submit(self, job: Job) -> None:
        """Have `job` done; where there is no thread it is done when this returns."""
        self._jobs.put(job)
        if self._helper is None or not self._helper.begins(BEGINS_WITHIN):
            self.finish()

    def stop(self) -> None:
        """Let the thread end when it has done its jobs. Nothing may be submitted afterwards."""
        self._jobs.put(None)

    def finish(self) -> None:
        """Return when every job is done; those submitted afterwards are done by their callers."""
        self._jobs.put(None)
        helper, self._helper = self._helper, None
        if helper is not None:
            helper.finish()
        while not self._jobs.empty():
            _do(self._jobs.get())


def end_workers() -> None:
    """Begin no worker's thread any more: the interpreter is about to stop all threads."""
    global _ending
    _ending = True


_ending = False


def _work(jobs: queue.SimpleQueue[Job | None], first: Callable[[], object]) -> None:
    first()
    while _do(jobs.get()):
        pass


def _do(job: Job | None) -> bool:
    """Do `job`; False for the last of all, which is none."""
    try:
        if job is not None:
            job()
    except BaseException:  # whatever it was: the next job is another save's
        log.exception("in a background thread")
    return job is not None


def together(
    work: Callable[[], None], count: int, *, stop: Callable[[], None] = lambda: None
) -> None:
    """Call `work` in up to `count` threads at once, the caller's among them; return when all are
    done.

    The first exception is raised when the others have ended; an interrupt of the caller calls
    `stop` first, so that they do. Fewer threads do where the system gives no more, or where the
    caller is done before they have begun: `work` must take its share from a common store.
    """
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            errors.append(error)
            stop()  # the others may be waiting for what this one has not done

    helpers: list[Helper] = []
    for _number in range(count - 1):
        try:
            helpers.append(Helper(guarded))
        except (RuntimeError, MemoryError):  # no more threads, or the interpreter is ending
            break
    guarded()
    try:
        for helper in helpers:
            helper.finish()
    except BaseException:  # an interrupt: no thread may work on what the caller gives up
        stop()
        for helper in helpers:
            helper.finish()
        raise
    if errors:
        raise errors[0]
