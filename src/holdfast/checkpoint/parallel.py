"""Several threads at one piece of work, for as long as it takes; and threads that step back.

Plain threads, not an executor: those refuse new work once the main thread has ended, and a save
that is under way then is still to be finished.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import threading
from collections.abc import Callable

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}  # the number of the system call, by processor
_THIS_THREAD, _BEST_EFFORT, _LOWEST = 1, 2 << 13, 7  # linux/ioprio.h


def yield_the_disk() -> bool:
    """Let the reads and writes of this thread, and of those that it starts, come after everybody
    else's, where the disk's scheduler knows priorities; whether the system has taken note."""
    number = _IOPRIO_SET.get(platform.machine())
    if not sys.platform.startswith("linux") or number is None:
        return False
    return int(ctypes.CDLL(None).syscall(number, _THIS_THREAD, 0, _BEST_EFFORT | _LOWEST)) == 0


def together(
    work: Callable[[], None], count: int, *, stop: Callable[[], None] = lambda: None
) -> None:
    """Call `work` in `count` threads at once, the caller's among them; return when all are done.

    The first exception is raised when the others have ended; an interrupt of the caller calls
    `stop` first, so that they do. Fewer threads do where the system gives no more: `work` must take
    its share from a common store.
    """
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            errors.append(error)

    threads: list[threading.Thread] = []
    for _thread in range(count - 1):
        thread = threading.Thread(target=guarded, name="holdfast-together")
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the interpreter is ending
            break
        threads.append(thread)
    guarded()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # an interrupt: nobody may work on what the caller gives up
        stop()
        for thread in threads:
            thread.join()
        raise
    if errors:
        raise errors[0]
