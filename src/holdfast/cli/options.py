"""The command line of `holdfast train`, built from the options that training/config.py defines.

Here stand only the options of the command itself (`--preset`, `--dry-run`, ...). No torch here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.cli.parsing import Parser, language_of
from holdfast.i18n import LANGUAGES, N_, _, set_language
from holdfast.training.options.config import OPTIONS, SECTION_TITLES, Config
from holdfast.training.options.config_files import DASHES, unknown_flag
from holdfast.training.options.fields import Option, did_you_mean, flag_of, format_value, nearest
from holdfast.training.options.presets import PRESETS, resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainCommand:
    """The orders of one `holdfast train`: the checked configuration, and how to go about it.

    `lang` is None where `--lang` was not given; `config_file` and `preset` are where values of
    `config` came from, to be named to the user.
    """

    config: Config
    preset: str | None
    config_file: Path | None
    save_config: Path | None
    list_presets: bool
    dry_run: bool
    json: bool
    no_log: bool
    quiet: bool
    yes: bool
    debug: bool
    lang: str | None


def parse_train(argv: Sequence[str], prog: str = "holdfast train") -> TrainCommand:
    """Read the arguments of `train` (without the program's name).

    A valid `--lang` takes effect before anything is said. `--help` prints and exits with 0. Raises
    ConfigError with every problem of the command line, the config file and the preset.
    """
    lang = language_of(argv)
    if lang is not None:
        set_language(lang)
    namespace, extra = build_train_parser(prog).parse_known_args(
        _join_negative_numbers(argv), argparse.Namespace(flags={})
    )
    given: dict[str, Any] = vars(namespace)
    flags = given.pop("flags")
    problems = _unknown(extra)
    if given["lang"] not in (None, *LANGUAGES):
        problems.append(
            _(
                "--lang {value}: expected one of {choices}{hint}",
                value=given["lang"],
                choices=", ".join(LANGUAGES),
                hint=did_you_mean(nearest(given["lang"], LANGUAGES)),
            )
        )
    if given["json"] and not (given["dry_run"] or given["list_presets"]):
        problems.append(
            _(
                "--json goes with --dry-run or --list-presets; what a training says for "
                "scripts is in its metrics.jsonl"
            )
        )
    config = resolve(given["preset"], given["config_file"], flags, problems=problems)
    return TrainCommand(config=config, **given)


def build_train_parser(prog: str = "holdfast train") -> Parser:
    """The parser of `train`, its help in the language in force.

    Options of the configuration are only collected, as typed, in `namespace.flags` (a dict by
    name); `resolve` judges them together with the config file.
    """
    parser = Parser(
        prog=prog,
        usage="%(prog)s " + _("[options]").replace("%", "%%"),
        description=_("Train a language model from a text file, with checkpoints that are safe."),
        epilog=_examples(prog),
        add_help=False,
    )
    _add_command_options(parser)
    groups = {
        section: parser.add_argument_group(_(title)) for section, title in SECTION_TITLES.items()
    }
    for option in OPTIONS.values():
        _add_option(groups[option.section], option)
    return parser


def _examples(prog: str) -> str:
    return _(
        "Examples:\n"
        "  {prog} --preset quick\n"
        "  {prog} --preset standard --data-file book.txt --epochs 5\n"
        "  {prog} --config run.json --learning-rate 5e-5 --resume\n"
        "\n"
        "A flag wins over the config file, the config file over the preset, the preset over the "
        "default.",
        prog=prog,
    ).replace("%", "%%")


_SWITCHES = {
    "list_presets": N_("show the presets and exit"),
    "dry_run": N_("a few timed steps, then speed, time, memory, disk and cost; saves nothing"),
    "json": N_("print JSON for scripts: of --dry-run or --list-presets"),
    "no_log": N_("write no log file"),
    "quiet": N_("say only what matters: warnings, checkpoints, the result"),
    "yes": N_("answer yes to every question"),
    "debug": N_("show the traceback of an error"),
}
_COMMAND_NAMES = ("preset", "config", "save_config", "lang", "help", *_SWITCHES)


def _add_command_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(_("Command"))
    group.add_argument("-h", "--help", action="help", help=_("show this help and exit"))
    presets = _("values for a purpose: {names}", names=", ".join(PRESETS))
    group.add_argument("--preset", metavar="NAME", help=presets)
    file_help = _("read options from this JSON file")
    group.add_argument("--config", dest="config_file", type=Path, metavar="FILE", help=file_help)
    save_help = _("write the options in force to this JSON file")
    group.add_argument("--save-config", type=Path, metavar="FILE", help=save_help)
    lang_help = _("language of all messages (the system's own where not given)")
    group.add_argument("--lang", metavar="zh|en", help=lang_help)
    short = {"quiet": ["-q"], "yes": ["-y"]}
    for name, text in _SWITCHES.items():
        group.add_argument(
            *short.get(name, []),
            flag_of(name),
            action="store_true",
            help=_(text).replace("%", "%%"),
        )


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    names = [f"-{option.meta.short}"] if option.meta.short else []
    names += [flag_of(name) for name in option.names]
    text = _(option.meta.help)
    if option.default not in (None, False):
        text += _(" (default: {value})", value=format_value(option.default))
    text = text.replace("%", "%%")
    if option.kind is bool:
        names.append(flag_of(f"no_{option.name}"))
        group.add_argument(*names, dest=option.name, action=_Switch, help=text)
        return
    group.add_argument(
        *names,
        dest=option.name,
        action=_Collect,
        nargs="?" if option.meta.const is not None else None,
        const=option.meta.const,
        metavar=option.metavar,
        help=text,
    )


class _Collect(argparse.Action):
    """Keep the text that follows, under the name by which the user gave it."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, **kwargs)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        option = OPTIONS[self.dest]
        for name in option.names:  # the last one wins, whatever it is called
            namespace.flags.pop(name, None)
        name = (option_string or "").lstrip("-").replace("-", "_")
        namespace.flags[name if name in option.names else option.name] = values


class _Switch(_Collect):
    """`--x` is true, `--no-x` is false, and nothing follows."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.flags[self.dest] = option_string != flag_of(f"no_{self.dest}")


def _unknown(words: Iterable[str]) -> list[str]:
    """A problem for each word that no option took; the value of an unknown flag goes with it."""
    also = [*_COMMAND_NAMES, *(f"no_{o.name}" for o in OPTIONS.values() if o.kind is bool)]
    problems = []
    after_flag = False
    for word in words:
        if word[:1] in DASHES and word.strip(DASHES):
            flag, equals, _value = word.partition("=")
            problems.append(unknown_flag(flag, also))
            after_flag = not equals
        elif after_flag:
            after_flag = False
        else:
            problems.append(
                _('"{word}" belongs to no option; a text is named with --data-file', word=word)
            )
    return problems


def _join_negative_numbers(argv: Sequence[str]) -> list[str]:
    """`--x -1e-4` as `--x=-1e-4`: argparse would take -1e-4 for a flag and miss the value."""
    joined: list[str] = []
    for word in argv:
        is_number = re.match(r"-(\d|\.\d|inf$)", word)
        if is_number and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined
