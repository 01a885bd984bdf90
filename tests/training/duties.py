"""Small trainings that have every duty there is, and a strike at any line of their steps: for
`test_duties.py` and for the fault matrix."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from holdfast.checkpoint.rundir.catalog import Catalog
from holdfast.errors import Interrupted
from holdfast.monitor.run_view import RunView
from holdfast.training import loop, session
from holdfast.training.console import Console
from tests.training.runs import config_for, final_state

# Every duty there is: evaluations that improve and that do not, kept steps, an early stop.
KINDS: dict[str, dict[str, Any]] = {
    "epochs": {"epochs": 2, "save_every": 3},
    "steps": {"num_steps": 7, "epochs": "none", "save_every": 3, "eval_every": 2},
    "early stop": {"epochs": 3, "eval_every": 2, "patience": 1, "learning_rate": 0.5},
}
FILES = ("loop.py", "trainer.py", "ending.py", "telling.py", "records.py", "generate.py")


class Run:
    """A run that is started again until it is finished, and all that it leaves behind."""

    def __init__(self, directory: Path, corpus: Path, kind: str, **options: Any) -> None:
        self.directory = directory
        self._config = config_for(directory, corpus, **{**KINDS[kind], **options})
        self._said = io.StringIO()

    def start(self) -> bool:
        """Train; False where it was interrupted."""
        try:
            with Console(stream=self._said, terminal=False) as console:
                session.run(self._config, console, log=False, yes=True, command="holdfast train")
        except Interrupted:
            return False
        return True

    def comes_to(self) -> dict[str, Any]:
        """The final state, the history, and the checkpoints that were to be kept."""
        contents = Catalog(self.directory).scan()
        best, kept = contents.best, [each for each in contents.entries if each.kind != "temp"]
        return {
            "state": final_state(self.directory),
            "history": json.loads((self.directory / "training_history.json").read_text()),
            "kept": sorted((each.names[0], each.step, each.loss) for each in kept),
            "best": best and (best.step, best.loss),
        }

    def wrote(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that say what the model has come to."""
        varies = ("time", "tokens_per_second", "durable_step", "memory_step")
        return [
            {key: value for key, value in line.items() if key not in varies}
            for line in lines_of(self.directory)
        ]

    def said(self) -> tuple[list[str], list[str]]:
        """What the loop said, in its order, and what the saves said."""
        waited = re.compile("; training waited .*")  # a busy machine's
        lines = [waited.sub("", line[20:]) for line in self._said.getvalue().splitlines()]
        saved = re.compile(r"  (✓|🏆)")
        loop = re.compile(r"\s*(📊|📉|🔢|✍️|🛑)")
        return (
            [line for line in lines if loop.match(line)],
            sorted(line for line in lines if saved.match(line)),
        )

    def shown(self) -> tuple[list[Any], ...]:
        """What the monitor shows of it: lines of steps that were undone do not count."""
        view = RunView(self.directory)
        view.refresh()
        return (
            [(each.step, each.loss, each.learning_rate) for each in view.points],
            [(each.step, each.val_loss) for each in view.evaluations],
            [(each.step, each.epoch, each.text) for each in view.samples],
        )


def lines_of(directory: Path, *events: str) -> list[dict[str, Any]]:
    """Return the whole lines of metrics.jsonl of these `events`; by default all about its steps."""
    events = events or ("step", "evaluation", "epoch", "sample", "left_out")
    try:
        *lines, _rest = (directory / "metrics.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [line for line in map(json.loads, lines) if line["event"] in events]


class Lines:
    """Counts the lines that a process runs for its steps, and calls `strike` before one of them."""

    def __init__(self, number: int = 0, strike: Callable[[], None] = lambda: None) -> None:
        self.seen: list[tuple[str, int, str]] = []  # file, line, function
        self._number, self._strike = number, strike

    def __enter__(self) -> Lines:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_exc: object) -> None:
        sys.settrace(None)

    def last_of_each(self) -> list[int]:
        """The number of the last time that each line was run, counted from 1."""
        return sorted({place: number for number, place in enumerate(self.seen, 1)}.values())

    def _trace(self, frame: FrameType, event: str, _argument: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        if path.name not in FILES or path.parent.name != "training":
            return None
        if event == "line" and _within_a_step(frame):
            self.seen.append((path.name, frame.f_lineno, frame.f_code.co_name))
            if len(self.seen) == self._number:
                self._strike()
        return self._trace


def _within_a_step(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code is not loop.go_on.__code__:
        frame = frame.f_back
    return frame is not None
