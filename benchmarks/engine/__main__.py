"""Measure saving and loading (on Linux): holdfast, its peers, the limits of disk and memory."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.engine.frameworks import PEERS
from benchmarks.engine.measure import Progress
from benchmarks.engine.peers import Ours
from benchmarks.engine.report import lines, write
from benchmarks.engine.run import PARTS, Options, Report, machine, run
from benchmarks.engine.workload import SHAPES


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Return 0, 1 if holdfast failed, or 130 after Ctrl-C.

    After Ctrl-C the tables show what was measured before it.
    """
    given = _parser().parse_args(argv)
    options = Options(tuple(given.size), given.rounds, tuple(given.parts), tuple(given.only))
    progress = Progress()
    with _scratch(given.dir) as directory:
        report = Report(options, machine(directory))
        try:
            run(report, directory, progress)
        except KeyboardInterrupt:
            pass  # the report says that it is not complete
        finally:
            progress.clear()
    print("\n".join(lines(report)))
    if given.out is not None:
        write(report, given.out)
    if not report.complete:
        return 130
    return int(any(Ours.name in s.failed for r in report.results for s in r.series.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument(
        "--size",
        nargs="+",
        choices=SHAPES,
        default=["124m", "10m", "350m"],
        metavar="SIZE",
        help=f"models out of {', '.join(SHAPES)}; the first gets all tables, the others are for "
        "growth (default: 124m 10m 350m)",
    )
    parser.add_argument("--rounds", type=int, default=16, metavar="N", help="default: 16")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        metavar="PART",
        help=f"default: all of {', '.join(PARTS)}",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PEERS,
        default=list(PEERS),
        metavar="NAME",
        help=f"only these savers (default: all of {', '.join(PEERS)})",
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(),
        help="a directory on the disk to measure (default: the current directory)",
    )
    parser.add_argument("--out", type=Path, help="write JSON, text and a plot to this directory")
    return parser


@contextlib.contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    """Make a directory on the disk of `place` and remove it at the end, on SIGTERM too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(
            prefix=".holdfast-bench-", dir=place, ignore_cleanup_errors=True
        ) as name:
            yield Path(name).absolute()
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
