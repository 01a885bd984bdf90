"""The command line of `holdfast list`: arguments and printing; manage/listing.py does the looking.

It imports what it needs and nothing more: a thousand checkpoints are listed in under 0.3 s, the
start of the interpreter included (benchmarks/list_speed.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from holdfast.cli.common import add_directories, explain, parser, show, show_json
from holdfast.errors import HoldfastError
from holdfast.i18n import N_, _
from holdfast.manage import listing
from holdfast.manage.rundir import look
from holdfast.table import Screen, printable


def run_list(argv: Sequence[str], prog: str) -> int:
    """`holdfast list`: 0, or an error that names the directories that are not there."""
    made = parser(
        prog,
        _("Show the checkpoints of run directories: losses, sizes, ages, which is best."),
        _("Examples:\n  {prog}\n  {prog} runs/a runs/b --sort loss\n  {prog} --json", prog=prog),
    )
    add_directories(made)
    made.add_argument(
        "--sort",
        choices=list(listing.SORTS),
        metavar="|".join(listing.SORTS),
        help=_("order of the rows (default: newest first)"),
    )
    given = made.parse_args(argv)
    found, problems = [], []
    for directory in given.directories:
        try:
            found.append(listing.listing_of(look(directory, cached=True), given.sort))
        except HoldfastError as error:
            problems.append(str(error))
        except OSError as error:  # the others are shown all the same
            problems.append(explain(error) if error.filename else f"{directory}: {error}")
    if given.json:
        show_json({"directories": [one.to_json() for one in found]})
    else:
        screen = Screen.of(sys.stdout)
        for i, one in enumerate(found):
            title = [screen.bold(printable(f"{one.run.directory}:"))]
            several = [*([""] if i else []), *title] if len(given.directories) > 1 else []
            show([*several, *one.lines(screen)])
    if problems:
        raise HoldfastError("\n".join(problems))
    return 0


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    "list": (N_("show the checkpoints of a run"), run_list),
}
