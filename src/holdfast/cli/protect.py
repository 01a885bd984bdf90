"""The command line of protection: run (start again after a crash) and service (after a boot).

Arguments and printing; what is decided and done lives in holdfast.manage. No torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from holdfast.cli import common
from holdfast.cli.options import parse_train
from holdfast.cli.parsing import Parser
from holdfast.errors import ConfigError
from holdfast.formatting import format_seconds
from holdfast.i18n import N_, _
from holdfast.manage.supervising import service, supervisor
from holdfast.training.options.config import Config

_Work = Callable[[Sequence[str], str], int]
_NAME = "holdfast"
_SCRIPTS = ("train_cli.py", "train_chinese.py")


def run_run(argv: Sequence[str], prog: str) -> int:
    """`holdfast run`: the exit status of the command, or 7 where it crashed too often."""
    given, command = _parse(_run_parser(prog), argv)
    directory = _directory_of(given, command)
    limits = supervisor.Limits(given.give_up_after, given.backoff)
    return supervisor.Supervisor(
        common.find_command(command).words,
        directory or Path(common.DIRECTORY),
        limits,
        _say,
        create=directory is not None,
    ).run()


def run_service(argv: Sequence[str], prog: str) -> int:
    """`holdfast service`: 0."""
    given, command = _parse(_service_parser(prog), argv)
    found = common.find_command(command)
    _refuse_beginning_anew(command)
    again = [sys.executable, "-m", "holdfast", "run", *_limits_of(given)]
    if given.checkpoint_dir is not None:
        again += ["--checkpoint-dir", given.checkpoint_dir]
    made = service.Service(
        name=given.name,
        command=(*again, "--", os.path.abspath(found.program), *found.words[1:]),  # noqa: PTH100 - a link stays one: it may lead into a virtual environment
        directory=Path.cwd(),
        environment={name: os.environ[name] for name in service.KEPT if name in os.environ},
    )
    if given.json:
        common.show_json({"name": made.file, "unit": made.unit(), "install": made.install()})
    else:
        common.show(made.unit().splitlines())
    return 0


COMMANDS: dict[str, tuple[str, _Work]] = {
    "run": (N_("run a training and start it again when it crashes"), run_run),
    "service": (N_("go on training after every boot: a systemd unit"), run_service),
}


# --------------------------------------------------------------------------------- the arguments


def _run_parser(prog: str) -> Parser:
    parser = common.parser(
        prog,
        _(
            "Run a command, and start it again when it crashes, after a pause that doubles from "
            "crash to crash. Ctrl-C and other signals are passed on, and end it for good. Exit "
            "status: that of the command, or 7 where it crashed too often."
        ),
        _(
            "Examples:\n  {prog} -- holdfast train --preset quick\n"
            "  {prog} --give-up-after 5 --checkpoint-dir runs/a -- python my_training.py",
            prog=prog,
        ),
        scripts=False,
    )
    _add_limits(parser)
    return parser


def _service_parser(prog: str) -> Parser:
    parser = common.parser(
        prog,
        _(
            "Print a systemd user unit that runs a command in this directory at every boot, and "
            "starts it again when it crashes. How to install it stands in its first lines."
        ),
        _(
            "Examples:\n  {prog} -- holdfast train --preset quick > "
            "~/.config/systemd/user/holdfast.service",
            prog=prog,
        ),
    )
    name_help = _("name of the service (default: {value})", value=_NAME)
    parser.add_argument("--name", default=_NAME, metavar="NAME", help=name_help)
    _add_limits(parser)
    return parser


def _add_limits(parser: Parser) -> None:
    parser.usage = "%(prog)s " + _("[options] -- COMMAND ...").replace("%", "%%")
    longest = format_seconds(supervisor.LONGEST_BACKOFF)
    parser.add_argument(
        "--checkpoint-dir",
        metavar="DIR",
        help=_(
            "run directory, whose newest step tells progress (default: that of the command, "
            "else {value})",
            value=common.DIRECTORY,
        ),
    )
    parser.add_argument(
        "--give-up-after",
        type=int,
        default=supervisor.GIVE_UP_AFTER,
        metavar="N",
        help=_(
            "crashes in a row without a new durable step that end it (default: {value})",
            value=supervisor.GIVE_UP_AFTER,
        ),
    )
    parser.add_argument(
        "--backoff",
        type=float,
        default=supervisor.BACKOFF,
        metavar="SECONDS",
        help=_(
            "pause before the first restart; doubles up to {longest}, each shortened by chance "
            "to no less than half (default: {value})",
            longest=longest,
            value=f"{supervisor.BACKOFF:g}",
        ),
    )


def _parse(parser: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options before `--` and the command after it. Raises ConfigError."""
    given, command = common.parse_with_command(parser, argv)
    smallest = {"give_up_after": 1, "backoff": 0}
    for name, least in smallest.items():
        value = getattr(given, name)
        if not least <= value < 1e9:
            raise ConfigError(
                "--{option} {value}: expected a number from {least}",
                option=name.replace("_", "-"),
                value=value,
                least=least,
            )
    return given, command


def _limits_of(given: argparse.Namespace) -> list[str]:
    """The limits as arguments again, as far as they are not the defaults."""
    defaults = supervisor.Limits()
    return [
        word
        for name in ("give_up_after", "backoff")
        if getattr(given, name) != getattr(defaults, name)
        for word in ("--" + name.replace("_", "-"), format(getattr(given, name), ".15g"))
    ]


# ----------------------------------------------------------------------------------- the command


def _own_arguments(command: Sequence[str]) -> list[str] | None:
    """The arguments of `holdfast train` in a command that is ours, whatever stands before it."""
    for i, word in enumerate(command):
        name = Path(word).name
        if name in _SCRIPTS:
            return list(command[i + 1 :])
        if name == "holdfast" and command[i + 1 : i + 2] == ["train"]:
            return list(command[i + 2 :])
    return None


def _own_config(command: Sequence[str]) -> Config | None:
    """The configuration of a command that is ours; None where it is not, or wrong: it will tell."""
    arguments = _own_arguments(command)
    if arguments is None or {"-h", "--help"} & set(arguments):
        return None
    try:
        return parse_train(arguments).config
    except ConfigError:
        return None


def _directory_of(given: argparse.Namespace, command: Sequence[str]) -> Path | None:
    """Return the run directory if the options or the command name one."""
    if given.checkpoint_dir is not None:
        return Path(given.checkpoint_dir)
    config = _own_config(command)
    if config is not None:
        return Path(config.checkpoint.checkpoint_dir)
    finder = Parser(add_help=False)
    finder.add_argument("--checkpoint-dir", type=Path)
    try:
        found: Path | None = finder.parse_known_args(command)[0].checkpoint_dir
    except ConfigError:
        return None
    return found


def _refuse_beginning_anew(command: Sequence[str]) -> None:
    config = _own_config(command)
    if config is None:
        return
    options = config.checkpoint
    flags = {
        "--fresh": options.fresh,
        "--checkpoint": options.checkpoint is not None,
        "--resume-from": options.resume not in (None, "auto"),
    }
    wrong = [flag for flag, said in flags.items() if said]
    if wrong:
        raise ConfigError(
            "With {flags} every boot would begin anew. Leave it out: the first start goes on "
            "from what lies in the run directory.",
            flags=", ".join(wrong),
        )


def _say(line: str) -> None:
    """To a terminal after what a killed training may have left there: half a line, no cursor."""
    clean = "\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else ""
    try:
        sys.stderr.write(f"{clean}holdfast: {line}\n")
        sys.stderr.flush()
    except OSError:  # the terminal is gone: the training goes on, and the log has the line
        pass
