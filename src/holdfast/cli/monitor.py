"""The command line of the terminal monitor; what it shows is in holdfast.monitor. No torch."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from holdfast.cli import common
from holdfast.errors import ConfigError, HoldfastError
from holdfast.i18n import N_, _
from holdfast.manage.rundir import look

_MEASURED = 0.2  # seconds over which `--once` measures the load of the CPU


def run_monitor(argv: Sequence[str], prog: str) -> int:
    """Run `holdfast monitor`: 0. With `--once` 0 where training goes on or is finished, 9 where a
    run has stopped before its end, 10 where one trains and cannot save; of several the highest."""
    parser = common.parser(
        prog,
        _(
            "Watch a training: loss, progress, checkpoints, what would be lost now, disk, machine. "
            "Only reads the run directory, so it works over SSH and never disturbs the training. "
            "With --once: 0 training or finished, 9 stopped before the end, 10 saving fails."
        ),
        _(
            "Examples:\n  {prog}\n  {prog} runs\n  {prog} runs/a --once\n  {prog} runs/a --json",
            prog=prog,
        ),
    )
    parser.add_argument(
        "directory",
        nargs="?",
        default=common.DIRECTORY,
        metavar="DIR",
        help=_(
            "run directory, or one that holds several (default: {value})", value=common.DIRECTORY
        ),
    )
    parser.add_argument(
        "--once", action="store_true", help=_("print one snapshot and exit; --json does so too")
    )
    given = parser.parse_args(argv)
    if given.once or given.json:
        return _once(given)
    return _watch(given, prog)


def _once(given: argparse.Namespace) -> int:
    from holdfast.monitor.machine import Probe
    from holdfast.monitor.run_view import EMPTY, RunView
    from holdfast.monitor.terminal import words
    from holdfast.monitor.terminal.snapshot import take
    from holdfast.monitor.terminal.watcher import runs_in

    root = Path(given.directory)
    views = [RunView(run) for run in runs_in(root)]
    for view in views:
        view.refresh()
    if all(view.state == EMPTY for view in views):
        look(root, cached=True)  # says what is wrong with it
        raise HoldfastError(
            "There is no run in {directory} yet. Name the directory that "
            "--checkpoint-dir named for the training.",
            directory=root,
        )
    probe = Probe()
    for view in views:  # a process is measured from the first question on
        take(view, probe)
    time.sleep(_MEASURED)
    taken = [take(view, probe) for view in views]
    if given.json:
        common.show_json({"runs": [snapshot.to_json() for snapshot in taken]})
    else:
        for i, snapshot in enumerate(taken):
            common.show([*([""] if i else []), *words.lines(snapshot)])
    return max(snapshot.exit_status for snapshot in taken)


def _watch(given: argparse.Namespace, prog: str) -> int:
    streams = (sys.stdin, sys.stdout, sys.stderr)  # Textual draws on the last
    if not all(stream.isatty() for stream in streams) or os.environ.get("TERM") == "dumb":
        raise ConfigError(
            "{prog} needs a terminal; for a pipe or a script: {prog} --once", prog=prog
        )
    root = Path(given.directory)
    if root.exists() and not root.is_dir():
        look(root, cached=True)
    try:
        import plotext  # noqa: F401 - here, where a missing package can be named

        from holdfast.monitor.terminal.screen import Monitor
    except ModuleNotFoundError as error:
        if (error.name or "holdfast").startswith("holdfast"):
            raise
        raise ConfigError(
            "{prog} needs the package {name}: pip install 'holdfast-train[desk]'; without it: "
            "{prog} --once",
            prog=prog,
            name=error.name,
        ) from error
    screen = Monitor(root)
    screen.run()
    return screen.return_code or 0  # 1 where it has failed: its result is then none


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    "monitor": (N_("watch a training on one screen"), run_monitor),
}
