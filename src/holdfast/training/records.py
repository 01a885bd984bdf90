"""Write what others read of a run: metrics.jsonl, training_history.json, TensorBoard.

None of it is needed to resume; all of it can be read while training goes on. A full disk costs a
warning here, never the training.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.checkpoint.rundir import now
from holdfast.checkpoint.system import Follower, filesystem
from holdfast.errors import ConfigError
from holdfast.i18n import _

log = logging.getLogger("holdfast")

METRICS, HISTORY, BOARD = "metrics.jsonl", "training_history.json", "tensorboard"
CONFIG, TOKENIZER = "config.json", "tokenizer"


class Records:
    """The files of one run directory, written as training goes on.

    Where the directory still holds another run, `held` keeps them in memory until that one has gone
    to the archive: a kill before the first save of this run leaves the other one as it was.
    """

    def __init__(
        self, directory: Path, *, tensorboard: bool, resumed_step: int, held: bool = False
    ) -> None:
        """Raises ConfigError where TensorBoard is wanted and not installed."""
        self._directory = directory
        self._held: list[Callable[[], None]] | None = [] if held else None
        self._failing: set[str] = set()  # files that could not be written the last time
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                message = _(
                    "--tensorboard needs the package tensorboard: pip install "
                    "'holdfast-train[tensorboard]'"
                )
                raise ConfigError(message) from error
            # Hide the points of steps that will be done again, and all of an earlier run here. The
            # point of the resumed step itself is not drawn again: purge behind it.
            purge = resumed_step + 1 if resumed_step else 0

            def open_board() -> None:
                self._board = SummaryWriter(str(directory / BOARD), purge_step=purge)

            self.do(open_board)

    def do(self, work: Callable[[], None]) -> None:
        """Do `work` now, or when the other run has made way."""
        if self._held is None:
            work()
        else:
            self._held.append(work)

    def take_over(self, archive: Path) -> None:
        """Move the records of the other run to `archive`, where its checkpoints lie now, and write
        what was held."""
        if self._held is None:
            return
        held, self._held = self._held, None
        for name in (CONFIG, TOKENIZER, METRICS, HISTORY, BOARD):
            with self._survive(name), contextlib.suppress(FileNotFoundError):
                filesystem.move(self._directory / name, archive / name)
        for work in held:
            with self._survive(CONFIG):
                work()

    def step(self, step: int, **values: float | int | None) -> None:
        """One line of metrics.jsonl for a logging interval."""
        self._append({"event": "step", "step": step, **values})
        numbers = {n: v for n, v in values.items() if isinstance(v, float)}
        self.do(partial(self._draw, step, numbers))

    def event(self, event: str, step: int, **values: Any) -> None:
        """One line for something that happened: resumed, epoch, evaluation, finished …"""
        self._append({"event": event, "step": step, **values})
        names = ("val_loss", "train_loss_epoch")
        numbers = {n: values[n] for n in names if isinstance(values.get(n), float)}
        self.do(partial(self._draw, step, numbers))

    def missing(self, step: int, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return those of the `lines` about `step` that metrics.jsonl lacks: a kill came first.

        All are missing after a line about an earlier step, from which training has gone on. Without
        one this is not the directory where the steps before were made, and none is missing.
        """
        missing: list[dict[str, Any]] = []
        written = Follower(self._directory / METRICS)
        while lines:
            with self._survive(METRICS):
                for line in written.new():
                    at = line.get("back_to", line.get("step"))
                    if isinstance(at, int) and at < step:
                        missing = list(lines)
                    elif at == step:
                        missing = [each for each in missing if each["event"] != line.get("event")]
            if not written.more or METRICS in self._failing:
                break
        return missing

    def history(self, history: dict[str, list[Any]]) -> None:
        """training_history.json: {"train_loss": [...], "val_loss": [...], "epochs": [...]}."""
        self.do(partial(self._write_history, _finite(history)))

    def _write_history(self, history: dict[str, list[Any]]) -> None:
        with self._survive(HISTORY):
            filesystem.write_json(self._directory / HISTORY, history)

    def close(self) -> None:
        with self._survive(BOARD):
            if self._board is not None:
                self._board.close()

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps(_finite({"time": now(), **line}), ensure_ascii=False)
        self.do(partial(self._write_line, text))

    def _write_line(self, text: str) -> None:
        torn = "\n" if METRICS in self._failing else ""  # a full disk may have taken half a line
        with self._survive(METRICS):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            opened = filesystem.open_regular(self._directory / METRICS, flags)
            with os.fdopen(opened, "a", encoding="utf-8") as file:
                file.write(f"{torn}{text}\n")

    def _draw(self, step: int, values: dict[str, float]) -> None:
        if self._board is None or BOARD in self._failing:  # its writer ends with its first error
            return
        with self._survive(BOARD):
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()  # by default after two minutes: a kill would lose those for good

    @contextlib.contextmanager
    def _survive(self, name: str) -> Iterator[None]:
        """Turn a failure to write into a warning, once until it works again."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - TensorBoard raises what its thread met
            if name not in self._failing:
                log.warning("%s: %s", name, error)
            self._failing.add(name)
        else:
            self._failing.discard(name)


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
