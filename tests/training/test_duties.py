"""What is due after a step (evaluation, save, sample, lines, the end of an epoch or of the run) is
done once, whatever comes: the end is that of the undisturbed run, and so is all that was written.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint.rundir import shared_memory
from tests.support import die, in_child
from tests.training.duties import KINDS, Lines, Run, lines_of
from tests.training.runs import difference, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), passages=2)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    for remains in shared_memory.remains():
        if remains.run is not None and tmp_path in [remains.run, *remains.run.parents]:
            remains.remove()


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
    assert_a_signal_changes_nothing(undisturbed, tmp_path, corpus, points(undisturbed, 3))


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
    for moment in points(undisturbed, 2):
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


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kill_at_the_end_kept_from_the_records_is_written_by_the_next_start(
    kind: str, tmp_path: Path, corpus: Path
) -> None:
    run = Run(tmp_path / "run", corpus, kind)
    assert run.start()
    wrote, comes_to = run.wrote(), run.comes_to()
    metrics = run.directory / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    last = json.loads(lines[-1])["step"]
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] < last))
    (run.directory / "training_history.json").unlink(missing_ok=True)
    for _again in range(2):
        assert run.start()
        assert run.wrote() == wrote
        assert difference(comes_to, run.comes_to()) is None
    assert len(lines_of(run.directory, "finished")) == 1


def kill_once_more_is_shown(directory: Path, lines: int) -> None:
    """Kill this process as soon as `lines` more lines about its steps stand in metrics.jsonl."""
    victim, wanted = os.getpid(), len(lines_of(directory)) + lines
    if os.fork() == 0:
        while os.getppid() == victim:
            if len(lines_of(directory)) >= wanted:
                os.kill(victim, signal.SIGKILL)
            time.sleep(0.0005)
        os._exit(0)


@pytest.mark.skipif(not shared_memory.usable(), reason="no /dev/shm on this system")
def test_what_was_shown_before_a_kill_is_gone_on_from_and_no_line_is_lost_or_doubled(
    tmp_path: Path, corpus: Path
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    options = {"num_steps": 40, "eval_every": 4, "save_every": 9, "memory_every": 1}
    straight = Run(tmp_path / "straight", corpus, "steps", **options)
    assert straight.start()
    run = Run(tmp_path / "killed", corpus, "steps", **options)

    shown = 0
    for _kill in range(12):
        more = draw.randrange(1, 4)

        def be_killed(more: int = more) -> None:
            kill_once_more_is_shown(run.directory, more)
            run.start()

        if in_child(be_killed) == 0:
            break
        if shown:
            resumed = lines_of(run.directory, "resumed")[-1]["step"]
            assert resumed >= shown, (resumed, shown)
        shown = lines_of(run.directory)[-1]["step"]
    assert run.start()
    assert run.wrote() == straight.wrote()
    assert difference(straight.comes_to(), run.comes_to()) is None
