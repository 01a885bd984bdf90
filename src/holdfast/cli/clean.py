"""The command line of `holdfast clean`: options, the question, what is said before and after.

What goes and what stays is decided in holdfast.manage. No torch.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence

from holdfast.cli import common
from holdfast.cli.parsing import Parser
from holdfast.errors import ConfigError
from holdfast.formatting import format_bytes
from holdfast.i18n import N_, _
from holdfast.manage.cleaning import clean, leftovers
from holdfast.table import Screen, printable
from holdfast.training.options.config import OPTIONS

_KEEP = int(OPTIONS["keep_last_n"].default)


def run_clean(argv: Sequence[str], prog: str) -> int:
    """`holdfast clean`: 0; 1 where the user said no; an error without a terminal or --yes."""
    given = _clean_parser(prog).parse_args(argv)
    wish = _wish(given, prog)
    if given.json and not (given.yes or given.dry_run):
        raise ConfigError("{prog} --json asks no questions: add --yes or --dry-run", prog=prog)
    return _clean_memory(given, prog) if given.memory else _clean_directory(given, wish, prog)


def _clean_directory(given: argparse.Namespace, wish: clean.Wish, prog: str) -> int:
    shown = clean.plan(given.directory, wish)
    if given.json:
        done = clean.execute(shown) if shown.going and not given.dry_run else shown
        common.show_json(done.to_json(done=not given.dry_run))
        return 0
    common.show(shown.lines(Screen.of(sys.stdout)))
    if shown.unverified:
        check = f"{prog.rpartition(' ')[0]} verify {shlex.quote(given.directory)}".lstrip()
        common.show(
            [
                _(
                    "No checkpoint goes before two are verified. This verifies them: {command}",
                    command=check,
                )
            ]
        )
    if not _may_go(shown, given, prog):
        return 1 if shown.going and not given.dry_run else 0
    done = clean.execute(shown)
    common.show(
        [
            _(
                "Removed: {count}, {size} came back.",
                count=len(done.going),
                size=format_bytes(done.freed),
            )
        ]
    )
    agreed = {row.key for row in shown.going}
    common.show(
        printable(_("{name} stays: {reason}", name=row.names[0], reason=done.why(row)))
        for row in done.rows
        if row.stays and row.key in agreed
    )
    return 0


def _clean_memory(given: argparse.Namespace, prog: str) -> int:
    """`holdfast clean --memory`: what it shows and asks, as for a run directory."""
    shown = leftovers.plan()
    if given.json:
        done = shown if given.dry_run else leftovers.execute(shown)
        common.show_json(done.to_json(done=not given.dry_run))
        return 0
    common.show(shown.lines(Screen.of(sys.stdout)))
    if not _may_go(shown, given, prog):
        return 1 if shown.going and not given.dry_run else 0
    done = leftovers.execute(shown)
    common.show(
        [
            _(
                "Removed: {count}, {size} came back.",
                count=len(done.going),
                size=format_bytes(done.freed),
            )
        ]
    )
    return 0


def _may_go(shown: clean.Plan | leftovers.Plan, given: argparse.Namespace, prog: str) -> bool:
    """Return True if something is to go and the user agrees; say so where not."""
    if given.dry_run or not shown.going:
        return False
    without = _(
        "{prog} removes nothing without being told: add --yes, there is no terminal to ask on",
        prog=prog,
    )
    if given.yes or common.agreed(_("Remove them? [y/N] "), without):
        return True
    common.show([_("Nothing was removed.")])
    return False


def _wish(given: argparse.Namespace, prog: str) -> clean.Wish:
    """Return the wish. Raises ConfigError where it makes no sense."""
    for flag, value, least in (
        ("--keep", given.keep, 0),
        ("--keep-best", given.keep_best, 1),
        ("--every", given.every, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(
                "{flag} {value}: expected a number that is not less than {least}; see {prog} "
                "--help",
                flag=flag,
                value=value,
                least=least,
                prog=prog,
            )
    rules = (given.keep, given.keep_best, given.every)
    others = given.temp or given.quarantine or given.archive
    nothing = all(rule is None for rule in rules) and not others
    if given.memory and (not nothing or given.directory != common.DIRECTORY):
        raise ConfigError("{prog} --memory stands alone: it looks at no run directory", prog=prog)
    return clean.Wish(
        _KEEP if nothing else given.keep,
        given.temp,
        given.quarantine,
        given.keep_best,
        given.every,
        given.archive,
    )


def _clean_parser(prog: str) -> Parser:
    parser = common.parser(
        prog,
        _(
            "Remove checkpoints that are no longer needed. Shows first what goes, what stays and "
            "why, then asks. What one of --keep, --keep-best and --every keeps stays; the best, "
            "the newest, the pinned and two verified ones always do."
        ),
        _(
            "Examples:\n  {prog} --keep 3 --dry-run\n  {prog} runs/a --keep 1 --temp --yes\n"
            "  {prog} --keep-best 2 --every 10\n  {prog} --quarantine --archive\n"
            "  {prog} --memory",
            prog=prog,
        ),
    )
    common.add_directory(parser)
    keep_help = _(
        "keep the last N epoch and the last N step checkpoints, 0 for all "
        "(default: {value}, where no option says what is to go)",
        value=_KEEP,
    )
    parser.add_argument("--keep", type=int, metavar="N", help=keep_help)
    parser.add_argument(
        "--keep-best", type=int, metavar="K", help=_("keep the K with the lowest loss")
    )
    every_help = _(
        "keep those whose number is a multiple of M: the epoch of epoch checkpoints, "
        "the step of step checkpoints (10: model_epoch_10.pt, "
        "checkpoint_step_500.pt)"
    )
    parser.add_argument("--every", type=int, metavar="M", help=every_help)
    for flag, text in (
        ("--temp", _("remove temporary checkpoints and files that were never finished")),
        ("--quarantine", _("remove damaged files that were set aside")),
        (
            "--archive",
            _("remove what roll-backs and new starts have set aside; that cannot be undone"),
        ),
        ("--memory", _("give back what killed trainings have left in shared memory, of any run")),
        ("--dry-run", _("show what would go, and remove nothing")),
        ("--yes", _("do not ask")),
    ):
        short = {"--yes": ["-y"]}.get(flag, [])
        parser.add_argument(*short, flag, action="store_true", help=text)
    return parser


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    "clean": (N_("remove checkpoints that are no longer needed"), run_clean),
}
