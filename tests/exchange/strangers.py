"""Small real models for the tests of exporting: trained by the trainer, or by a stranger's loop."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from holdfast.training.text.tokenizer import TextTokenizer, train_tokenizer
from tests.training.runs import SAMPLE, config_for, train, write_corpus


def make_run(directory: Path, **options: Any) -> Path:
    """A finished run of the trainer: a Llama of 4 layers after a few steps."""
    data = write_corpus(directory)
    train(config_for(directory / "run", data, **{"epochs": 1, **options}))
    return directory / "run"


@functools.cache
def tokenizer() -> TextTokenizer:
    return train_tokenizer(SAMPLE.read_text("utf-8")[:4000].split("\n\n"), 300)


def settings(kind: str, **changes: Any) -> Any:
    """A configuration of transformers for a model of some thousand parameters."""
    import transformers

    common = {"vocab_size": tokenizer().vocab_size, "bos_token_id": 0, "eos_token_id": 0,
              "pad_token_id": 0}  # fmt: skip
    if kind == "gpt2":
        sizes: dict[str, Any] = {
            "n_layer": 2,
            "n_embd": 32,
            "n_head": 2,
            "n_positions": 32,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
        return transformers.GPT2Config(**{**common, **sizes, **changes})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
             "tie_word_embeddings": False}  # fmt: skip
    if kind == "mistral":
        return transformers.MistralConfig(**{**common, **sizes, "sliding_window": 8, **changes})
    return transformers.LlamaConfig(**{**common, **sizes, **changes})


def batches(count: int, start: int = 0) -> list[torch.Tensor]:
    """Token ids [4, 16] of the sample text, one row after the other."""
    ids = torch.tensor(tokenizer().encode(SAMPLE.read_text("utf-8")[:20_000]))
    rows = ids[: ids.numel() // 64 * 64].view(-1, 4, 16)
    return [rows[(start + i) % len(rows)] for i in range(count)]


class Stranger:
    """Somebody's plain training script: a model of transformers, Adam, nothing of ours."""

    def __init__(self, kind: str = "gpt2", *, grouped: bool = False, named: bool = False) -> None:
        import transformers

        torch.manual_seed(1)
        self.model = transformers.AutoModelForCausalLM.from_config(settings(kind))
        self.optimizer = torch.optim.AdamW(
            self._parameters(grouped, named), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.05
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1000)
        self.losses: list[float] = []

    def _parameters(self, grouped: bool, named: bool) -> Any:
        if named:  # in an order that nobody would guess
            return sorted(self.model.named_parameters(), reverse=True)
        if not grouped:
            return self.model.parameters()
        parameters = list(self.model.parameters())
        return [
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
            {"params": [p for p in parameters if p.dim() >= 2]},
        ]

    def train(self, steps: int) -> Stranger:
        for ids in batches(steps, len(self.losses)):
            loss = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
        return self

    def state(self, form: str) -> dict[str, Any]:
        """What such scripts save: as the original guide, as PyTorch's tutorials, weights alone."""
        weights, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        scheduler, step = self.scheduler.state_dict(), len(self.losses)
        if form == "model":
            return {"model": weights, "optimizer": optimizer, "scheduler": scheduler, "epoch": 1,
                    "global_step": step, "best_loss": min(self.losses, default=None),
                    "model_config": self.model.config.to_dict(),
                    "tokenizer": tokenizer().to_state()}  # fmt: skip
        if form == "model_state_dict":
            return {"epoch": 1, "model_state_dict": weights, "optimizer_state_dict": optimizer,
                    "scheduler_state_dict": scheduler, "loss": self.losses[-1]}  # fmt: skip
        return dict(weights)

    def save_beside(self, directory: Path) -> tuple[Path, Path]:
        """config.json and a tokenizer directory, for files that have neither inside."""
        self.model.config.save_pretrained(directory)
        tokenizer().save(directory / "tokenizer")
        return directory / "config.json", directory / "tokenizer"
