"""The command line of `holdfast completion`: a script with which the shell completes our words.

It holds every command and option of this version; shtab writes it in the shell's own language.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

from holdfast.cli.common import parser, show
from holdfast.cli.parsing import parser_of
from holdfast.i18n import N_, _

PROGRAM = "holdfast"
_PLACES = {  # where the shell looks for it by itself; it is written there once
    "bash": "~/.local/share/bash-completion/completions/holdfast",
    "zsh": "~/.zfunc/_holdfast",
    "fish": "~/.config/fish/completions/holdfast.fish",
}
SHELLS = tuple(_PLACES)


def run_completion(argv: Sequence[str], prog: str) -> int:
    """`holdfast completion SHELL`: 0."""
    made = parser(
        prog,
        _("Print a script with which the shell completes commands, options and files of holdfast."),
        _(
            "Examples:\n"
            "  source <({prog} bash)                 # now, in this shell\n"
            "  {prog} bash > {bash}\n"
            "  {prog} zsh > {zsh}   # with fpath+=~/.zfunc before compinit\n"
            "  {prog} fish > {fish}",
            prog=prog,
            **_PLACES,
        ),
        scripts=False,
    )
    made.add_argument(
        "shell", choices=SHELLS, metavar="|".join(SHELLS), help=_("the shell that is to complete")
    )
    given = made.parse_args(argv)
    import shtab

    script = shtab.complete(_whole(given.shell), given.shell)
    if given.shell == "zsh":
        # shtab writes what may be given several times as one argument that excludes all others:
        # the second run of `compare`, `list` or `history` would not be completed.
        script = re.sub(r'^( *")\(\*\)::?', r"\1*:", script, flags=re.MULTILINE)
    show(script.rstrip().splitlines())
    return 0


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    "completion": (N_("complete commands and options in the shell"), run_completion),
}


def _whole(shell: str) -> argparse.ArgumentParser:
    """One parser with a sub-parser for every command, each as the command itself would read."""
    from holdfast.cli.main import commands

    whole = argparse.ArgumentParser(prog=PROGRAM, add_help=False)
    whole.add_argument("-h", "--help", action="help", help=_("show this help and exit"))
    whole.add_argument("--version", action="store_true", help=_("show the version and exit"))
    below = whole.add_subparsers()
    for name, (summary, command) in commands().items():
        own = parser_of(command, f"{PROGRAM} {name}")
        made = below.add_parser(
            name, parents=[own] if own else [], add_help=False, help=_(summary).replace("%", "%%")
        )
        for action in made._actions:  # argparse has no other list of them
            _say_what_follows(action, shell)
    return whole


def _say_what_follows(action: Any, shell: str) -> None:
    """Files, directories or one of a few words, as the placeholder of a value has it in --help."""
    import shtab

    shown = action.metavar if isinstance(action.metavar, str) else ""
    words = shown.split("|")
    if len(words) > 1 and all(word.islower() for word in words):
        action.choices = action.choices or words
    elif action.option_strings and action.nargs == "?":
        # After it another option may follow. zsh knows that of a value with one colon more; the
        # others would complete that option as a file.
        if shell == "zsh":
            action.metavar, action.complete = f":{shown}", shtab.FILE
    elif "FILE" in shown or "PATH" in shown:
        action.complete = shtab.FILE
    elif "DIR" in shown or "RUN" in shown:
        action.complete = shtab.DIRECTORY
    elif action.dest == "preset":
        from holdfast.training.options.presets import PRESETS

        action.choices = list(PRESETS)
