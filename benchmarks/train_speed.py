"""Tokens per second of our training loop beside nanoGPT's and transformers.Trainer's.

    python benchmarks/train_speed.py --nanogpt DIR [--rounds 5] [--steps 12]

The same model shape, batch, precision, data and machine; every round runs each contender once, in
a process of its own, in an order that rotates. Steps are timed as each loop's user experiences
them: from one step's end to the next one's. nanoGPT is run by its own train.py from a checkout
outside this repository (`--nanogpt` or $NANOGPT), with one change: autocast on the CPU too, which
it leaves out, so that precision is the same. transformers.Trainer is used as its documentation
shows it. Results go to benchmarks/results/train_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"layers": 6, "width": 384, "heads": 6, "context": 256, "batch": 8}
WARM_UP = 4  # steps of each process that do not count
CONTENDERS = ("holdfast", "nanogpt", "transformers")


# ------------------------------------------------------------------------------- the contenders


def prepare(data: Path, scratch: Path) -> int:
    """Tokenize once for all; returns the size of the vocabulary."""
    from holdfast.training.text.prepare import prepare_data

    prepared = prepare_data(data, vocab_size=8192, val_fraction=0.05, seed=1, cache_dir=scratch)
    tokens = np.asarray(prepared.train.tokens, dtype=np.uint16)
    for name in ("train.bin", "val.bin"):
        tokens.tofile(scratch / name)
    return prepared.tokenizer.vocab_size


def run_holdfast(data: Path, scratch: Path, steps: int, dtype: str) -> list[float]:
    """Our own session, as `holdfast train` runs it, console and all."""
    import io

    from holdfast.training import loop, models, session
    from holdfast.training.console import Console
    from holdfast.training.options.presets import resolve
    from holdfast.training.trainer import Trainer

    size = SHAPE["layers"], SHAPE["width"], SHAPE["heads"], SHAPE["context"]
    models.SHAPES["bench"] = models.Shape("gpt2", *size, vocab_size=8192)
    flags = {
        "model": "bench", "data_file": str(data), "cache_dir": str(scratch),
        "num_steps": str(WARM_UP + steps), "batch_size": str(SHAPE["batch"]), "seed": "1",
        "precision": dtype, "val_fraction": "0.05", "temp_every_minutes": "0",
        "checkpoint_dir": str(scratch / f"run-{os.getpid()}"), "sample_tokens": "0",
    }  # fmt: skip
    ends: list[float] = []
    after_step = loop.after_step

    def watched(trainer: Trainer) -> None:
        after_step(trainer)
        ends.append(time.perf_counter())
        if len(ends) == WARM_UP + steps:
            raise SystemExit  # the evaluation and the save at the end are not what is measured

    loop.after_step = watched
    try:
        with Console(stream=io.StringIO(), terminal=False) as console:
            session.run(resolve(flags=flags), console, log=False, yes=True, command="")
    except SystemExit:
        pass
    return np.diff(ends).tolist()[WARM_UP - 1 :]


def run_transformers(scratch: Path, steps: int, vocabulary: int, dtype: str) -> list[float]:
    """transformers.Trainer with GPT2LMHeadModel, both with their defaults."""
    import torch
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    context = SHAPE["context"]
    tokens = np.fromfile(scratch / "train.bin", dtype=np.uint16)
    rows = len(tokens) // context

    class Windows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return rows

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            window = torch.from_numpy(tokens[i * context : (i + 1) * context].astype(np.int64))
            return {"input_ids": window, "labels": window}

    class Watch(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_layer=SHAPE["layers"], n_embd=SHAPE["width"],
            n_head=SHAPE["heads"], n_positions=context, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )
    )  # fmt: skip
    watch = Watch()
    arguments = TrainingArguments(
        output_dir=str(scratch / "hf"), per_device_train_batch_size=SHAPE["batch"],
        max_steps=WARM_UP + steps, bf16=dtype == "bf16", use_cpu=not torch.cuda.is_available(),
        save_strategy="no", report_to=[], learning_rate=1e-3, logging_steps=10, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Windows(), callbacks=[watch]).train()
    return np.diff(watch.ends).tolist()[WARM_UP - 1 :]


def run_nanogpt(
    checkout: Path, scratch: Path, steps: int, vocabulary: int, dtype: str
) -> list[float]:
    """nanoGPT's own train.py; its log tells the time of each iteration."""
    import pickle

    import torch

    place = scratch / "nanogpt"
    if not place.exists():
        shutil.copytree(checkout, place, ignore=shutil.ignore_patterns(".git", "assets"))
        script = (place / "train.py").read_text()
        without = "nullcontext() if device_type == 'cpu' else "
        assert without in script, "another version of nanoGPT: look at its autocast line"
        (place / "train.py").write_text(script.replace(without, ""))
        (scratch / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocabulary}))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {
        "device": device, "compile": False, "dataset": str(scratch), "eval_iters": 1,
        "dtype": "bfloat16" if dtype == "bf16" else "float32", "batch_size": SHAPE["batch"],
        "block_size": SHAPE["context"], "n_layer": SHAPE["layers"], "n_embd": SHAPE["width"],
        "n_head": SHAPE["heads"], "gradient_accumulation_steps": 1, "eval_interval": 10_000,
        "max_iters": WARM_UP + steps, "out_dir": str(scratch / "nano-out"),
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(
        [sys.executable, "train.py", *words], cwd=place, capture_output=True, text=True, check=True
    )
    times = [float(ms) / 1000 for ms in re.findall(r"time ([\d.]+)ms", done.stdout)]
    return times[WARM_UP + 1 :]


# ------------------------------------------------------------------------------------ the rounds


def contender(
    name: str, arguments: argparse.Namespace, scratch: Path, vocabulary: int
) -> list[float]:
    if name == "nanogpt":
        nano = Path(arguments.nanogpt)
        return run_nanogpt(nano, scratch, arguments.steps, vocabulary, arguments.precision)
    command = [
        sys.executable, __file__, "--worker", name, "--scratch", str(scratch), "--data",
        str(arguments.data), "--steps", str(arguments.steps), "--vocabulary", str(vocabulary),
        "--precision", arguments.precision,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    return list(json.loads(done.stdout.splitlines()[-1]))


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(
        statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000)
    )  # fmt: skip
    return medians[50], medians[-51]


def main() -> None:
    default_data = ROOT / "data" / "zh_sample.txt"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", default=os.environ.get("NANOGPT"), help="its checkout")
    parser.add_argument("--data", type=Path, default=default_data)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a process")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/train_speed.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == "holdfast":
        times = run_holdfast(
            arguments.data, arguments.scratch, arguments.steps, arguments.precision
        )
        print(json.dumps(times))
        return
    if arguments.worker == "transformers":
        print(json.dumps(run_transformers(
            arguments.scratch, arguments.steps, arguments.vocabulary, arguments.precision
        )))  # fmt: skip
        return
    names = [name for name in CONTENDERS if name != "nanogpt" or arguments.nanogpt]
    if "nanogpt" not in names:
        print("nanoGPT is left out: give its checkout with --nanogpt DIR or $NANOGPT")
    medians: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as folder:
        scratch = Path(folder)
        vocabulary = prepare(arguments.data, scratch)
        for number in range(arguments.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                times = contender(name, arguments, scratch, vocabulary)
                medians[name].append(statistics.median(times))
                print(f"round {number + 1}: {name:13} {medians[name][-1]:.3f} s a step", flush=True)
    report(arguments, medians, vocabulary)


def report(arguments: argparse.Namespace, medians: dict[str, list[float]], vocabulary: int) -> None:
    """The table, and the file it comes from."""
    import torch
    import transformers

    tokens = SHAPE["batch"] * SHAPE["context"]
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/train_speed.py "
        + f"--rounds {arguments.rounds} --steps {arguments.steps}",
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine(),
                    "torch": torch.__version__, "transformers": transformers.__version__},
        "shape": {**SHAPE, "vocabulary": vocabulary, "precision": arguments.precision},
        "seconds_a_step": medians,
        "ratios": {},
    }  # fmt: skip
    print(f"\n{'contender':13} {'tokens/s (median)':>18} {'spread':>17}   ours / theirs [95 %]")
    for name, times in medians.items():
        rates = sorted(tokens / t for t in times)
        line = f"{name:13} {statistics.median(rates):18,.0f} {rates[0]:8,.0f}–{rates[-1]:8,.0f}"
        if name != "holdfast":
            ratios = [
                theirs / ours for ours, theirs in zip(medians["holdfast"], times, strict=True)
            ]
            low, high = interval(ratios)
            result["ratios"][name] = {"median": statistics.median(ratios), "95%": [low, high]}
            line += f"   {statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"
        print(line)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten: {arguments.out}")


if __name__ == "__main__":
    main()
