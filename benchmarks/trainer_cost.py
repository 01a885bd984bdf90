"""Measure what protecting a `transformers.Trainer` costs: a step, a resume, a save of LoRA.

    python -m benchmarks.trainer_cost [PAIRS]

Runs with and without protection take turns. A step is counted in seconds of the clock and of
processors; the first 32 are left out, in which each step is kept in memory.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from holdfast import CheckpointManager
from holdfast.adapters.transformers import protect

LEFT_OUT, STEPS = 32, 60


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, samples: int, length: int) -> None:
        seeded = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 512, (samples, length), generator=seeded)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes when each step begins: seconds of the clock, and of processors."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_step_begin(self, *_args: Any, **_more: Any) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def steps(self, which: int) -> list[float]:
        times = [each[which] for each in self.times][LEFT_OUT:]
        return [after - before for before, after in itertools.pairwise(times)]


def trainer(out: Path, *, steps: int, width: int = 256, length: int = 64) -> tuple[Trainer, Clock]:
    config = GPT2Config(vocab_size=512, n_positions=length, n_embd=width, n_layer=4, n_head=4)
    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=4,
        max_steps=steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    made = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=Data(10_000, length))
    clock = Clock()
    made.add_callback(clock)
    return made, clock


def step_costs(pairs: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
    for _pair in range(pairs):
        for name, rows in found.items():
            with tempfile.TemporaryDirectory() as out:
                made, clock = trainer(Path(out), steps=LEFT_OUT + STEPS)
                if name == "with":
                    protect(made, out, quiet=True)
                made.train()
                rows.append((statistics.mean(clock.steps(0)), statistics.mean(clock.steps(1))))
    for which, unit in enumerate(("clock", "processors")):
        for name, rows in found.items():
            ms = sorted(1e3 * row[which] for row in rows)
            middle = statistics.median(ms)
            print(f"step {name}: {middle:.2f} ms of {unit} ({ms[0]:.2f}-{ms[-1]:.2f})")
        both = zip(found["without"], found["with"], strict=True)
        more = statistics.median(100 * (b[which] / a[which] - 1) for a, b in both)
        print(f"  with against without: {more:+.2f} % of {unit} in the median")


def resume_costs() -> None:
    """Print the time from the call of train() to the first step, by the place in the epoch."""
    for step in (10, 2000):
        with tempfile.TemporaryDirectory() as place:
            base = Path(place, "base")
            protect(trainer(base, steps=step, width=32, length=16)[0], base, quiet=True).train()
            times = []
            for again in range(7):
                out = Path(shutil.copytree(base, Path(place, str(again))))
                made, clock = trainer(out, steps=step + 1, width=32, length=16)
                protect(made, out, quiet=True)
                began = time.perf_counter()
                made.train()
                times.append(1e3 * (clock.times[0][0] - began))
            low, high = min(times), max(times)
            print(
                f"resume at step {step}: {statistics.median(times):.0f} ms ({low:.0f}-{high:.0f})"
            )


def lora_costs() -> None:
    """Print seconds and bytes of a save: all weights train, or an adapter does."""
    for adapter in (False, True):
        with tempfile.TemporaryDirectory() as place:
            out = Path(place)
            made, _clock = trainer(out, steps=2, width=1024)
            if adapter:
                config = LoraConfig(r=8, target_modules=["c_attn"], task_type="CAUSAL_LM")
                made = Trainer(
                    get_peft_model(made.model, config), made.args, train_dataset=made.train_dataset
                )
            protect(made, out, quiet=True).train()
            with CheckpointManager(out / "more", made._holdfast.manager.state) as manager:
                saved = [manager.save(step=step) for step in range(1, 6)]
            seconds = statistics.median(each.seconds for each in saved if each is not None)
            size = (out / "latest.pt").stat().st_size
            print(
                f"a save, {'LoRA' if adapter else 'all weights'}: {size:,} bytes, {seconds:.3f} s"
            )


if __name__ == "__main__":
    lora_costs()
    resume_costs()
    step_costs(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
