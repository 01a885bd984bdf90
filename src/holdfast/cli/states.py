"""The command line of single states: rollback, pin.

Arguments, questions and printing; what is decided and done lives in holdfast.manage. No torch.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from holdfast.checkpoint.system import run_lock
from holdfast.cli import common
from holdfast.errors import ConfigError
from holdfast.i18n import N_, _
from holdfast.manage import pin, rollback
from holdfast.manage.choosing import directory_of
from holdfast.manage.rundir import look
from holdfast.table import Screen, printable


def run_rollback(argv: Sequence[str], prog: str) -> int:
    """`holdfast rollback`: 0; 1 where the user said no; an error without a terminal or --yes."""
    parser = common.parser(
        prog,
        _(
            "Go back to an earlier checkpoint: it becomes the newest, and the next start of the "
            "training goes on from it in a new generation. What is newer goes to archive/; nothing "
            "is removed."
        ),
        _(
            "Examples:\n  {prog} 1500\n  {prog} best_model.pt runs/a --dry-run\n"
            "  {prog} runs/a/archive/5d2c91f0/generation_1/latest.pt",
            prog=prog,
        ),
    )
    _add_wanted(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help=_("show what would happen, and change nothing")
    )
    parser.add_argument("-y", "--yes", action="store_true", help=_("do not ask"))
    given = parser.parse_args(argv)
    if given.json and not (given.yes or given.dry_run):
        raise ConfigError("{prog} --json asks no questions: add --yes or --dry-run", prog=prog)
    directory = _directory(given)
    look(directory, cached=True)  # says what is wrong with it before a lock makes a file in it
    with nullcontext() if given.dry_run else run_lock(directory):
        return _roll_back(given, rollback.plan(directory, given.wanted), prog)


def _roll_back(given: argparse.Namespace, shown: rollback.Plan, prog: str) -> int:
    if not given.json:
        common.show(shown.lines(Screen.of(sys.stdout)))
    without = _(
        "{prog} changes nothing without being told: add --yes, there is no terminal to ask on",
        prog=prog,
    )
    if shown.changes and not given.dry_run:
        if not given.yes and not common.agreed(_("Go back? [y/N] "), without):
            common.show([_("Nothing was changed.")])
            return 1
        rollback.execute(shown)
    if given.json:
        common.show_json(shown.to_json(done=shown.changes and not given.dry_run))
    elif shown.changes and not given.dry_run:
        common.show(_outcome(shown, prog))
    return 0


def _outcome(shown: rollback.Plan, prog: str) -> list[str]:
    lines = [
        _(
            "Done: step {step} is the newest now; the next start of the training goes on from it.",
            step=shown.chosen.step,
        )
    ]
    path = rollback.undo(shown)
    if path is not None:
        lines.append(_("To undo it: {command}", command=f"{prog} {shlex.quote(str(path))}"))
    return [printable(line) for line in lines]


def run_pin(argv: Sequence[str], prog: str) -> int:
    """`holdfast pin`: 0, or 4 where there is no such checkpoint."""
    parser = common.parser(
        prog,
        _(
            "Keep a checkpoint for good: neither the training's own retention nor clean takes it, "
            "a temporary one included."
        ),
        _(
            "Examples:\n  {prog} model_epoch_3.pt\n  {prog} 1500 runs/a\n"
            "  {prog} --remove 1500 runs/a",
            prog=prog,
        ),
    )
    _add_wanted(parser)
    parser.add_argument("--remove", action="store_true", help=_("let it go again"))
    given = parser.parse_args(argv)
    done = pin.pin(_directory(given), given.wanted, remove=given.remove)
    if given.json:
        common.show_json(done.to_json())
    else:
        common.show([done.line()])
    return 0


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    "rollback": (N_("go back to an earlier checkpoint; nothing is removed"), run_rollback),
    "pin": (N_("keep a checkpoint for good"), run_pin),
}


def _add_wanted(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "wanted", metavar="STEP|FILE", help=_("a step, or the name of a checkpoint")
    )
    parser.add_argument(
        "directory",
        nargs="?",
        metavar="DIR",
        help=_("run directory (default: that of FILE, else {value})", value=common.DIRECTORY),
    )


def _directory(given: argparse.Namespace) -> Path:
    """Return the directory that was given, else that of the file."""
    return Path(given.directory or directory_of(given.wanted) or common.DIRECTORY)
