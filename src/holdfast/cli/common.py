"""What the commands of the desk share: the parser with its common options, questions, printing.

No torch here, and nothing of any one command: whatever this imports, `holdfast list` waits for.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from typing import Any

from holdfast.cli.parsing import Parser
from holdfast.errors import ConfigError
from holdfast.formatting import wrap_cells
from holdfast.i18n import LANGUAGES, _
from holdfast.manage.values import json_ready
from holdfast.training.config import OPTIONS

DIRECTORY = str(OPTIONS["checkpoint_dir"].default)


def parser(prog: str, description: str, examples: str, *, scripts: bool = True) -> Parser:
    """A parser with the options that every command has; `--json` where it is for `scripts`."""
    width = min(shutil.get_terminal_size().columns, 100) - 2
    description = "\n".join(wrap_cells(description, width))  # argparse leaves it as it is
    made = Parser(prog=prog, description=description.replace("%", "%%"),
                  epilog=examples.replace("%", "%%"), add_help=False)  # fmt: skip
    made.add_argument("-h", "--help", action="help", help=_("show this help and exit"))
    if scripts:
        made.add_argument("--json", action="store_true", help=_("print JSON for scripts"))
    lang_help = _("language of all messages (the system's own where not given)")
    made.add_argument("--lang", choices=LANGUAGES, metavar="|".join(LANGUAGES), help=lang_help)
    made.add_argument("--debug", action="store_true", help=_("show the traceback of an error"))
    return made


def add_directory(made: Parser) -> None:
    """The one run directory that a command looks at, the trainer's own where none is named."""
    made.add_argument("directory", nargs="?", default=DIRECTORY, metavar="DIR",
                      help=_("run directory (default: {value})", value=DIRECTORY))  # fmt: skip


def add_directories(made: Parser) -> None:
    """The run directories that a command looks at."""
    made.add_argument("directories", nargs="*", default=[DIRECTORY], metavar="DIR",
                      help=_("run directories (default: {value})", value=DIRECTORY))  # fmt: skip


def agreed(question: str, without: str) -> bool:
    """Ask; the answer of somebody who only presses Enter, or has gone, is no. Raises ConfigError
    that says `without` where there is no terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(without)
    sys.stdout.write(question)
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes", "是")


def show(lines: Iterable[str]) -> None:
    """Write lines to stdout at once: a reader that has gone is noticed here, by the one place that
    deals with it (cli/main.py), and not when the interpreter exits."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def show_json(value: Any) -> None:
    """One document; a number that is not finite is "nan", "inf" or "-inf", as in a manifest."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    show([json.dumps(json_ready(value), ensure_ascii=not utf8, indent=2, allow_nan=False)])
