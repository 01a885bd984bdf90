"""A real training, ended at random moments by every signal that ends trainings and by the kernel's
out-of-memory killer, until it has come through: then weights, optimizer and history are those of
the undisturbed run, bit for bit."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.training import models, session
from holdfast.training.console import Console
from tests.faults import inject
from tests.faults.inject import Fault, Outcome, Strike
from tests.faults.tally import Tally, Verdict
from tests.training.runs import SMALL, config_for, difference, final_state, write_corpus

OPTIONS = {"temp_every_steps": 3, "save_every": 8, "memory_every": 1}


def _told(say: Callable[[str], None]) -> Callable[[Console, str, dict[str, Any]], None]:
    """Return a `tell_event` that also says over the pipe what was announced."""
    real = session.tell_event

    def tell(console: Console, event: str, fields: dict[str, Any]) -> None:
        real(console, event, fields)
        if event == "durable":
            say(f"durable {fields['saved'].entry.step}")
        elif event == "resumed":
            say(f"resumed {fields['resumed'].step}")

    return tell


@functools.cache
def group() -> Path | None:
    """A control group of our own that counts memory; None where nobody lets us make one."""
    for root, limit in ((Path("/sys/fs/cgroup/memory"), _V1), (Path("/sys/fs/cgroup"), _V2)):
        place = root / f"holdfast-faults-{os.getpid()}"
        with contextlib.suppress(OSError):
            place.mkdir()
            if (place / limit[0]).exists():
                return place
            place.rmdir()
    return None


def exhaust_memory(_pid: int) -> None:
    """The group may take no byte more than it has: the kernel kills at the next one it takes."""
    place = group()
    assert place is not None
    for limit, usage in (_V1, _V2):
        if (place / limit).exists():
            (place / limit).write_text((place / usage).read_text())


def _remove(place: Path) -> None:
    """Take the group away; for a moment after its last process has ended it is busy."""
    for _attempt in range(100):
        with contextlib.suppress(OSError):
            place.rmdir()
            return
        time.sleep(0.1)


def _lift() -> None:
    """For the next life: no limit. A group that is busy yet is left as it is."""
    place = group()
    if place is not None:
        for (limit, _usage), none in ((_V1, "-1"), (_V2, "max")):
            if (place / limit).exists():
                (place / limit).write_text(none)


def _kill(number: int) -> Callable[[int], None]:
    def act(pid: int) -> None:
        os.kill(pid, number)

    return act


ENDS: dict[str, Callable[[int], None]] = {
    "SIGKILL": _kill(signal.SIGKILL),
    "SIGTERM": _kill(signal.SIGTERM),
    "SIGINT": _kill(signal.SIGINT),
    "out of memory": exhaust_memory,
}
_V1 = "memory.limit_in_bytes", "memory.usage_in_bytes"
_V2 = "memory.max", "memory.current"


def random_kills(kills: int, *, seed: int, small: bool = False) -> Tally:
    """End trainings until `kills` of them have been ended in the middle; of a `small` model, or of
    one as it ships. Raises AssertionError where a finished one is not what the undisturbed one is.
    """
    if small:
        models.SHAPES["tiny"] = SMALL
    tally, began = Tally("a training killed at a random moment", "holdfast"), time.monotonic()
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        corpus = write_corpus(Path(place))
        straight = _live(Path(place) / "straight", corpus, None)
        assert straight.status == 0, straight.error
        _import(inject.answer(straight))
        began_again = time.monotonic()
        _live(Path(place) / "again", corpus, None)
        length = time.monotonic() - began_again
        expected = final_state(Path(place) / "straight")
        number = 0
        while tally.points < kills:
            number += 1
            directory = Path(place) / f"run{number}"
            _until_finished(directory, corpus, _strikes(rng, length), tally, expected)
        made = group()
        tally.notes = "" if made is not None else "without the kernel's out-of-memory killer"
        if made is not None:
            _remove(made)
    tally.seconds = time.monotonic() - began
    return tally


def _import(modules: list[str]) -> None:
    """What a training imports, once here and not in every life of one."""
    for name in modules:
        with contextlib.suppress(Exception):  # what only works where it was first imported
            importlib.import_module(name)


def _strikes(rng: random.Random, length: float) -> Iterator[tuple[str, Strike]]:
    """Yield what ends one life after the other, and when; a whole training takes `length` seconds.

    Most of that is the start of a small training: strikes that all came before its first step
    would let no training get on.
    """
    ends = [name for name in ENDS if name != "out of memory" or group() is not None]
    for _life in range(1000):
        name = rng.choice(ends)
        yield name, Strike(rng.uniform(0, 0.9 * length), ENDS[name])


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

    place = group()
    _lift()

    def body(_arm: object, say: Callable[[str], None]) -> list[str]:
        if place is not None:
            (place / "cgroup.procs").write_text(str(os.getpid()))
        say("begun")
        try:
            session.tell_event = _told(say)
            with Console(stream=io.StringIO(), terminal=False) as console:
                config = config_for(directory, corpus, **OPTIONS)
                session.run(config, console, log=False, yes=True, command="holdfast train")
        except HoldfastError as error:
            os._exit(error.exit_code)
        return sorted(sys.modules)

    return inject.run(body, directory, Fault(), strike=strike)


def _newest(outcome: Outcome, word: str) -> int:
    steps = [int(line.split()[1]) for line in outcome.said if line.startswith(word + " ")]
    return max(steps, default=-1)
