"""The parser with the common options, questions and printing of all commands.

No torch here, and nothing of any one command: whatever this imports, `holdfast list` waits for.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.cli.parsing import Parser
from holdfast.errors import ConfigError
from holdfast.formatting import wrap_cells
from holdfast.i18n import LANGUAGES, _
from holdfast.manage.output import json_ready
from holdfast.training.options.config import OPTIONS

_LOOK = 0.1  # seconds for which the processors are watched
_BUSY = 30.0  # per cent of all processors: other programs are at work
DIRECTORY = str(OPTIONS["checkpoint_dir"].default)


def parser(prog: str, description: str, examples: str, *, scripts: bool = True) -> Parser:
    """A parser with the options that every command has; `--json` where it is for `scripts`."""
    width = min(shutil.get_terminal_size().columns, 100) - 2
    description = "\n".join(wrap_cells(description, width))  # argparse leaves it as it is
    made = Parser(
        prog=prog,
        description=description.replace("%", "%%"),
        epilog=examples.replace("%", "%%"),
        add_help=False,
    )
    made.add_argument("-h", "--help", action="help", help=_("show this help and exit"))
    if scripts:
        made.add_argument("--json", action="store_true", help=_("print JSON for scripts"))
    lang_help = _("language of all messages (the system's own where not given)")
    made.add_argument("--lang", choices=LANGUAGES, metavar="|".join(LANGUAGES), help=lang_help)
    made.add_argument("--debug", action="store_true", help=_("show the traceback of an error"))
    return made


def before_torch() -> None:
    """Set what libraries read when they are loaded; call it before torch is imported.

    OpenMP's threads spin while they wait for each other. On a machine in use a waiting thread then
    takes the processor that the one it waits for needs, and a step takes many times as long; a
    thread that sleeps computes the same bits. On a quiet machine sleeping costs a fifth of the
    speed (benchmarks/wait_policy.py), so it is chosen by what the machine does now. What the user
    has set stays.
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        import psutil

        if psutil.cpu_percent(_LOOK) > _BUSY:
            os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # What transformers has to say is said in the user's language where it matters.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def add_directory(made: Parser) -> None:
    """Add the argument for the one run directory of a command; the trainer's own by default."""
    made.add_argument(
        "directory",
        nargs="?",
        default=DIRECTORY,
        metavar="DIR",
        help=_("run directory (default: {value})", value=DIRECTORY),
    )


def add_directories(made: Parser) -> None:
    """The run directories that a command looks at."""
    made.add_argument(
        "directories",
        nargs="*",
        default=[DIRECTORY],
        metavar="DIR",
        help=_("run directories (default: {value})", value=DIRECTORY),
    )


def add_ways_in(made: Parser) -> None:
    """Add the names of proxies, containers and pages through which a server is reached."""
    made.add_argument(
        "--allowed-host",
        action="append",
        type=_host,
        default=[],
        metavar="NAME",
        help=_(
            "another name that it answers to: a proxy's, or host.docker.internal (may be repeated)"
        ),
    )
    made.add_argument(
        "--allowed-origin",
        action="append",
        type=_origin,
        default=[],
        metavar="https://NAME",
        help=_(
            "a web page from elsewhere that may ask, or the address at which a "
            "proxy shows this one (may be repeated)"
        ),
    )


def _host(text: str) -> str:
    from holdfast.guarding import host_name

    if "*" in text or (host_name(text) is None and host_name(f"[{text}]") is None):
        raise argparse.ArgumentTypeError(
            _("{value} is not the name of a host, as in llm.example.com", value=repr(text))
        )
    return text


def _origin(text: str) -> str:
    scheme, slashes, place = text.rstrip("/").partition("://")
    if not (scheme and slashes and place) or any(mark in place for mark in "/*?# "):
        raise argparse.ArgumentTypeError(
            _(
                "{value} is not the address of a site, as in https://llm.example.com",
                value=repr(text),
            )
        )
    return text


def parse_with_command(parser: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options before `--` and the command after it. Raises ConfigError."""
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    given, rest = parser.parse_known_args(words[:at])
    command = words[at + 1 :]
    if not command or rest:
        problem = (
            _("unknown: {words}", words=" ".join(rest)) if rest else _("there is no command to run")
        )
        raise ConfigError(
            "{problem}; write it as {prog} [options] -- COMMAND ...",
            problem=problem,
            prog=parser.prog,
        )
    return given, command


@dataclass(frozen=True, slots=True)
class Command:
    """Words of a command, and where its program lies."""

    words: list[str]
    program: str


def find_command(command: Sequence[str]) -> Command:
    """Find the program of a command; `holdfast` is found where it is not on the PATH.

    Raises ConfigError.
    """
    words = list(command)
    if words[0] == "holdfast" and shutil.which("holdfast") is None:
        words[:1] = [sys.executable, "-m", "holdfast"]
    program = shutil.which(words[0])
    if program is None:
        raise ConfigError("There is no program {name}. Check the command after --.", name=words[0])
    return Command(words, program)


@contextlib.contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that temporary files are removed then too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def agreed(question: str, without: str) -> bool:
    """Ask a question; Enter alone and a closed terminal mean no. Raises ConfigError
    that says `without` where there is no terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(without)
    sys.stdout.write(question)
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes", "是")


def explain(error: OSError) -> str:
    """Return what the system refused, where, and what to do, in the user's language."""
    names = (error.filename, error.filename2)
    where = f"{' -> '.join(str(name) for name in names if name)}: " if error.filename else ""
    what = {
        errno.ENOSPC: _("the disk is full. Free some space and start again."),
        errno.EDQUOT: _("your disk quota is used up. Free some space and start again."),
        errno.EROFS: _("the file system is read-only. Choose another directory."),
        errno.EACCES: _("permission denied. Choose one that you may read and write."),
        errno.EPERM: _("permission denied. Choose one that you may read and write."),
        errno.ENOENT: _("there is no such file or directory. Check the name."),
        errno.ENOTDIR: _("a file is where a directory should be. Choose another path."),
        errno.EISDIR: _("a directory is where a file should be. Name a file."),
        errno.ENOLINK: _(
            "the link leads to nothing. Mount the disk that it leads to, or remove the link."
        ),
        errno.ENAMETOOLONG: _("the name is too long. Choose a shorter one."),
    }.get(error.errno or 0, str(error.strerror or error))
    return where + what


def show(lines: Iterable[str]) -> None:
    """Write lines to stdout at once: a reader that has gone is noticed here, by the one place that
    deals with it (cli/main.py), and not when the interpreter exits."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def show_json(value: Any) -> None:
    """One document; a number that is not finite is "nan", "inf" or "-inf", as in a manifest."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    show([json.dumps(json_ready(value), ensure_ascii=not utf8, indent=2, allow_nan=False)])
