"""`holdfast doctor --prove-resume`: the user's own training, straight and killed, to the last bit.

The runs are real ones in processes of their own (prove_worker.py), in temporary run directories
beside the real one. Of the configuration only the directory and, in the run that is killed, the
step of a save are other ones: what makes a training repeatable, or not, is left as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from holdfast.checkpoint.state import load
from holdfast.errors import CheckpointError
from holdfast.i18n import _, language
from holdfast.prove import (
    NOT_REPEATABLE,
    OUTSIDE,
    Proof,
    explain,
    first_difference,
    judge,
    revived,
    workshop,
)
from holdfast.training.options.config import OPTIONS, Config
from holdfast.training.prove_worker import Order

# What a run keeps about itself, and what differs with the directory it lies in.
_NOT_COMPARED = ("config",)
_NOT_PASSED_ON = {"notify"}  # it is about the real run

Told = Mapping[str, Any]
Progress = Callable[["Stage"], None]


Start = Callable[[Order, IO[bytes]], Any]
"""Begin a process that trains as ordered: a `Popen`, or what behaves like one. What it says of a
crash goes into the file."""


@dataclass(slots=True)
class Stage:
    """Progress of a proof: the run, its step, and the seconds that all runs will still take."""

    name: str  # "straight", "interrupted", "resumed" or "again"
    step: int = 0
    last: int = 0
    left: float | None = None  # seconds, once a step has been timed
    preparing: str = ""  # what is done before the first step


@dataclass(frozen=True, slots=True)
class TrainingProof:
    """Result of proving a training; `proof` is about the state at the end."""

    proof: Proof
    steps: int
    more: int
    at: int | None = None  # the first step in which anything differed
    what: str | None = None  # in that step: "batch", "rng.torch", ... or "loss"
    values: tuple[str, str] = ("", "")  # of that, straight and interrupted

    @property
    def equal(self) -> bool:
        """True if every step and the state at the end are the same to the bit."""
        return self.proof.equal and self.at is None

    def to_json(self) -> dict[str, Any]:
        """The documented form."""
        step = {
            "step": self.at,
            "what": self.what,
            "straight": self.values[0],
            "interrupted": self.values[1],
        }
        return {
            **self.proof.to_json(),
            "equal": self.equal,
            "steps": self.steps,
            "more": self.more,
            "first_step": None if self.at is None else step,
        }


def prove(
    config: Config,
    *,
    steps: int,
    more: int,
    place: Path,
    progress: Progress,
    start: Start | None = None,
) -> TrainingProof:
    """Train `steps` + `more` steps straight; and `steps`, SIGKILL in the next one, resume, `more`.

    `place` is an existing directory for the temporary runs, which are gone afterwards, whatever
    happens. Where the ends differ the straight run is repeated, to learn whether it is to blame.

    `start` begins a process (a Python of its own where not given). Raises ConfigError where the run
    has fewer steps, or whatever a training raises.
    """
    with workshop(place) as directory:
        return _Proving(config, steps, more, directory, progress, start or _start).run()


@dataclass(slots=True)
class _Proving:
    config: Config
    steps: int
    more: int
    directory: Path
    progress: Progress
    start: Start
    _spent: list[float] = field(default_factory=list)  # seconds of steps
    _starts: list[float] = field(default_factory=list)  # seconds until the first step of a run

    def run(self) -> TrainingProof:
        end = self.steps + self.more
        straight = self._train("straight", Order(self._file("straight"), end))
        file = self._file("interrupted", self.steps)
        begun = self._train("interrupted", Order(file, end, self.steps))
        resumed = self._train("resumed", Order(file, end))
        if min(resumed) != self.steps + 1:
            message = _(
                "The interrupted run was to go on after step {step}, and went on with step "
                "{first}: that proves nothing.",
                step=self.steps,
                first=min(resumed),
            )
            raise CheckpointError(message)
        a, b = self._state("straight"), self._state("interrupted")
        proof = judge(a, b, killed=True)
        at, what, values = _first_step(straight, {**begun, **resumed})
        if not proof.equal:
            proof = self._explained(proof, a, end)
        return TrainingProof(proof, self.steps, self.more, at, what, values)

    def _explained(self, proof: Proof, straight: Any, end: int) -> Proof:
        self._train("again", Order(self._file("again"), end))
        same = first_difference(straight, self._state("again")) is None
        return explain(proof, OUTSIDE if same else NOT_REPEATABLE)

    def _state(self, run: str) -> Any:
        state = load(self.directory / run / "latest.pt")
        return {name: value for name, value in state.items() if name not in _NOT_COMPARED}

    def _file(self, run: str, save_every: int | None = None) -> str:
        """The user's configuration as a file, for this run directory."""
        own: dict[str, Any] = {"checkpoint_dir": str(self.directory / run)}
        if save_every is not None:
            own["temp_every_steps"] = save_every
        said = {
            section: {
                name: own.get(name, value)
                for name, value in values.items()
                if name in own or _is_said(self.config, name)
            }
            for section, values in self.config.to_dict().items()
        }
        path = self.directory / f"{run}.json"
        path.write_text(json.dumps(said), "utf-8")
        return str(path)

    # -------------------------------------------------------------------------------- one run

    def _train(self, name: str, order: Order) -> dict[int, Told]:
        """Run a training to its end, or until it is time to kill it; what it told of each step."""
        told: dict[int, Told] = {}
        order = Order(order.config, order.stop, order.hold, language())
        with (self.directory / "stderr").open("w+b") as errors, self.start(order, errors) as child:
            stage = Stage(name, last=order.stop if order.hold is None else order.hold)
            self.progress(stage)
            began, over = time.monotonic(), False
            try:
                for line in child.stdout:
                    answer = json.loads(line)
                    if "error" in answer:
                        raise revived(answer["kind"], answer["error"])
                    if "durable" in answer:
                        over = True
                        child.kill()
                    elif "working" in answer:
                        stage.preparing = answer["working"]
                    elif "step" in answer:
                        (self._spent if told else self._starts).append(time.monotonic() - began)
                        began = time.monotonic()
                        told[answer["step"]] = answer
                        stage.step, stage.preparing = answer["step"], ""
                        stage.left = self._left(stage.step, name)
                    self.progress(stage)
                status = child.wait()
            finally:  # Ctrl-C, too, leaves no training behind
                child.kill()
            if not over and (status or order.stop not in told):
                raise _death(status, errors)
        return told

    def _left(self, step: int, run: str) -> float | None:
        """Seconds until the end, by the mean of the steps and of the starts so far."""
        if not self._spent:
            return None
        end = self.steps + self.more
        done = step if run == "straight" else end + step
        coming = {"straight": 2, "interrupted": 1}.get(run, 0)
        steps = (2 * end - done) * sum(self._spent) / len(self._spent)
        return steps + coming * sum(self._starts) / len(self._starts)


def _start(order: Order, errors: IO[bytes]) -> subprocess.Popen[str]:
    """A Python of its own, which Ctrl-C in our terminal does not reach: we end it."""
    command = [sys.executable, "-m", "holdfast.training.prove_worker", order.to_json()]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        encoding="utf-8",
        start_new_session=os.name == "posix",
    )


def _is_said(config: Config, name: str) -> bool:
    """Return True if the user chose this option, and it is not about one start of the real run."""
    passed = name not in _NOT_PASSED_ON and not OPTIONS[name].meta.of_this_start
    return passed and config.sources[name] != "default"


def _first_step(
    straight: Mapping[int, Told], other: Mapping[int, Told]
) -> tuple[int | None, str | None, tuple[str, str]]:
    """The first step that differs, in what, and the two values.

    What goes in comes first: another batch or another random number explains another loss.
    """
    for step in sorted(other):
        a, b = straight[step], other[step]
        pairs = [("batch", a["batch"], b["batch"])]
        pairs += [(f"rng.{name}", a["rng"][name], b["rng"].get(name)) for name in a["rng"]]
        pairs.append(("loss", _number(a["loss"]), _number(b["loss"])))
        for what, x, y in pairs:
            if x != y:
                return step, what, (x, str(y))
    return None, None, ("", "")


def _number(text: str) -> str:
    return repr(float.fromhex(text))


def _death(status: int, errors: IO[bytes]) -> CheckpointError:
    """A training that ended as none should: with the last words it had."""
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    words = lines[-1].strip() if lines else _("it said nothing")
    return CheckpointError(
        "The training ended by itself with status {status}: {words}", status=status, words=words
    )
