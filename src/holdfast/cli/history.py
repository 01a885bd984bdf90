"""The command line of `holdfast history`: arguments and printing; manage/history.py has the table,
monitor/curves.py what is drawn."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.cli.common import add_directories, parser, show, show_json
from holdfast.cli.parsing import Parser
from holdfast.errors import HoldfastError
from holdfast.i18n import N_, _
from holdfast.manage import history
from holdfast.manage.rundir import look
from holdfast.monitor.run_view import RunView
from holdfast.table import Screen, printable

if TYPE_CHECKING:
    from holdfast.monitor.curves import Curves


def run_history(argv: Sequence[str], prog: str) -> int:
    """`holdfast history`: 0, or an error that names the directories that are not there."""
    given = _history_parser(prog).parse_args(argv)
    found: list[history.History] = []
    views: list[RunView] = []
    problems = []
    for directory in given.directories:
        try:
            run = look(directory, cached=True)
            view = RunView(run.directory)
            view.refresh()
            told = replace(history.history_of(run), state=view.state, ends=view.ends)
            views.append(view)
            found.append(told)
        except HoldfastError as error:
            problems.append(str(error))
    if given.csv is not None and found:
        history.write_csv(found, given.csv)
    if given.json:
        records = [one.to_json() for one in found]
        one_run = records and len(given.directories) == 1
        show_json(records[0] if one_run else {"directories": records})
    else:
        _print_tables(found, several=len(given.directories) > 1, everything=given.events)
    if views:
        _plot(views, given)
    if problems:
        raise HoldfastError("\n".join(problems))
    return 0


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    "history": (N_("show the epochs of a run and what happened to it"), run_history),
}


def _history_parser(prog: str) -> Parser:
    made = parser(
        prog,
        _(
            "Show the epochs of runs and what happened to them: interruptions, resumes, damage; "
            "and the curves of the losses."
        ),
        _(
            "Examples:\n  {prog}\n  {prog} runs/a runs/b\n"
            "  {prog} runs/a --events --no-plot\n  {prog} --csv losses.csv",
            prog=prog,
        ),
    )
    add_directories(made)
    csv_help = _("also write the table of epochs to this file")
    made.add_argument("--csv", type=Path, metavar="FILE", help=csv_help)
    made.add_argument("--events", action="store_true", help=_("show every event"))
    either = made.add_mutually_exclusive_group()
    plot_help = _("draw the curves in a pipe too, not only on a terminal")
    either.add_argument("--plot", action="store_true", default=None, help=plot_help)
    either.add_argument("--no-plot", action="store_false", dest="plot", help=_("draw nothing"))
    return made


def _print_tables(found: Sequence[history.History], *, several: bool, everything: bool) -> None:
    screen = Screen.of(sys.stdout)
    for i, one in enumerate(found):
        title = [screen.bold(printable(f"{one.run.directory}:"))]
        above = [*([""] if i else []), *title] if several else []
        show([*above, *one.lines(screen, everything=everything)])


def _plot(views: Sequence[RunView], given: argparse.Namespace) -> None:
    """Draw all runs in one: on a terminal without being asked, in a pipe where it was asked for."""
    screen = Screen.of(sys.stdout)
    drawn = not given.json and (screen.terminal if given.plot is None else given.plot)
    if not drawn:
        return
    from holdfast.monitor.curves import curves_of, labels_of

    labels = labels_of([view.directory for view in views])
    runs = [curves_of(view, label) for view, label in zip(views, labels, strict=True)]
    if given.plot or any(runs):
        _draw(runs, screen, asked=bool(given.plot))


def _draw(runs: Sequence[Curves], screen: Screen, *, asked: bool) -> None:
    from holdfast.monitor.terminal.plot import lines

    height = shutil.get_terminal_size().lines if screen.terminal else None
    try:
        show(lines(runs, screen, height))
    except ModuleNotFoundError as error:
        if asked or error.name != "plotext":
            raise
        show(["", _("With plotext the curves stand here: pip install 'holdfast-train[desk]'")])
