"""The command line of the desk: compare, clean, verify; modules beside this one have the rest.

Arguments, questions and printing; what is found and decided lives in holdfast.manage. No torch.
How a command ends when it fails, is interrupted or loses its reader is cli/main.py's business.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing

from holdfast.cli import common
from holdfast.cli.options import Parser
from holdfast.cli.progress import ProgressLine
from holdfast.errors import CheckpointError, ConfigError
from holdfast.formatting import format_bytes, format_seconds
from holdfast.i18n import N_, _
from holdfast.manage import clean, compare, leftovers, verify
from holdfast.manage.rundir import DAMAGED
from holdfast.manage.table import Screen, printable
from holdfast.training.config import OPTIONS

_DIRECTORY = common.DIRECTORY
_parser, _add_directory, _agreed = common.parser, common.add_directory, common.agreed
_print, _print_json = common.show, common.show_json
_KEEP = int(OPTIONS["keep_last_n"].default)

_Work = Callable[[Sequence[str], str], int]


# ------------------------------------------------------------------------------------- commands


def run_compare(argv: Sequence[str], prog: str) -> int:
    """`holdfast compare`: 0."""
    parser = _parser(
        prog,
        _("Compare checkpoints: metrics and which is better, configuration, environment."),
        _("Examples:\n  {prog} runs/a runs/b\n"
          "  {prog} runs/a/model_epoch_1.pt runs/a", prog=prog),
    )  # fmt: skip
    parser.add_argument("sources", nargs="+", metavar="FILE|DIR",
                        help=_("checkpoints; a directory stands for its best one"))  # fmt: skip
    given = parser.parse_args(argv)
    if len(given.sources) < 2:
        raise ConfigError(
            _("one checkpoint cannot be compared: name two or more; see {prog} --help", prog=prog)
        )
    found = compare.compare(given.sources)
    if given.json:
        _print_json(found.to_json())
    else:
        _print(found.lines(Screen.of(sys.stdout)))
    return 0


def run_clean(argv: Sequence[str], prog: str) -> int:
    """`holdfast clean`: 0; 1 where the user said no; an error without a terminal or --yes."""
    given = _clean_parser(prog).parse_args(argv)
    if given.memory:
        return _clean_memory(given, prog)
    if given.keep is not None and given.keep < 0:
        raise ConfigError(_("--keep {value}: expected a number that is not negative; see {prog} "
                            "--help", value=given.keep, prog=prog))  # fmt: skip
    if given.keep is None and not given.temp and not given.quarantine:
        given.keep = _KEEP
    if given.json and not (given.yes or given.dry_run):
        raise ConfigError(_("{prog} --json asks no questions: add --yes or --dry-run", prog=prog))
    shown = clean.plan(given.directory, clean.Wish(given.keep, given.temp, given.quarantine))
    if given.json:
        done = clean.execute(shown) if shown.going and not given.dry_run else shown
        _print_json(done.to_json(done=not given.dry_run))
        return 0
    _print(shown.lines(Screen.of(sys.stdout)))
    if shown.unverified:
        check = f"{prog.rpartition(' ')[0]} verify {shlex.quote(given.directory)}".lstrip()
        _print([_("No checkpoint goes before two are verified. This verifies them: {command}",
                  command=check)])  # fmt: skip
    if given.dry_run or not shown.going:
        return 0
    if not given.yes and not _confirmed(prog):
        _print([_("Nothing was removed.")])
        return 1
    done = clean.execute(shown)
    _print([_("Removed: {count}, {size} came back.", count=len(done.going),
              size=format_bytes(done.freed))])  # fmt: skip
    agreed = {row.key for row in shown.going}
    _print(_("{name} stays: {reason}", name=row.names[0], reason=done.why(row))
           for row in done.rows if row.stays and row.key in agreed)  # fmt: skip
    return 0


def _clean_memory(given: argparse.Namespace, prog: str) -> int:
    """`holdfast clean --memory`: what it shows and asks, as for a run directory."""
    if given.keep is not None or given.temp or given.quarantine:
        raise ConfigError(_("{prog} --memory stands alone: it looks at no run directory",
                            prog=prog))  # fmt: skip
    if given.json and not (given.yes or given.dry_run):
        raise ConfigError(_("{prog} --json asks no questions: add --yes or --dry-run", prog=prog))
    shown = leftovers.plan()
    if given.json:
        done = shown if given.dry_run else leftovers.execute(shown)
        _print_json(done.to_json(done=not given.dry_run))
        return 0
    _print(shown.lines(Screen.of(sys.stdout)))
    if given.dry_run or not shown.going:
        return 0
    if not given.yes and not _confirmed(prog):
        _print([_("Nothing was removed.")])
        return 1
    done = leftovers.execute(shown)
    _print([_("Removed: {count}, {size} came back.", count=len(done.going),
              size=format_bytes(done.freed))])  # fmt: skip
    return 0


def _clean_parser(prog: str) -> Parser:
    parser = _parser(
        prog,
        _("Remove checkpoints that are no longer needed. Shows first what goes, what stays and "
          "why, then asks. The best, the newest and two verified ones always stay."),
        _("Examples:\n  {prog} --keep 3 --dry-run\n  {prog} runs/a --keep 1 --temp --yes\n"
          "  {prog} --quarantine\n  {prog} --memory", prog=prog),
    )  # fmt: skip
    _add_directory(parser)
    keep_help = _(
        "keep the last N epoch and the last N step checkpoints, 0 for all "
        "(default: {value}, where neither --temp nor --quarantine is given)",
        value=_KEEP,
    )
    parser.add_argument("--keep", type=int, metavar="N", help=keep_help)
    for flag, text in (
        ("--temp", _("remove temporary checkpoints and files that were never finished")),
        ("--quarantine", _("remove damaged files that were set aside")),
        ("--memory", _("give back what killed trainings have left in shared memory, of any run")),
        ("--dry-run", _("show what would go, and remove nothing")),
        ("--yes", _("do not ask")),
    ):
        short = {"--yes": ["-y"]}.get(flag, [])
        parser.add_argument(*short, flag, action="store_true", help=text)
    return parser


def run_verify(argv: Sequence[str], prog: str) -> int:
    """`holdfast verify`: 0, or 4 where something is damaged that is not in quarantine already."""
    parser = _parser(
        prog,
        _("Check every byte of checkpoints against their checksums. Nothing is moved; what was "
          "found goes into the history."),
        _("Examples:\n  {prog}\n  {prog} --all\n  {prog} runs/a backup/model_epoch_3.pt",
          prog=prog),
    )  # fmt: skip
    parser.add_argument("sources", nargs="*", default=[_DIRECTORY], metavar="DIR|FILE",
                        help=_("what to check (default: {value})", value=_DIRECTORY))  # fmt: skip
    parser.add_argument("--all", action="store_true", dest="everything",
                        help=_("also check what lies in archive/ and quarantine/"))  # fmt: skip
    jobs_help = _("files read at once (default: {value}; 1 for a disk that turns)",
                  value=verify.JOBS)  # fmt: skip
    parser.add_argument("--jobs", type=int, default=verify.JOBS, metavar="N", help=jobs_help)
    given = parser.parse_args(argv)
    if given.jobs < 1:
        raise ConfigError(_("--jobs {value}: expected a positive number; see {prog} --help",
                            value=given.jobs, prog=prog))  # fmt: skip
    targets = verify.targets_of(given.sources, everything=given.everything)
    began, verdicts = time.monotonic(), []
    bar = ProgressLine()
    try:
        with closing(verify.verify(targets, bar.show, jobs=given.jobs)) as found:
            for verdict in found:
                verdicts.append(verdict)
                if not given.json:
                    bar.clear()
                    _print([_verdict_line(verdict)])
    finally:
        bar.clear()
    failed = any(verdict.failed for verdict in verdicts)
    known = sum(v.state == DAMAGED and v.target.quarantined for v in verdicts)
    damaged = sum(verdict.state == DAMAGED for verdict in verdicts) - known
    if given.json:
        _print_json({"files": [v.to_json() for v in verdicts], "damaged": damaged,
                     "quarantined": known})  # fmt: skip
        return CheckpointError.exit_code if failed else 0
    if not verdicts:
        _print([_("There is nothing to check.")])
        return 0
    _print(dict.fromkeys(verdict.note for verdict in verdicts if verdict.note))
    checked = [v.size for v in verdicts if v.state in (verify.INTACT, DAMAGED)]
    _print([_("Files checked: {count}, {size} in {time}. Damaged: {damaged}.", count=len(checked),
              size=format_bytes(sum(checked)), time=format_seconds(time.monotonic() - began),
              damaged=damaged)])  # fmt: skip
    if any(v.state == DAMAGED and v.target.place == verify.RUN for v in verdicts):
        _print([_("Nothing was moved: the next start of the training sets damaged files aside and "
                  "goes on from the newest that is intact.")])  # fmt: skip
    return CheckpointError.exit_code if failed else 0


def _verdict_line(verdict: verify.Verdict) -> str:
    path, *others = verdict.target.paths
    names = ", ".join(other.name for other in others)
    what = f"{path} ({names})" if names else str(path)
    if verdict.state == verify.INTACT:
        line = _("✓ {path}: intact, step {step}, {size}", path=what, step=verdict.step,
                 size=format_bytes(verdict.size))  # fmt: skip
    elif verdict.state == DAMAGED and verdict.target.quarantined:
        line = _("- {path}: damaged, set aside already: {reason}", path=what,
                 reason=verdict.reason)  # fmt: skip
    elif verdict.state == DAMAGED:
        line = _("✗ {path}: DAMAGED: {reason}", path=what, reason=verdict.reason)
    else:
        line = _("- {path}: not checked: {reason}", path=what, reason=verdict.reason)
    return printable(line)


COMMANDS: dict[str, tuple[str, _Work]] = {
    "compare": (N_("compare checkpoints or runs"), run_compare),
    "clean": (N_("remove checkpoints that are no longer needed"), run_clean),
    "verify": (N_("check every byte of the checkpoints"), run_verify),
}


# ---------------------------------------------------------------------------------- what is shared


def _confirmed(prog: str) -> bool:
    """Ask whether to remove what was shown."""
    without = _("{prog} removes nothing without being told: add --yes, there is no terminal to "
                "ask on", prog=prog)  # fmt: skip
    return _agreed(_("Remove them? [y/N] "), without)
