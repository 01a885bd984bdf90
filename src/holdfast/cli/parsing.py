"""argparse as all commands use it: errors of our own, help in terminal cells, the language first.

Nothing of any one command, and nothing slow: every command waits for this module.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from holdfast.errors import ConfigError
from holdfast.formatting import wrap_cells
from holdfast.i18n import LANGUAGES, N_

# argparse's own words, which it looks up in the same catalogue; listed so that they get into it.
ARGPARSE_WORDS = (
    N_("usage: "),
    N_("options"),
    N_("positional arguments"),
    N_("show this help message and exit"),
    N_("argument %(argument_name)s: %(message)s"),
    N_("expected one argument"),
    N_("expected at most one argument"),
    N_("expected at least one argument"),
    N_("ignored explicit argument %r"),
    N_("the following arguments are required: %s"),
    N_("unrecognized arguments: %s"),
    N_("not allowed with argument %s"),
    N_("invalid %(type)s value: %(value)r"),
    N_("invalid choice: %(value)r (choose from %(choices)s)"),
)


def language_of(argv: Sequence[str]) -> str | None:
    """The language that `--lang` names, found before the parser exists; None where it names none.

    A command line calls this first, so that errors and `--help` already speak the language.
    """
    found = None
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        value = following if word == "--lang" else word.removeprefix("--lang=")
        if word.startswith("--lang") and value in LANGUAGES:
            found = value
    return found


_show_only = False  # while `parser_of` asks a command for its parser


class _Shown(BaseException):
    """Carries a parser out of a command that was asked for it; nothing may catch it on the way."""

    def __init__(self, parser: Parser) -> None:
        super().__init__()
        self.parser = parser


def parser_of(command: Callable[[Sequence[str], str], int], prog: str) -> Parser | None:
    """The parser that `command` would read its arguments with; None where it has none of ours.

    A command builds its parser in the language of that moment and before it does anything else, so
    it is called, with `--help`, and stopped where it begins to read: shell completion learns every
    option from the one place that defines it.
    """
    global _show_only
    _show_only = True
    try:
        command(["--help"], prog)
    except _Shown as shown:
        return shown.parser
    except SystemExit:
        pass
    finally:
        _show_only = False
    return None


class Parser(argparse.ArgumentParser):
    """argparse for all commands: no abbreviations, errors as ConfigError, help in cells."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; `parse_args` comes here too."""
        if _show_only:
            raise _Shown(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing and exiting: one place prints all errors."""
        raise ConfigError("{problem}; see {prog} --help", problem=message, prog=self.prog)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Wraps by the cells that a terminal shows: Chinese has no spaces and is twice as wide."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        kwargs.setdefault("width", min(shutil.get_terminal_size().columns, 100) - 2)
        super().__init__(prog, max_help_position=30, **kwargs)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap_cells(text, width)
