"""What is due after a step (evaluation, save, sample, lines, the end of an epoch or of the run) is
done once, whatever comes: the end is that of the undisturbed run, and so is all that was written.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from holdfast.checkpoint import memory
from holdfast.checkpoint.catalog import Catalog
from holdfast.errors import Interrupted
from holdfast.monitor.run_view import RunView
from holdfast.training import session
from holdfast.training.console import Console
from holdfast.training.trainer import Trainer
from tests.support import die, in_child
from tests.training.runs import config_for, difference, final_state, write_corpus

# Every duty there is: evaluations that improve and that do not, kept steps, an early stop.
KINDS: dict[str, dict[str, Any]] = {
    "epochs": {"epochs": 2, "save_every": 3},
    "steps": {"num_steps": 7, "epochs": "none", "save_every": 3, "eval_every": 2},
    "early stop": {"epochs": 3, "eval_every": 2, "patience": 1, "learning_rate": 0.5},
}
FILES = ("trainer.py", "ending.py", "telling.py", "records.py")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), passages=2)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    for remains in memory.remains():
        if remains.run is not None and tmp_path in [remains.run, *remains.run.parents]:
            remains.remove()


class Run:
    """A run that is started again until it is finished, and all that it leaves behind."""

    def __init__(self, directory: Path, corpus: Path, kind: str, **options: Any) -> None:
        self.directory = directory
        self._config = config_for(directory, corpus, **KINDS[kind], **options)
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
        lines = map(json.loads, (self.directory / "metrics.jsonl").read_text().splitlines())
        return [
            {key: value for key, value in line.items() if key not in varies}
            for line in lines
            if line["event"] in ("step", "evaluation", "epoch", "sample", "left_out")
        ]

    def said(self) -> tuple[list[str], list[str]]:
        """What the loop said, in its order, and what the saves said."""
        lines = [line[20:] for line in self._said.getvalue().splitlines()]
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


class Lines:
    """Counts the lines that a process runs for its steps, and calls `strike` before one of them."""

    def __init__(self, number: int = 0, strike: Callable[[], None] = lambda: None) -> None:
        self.seen: list[tuple[str, int]] = []
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
            self.seen.append((path.name, frame.f_lineno))
            if len(self.seen) == self._number:
                self._strike()
        return self._trace


def _within_a_step(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code is not Trainer._go_on.__code__:
        frame = frame.f_back
    return frame is not None


@dataclass
class Undisturbed:
    kind: str
    run: Run
    lines: Lines
    comes_to: dict[str, Any]


@pytest.fixture(scope="module", params=KINDS)
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: Path
) -> Undisturbed:
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run", corpus, request.param)
    with Lines() as lines:
        assert run.start()
    return Undisturbed(request.param, run, lines, run.comes_to())


def points(undisturbed: Undisturbed, count: int) -> list[int]:
    """Some of the moments in a run, others each time."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chosen = random.Random(seed)
    return chosen.sample(range(1, len(undisturbed.lines.seen) + 1), count)


def assert_a_signal_changes_nothing(
    undisturbed: Undisturbed, directory: Path, corpus: Path, moments: list[int]
) -> None:
    for moment in moments:
        run = Run(directory / f"at{moment}", corpus, undisturbed.kind)
        with Lines(moment, lambda: signal.raise_signal(signal.SIGTERM)):
            run.start()
        place = f"SIGTERM at line {moment}: {undisturbed.lines.seen[moment - 1]}"
        assert run.start(), place
        assert difference(undisturbed.comes_to, run.comes_to()) is None, place
        assert run.wrote() == undisturbed.run.wrote(), place
        assert run.said() == undisturbed.run.said(), place
        shutil.rmtree(run.directory)


def test_a_signal_at_any_moment_of_a_step_changes_nothing_of_the_end(
    tmp_path: Path, corpus: Path, undisturbed: Undisturbed
) -> None:
    assert_a_signal_changes_nothing(undisturbed, tmp_path, corpus, points(undisturbed, 5))


@pytest.mark.slow
def test_a_signal_at_a_third_of_the_lines_of_the_loop_changes_nothing_of_the_end(
    tmp_path: Path, corpus: Path, undisturbed: Undisturbed
) -> None:
    moments = undisturbed.lines.last_of_each()
    moments = moments[random.randrange(3) :: 3]  # all of them take ten minutes
    assert_a_signal_changes_nothing(undisturbed, tmp_path, corpus, moments)


@pytest.mark.parametrize("memory_every", [0, 1])
def test_a_kill_at_any_moment_of_a_step_changes_nothing_of_the_end(
    tmp_path: Path, corpus: Path, undisturbed: Undisturbed, memory_every: int
) -> None:
    for moment in points(undisturbed, 3):
        run = Run(tmp_path / f"at{moment}", corpus, undisturbed.kind, memory_every=memory_every,
                  temp_every_steps=2)  # fmt: skip

        def be_killed(run: Run = run, moment: int = moment) -> None:
            with Lines(moment, die):
                run.start()

        assert in_child(be_killed) == -signal.SIGKILL
        place = f"SIGKILL at line {moment}: {undisturbed.lines.seen[moment - 1]}"
        assert run.start(), place
        assert difference(undisturbed.comes_to, run.comes_to()) is None, place
        assert run.shown() == undisturbed.run.shown(), place
