"""The command line of `holdfast doctor`: looking at a run's surroundings, and proving that it
resumes.

Arguments and printing; what is looked at lives in holdfast.manage, the proof in holdfast.training.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.cli import common
from holdfast.cli.options import parse_train
from holdfast.cli.parsing import Parser
from holdfast.cli.progress import ProgressLine
from holdfast.errors import CheckpointError, ConfigError, ResourceError
from holdfast.formatting import format_seconds
from holdfast.i18n import N_, _

if TYPE_CHECKING:
    from holdfast.training.options.config import Config
    from holdfast.training.proving import Stage, TrainingProof

_STEPS, _MORE = 10, 10
_PROVE = "--prove-resume"


def run_doctor(argv: Sequence[str], prog: str) -> int:
    """`holdfast doctor`: 0, also with warnings; 6 where something is bad. With `--prove-resume` 0
    where the runs are equal, 4 where they are not."""
    if _PROVE in argv and "--" in argv:  # somebody's own command
        from holdfast.cli.prove import run_prove

        return run_prove([word for word in argv if word != _PROVE], f"{prog} {_PROVE}")
    with common.ended_like_ctrl_c():
        if _PROVE in argv and not {"-h", "--help"} & set(argv):
            return _prove(argv, prog)
        return _examine(argv, prog)


COMMANDS = {
    "doctor": (N_("check disk, memory and versions; prove that resuming is exact"), run_doctor)
}


def _examine(argv: Sequence[str], prog: str) -> int:
    given = _doctor_parser(prog).parse_args(argv)

    from holdfast.manage.doctor.examine import Report, examine
    from holdfast.manage.doctor.findings import BAD, WARN

    findings = []
    for finding in examine(given.directory):
        findings.append(finding)
        if not given.json:
            common.show([finding.line()])
    report = Report(Path(given.directory), findings)
    if given.json:
        common.show_json(report.to_json())
    else:
        count = {state: sum(f.state == state for f in findings) for state in (BAD, WARN)}
        common.show(
            [
                _(
                    "Checks: {count}. Bad: {bad}. Warnings: {warnings}.",
                    count=len(findings),
                    bad=count[BAD],
                    warnings=count[WARN],
                )
            ]
        )
    return ResourceError.exit_code if report.state == BAD else 0


def _doctor_parser(prog: str) -> Parser:
    parser = common.parser(
        prog,
        _(
            "Check what a run depends on: its disk (room, speed, whether durable means durable), "
            "memory, GPU, versions, the run directory itself. Nothing is changed. The exit status "
            "is 6 where something is bad."
        ),
        _(
            "Examples:\n  {prog}\n  {prog} runs/a --json\n"
            "  {prog} --prove-resume --preset quick\n"
            "  {prog} --prove-resume --config run.json --steps 50 --more 20\n"
            "  {prog} --prove-resume -- python train.py    (see holdfast prove --help)",
            prog=prog,
        ),
    )
    parser.add_argument(
        "directory",
        nargs="?",
        default=common.DIRECTORY,
        metavar="DIR",
        help=_("run directory, or where one is to be (default: {value})", value=common.DIRECTORY),
    )
    _add_proof_options(parser)
    return parser


def _add_proof_options(parser: Parser) -> None:
    group = parser.add_argument_group(_("The proof"))
    group.add_argument(
        _PROVE,
        action="store_true",
        help=_(
            "train as configured, straight and killed, and compare to the last bit; takes all "
            "options of holdfast train, or those of the run directory"
        ),
    )
    for flag, metavar, default, text in (
        ("--steps", "N", _STEPS, _("steps before the kill (default: {value})", value=_STEPS)),
        ("--more", "K", _MORE, _("steps after it (default: {value})", value=_MORE)),
    ):
        group.add_argument(flag, type=int, default=default, metavar=metavar, help=text)
    place_help = _("where the temporary runs go (default: beside the run directory)")
    group.add_argument("--dir", type=Path, metavar="DIR", help=place_help)


# ------------------------------------------------------------------------------------- the proof


def _prove(argv: Sequence[str], prog: str) -> int:
    parser = Parser(prog=prog, add_help=False)
    parser.add_argument("--json", action="store_true")
    _add_proof_options(parser)
    given, words = parser.parse_known_args(argv)
    for option, value in (("--steps", given.steps), ("--more", given.more)):
        if value < 1:
            raise ConfigError(
                "{option} {value}: expected a positive number; see {prog} --help",
                option=option,
                value=value,
                prog=prog,
            )
    config = _configuration(words, prog)
    place = given.dir or _beside(Path(config.checkpoint.checkpoint_dir))
    if not place.is_dir():
        raise ConfigError("--dir {directory}: there is no such directory", directory=place)

    from holdfast.training.proving import prove

    shown = ProgressLine()
    try:
        proof = prove(
            config,
            steps=given.steps,
            more=given.more,
            place=place,
            progress=_telling(shown),
        )
    finally:
        shown.clear()
    if given.json:
        common.show_json(proof.to_json())
    else:
        common.show(_lines(proof))
    return 0 if proof.equal else CheckpointError.exit_code


def _configuration(words: Sequence[str], prog: str) -> Config:
    """Return what `holdfast train` makes of the options; a run directory brings its own."""
    if words and not words[0].startswith("-"):  # DIR, as without --prove-resume
        words = ["--checkpoint-dir", *words]
    command = parse_train(words, prog)
    own = Path(command.config.checkpoint.checkpoint_dir) / "config.json"
    if command.config_file is None and command.preset is None and own.is_file():
        command = parse_train(["--config", str(own), *words], prog)
    return command.config


def _beside(directory: Path) -> Path:
    from holdfast.manage.doctor.disk_checks import existing_parent

    return existing_parent(directory.absolute().parent)


def _lines(proof: TrainingProof) -> list[str]:
    plan = _("{steps} steps, SIGKILL, resume, {more} steps", steps=proof.steps, more=proof.more)
    if proof.equal:
        return [
            _(
                "✓ Equal to the last bit: {plan}, and {all} steps straight.",
                plan=plan,
                all=proof.steps + proof.more,
            ),
            _(
                "  Compared: {tensors} tensors, {values} values, the random streams, and every "
                "step's batch and loss.",
                tensors=proof.proof.tensors,
                values=proof.proof.values,
            ),
        ]
    lines = [
        _(
            "✗ Different: {plan}, against {all} steps straight.",
            plan=plan,
            all=proof.steps + proof.more,
        )
    ]
    if proof.at is not None:
        lines.append(
            _(
                "  First in step {step}, its {what}: {a} straight, {b} interrupted",
                step=proof.at,
                what=_(_WHAT.get(str(proof.what), str(proof.what))),
                a=proof.values[0],
                b=proof.values[1],
            )
        )
    if proof.proof.difference is not None:
        lines.append(_("  At the end {difference}", difference=proof.proof.difference))
    return lines


_WHAT = {"batch": N_("batch of data"), "loss": N_("loss")}
_STAGES = {
    "straight": N_("straight"),
    "interrupted": N_("to the kill"),
    "resumed": N_("resumed"),
    "again": N_("straight again"),
}


def _telling(bar: ProgressLine) -> Callable[[Stage], None]:
    """Show each step on a terminal, and elsewhere one line a run."""
    told = ""

    def tell(stage: Stage) -> None:
        nonlocal told
        if not sys.stderr.isatty() and stage.name != told:
            with contextlib.suppress(OSError):  # the answer is on stdout
                print(_stage_line(stage), file=sys.stderr, flush=True)
        told = stage.name
        bar.note(_stage_line(stage))

    return tell


def _stage_line(stage: Stage) -> str:
    """Write the run, its step and the time that is left."""
    text = f"{_(_STAGES[stage.name])}: " + (
        stage.preparing or _("step {step}/{last}", step=stage.step, last=stage.last)
    )
    if stage.left is not None:
        text += _(", about {time} left", time=format_seconds(stage.left))
    return text
