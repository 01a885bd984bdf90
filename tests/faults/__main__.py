"""`python -m tests.faults [--quick] [--rows WORD …] [--json] [--out DIR]`: the matrix as a table.

Ends with 1 where a row does not show what it must: something of ours was lost, wrong or needed a
human; a control survived; no fault fired.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

from tests.faults import inject, matrix
from tests.faults.tally import Tally, machine, table


def main() -> int:
    given = _parser().parse_args()
    unseen = inject.compiled() is not None and inject.shim() is None
    if unseen or os.environ.get("OMP_NUM_THREADS") != "1":  # both must be there from the start
        words = [sys.executable, "-m", "tests.faults", *sys.argv[1:]]
        os.execve(sys.executable, words, inject.environment())
    began = time.monotonic()
    done = _run(
        matrix.chosen(given.rows, full=not given.quick),
        full=not given.quick,
        seed=given.seed,
        jobs=given.jobs,
    )
    problems = [text for row, tally in done if (text := matrix.problem(row, tally))]
    text = _text(given, done, problems, time.monotonic() - began)
    if given.json:
        rows = [{"role": row.role, **tally.to_json()} for row, tally in done]
        print(json.dumps({"rows": rows, "problems": problems}, ensure_ascii=False))
    else:
        print(text)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "faults.txt").write_text(text + "\n")
    return 1 if problems or not done else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the short form that `make test` runs")
    parser.add_argument("--rows", nargs="*", default=[], help="only rows with one of these words")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of random points")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="rows at a time")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, help="also write faults.txt into this directory")
    return parser


def _run(
    rows: list[matrix.Row], *, full: bool, seed: int, jobs: int
) -> list[tuple[matrix.Row, Tally]]:
    """Make the rows, some at a time, each in a process that forks its own points."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=None) as pool:
        running: dict[Future[Tally], int] = {
            pool.submit(_make, row.name, full, seed): i for i, row in enumerate(rows)
        }
        found: dict[int, Tally] = {}
        began = time.monotonic()
        for future in as_completed(running):
            number = running[future]
            found[number] = future.result()
            _progress(len(found), len(rows), found[number], time.monotonic() - began)
    return [(row, found[i]) for i, row in enumerate(rows)]


def _make(name: str, full: bool, seed: int) -> Tally:
    row = next(row for row in matrix.rows() if row.name == name)
    try:
        return row.run(full=full, seed=seed)
    except Exception:  # noqa: BLE001 - the other rows are made all the same, and this is a problem
        return Tally(row.fault, row.saver, examples=[traceback.format_exc()])


def _progress(done: int, of: int, tally: Tally, seconds: float) -> None:
    left = seconds / done * (of - done)
    sys.stderr.write(
        f"{done}/{of} {tally.fault}: {tally.saver}: {tally.points} points, {tally.failed} failed, "
        f"{tally.seconds:.0f} s; about {left:.0f} s left\n"
    )
    sys.stderr.flush()


def _text(
    given: argparse.Namespace,
    done: list[tuple[matrix.Row, Tally]],
    problems: list[str],
    seconds: float,
) -> str:
    ours = [tally for row, tally in done if row.role == "ours"]
    total = (
        f"Holdfast: {sum(t.points for t in ours):,} faults injected, "
        f"{sum(t.recovered for t in ours):,} recovered to the newest acknowledged state, "
        f"{sum(t.lost for t in ours)} acknowledged states lost, "
        f"{sum(t.wrong for t in ours)} bad states loaded, "
        f"{sum(t.human for t in ours)} needed a human"
    )
    form = "short form" if given.quick else "full form"
    today = datetime.datetime.now().astimezone().date()
    return "\n".join(
        [
            f"{today}, {form}, seed {given.seed}, {seconds:.0f} s, {machine()}",
            "",
            table([tally for _row, tally in done]),
            "",
            total,
            *(f"PROBLEM {text}" for text in problems),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
