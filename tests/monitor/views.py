"""Run directories with metrics as the trainer writes them, for the tests of what draws them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from holdfast.monitor.curves import Curves, curves_of
from holdfast.monitor.run_view import RunView
from tests.manage.runs import make_run


def add_metrics(directory: Path, steps: int = 400, *, every: int = 10, shift: float = 0.0) -> Path:
    """Lines of metrics.jsonl for a training of `steps` steps."""
    time = "2026-03-01T10:00:00+00:00"
    lines: list[dict[str, Any]] = [{"event": "started", "step": 0, "total_steps": steps}]
    for step in range(every, steps + 1, every):
        lines.append({
            "event": "step", "step": step, "epoch": 1 + step // 100,
            "loss": 3 + shift + 4 * math.exp(-step / 100), "learning_rate": 1e-3 * step / steps,
            "tokens_per_second": 5000.0 + step,
        })  # fmt: skip
        if step % 100 == 0:
            lines.append({"event": "evaluation", "step": step, "val_loss": 3.5 + shift})
    text = "".join(json.dumps({"time": time, **line}) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text, "utf-8")
    return directory


def run_with_metrics(directory: Path, **how: Any) -> Path:
    return add_metrics(make_run(directory), **how)


def view_of(directory: Path) -> RunView:
    view = RunView(directory)
    view.refresh()
    return view


def curves(directory: Path, label: str = "run") -> Curves:
    return curves_of(view_of(directory), label)
