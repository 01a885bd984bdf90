"""Small trainings with Trainer and its kin, each in a process of its own that can be killed.

A process is forked from this one, which has imported the frameworks: that takes them seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import torch
import trl
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from holdfast.adapters.transformers import protect

_fork = multiprocessing.get_context("fork")
FINAL = "final.pth"

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,  # 13 batches an epoch: the last step has one
    "num_train_epochs": 3,
    "learning_rate": 1e-2,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "save_total_limit": 2,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}


class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Token ids; every draw of a sample has `noise` of its own, from the global streams."""

    def __init__(self, samples: int, *, noise: bool) -> None:
        self.samples, self.noise = samples, noise

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(index))
        if self.noise:
            ids[random.randrange(12)] = int(torch.randint(0, 32, ())) + np.random.randint(32)
        return {"input_ids": ids, "labels": ids}


class Counting:
    """Writes a line for each batch that is trained on; stands in front of a trainer's class."""

    args: Any
    state: Any

    def training_step(self, model: Any, inputs: dict[str, Any], *more: Any) -> Any:
        with Path(self.args.output_dir, "batches.txt").open("a") as file:
            ids = inputs["input_ids"].flatten().tolist()
            print(os.getpid(), self.state.global_step, ids, file=file)
        return super().training_step(model, inputs, *more)  # type: ignore[misc]


def gpt2(size: int) -> GPT2LMHeadModel:
    words = {"vocab_size": 64, "n_positions": 32, "eos_token_id": 1, "bos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(**words, n_embd=size, n_layer=2, n_head=2))


def causal(out: Path, **settings: Any) -> Trainer:
    set_seed(0)
    return type("Own", (Counting, Trainer), {})(
        model=gpt2(settings.pop("size", 32)),
        args=TrainingArguments(str(out), **{**SETTINGS, **settings}),
        train_dataset=Data(26, noise=True),
        eval_dataset=Data(4, noise=False),
    )


def seq2seq(out: Path, **settings: Any) -> Trainer:
    set_seed(0)
    config = BartConfig(
        vocab_size=64,
        max_position_embeddings=32,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    return type("Own", (Counting, Seq2SeqTrainer), {})(
        model=BartForConditionalGeneration(config),
        args=Seq2SeqTrainingArguments(str(out), **{**SETTINGS, **settings}),
        train_dataset=Data(26, noise=True),
        eval_dataset=Data(4, noise=False),
    )


def sft_lora(out: Path, **settings: Any) -> Trainer:
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    set_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *map(str, range(62))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [{"text": " ".join(str((i * j) % 62) for j in range(1, 12))} for i in range(26)]
    return type("Own", (Counting, trl.SFTTrainer), {})(
        model=gpt2(settings.pop("size", 32)),
        args=trl.SFTConfig(str(out), max_length=32, **{**SETTINGS, **settings}),
        train_dataset=Dataset.from_list(texts),
        eval_dataset=Dataset.from_list(texts[:4]),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
        ),
        peft_config=LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"),
    )


class Dice(TrainerCallback):  # type: ignore[misc]
    """Draws from the global streams before the first step, as a logger does for a run's name."""

    def on_train_begin(self, *_args: Any, **_more: Any) -> None:
        torch.rand(1), random.random(), np.random.rand()


class Killer(TrainerCallback):  # type: ignore[misc]
    """Ends the process at an event of a step ("substep_end", "epoch_end", ...): by a signal, or,
    where that is 0, by an exception."""

    struck = False

    def __init__(self, event: str, step: int, number: int) -> None:
        def strike(_args: Any, state: Any, _control: Any, **_more: Any) -> None:
            if state.global_step == step and not self.struck:
                self.struck = True
                if event == "prediction_step":
                    time.sleep(1)  # an evaluation takes longer than a snapshot
                if not number:
                    raise RuntimeError("a batch that cannot be computed")
                os.kill(os.getpid(), number)

        setattr(self, f"on_{event}", strike)


def train(
    make: Callable[..., Trainer],
    out: Path,
    *,
    kill: tuple[str, int] | None = None,
    number: int = signal.SIGKILL,
    guard: Callable[[Trainer, Path], Any] = protect,
    **settings: Any,
) -> None:
    """Train as a user's script does; what it comes to goes into `FINAL`.

    Args:
        make: makes the trainer, with `settings`.
        kill: the event and the step at which the process ends by signal `number`.
        guard: protects the trainer.
    """
    torch.set_num_threads(1)
    trainer = make(out, **settings)
    guard(trainer, out)
    trainer.add_callback(Dice())
    if kill is not None:
        trainer.add_callback(Killer(*kill, number))
    result = trainer.train()
    state = {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "rng": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),
        "logs": [plain(each) for each in trainer.state.log_history],
        "loss": result.training_loss,
        "batches": batches(out),
    }
    torch.save(state, out / FINAL)


def plain(logs: dict[str, Any]) -> dict[str, Any]:
    """Return a line of the log without the times of the clock."""
    return {k: v for k, v in logs.items() if not k.endswith(("_runtime", "_per_second"))}


def batches(out: Path) -> list[str]:
    """Return the batches in the order of the steps; what a process has done again, once."""
    kept: list[tuple[int, str]] = []
    last = ""
    for line in (out / "batches.txt").read_text().splitlines():
        process, step, batch = line.split(maxsplit=2)
        if process != last:
            kept = [each for each in kept if each[0] < int(step)]
        kept.append((int(step), batch))
        last = process
    return [f"{step} {batch}" for step, batch in kept]


def run(
    make: Callable[..., Trainer], out: Path, *, within: float | None = None, **more: Any
) -> tuple[int, str]:
    """Train in a process of its own, which is killed after `within` seconds; returns its exit
    status and what it has said."""
    out.mkdir(exist_ok=True)
    errors = out / "said.txt"
    process = _fork.Process(target=_become, args=(errors, make, out), kwargs=more)
    process.start()
    process.join(within or 120)
    if process.is_alive():
        process.kill()
        process.join()
        assert within is not None, errors.read_text()
    assert process.exitcode is not None
    return process.exitcode, errors.read_text()


def _become(errors: Path, make: Callable[..., Trainer], out: Path, **more: Any) -> None:
    said = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    train(make, out, **more)
