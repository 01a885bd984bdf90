"""`holdfast train`: from the arguments to a session, a dry run or a table of presets."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from holdfast.cli import common
from holdfast.cli.options import TrainCommand, parse_train
from holdfast.i18n import N_, _
from holdfast.table import Screen
from holdfast.training.options.config_files import save_config
from holdfast.training.options.presets import presets_json, presets_table


def train(argv: Sequence[str], prog: str) -> int:
    """Run the command; returns the exit status, 0 only when training is finished."""
    command = parse_train(argv, prog)
    if command.list_presets:
        if command.json:
            common.show_json({"presets": presets_json()})
        else:
            common.show(presets_table(Screen.of(sys.stdout)))
        return 0
    if command.save_config is not None:
        save_config(command.config, command.save_config)
        print(
            _(
                "Saved: {path}. Train with it: {prog} --config {path}",
                path=command.save_config,
                prog=prog,
            )
        )
        return 0
    return _session(command, prog)


COMMANDS = {"train": (N_("train a language model from a text file"), train)}


def _session(command: TrainCommand, prog: str) -> int:
    common.before_torch()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from holdfast.training.console import Console

    # stdout is the script's alone.
    with Console(quiet=command.quiet, stream=sys.stderr if command.json else None) as console:
        if command.dry_run:
            from holdfast.training.dry_run import dry_run

            tell = (lambda found: common.show_json(found.to_json())) if command.json else None
            dry_run(command.config, console, tell)
        else:
            from holdfast.training.session import run

            call = _how_called(prog, command)
            run(command.config, console, log=not command.no_log, yes=command.yes, command=call)
    return 0


def _how_called(prog: str, command: TrainCommand) -> str:
    """Return what the user can type to call us again, in their shell."""
    words = [prog]
    if prog.endswith(".py"):
        in_venv = sys.prefix != sys.base_prefix and "VIRTUAL_ENV" not in os.environ
        script = sys.argv[0] if Path(sys.argv[0]).name == prog else prog
        words = [os.path.relpath(sys.executable) if in_venv else "python", script]
    if command.config.sources["checkpoint_dir"] != "default":
        words += ["--checkpoint-dir", command.config.checkpoint.checkpoint_dir]
    return " ".join([words[0], *(shlex.quote(word) for word in words[1:])])
