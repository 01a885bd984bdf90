"""The command line of `holdfast prove`: any command, straight against interrupted and resumed.

Arguments and printing; the proof lives in holdfast.prove.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.cli import common
from holdfast.cli.parsing import Parser
from holdfast.cli.progress import ProgressLine
from holdfast.errors import CheckpointError, ConfigError
from holdfast.formatting import format_seconds
from holdfast.i18n import N_, _

if TYPE_CHECKING:
    from holdfast.prove import ScriptProof, Step

_SECONDS = 600.0


def run_prove(argv: Sequence[str], prog: str) -> int:
    """`holdfast prove`: 0 where every end is equal, 4 where one is not."""
    parser = _parser(prog)
    if {"-h", "--help"} & set(argv[: argv.index("--") if "--" in argv else None]):
        parser.parse_args(["--help"])
    given, command = common.parse_with_command(parser, argv)
    found = common.find_command(command)
    program = os.path.abspath(found.program)  # noqa: PTH100 - a link may lead into a virtual environment
    if not 0 < given.time < 1e9:
        raise ConfigError("--time {value}: expected seconds, more than 0", value=given.time)
    if given.keep is not None and given.keep.exists():
        raise ConfigError(
            "--keep {directory}: it exists already. Name a new one.", directory=given.keep
        )
    with common.ended_like_ctrl_c():
        from holdfast.prove import Order, prove_script

        shown = ProgressLine()
        try:
            proof = prove_script(
                Order(
                    [program, *found.words[1:]],
                    _split(given.resume_with),
                    _output(given.dir),
                    given.link,
                    given.result,
                    given.time,
                    given.keep,
                    not given.no_power_cuts,
                ),
                _telling(shown),
            )
        finally:
            shown.clear()
    if given.json:
        common.show_json(proof.to_json())
    else:
        common.show(_lines(proof))
    return 0 if proof.equal else CheckpointError.exit_code


COMMANDS = {"prove": (N_("prove that any training script resumes exactly"), run_prove)}


def _parser(prog: str) -> Parser:
    parser = common.parser(
        prog,
        _(
            "Prove that a training resumes exactly, whatever it saves with. The command runs twice "
            "without interruption; then it is killed, stopped, and started with what a kill or a "
            "power cut leaves, at an epoch's end, during a save and elsewhere. Final weights, "
            "optimizer, random states and logged losses must be equal to the bit. Each run has its "
            "own copy of the working directory. Exit status: 0, or 4 where something differs."
        ),
        _(
            "Examples:\n  {prog} -- python train.py --max_iters 60\n"
            "  {prog} --dir out --link data --resume-with '--init_from resume' -- python train.py",
            prog=prog,
        ),
    )
    parser.usage = "%(prog)s " + _("[options] -- COMMAND ...").replace("%", "%%")
    parser.add_argument(
        "--dir",
        type=Path,
        metavar="DIR",
        help=_(
            "where the command saves: every run begins without it, and one outside of the working "
            "directory is replaced in the command (default: what the command writes)"
        ),
    )
    parser.add_argument(
        "--link",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help=_("a part of the working directory that is only read: not copied (may be repeated)"),
    )
    parser.add_argument(
        "--resume-with",
        default="",
        metavar="OPTIONS",
        help=_("options of a start that resumes, in quotes (default: the same command again)"),
    )
    parser.add_argument(
        "--result",
        metavar="FILE|CMD",
        help=_(
            "a file, or a command whose output is compared as well, where states cannot be opened"
        ),
    )
    parser.add_argument(
        "--time",
        type=float,
        default=_SECONDS,
        metavar="SECONDS",
        help=_("time for everything (default: {value})", value=f"{_SECONDS:g}"),
    )
    no_power_help = _("leave power cuts out: only kills and signals")
    parser.add_argument("--no-power-cuts", action="store_true", help=no_power_help)
    keep_help = _("put the runs into this new directory, and leave it")
    parser.add_argument("--keep", type=Path, metavar="DIR", help=keep_help)
    return parser


def _split(options: str) -> list[str]:
    try:
        return shlex.split(options)
    except ValueError as error:
        raise ConfigError(
            "--resume-with {value}: the quotes do not match", value=options
        ) from error


def _output(directory: Path | None) -> Path | None:
    """Return the output directory, relative where it lies in the working directory."""
    if directory is None:
        return None
    path = Path(os.path.normpath(Path.cwd() / directory))
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else directory


def _lines(proof: ScriptProof) -> list[str]:
    tried = len(proof.moments)
    seconds = format_seconds(sum(each.seconds for each in proof.moments))
    lines = []
    if proof.equal:
        lines.append(
            _(
                "✓ Equal to the last bit after {count} interruptions ({time}).",
                count=tried,
                time=seconds,
            )
        )
        lines += [f"    {each.name}" for each in proof.moments]
        lines.append(
            _(
                "  Compared each time: {tensors} tensors and {values} values in {files} files; "
                "{losses} logged losses in all.",
                tensors=proof.tensors,
                values=proof.values,
                files=proof.files,
                losses=proof.losses,
            )
        )
    elif not proof.moments:
        lines.append(_("✗ It does not repeat itself: two straight runs differ."))
    else:
        last = proof.moments[-1].name
        lines.append(
            _(
                "✗ Different after: {moment}. ({count} interruptions before it ended equal.)",
                moment=last,
                count=tried - 1,
            )
        )
    lines += [f"  {text}" for text in filter(None, [proof.difference, *proof.also])]
    if proof.advice:
        lines.append(_("What to do:"))
        lines += [f"  - {text}" for text in proof.advice]
    if proof.left_out:
        lines.append(_("Not looked at:"))
        lines += [f"  - {text}" for text in proof.left_out]
    if proof.kept is not None:
        lines.append(_("The runs lie in {directory}.", directory=proof.kept))
    return lines


def _telling(bar: ProgressLine) -> Callable[[Step], None]:
    """Show on a terminal what is being done, and elsewhere a line for each start."""

    def tell(step: Step) -> None:
        text = f"{step.number}/{step.of} {step.name}" if step.of else step.name
        if step.left is not None:
            text += _(", about {time} left", time=format_seconds(step.left))
        if sys.stderr.isatty():
            bar.note(text)
        else:
            with contextlib.suppress(OSError):  # the answer is on stdout
                print(text, file=sys.stderr, flush=True)

    return tell
