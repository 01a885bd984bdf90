"""`holdfast COMMAND …`: finds the command, speaks the user's language, and ends with the truth.

Errors become one line and an exit status here, and nowhere else. Nothing heavy is imported before
the command is known.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from holdfast.cli.parsing import language_of
from holdfast.errors import ConfigError, HoldfastError
from holdfast.i18n import _, detect_language, encode_anything, set_language
from holdfast.version import __version__

Command = Callable[[Sequence[str], str], int]

# The modules of this room and the commands that each brings, in the order of `--help`. A module is
# imported when one of its commands is called: no command waits for another.
ROOMS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "protect": ("run", "service"),
    "list": ("list",),
    "show": ("show",),
    "history": ("history",),
    "compare": ("compare",),
    "monitor": ("monitor",),
    "web": ("dashboard", "report"),
    "verify": ("verify",),
    "clean": ("clean",),
    "states": ("rollback", "pin"),
    "generate": ("generate",),
    "serve": ("serve",),
    "export": ("export", "import"),
    "pack": ("pack", "unpack"),
    "doctor": ("doctor",),
    "prove": ("prove",),
    "completion": ("completion",),
}
# Which extra brings what a command may find missing: a command's own, else the package's, else the
# trainer's.
_EXTRA_OF_COMMAND = {"dashboard": "web", "report": "web", "serve": "serve", "export": "export"}
_EXTRA_OF_PACKAGE = dict.fromkeys(
    ("textual", "plotext", "shtab", "psutil", "zstandard"), "desk"
) | {"plotly": "web"}


def main(  # noqa: PLR0911 - one return a bad end
    argv: Sequence[str] | None = None, prog: str = "holdfast", lang: str = ""
) -> int:
    """Run one command and return its exit status. `lang` is the default language of `prog`."""
    words = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    set_language(language_of(words) or lang or detect_language())
    debug = "--debug" in words
    try:
        status = _dispatch(words, prog)
        sys.stdout.flush()  # at exit a closed pipe would be a complaint and status 120
        return status
    except HoldfastError as error:
        return _fail(str(error), error.exit_code, error, debug)
    except KeyboardInterrupt as error:
        message = str(error) or _("Stopped at once; what was durable is intact.")
        return _fail(message, 130, error, debug)
    except BrokenPipeError:
        _silence_stdout()
        return 141  # 128 + SIGPIPE, as other tools end when `head` has seen enough
    except ModuleNotFoundError as error:
        if (error.name or "holdfast").startswith("holdfast"):
            raise  # ours: a broken installation, which a traceback explains better
        message = _missing(error.name or "", words)
        return _fail(message, ConfigError.exit_code, error, debug)
    except MemoryError as error:
        return _fail(
            _("Out of memory. Use a smaller --model, --batch-size or --context-length."),
            6,
            error,
            debug,
        )
    except OSError as error:
        from holdfast.cli.common import explain

        return _fail(explain(error), 1, error, debug)


def train_main(
    argv: Sequence[str] | None = None, prog: str = "holdfast train", lang: str = ""
) -> int:
    """`train` alone: what train_cli.py and train_chinese.py run."""
    words = list(sys.argv[1:] if argv is None else argv)
    return main(["train", *words], prog=prog.removesuffix(" train"), lang=lang)


def _dispatch(words: list[str], prog: str) -> int:
    ahead, words = _split(words)
    if not words or words[0] in ("-h", "--help"):
        print(_usage(prog))
        return 0 if words else 2
    if words[0] == "--version":
        print(f"holdfast {__version__}")
        return 0
    name, *rest = words
    called = prog if prog.endswith(".py") and name == "train" else f"{prog} {name}"
    # Before the rest: behind a `--` they would be words of somebody else's command.
    return command_of(name, prog)([*ahead, *rest], called)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The options that work everywhere and stand before the command, and what follows them."""
    count = 0
    while count < len(words) and (words[count] == "--debug" or words[count].startswith("--lang")):
        count += 2 if words[count] == "--lang" else 1
    return words[:count], words[count:]


def command_of(name: str, prog: str) -> Command:
    """Return the function of the command `name`.

    Raises ConfigError, with what was perhaps meant.
    """
    for room, names in ROOMS.items():
        if name in names:
            command: Command = import_module(f"holdfast.cli.{room}").COMMANDS[name][1]
            return command
    from holdfast.training.options.fields import did_you_mean, nearest

    known = [one for names in ROOMS.values() for one in names]
    raise ConfigError(
        "{prog} has no command {name}{hint}; see {prog} --help",
        prog=prog,
        name=name,
        hint=did_you_mean(nearest(name, known)),
    )


def commands() -> dict[str, tuple[str, Command]]:
    """Every command by its name: what it is for, and what runs it. Imports all of them."""
    found: dict[str, tuple[str, Command]] = {}
    for room in ROOMS:
        found |= import_module(f"holdfast.cli.{room}").COMMANDS
    return found


def _usage(prog: str) -> str:
    rows = "\n".join(f"  {name:<10} {_(text)}" for name, (text, _run) in commands().items())
    return _(
        "Holdfast: train a model and never lose a step.\n"
        "\n"
        "usage: {prog} COMMAND [options]\n"
        "\n"
        "{rows}\n"
        "\n"
        "Example: {prog} train --preset quick\n"
        "{prog} COMMAND --help tells more; --lang zh|en and --debug work everywhere.",
        prog=prog,
        rows=rows,
    )


# ------------------------------------------------------------------------------------- bad ends


def _missing(package: str, words: Sequence[str]) -> str:
    command = next((word for word in words if not word.startswith("-")), "")
    top = package.partition(".")[0]
    extra = _EXTRA_OF_PACKAGE.get(top) or _EXTRA_OF_COMMAND.get(command, "train")
    return _(
        "This needs the package {name}: pip install 'holdfast-train[{extra}]'",
        name=top,
        extra=extra,
    )


def _fail(message: str, status: int, error: BaseException, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    from holdfast.table import printable

    try:
        for line in message.splitlines():
            print(f"holdfast: {printable(line)}", file=sys.stderr)
        sys.stdout.flush()
    except OSError:  # the terminal is gone; the status still tells
        _silence_stdout()
    return status


def _open_streams() -> None:
    """Make the standard streams safe to use.

    A stream that was closed by the parent (`>&-`) is None here: it is pointed at nothing, since its
    descriptor would go to the file that is opened next.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123
    encode_anything(sys.stdout)
    encode_anything(sys.stderr)


def _silence_stdout() -> None:
    """Keep the interpreter from complaining about a closed pipe when it flushes at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
