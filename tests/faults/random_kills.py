"""A real training, ended at random moments by every signal that ends trainings and by a memory
limit, until it has come through: then weights, optimizer and history are those of the undisturbed
run, bit for bit."""

from __future__ import annotations

import io
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.training import session
from holdfast.training.console import Console
from tests.faults import inject
from tests.faults.inject import Fault, Outcome, Strike
from tests.faults.tally import Tally, Verdict
from tests.training.runs import config_for, difference, final_state, write_corpus

OPTIONS = {"temp_every_steps": 3, "save_every": 8, "memory_every": 1}
_MEMORY = 4 << 20  # bytes that a process may still take when it runs into the limit


class _Telling(Console):
    """A console that also says over the pipe what was announced."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(stream=io.StringIO(), terminal=False)
        self._say = say

    def on_event(self, event: str, fields: dict[str, Any]) -> None:
        super().on_event(event, fields)
        if event == "durable":
            self._say(f"durable {fields['saved'].entry.step}")
        elif event == "resumed":
            self._say(f"resumed {fields['resumed'].step}")


def limit_memory(pid: int) -> None:
    """Let the next larger allocation of a process fail."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + _MEMORY
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))


def _kill(number: int) -> Callable[[int], None]:
    def act(pid: int) -> None:
        os.kill(pid, number)

    return act


ENDS: dict[str, Callable[[int], None]] = {
    "SIGKILL": _kill(signal.SIGKILL),
    "SIGTERM": _kill(signal.SIGTERM),
    "SIGINT": _kill(signal.SIGINT),
    "memory limit": limit_memory,
}


def random_kills(kills: int, *, seed: int) -> Tally:
    """End trainings until `kills` of them have been ended in the middle. Raises AssertionError
    where a finished one is not what the undisturbed one is."""
    tally, began = Tally("a training killed at a random moment", "holdfast"), time.monotonic()
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        corpus = write_corpus(Path(place))
        straight = _live(Path(place) / "straight", corpus, None)
        assert straight.status == 0, straight.error
        length = time.monotonic() - began
        expected = final_state(Path(place) / "straight")
        number = 0
        while tally.points < kills:
            number += 1
            directory = Path(place) / f"run{number}"
            _until_finished(directory, corpus, _strikes(rng, length), tally, expected)
    tally.seconds = time.monotonic() - began
    return tally


def _strikes(rng: random.Random, length: float) -> Iterator[tuple[str, Strike]]:
    """What ends one life after the other, and when; `length` is how long a whole training takes."""
    for _life in range(1000):
        name = rng.choice([*ENDS])
        yield name, Strike(rng.uniform(0, 0.7 * length), ENDS[name])


def _until_finished(
    directory: Path, corpus: Path, strikes: Iterator[tuple[str, Strike]], tally: Tally,
    expected: dict[str, Any],
) -> None:  # fmt: skip
    """One training through all of its lives."""
    newest, ended = 0, ""
    for name, strike in strikes:
        outcome = _live(directory, corpus, strike)
        resumed = _newest(outcome, "resumed")
        if ended and resumed >= 0:
            whole = outcome.status == 0
            same = not whole or difference(final_state(directory), expected) is None
            verdict = Verdict(newest, newest, resumed, same, same)
            tally.judge(verdict, f"{ended} in {directory.name}")
            ended = ""
        newest = max(newest, _newest(outcome, "durable"))
        if outcome.status == 0:
            wrong = difference(final_state(directory), expected)
            assert wrong is None, f"after {tally.points} kills: {wrong}"
            return
        ended = ended or name
        tally.note(directory)
    raise AssertionError(f"a training does not get on: {outcome.error[-2000:]}")


def _live(directory: Path, corpus: Path, strike: Strike | None) -> Outcome:
    """Train until the end or until it is struck."""

    def body(_arm: object, say: Callable[[str], None]) -> str:
        say("begun")
        try:
            with _Telling(say) as console:
                config = config_for(directory, corpus, **OPTIONS)
                session.run(config, console, log=False, yes=True, command="holdfast train")
        except HoldfastError as error:
            os._exit(error.exit_code)
        return ""

    return inject.run(body, directory, Fault(), strike=strike)


def _newest(outcome: Outcome, word: str) -> int:
    steps = [int(line.split()[1]) for line in outcome.said if line.startswith(word + " ")]
    return max(steps, default=-1)
