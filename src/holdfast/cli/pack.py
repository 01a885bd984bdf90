"""The command line of packed runs: pack, unpack.

Arguments, progress and printing; the work is done in holdfast.manage, which is imported when it is
asked for: every command waits for the imports of this module. No torch.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from holdfast.cli import common
from holdfast.cli.progress import ProgressLine
from holdfast.errors import CheckpointError, ConfigError, Interrupted
from holdfast.formatting import format_bytes
from holdfast.i18n import N_, _
from holdfast.manage.progress import Progress
from holdfast.table import Screen, printable, wrapped

if TYPE_CHECKING:
    from holdfast.manage.packing.pack import Packed


def run_pack(argv: Sequence[str], prog: str) -> int:
    """`holdfast pack`: 0; 4 where a damaged checkpoint was left out."""
    from holdfast.manage.packing import pack

    parser = common.parser(
        prog,
        _(
            "Write a run into one file, links kept and every file with its checksum. Works while "
            "the training goes on: what is packed is the run at one moment. Any tar can unpack it."
        ),
        _(
            "Examples:\n  {prog} runs/a\n  {prog} runs/a a.tar.zst\n"
            "  {prog} runs/a /mnt/backup --slim --force",
            prog=prog,
        ),
    )
    parser.add_argument(
        "directory",
        nargs="?",
        default=common.DIRECTORY,
        metavar="DIR",
        help=_("run directory (default: {value})", value=common.DIRECTORY),
    )
    file_help = _(
        "where to: FILE.tar, FILE.tar.zst (compressed: checkpoints hardly get smaller), "
        "or a directory (default: the run's name with .tar, here)"
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help=file_help)
    for flag, text in (
        (
            "--slim",
            _(
                "of the checkpoints only the newest and the best, and no archive: enough to "
                "go on and to use the model"
            ),
        ),
        ("--force", _("replace FILE if it exists, when the new one is complete")),
    ):
        parser.add_argument(flag, action="store_true", help=text)
    given = _pack_arguments(parser.parse_args(argv))
    target = pack.target_of(given.directory, given.file)
    bar = ProgressLine(_packing)
    with _ending(bar, _("Stopped: no archive was written.")):
        packed = pack.pack(
            given.directory, target, slim=given.slim, force=given.force, show=bar.show
        )
    if given.json:
        common.show_json(packed.to_json())
    else:
        _show(_told(packed, given.directory))
    return CheckpointError.exit_code if packed.damaged else 0


def _pack_arguments(given: argparse.Namespace) -> argparse.Namespace:
    """`pack a.tar` means the usual run directory, as `pack` alone does."""
    from holdfast.manage.packing import pack

    named = given.directory.endswith(pack.SUFFIXES) and not Path(given.directory).is_dir()
    if named and given.file is None:
        given.directory, given.file = common.DIRECTORY, given.directory
    return given


def _told(packed: Packed, directory: str) -> Iterator[str]:
    yield _(
        "✓ {path} ({size}): {summary}. Every checksum was read back.",
        path=packed.path,
        size=format_bytes(packed.size),
        summary=packed.summary(),
    )
    for name, why in packed.left_out:
        yield _("Left out: {name}: {reason}", name=name, reason=why)
    if packed.unsaved is not None:
        yield _(
            "Not in it: step {step}, which a killed training has left in memory only. Start "
            "the training in {directory} again to save it, then pack.",
            step=packed.unsaved,
            directory=directory,
        )


def run_unpack(argv: Sequence[str], prog: str) -> int:
    """`holdfast unpack`: 0; 4 where the archive is damaged, or no packed run."""
    from holdfast.manage.packing import unpack

    parser = common.parser(
        prog,
        _(
            "Make a run directory of a packed run. Every checksum is compared and every checkpoint "
            "read back before the directory has its name; the training goes on there."
        ),
        _(
            "Examples:\n  {prog} a.tar\n  {prog} a.tar.zst runs/b\n  {prog} --list a.tar\n"
            "  {prog} --check a.tar",
            prog=prog,
        ),
    )
    parser.add_argument("file", metavar="FILE", help=_("a packed run"))
    where_help = _("the new run directory (default: the run's name, here)")
    parser.add_argument("directory", nargs="?", metavar="DIR", help=where_help)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--list", action="store_true", help=_("show what is in it, and unpack nothing")
    )
    which.add_argument(
        "--check", action="store_true", help=_("compare every checksum, and unpack nothing")
    )
    given = parser.parse_args(argv)
    if given.directory is not None and (given.list or given.check):
        raise ConfigError(
            "{prog} --list and --check unpack nothing: leave {directory} out",
            prog=prog,
            directory=given.directory,
        )
    if given.list:
        found = unpack.contents_of(given.file)
        if given.json:
            common.show_json(found.to_json())
        else:
            common.show(found.lines(Screen.of(sys.stdout)))
        return 0
    return _check(given) if given.check else _unpack(given)


def _check(given: argparse.Namespace) -> int:
    from holdfast.manage.packing import unpack

    bar = ProgressLine(_reading)
    with _ending(bar, _("Stopped.")):
        found = unpack.checked(given.file, bar.show)
    if given.json:
        common.show_json(found.to_json())
    else:
        _show(
            [
                _(
                    "✓ {path}: {summary}. Every checksum is right.",
                    path=found.path,
                    summary=found.summary(),
                )
            ]
        )
    return 0


def _unpack(given: argparse.Namespace) -> int:
    from holdfast.manage.packing import unpack

    bar = ProgressLine(_unpacking)
    with _ending(bar, _("Stopped: nothing was unpacked.")):
        target, found = unpack.unpack(given.file, given.directory, bar.show)
    if given.json:
        common.show_json({**found.to_json(), "directory": str(target)})
        return 0
    lines = [
        _(
            "✓ {directory}: {summary}. Every checksum was right, and every checkpoint was read "
            "back.",
            directory=target,
            summary=found.summary(),
        )
    ]
    commands = []
    if (target / "config.json").is_file():  # our own trainer's; a stranger's loop has its own way
        command = f"holdfast train --checkpoint-dir {shlex.quote(str(target))}"
        commands.append(_("To go on: {command}", command=command))
    _show(lines)
    common.show(map(printable, commands))
    return 0


def _show(lines: Iterable[str]) -> None:
    screen = Screen.of(sys.stdout)
    for line in lines:
        common.show(wrapped(printable(line), screen))


@contextlib.contextmanager
def _ending(bar: ProgressLine, stopped: str) -> Iterator[None]:
    """Clear the progress at the end; Ctrl-C, SIGTERM and SIGHUP end in a sentence, and what was
    half-written is gone."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(stopped, number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(stopped) from None
    finally:
        bar.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def _packing(progress: Progress) -> str:
    if progress.number == progress.of:
        return _reading(progress)
    return _(
        "packing {number}/{of}: {name}",
        number=progress.number,
        of=progress.of - 1,
        name=progress.path.name,
    )


def _unpacking(progress: Progress) -> str:
    return _(
        "unpacking {number}/{of}: {name}",
        number=progress.number,
        of=progress.of,
        name=progress.path.name,
    )


def _reading(progress: Progress) -> str:
    return _("reading back {name}", name=progress.path.name)


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    "pack": (N_("write a run into one file"), run_pack),
    "unpack": (N_("make a run directory of a packed run"), run_unpack),
}
