"""Freeze whatever makes two runs of the same code differ, for this process and its forks.

Only the standard library, torch, the 17 public names of `holdfast` and its version are touched, so
that files of the package may move and internals may be renamed. Import it before the package is
used.
"""

from __future__ import annotations

import concurrent.futures  # noqa: F401
import datetime
import platform
import queue  # noqa: F401 - takes its own reference to the real clock, as threading does
import shutil
import socket
import subprocess  # noqa: F401
import threading  # noqa: F401
import time
import uuid
from collections.abc import Callable
from functools import wraps
from typing import Any

ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "default",  # torch's kernels for any x86 processor
    "COLUMNS": "100",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HOLDFAST_CACHE": "cache",
    "HOLDFAST_DEVICE": "cpu",
    "LC_ALL": "C.UTF-8",
    "MKL_CBWR": "COMPATIBLE",  # the same sums on every x86 processor
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TERM": "dumb",
    "TOKENIZERS_PARALLELISM": "false",
    "TZ": "UTC",
}
# Of the tester's own, none of these reaches the walk.
DROPPED = ("HOLDFAST_", "LANG", "LC_", "FORCE_COLOR", "NO_COLOR", "CLICOLOR", "TTY_", "XDG_",
           "GITHUB_", "LINES", "TORCH_", "KMP_", "PYTHONWARNINGS", "LLM_")  # fmt: skip

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc).timestamp()


class Clock:
    """Seconds since the first start. They pass when the walk says so, never by themselves."""

    def __init__(self) -> None:
        self.start = self.drawn = 0  # starts of a training so far; ids drawn in this one
        self.elapsed = 0.0

    def new_start(self) -> None:
        """An hour later another process of the user begins."""
        self.start, self.drawn, self.elapsed = self.start + 1, 0, 3600.0 * (self.start + 1)

    def wall(self) -> float:
        return START + self.elapsed

    def since_boot(self) -> float:
        return 1000.0 + self.elapsed


clock = Clock()
_datetime, _strftime, _localtime, _gmtime = (
    datetime.datetime, time.strftime, time.localtime, time.gmtime,
)  # fmt: skip


class _FrozenDatetime(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return cls.fromtimestamp(clock.wall(), tz)


ID = r"(?<![0-9a-f])901d[0-9a-f]{4}(?:4000a000[0-9a-f]{16})?(?![0-9a-f])"  # or its first 8


def _uuid4() -> uuid.UUID:
    """Return an id that `ID` finds again: records name ids by the order in which they appear, for
    how many were drawn in vain is nothing that a user sees."""
    clock.drawn += 1
    return uuid.UUID(hex=f"901d{clock.start:01x}{clock.drawn:03x}4000a000{0:016x}")


def freeze() -> None:
    """Replace clocks, ids, versions, and what the machine says of itself."""
    from holdfast import version

    version.__version__ = "0"
    nanoseconds: Callable[[Callable[[], float]], Callable[[], int]]
    nanoseconds = lambda get: lambda: int(get() * 1e9)  # noqa: E731
    time.time, time.monotonic, time.perf_counter = clock.wall, clock.since_boot, clock.since_boot
    time.time_ns = nanoseconds(clock.wall)
    time.monotonic_ns = time.perf_counter_ns = nanoseconds(clock.since_boot)
    time.process_time = time.thread_time = lambda: 0.0
    time.localtime = lambda seconds=None: _localtime(clock.wall() if seconds is None else seconds)
    time.gmtime = lambda seconds=None: _gmtime(clock.wall() if seconds is None else seconds)
    time.strftime = lambda form, when=None: _strftime(form, when or time.localtime())
    datetime.datetime = _FrozenDatetime  # type: ignore[misc]
    uuid.uuid4 = _uuid4
    socket.gethostname = lambda: "host"
    platform.python_version = lambda: "3.12.0"
    which = shutil.which
    shutil.which = lambda cmd, *rest, **more: None if cmd == "git" else which(cmd, *rest, **more)  # type: ignore[assignment]


def freeze_versions() -> None:
    """Call it when everything is imported: some packages ask for torch's version to adapt to it."""
    import torch

    torch.__version__ = "2.13.0"  # type: ignore[misc]


def one_at_a_time() -> None:
    """Let a training wait for each save: else it depends on the disk which temporary ones are
    dropped. Let a quarter of a second pass at each step of an optimizer."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from holdfast import CheckpointManager

    def then_wait(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            self.wait()
            return result

        return call

    for name in ("after_step", "end_epoch", "save_async"):
        setattr(CheckpointManager, name, then_wait(getattr(CheckpointManager, name)))

    def tick(*_args: Any) -> None:
        clock.elapsed += 0.25

    register_optimizer_step_post_hook(tick)
