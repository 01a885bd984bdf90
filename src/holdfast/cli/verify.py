"""`holdfast verify`: every byte of the checkpoints against their checksums."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from holdfast.cli import common
from holdfast.cli.progress import ProgressLine
from holdfast.errors import CheckpointError
from holdfast.formatting import format_bytes, format_seconds
from holdfast.i18n import N_, _
from holdfast.manage import verify
from holdfast.manage.rundir import DAMAGED
from holdfast.table import Screen, printable, wrapped


def run_verify(argv: Sequence[str], prog: str) -> int:
    """`holdfast verify`: 0, or 4 where something is damaged that is not in quarantine already."""
    parser = common.parser(
        prog,
        _(
            "Check every byte of checkpoints against their checksums. Nothing is moved; what was "
            "found goes into the history."
        ),
        _(
            "Examples:\n  {prog}\n  {prog} --all\n  {prog} runs/a backup/model_epoch_3.pt",
            prog=prog,
        ),
    )
    parser.add_argument(
        "sources",
        nargs="*",
        default=[common.DIRECTORY],
        metavar="DIR|FILE",
        help=_("what to check (default: {value})", value=common.DIRECTORY),
    )
    parser.add_argument(
        "--all",
        action="store_true",
        dest="everything",
        help=_("also check what lies in archive/ and quarantine/"),
    )
    given = parser.parse_args(argv)
    targets = verify.targets_of(given.sources, everything=given.everything)
    screen = Screen.of(sys.stdout)
    began, verdicts = time.monotonic(), []
    bar = ProgressLine()
    try:
        for verdict in verify.verify(targets, bar.show):
            verdicts.append(verdict)
            if not given.json:
                bar.clear()
                mark, told = _verdict_line(verdict)
                common.show(wrapped(told, screen, mark))
    finally:
        bar.clear()
    failed = any(verdict.failed for verdict in verdicts)
    known = sum(v.state == DAMAGED and v.target.quarantined for v in verdicts)
    damaged = sum(verdict.state == DAMAGED for verdict in verdicts) - known
    if given.json:
        common.show_json(
            {"files": [v.to_json() for v in verdicts], "damaged": damaged, "quarantined": known}
        )
        return CheckpointError.exit_code if failed else 0
    if not verdicts:
        common.show([_("There is nothing to check.")])
        return 0
    for note in dict.fromkeys(verdict.note for verdict in verdicts if verdict.note):
        common.show(wrapped(printable(note), screen))
    checked = [v.size for v in verdicts if v.state in (verify.INTACT, DAMAGED)]
    told = _(
        "Files checked: {count}, {size} in {time}. Damaged: {damaged}.",
        count=len(checked),
        size=format_bytes(sum(checked)),
        time=format_seconds(time.monotonic() - began),
        damaged=damaged,
    )
    common.show(wrapped(told, screen))
    if any(v.state == DAMAGED and v.target.place == verify.RUN for v in verdicts):
        told = _(
            "Nothing was moved: the next start of the training sets damaged files aside and "
            "goes on from the newest that is intact."
        )
        common.show(wrapped(told, screen))
    return CheckpointError.exit_code if failed else 0


def _verdict_line(verdict: verify.Verdict) -> tuple[str, str]:
    """The sign of what was found, with the space behind it, and the words."""
    path, *others = verdict.target.paths
    names = ", ".join(other.name for other in others)
    what = f"{path} ({names})" if names else str(path)
    if verdict.state == verify.INTACT:
        line = _(
            "✓ {path}: intact, step {step}, {size}",
            path=what,
            step=verdict.step,
            size=format_bytes(verdict.size),
        )
    elif verdict.state == DAMAGED and verdict.target.quarantined:
        line = _("- {path}: damaged, set aside already: {reason}", path=what, reason=verdict.reason)
    elif verdict.state == DAMAGED:
        line = _("✗ {path}: DAMAGED: {reason}", path=what, reason=verdict.reason)
    else:
        line = _("- {path}: not checked: {reason}", path=what, reason=verdict.reason)
    return line[:2], printable(line[2:])


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    "verify": (N_("check every byte of the checkpoints"), run_verify),
}
