"""The command line of `holdfast show`: arguments and printing; manage/showing/ does the looking."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from holdfast.cli.common import DIRECTORY, parser, show, show_json
from holdfast.errors import CheckpointError
from holdfast.i18n import N_, _
from holdfast.manage.showing.show import DAMAGED
from holdfast.manage.showing.show import show as look_at
from holdfast.manage.showing.text import lines
from holdfast.table import Screen


def run_show(argv: Sequence[str], prog: str) -> int:
    """`holdfast show`: 0, also for a file that is not ours; 4 where it is damaged or not there."""
    made = parser(
        prog,
        _(
            "Show one checkpoint in full: where it stands, metrics, configuration, environment, "
            "the parameters by layer, and what can be done with it. Nothing is unpickled."
        ),
        _(
            "Examples:\n  {prog}\n  {prog} runs/a/best_model.pt\n  {prog} runs/a --tensors\n"
            "  {prog} model.pt --json",
            prog=prog,
        ),
    )
    made.add_argument(
        "source",
        nargs="?",
        default=DIRECTORY,
        metavar="FILE|DIR",
        help=_(
            "a checkpoint; a directory stands for its newest one (default: {value})",
            value=DIRECTORY,
        ),
    )
    made.add_argument(
        "--tensors", action="store_true", help=_("every tensor, those of the optimizer too")
    )
    given = made.parse_args(argv)
    found = look_at(given.source)
    if given.json:
        show_json(found.to_json(tensors=given.tensors))
    else:
        show(lines(found, Screen.of(sys.stdout), tensors=given.tensors))
    return CheckpointError.exit_code if found.state == DAMAGED else 0


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    "show": (N_("show one checkpoint in full: layers, configuration, environment"), run_show),
}
