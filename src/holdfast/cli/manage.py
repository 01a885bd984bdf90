"""The command line of the desk: list, history, verify; its siblings have the rest.

Arguments, questions and printing; what is found and decided lives in holdfast.manage. No torch.
How a command ends when it fails, is interrupted or loses its reader is cli/main.py's business.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from holdfast.cli.options import Parser, wrap_cells
from holdfast.cli.progress import ProgressLine
from holdfast.errors import CheckpointError, ConfigError, HoldfastError
from holdfast.formatting import format_bytes, format_seconds
from holdfast.i18n import LANGUAGES, N_, _
from holdfast.manage import history, listing, verify
from holdfast.manage.rundir import DAMAGED, look
from holdfast.manage.table import Screen, printable
from holdfast.manage.values import json_ready
from holdfast.training.config import OPTIONS

_DIRECTORY = str(OPTIONS["checkpoint_dir"].default)

_Work = Callable[[Sequence[str], str], int]


# ------------------------------------------------------------------------------------- commands


def run_list(argv: Sequence[str], prog: str) -> int:
    """`holdfast list`: 0, or an error that names the directories that are not there."""
    parser = _parser(
        prog,
        _("Show the checkpoints of run directories: losses, sizes, ages, which is best."),
        _("Examples:\n  {prog}\n  {prog} runs/a runs/b --sort loss\n  {prog} --json", prog=prog),
    )
    parser.add_argument("directories", nargs="*", default=[_DIRECTORY], metavar="DIR",
                        help=_("run directories (default: {value})", value=_DIRECTORY))  # fmt: skip
    parser.add_argument("--sort", choices=list(listing.SORTS), metavar="|".join(listing.SORTS),
                        help=_("order of the rows (default: newest first)"))  # fmt: skip
    given = parser.parse_args(argv)
    found, problems = [], []
    for directory in given.directories:
        try:
            found.append(listing.listing_of(look(directory), given.sort))
        except HoldfastError as error:
            problems.append(str(error))
    if given.json:
        _print_json({"directories": [one.to_json() for one in found]})
    else:
        screen = Screen.of(sys.stdout)
        for i, one in enumerate(found):
            title = [screen.bold(printable(f"{one.run.directory}:"))]
            several = [*([""] if i else []), *title] if len(given.directories) > 1 else []
            _print([*several, *one.lines(screen)])
    if problems:
        raise HoldfastError("\n".join(problems))
    return 0


def run_history(argv: Sequence[str], prog: str) -> int:
    """`holdfast history`: 0."""
    parser = _parser(
        prog,
        _("Show the epochs of a run and what happened to it: interruptions, resumes, damage."),
        _("Examples:\n  {prog}\n  {prog} runs/a --events\n  {prog} --csv losses.csv", prog=prog),
    )
    _add_directory(parser)
    parser.add_argument("--csv", type=Path, metavar="FILE",
                        help=_("also write the table of epochs to this file"))  # fmt: skip
    parser.add_argument("--events", action="store_true", help=_("show every event"))
    given = parser.parse_args(argv)
    found = history.history_of(look(given.directory))
    if given.csv is not None:
        history.write_csv(found, given.csv)
    if given.json:
        _print_json(found.to_json())
    else:
        _print(found.lines(Screen.of(sys.stdout), everything=given.events))
    return 0


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
    "list": (N_("show the checkpoints of a run"), run_list),
    "history": (N_("show the epochs of a run and what happened to it"), run_history),
    "verify": (N_("check every byte of the checkpoints"), run_verify),
}


# ---------------------------------------------------------------------------------- what is shared


def _parser(prog: str, description: str, examples: str, *, scripts: bool = True) -> Parser:
    width = min(shutil.get_terminal_size().columns, 100) - 2
    description = "\n".join(wrap_cells(description, width))  # argparse leaves it as it is
    parser = Parser(prog=prog, description=description.replace("%", "%%"),
                    epilog=examples.replace("%", "%%"), add_help=False)  # fmt: skip
    parser.add_argument("-h", "--help", action="help", help=_("show this help and exit"))
    if scripts:
        parser.add_argument("--json", action="store_true", help=_("print JSON for scripts"))
    lang_help = _("language of all messages (the system's own where not given)")
    parser.add_argument("--lang", choices=LANGUAGES, metavar="|".join(LANGUAGES), help=lang_help)
    parser.add_argument("--debug", action="store_true", help=_("show the traceback of an error"))
    return parser


def _add_directory(parser: Parser) -> None:
    parser.add_argument("directory", nargs="?", default=_DIRECTORY, metavar="DIR",
                        help=_("run directory (default: {value})", value=_DIRECTORY))  # fmt: skip


def _agreed(question: str, without: str) -> bool:
    """Ask; the answer of somebody who only presses Enter, or has gone, is no. Raises ConfigError
    that says `without` where there is no terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(without)
    sys.stdout.write(question)
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes", "是")


def _print(lines: Iterable[str]) -> None:
    """Write lines to stdout at once: a reader that has gone is noticed here, by the one place that
    deals with it (cli/main.py), and not when the interpreter exits."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII pipe gets \u2b50, no traceback
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _print_json(value: Any) -> None:
    """One document; a number that is not finite is "nan", "inf" or "-inf", as in a manifest."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    _print([json.dumps(json_ready(value), ensure_ascii=not utf8, indent=2, allow_nan=False)])
