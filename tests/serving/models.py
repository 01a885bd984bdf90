"""Small real models for the tests of the server: they have learned one poem by heart."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from holdfast import CheckpointManager
from holdfast.serving.library import Options
from holdfast.serving.server import Ready, Running, Settings
from holdfast.training import models
from holdfast.training.text.batches import IGNORED
from holdfast.training.text.tokenizer import TextTokenizer, train_tokenizer
from tests.support import end_epoch

POEM = "明月几时有？把酒问青天。不知天上宫阙，今夕是何年。我欲乘风归去，又恐琼楼玉宇，高处不胜寒。"
CONTEXT = 4096  # long answers, so that there is something to cancel


def poet(
    tokenizer: TextTokenizer, kind: str = "llama", *, seed: int = 0, steps: int = 80, **more: Any
) -> Any:
    """A model of 2 layers that goes on with the poem after any beginning of it."""
    import transformers

    torch.manual_seed(seed)
    common = {
        "vocab_size": tokenizer.vocab_size, "bos_token_id": 0, "eos_token_id": 0,
        "pad_token_id": 0, "use_cache": False, "attn_implementation": "sdpa", **more,
    }  # fmt: skip
    settings: Any
    if kind == "gpt2":
        settings = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=128,
                                           resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                                           **common)  # fmt: skip
    else:
        settings = transformers.AutoConfig.for_model(
            kind, num_hidden_layers=2, hidden_size=64, intermediate_size=128,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
            head_dim=16, **common,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(settings)
    learn(model, tokenizer, steps)
    return model


def learn(model: Any, tokenizer: TextTokenizer, steps: int) -> None:
    """Train on the poem from any of its characters on: known by heart after 100 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    texts = [[*tokenizer.encode(POEM[start:]), tokenizer.eos_id] for start in range(0, 32)]
    longest = max(map(len, texts))
    given = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    wanted = torch.tensor([[*text, *[IGNORED] * (longest - len(text))] for text in texts])
    model.train()
    for step in range(steps):
        some = slice(step * 8 % 32, step * 8 % 32 + 8)
        logits = model(input_ids=given[some]).logits[:, :-1]
        loss = models.next_token_loss(logits, wanted[some, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def make_tokenizer() -> TextTokenizer:
    """A byte-level tokenizer that has seen half of the poem: the other half is single bytes."""
    return train_tokenizer([POEM[: len(POEM) // 2]] * 4, 300)


def beginnings(tokenizer: TextTokenizer) -> list[str]:
    """The beginnings of the poem that are made of its own tokens: their continuation is known."""
    whole = tokenizer.encode(POEM)
    starts = [POEM[:size] for size in range(1, 31)]
    return [s for s in starts if (tokens := tokenizer.encode(s)) == whole[: len(tokens)]]


class Training:
    """A run directory that grows: `epoch` saves what the model is by then."""

    def __init__(self, directory: Path, model: Any, tokenizer: TextTokenizer) -> None:
        self.directory, self.model = directory, model
        state = {
            "model": model,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
            "model_config": models.plain_config(model),
            "tokenizer": tokenizer.to_state(),
        }
        self.manager = CheckpointManager(directory, state, keep_last=0)
        self._number = 0

    def epoch(self, val_loss: float) -> None:
        self._number += 1
        metrics = {"train_loss": val_loss + 1, "val_loss": val_loss}
        end_epoch(self.manager, self._number, step=100 * self._number, metrics=metrics)
        self.manager.wait()

    def close(self) -> None:
        self.manager.close()


@contextlib.contextmanager
def serving(*sources: Path, **settings: Any) -> Iterator[str]:
    """A real server on a port of its own, in a thread; gives its URL."""
    options = {k: settings.pop(k) for k in tuple(settings) if k in Options.__dataclass_fields__}
    made = Settings(port=0, look_every=0.05, grace=settings.pop("grace", 5.0),
                    options=Options(**options), **settings)  # fmt: skip
    running, urls, failed = Running(sources, made), [""], [None]
    answers = threading.Event()

    def ready(told: Ready) -> None:
        urls[0] = told.url
        answers.set()

    def run() -> None:
        try:
            asyncio.run(running.run(ready))
        except BaseException as error:  # noqa: BLE001 - raised in the test's thread
            failed[0] = error
        finally:
            answers.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert answers.wait(60), "the server did not start"
        if failed[0] is not None:
            raise failed[0]
        yield urls[0]
    finally:
        running.stop()
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"
