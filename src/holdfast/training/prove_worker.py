"""One run of `holdfast doctor --prove-resume`: the trainer as it is, watched through its console.

Gets its order as JSON in the first argument and answers with a line of JSON for each step on what
was its standard output. Ends when its parent does: it reads from it until there is nothing more.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import xxhash

from holdfast.checkpoint.rundir import Catalog
from holdfast.checkpoint.state import RandomState
from holdfast.errors import ConfigError, HoldfastError, Interrupted, SaveFailed
from holdfast.i18n import _, set_language
from holdfast.training import trainer
from holdfast.training.console import Console
from holdfast.training.options.config import Config
from holdfast.training.options.presets import resolve
from holdfast.training.text.batches import Batches

SAVE_WITHIN = 900.0  # seconds until the step that is to be resumed from must be durable
_POLL = 0.02  # seconds between two looks into the history


@dataclass(frozen=True, slots=True)
class Order:
    """Orders of a run: stop at a step as a person would, or wait after a durable one."""

    config: str  # the file
    stop: int  # the last step, counted from the beginning of the run
    hold: int | None = None  # once this step is durable, be in the middle of the next and wait
    lang: str = "en"

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main() -> int:
    """Train as ordered; 0 where the last step was reached and saved."""
    order = Order(**json.loads(sys.argv[1]))
    set_language(order.lang)
    threading.Thread(target=end_with_parent, daemon=True).start()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        try:
            _train(order, answers)
        except HoldfastError as error:
            _tell(answers, error=str(error), kind=type(error).__name__)
            return error.exit_code
    return 0


def _train(order: Order, answers: TextIO) -> None:
    from holdfast.training.session import run

    config = resolve(file=Path(order.config))
    with Path(os.devnull).open("w") as nowhere:
        watch = _Watch(order, config, answers, nowhere)
        vars(trainer)["Batches"] = watch.batches()  # the loop's own, and a note of what they are
        try:
            run(config, watch, log=False, yes=True, command="holdfast train")
        except Interrupted:
            if not watch.reached:
                raise


def _tell(answers: TextIO, **values: Any) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def end_with_parent() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock would be in the way of the exit
        pass
    os._exit(1)


class _Watch(Console):
    """A console that says nothing and tells the parent of every step: what went in, what came out,
    and where the random streams stand."""

    def __init__(self, order: Order, config: Config, answers: TextIO, nowhere: TextIO) -> None:
        super().__init__(quiet=True, stream=nowhere, terminal=False)
        self._order, self._config, self._answers = order, config, answers
        self._seen = xxhash.xxh3_64()
        self._random = RandomState()
        self.reached = False

    def working(self, label: str, done: int, total: int) -> None:
        _tell(self._answers, working=label, done=done, total=total)

    def stepped(self) -> None:
        """Tell the parent of the step that has been done, and stop or wait after it as ordered."""
        step, last = self.status.step, self._order.stop
        if self.status.total_steps < last:
            message = _(
                "This run has only {total} steps: choose --steps and --more so that they are at "
                "most that many together.",
                total=self.status.total_steps,
            )
            raise ConfigError(message)
        _tell(
            self._answers,
            step=step,
            batch=self._seen.hexdigest(),
            rng=self._streams(),
            loss=float(self.status.loss).hex(),
        )
        self._seen.reset()
        if self._order.hold is not None and step > self._order.hold:
            self._hold(self._order.hold)
        if step >= last:
            self.reached = True
            signal.raise_signal(signal.SIGTERM)  # save this step, and leave: as after any signal

    def batches(self) -> type[Batches]:
        """`Batches` that notes what it hands out."""
        seen = self._seen

        class Watched(Batches):
            def batch(self, epoch: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
                inputs, targets = super().batch(epoch, position)
                for tensor in (inputs, targets):
                    seen.update(tensor.numpy().tobytes())
                return inputs, targets

        return Watched

    def _streams(self) -> dict[str, str]:
        return {name: _digest(value) for name, value in self._random.state_dict().items()}

    def _hold(self, step: int) -> None:
        """Wait until `step` is durable, say so, and wait for the kill."""
        catalog = Catalog(self._config.checkpoint.checkpoint_dir)
        deadline = time.monotonic() + SAVE_WITHIN
        while not any(event["step"] == step for event in catalog.history.known.announced.values()):
            if time.monotonic() > deadline:
                raise SaveFailed("Step {step} has not become durable.", step=step)
            time.sleep(_POLL)
        _tell(self._answers, durable=step)
        while True:
            time.sleep(3600)


def _digest(value: Any) -> str:
    """A fingerprint of a random stream's state."""
    found = xxhash.xxh3_64()

    def walk(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            found.update(item.numpy().tobytes())
        elif isinstance(item, Mapping):
            for part in item.values():
                walk(part)
        elif isinstance(item, list | tuple):
            for part in item:
                walk(part)
        else:
            found.update(repr(item).encode())

    walk(value)
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
