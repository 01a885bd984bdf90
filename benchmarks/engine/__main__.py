"""The command line of the benchmark: `python -m benchmarks.engine`.

Arguments, the scratch directory and printing; what is measured and how stand beside this module.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.cli import common
from holdfast.cli.parsing import Parser
from holdfast.errors import ConfigError
from holdfast.i18n import _

if TYPE_CHECKING:
    import argparse

    from benchmarks.engine.run import Options

_ROUNDS, _QUICK_ROUNDS = 16, 3
_SIZES = ("124m", "10m", "350m")


def run_bench(argv: Sequence[str], prog: str) -> int:
    """Measure and print; 0, 1 where ours failed, 130 after Ctrl-C, which prints what there is."""
    parser = _bench_parser(prog)
    given = parser.parse_args(argv)
    options = _options(given, prog)  # all that can be wrong is said before anything is measured

    from benchmarks.engine import report as reports
    from benchmarks.engine.measure import Progress
    from benchmarks.engine.peers import Ours
    from benchmarks.engine.run import Report, machine, run
    from holdfast.manage.table import Screen

    progress = Progress()
    with _scratch(given.dir) as directory:
        report = Report(options, machine(directory))
        try:
            run(report, directory, progress)
        except KeyboardInterrupt:
            pass  # the report says that it is not complete
        finally:
            progress.clear()
    if given.json:
        common.show([json.dumps(reports.to_json(report), indent=2)])
    else:
        common.show(reports.lines(report, Screen.of(sys.stdout)))
    if given.out is not None:
        written = reports.write(report, given.out)
        names = ", ".join(str(path) for path in written)
        print(_("Written: {names}", names=names), file=sys.stderr)
        if not any(path.suffix == ".png" for path in written):
            print(_("No plot: matplotlib is not installed."), file=sys.stderr)
    if not report.complete:
        return 130
    return int(any(Ours.name in s.failed for r in report.results for s in r.series.values()))


def _bench_parser(prog: str) -> Parser:
    parser = common.parser(
        prog,
        _("Measure saving and loading on this machine: holdfast beside torch.save and every other "
          "checkpoint library that is installed, and beside the limits of disk and memory."),
        _("Examples:\n  {prog} --quick\n  {prog} --quick --size 10m --dir /mnt/data\n"
          "  {prog} --out results", prog=prog),
    )  # fmt: skip
    flags: dict[str, dict[str, Any]] = {
        "--quick": {"action": "store_true",
                    "help": _("saves and loads of one size in 3 rounds: minutes, not hours")},
        "--size": {"action": "append", "choices": _SIZES, "metavar": "|".join(_SIZES),
                   "help": _("parameters of the model, repeatable; the first gets all tables "
                             "(default: 124m, then 10m and 350m)")},
        "--rounds": {"type": int, "metavar": "N",
                     "help": _("rounds (default: {rounds}, with --quick {quick})",
                               rounds=_ROUNDS, quick=_QUICK_ROUNDS)},
        "--only": {"metavar": "NAME,...",
                   "help": _("only these savers, by the names of their rows")},
        "--parts": {"metavar": "PART,...", "help": _("only these parts: {names}",
                    names="save, load, fresh, training, regular, growth")},
        "--dir": {"type": Path, "default": Path(), "metavar": "DIR",
                  "help": _("whose disk is measured (default: the current directory)")},
        "--out": {"type": Path, "metavar": "DIR",
                  "help": _("write the results there as JSON, text and a plot")},
        "--seed": {"type": int, "metavar": "N",
                   "help": _("of the order within the rounds (default: another each time)")},
    }  # fmt: skip
    for flag, options in flags.items():
        parser.add_argument(flag, **options)
    return parser


def _options(given: argparse.Namespace, prog: str) -> Options:
    from benchmarks.engine.frameworks import PEERS
    from benchmarks.engine.run import PARTS, QUICK_PARTS, Options

    known = {_plain(name): name for name in PEERS}
    wanted = [_plain(name) for name in (given.only or "").split(",") if name.strip()]
    parts = [part.strip() for part in (given.parts or "").split(",") if part.strip()]
    for what, names, among in (("--only", wanted, known), ("--parts", parts, PARTS)):
        for name in names:
            if name not in among:
                raise ConfigError(
                    _("{option}: there is no {name}, only {names}; see {prog} --help", option=what,
                      name=name, names=", ".join(among), prog=prog)
                )  # fmt: skip
    rounds = given.rounds or (_QUICK_ROUNDS if given.quick else _ROUNDS)
    if rounds < 1:
        raise ConfigError(_("--rounds {value}: expected a positive number; see {prog} --help",
                            value=given.rounds, prog=prog))  # fmt: skip
    sizes = given.size or (_SIZES[:1] if given.quick else _SIZES)
    return Options(
        sizes=tuple(dict.fromkeys(sizes)),
        rounds=rounds,
        parts=tuple(parts or (QUICK_PARTS if given.quick else PARTS)),
        only=tuple(known[name] for name in wanted),
        seed=random.randrange(10_000) if given.seed is None else given.seed,
    )


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", " ")


@contextlib.contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    """A directory on the disk of `place` that is gone afterwards, also when we are told to end."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        with tempfile.TemporaryDirectory(
            prefix=".holdfast-bench-", dir=place, ignore_cleanup_errors=True
        ) as name:
            yield Path(name)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(run_bench(sys.argv[1:], "python -m benchmarks.engine"))
