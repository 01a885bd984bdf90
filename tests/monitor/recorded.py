"""A run directory with the lines that a training would have written, at times of one's choice."""

from __future__ import annotations

import datetime
import json
import os
import socket
from pathlib import Path
from typing import Any

START = datetime.datetime(2026, 3, 1, 12, 0, 0).astimezone()


def stamp(seconds: float) -> str:
    """The time so many seconds after START, as holdfast writes it."""
    return (START + datetime.timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def ago(seconds: float) -> float:
    """The moment so many seconds before now, counted from START."""
    return (datetime.datetime.now().astimezone() - START).total_seconds() - seconds


class Recorded:
    """Appends lines of metrics.jsonl and events.jsonl as the trainer and the engine form them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def metric(self, event: str, step: int, at: float, **fields: Any) -> None:
        self._append("metrics.jsonl", {"time": stamp(at), "event": event, "step": step, **fields})

    def event(self, event: str, at: float, **fields: Any) -> None:
        self._append("events.jsonl", {"time": stamp(at), "event": event, **fields})

    def started(self, step: int, at: float, **fields: Any) -> None:
        told = {
            "total_steps": 1000, "steps_per_epoch": 100, "epochs": 10, "model": "tiny",
            "parameters": 3639552, "device": "cpu", "pid": os.getpid(),
            "host": socket.gethostname(), **fields,
        }  # fmt: skip
        self.metric("started", step, at, **told)

    def step(self, step: int, at: float, loss: float | None = 2.0, **fields: Any) -> None:
        told = {
            "epoch": 1 + (step - 1) // 100, "loss": loss, "smoothed_loss": loss,
            "learning_rate": 1e-3, "tokens_per_second": 5000.0, "durable_step": None,
            "memory_step": None, "gpu_bytes": None, **fields,
        }  # fmt: skip
        self.metric("step", step, at, **told)

    def steps(self, first: int, last: int, at: float, pace: float = 1.0, every: int = 10) -> None:
        """Lines for the steps from `first` to `last`, `pace` seconds a step, the first at `at`."""
        for step in range(first, last + 1, every):
            self.step(step, at + pace * (step - first), loss=100 / (step + 10))

    def configure(self, **checkpoint: Any) -> None:
        """config.json as the trainer writes it, with these options of its checkpoints."""
        (self.directory / "config.json").write_text(json.dumps({"checkpoint": checkpoint}))

    def torn(self, name: str = "metrics.jsonl") -> None:
        """Half a line, as a power cut leaves it."""
        with (self.directory / name).open("a") as file:
            file.write('{"time": "2026-03-01T12:0')

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.directory / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
