"""The state that the benchmark saves: a model shaped like GPT-2 with AdamW, and a real step of it.

Plain torch. The tensors have the names, shapes and number of transformers' GPT2LMHeadModel (with
its tied head), which is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from holdfast.training.models import has_bf16

_CONTEXT = 512
_VOCABULARY = 50_257


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a model; the context is always 512 tokens."""

    layers: int
    width: int
    heads: int
    vocabulary: int = _VOCABULARY


# "124m" is GPT-2 small and "350m" GPT-2 medium; "tiny" is for tests.
SHAPES = {
    "tiny": Shape(2, 64, 2, 512),
    "10m": Shape(6, 320, 5, 8192),
    "124m": Shape(12, 768, 12),
    "350m": Shape(24, 1024, 16),
}


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.c_attn(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.c_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        hidden = functional.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        out: torch.Tensor = x + self.c_proj(hidden)
        return out


class Model(nn.Module):
    """A language model of `shape`; its forward maps tokens [batch, length] to the loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocabulary, shape.width)
        self.wpe = nn.Embedding(_CONTEXT, shape.width)
        self.h = nn.ModuleList(_Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        logits = functional.linear(self.ln_f(x), self.wte.weight)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Workload:
    """A model with AdamW after its first update, on the GPU if there is one.

    `step()` is one real update on 1 × 512 tokens, in bf16 where the hardware computes in it.
    """

    def __init__(self, size: str) -> None:
        torch.manual_seed(0)
        self.size = size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.bf16 = has_bf16(self.device)
        shape = SHAPES[size]
        with self.device:
            self.model = Model(shape)
            self.tokens = torch.randint(shape.vocabulary, (1, _CONTEXT))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        for parameter in self.model.parameters():  # random, not zero: a disk may notice zeros
            parameter.grad = torch.randn_like(parameter) * 1e-3
        self.update()

    def state(self) -> dict[str, Any]:
        """Return the nested state that the peers save; its tensors are the live ones."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the live tensors of the state by their dotted names."""
        return dict(flat(self.state()))

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the state."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def backward(self) -> None:
        """Compute the loss and the gradients."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(self.tokens)
        loss.backward()

    def update(self) -> None:
        """Change the state by a step of the optimizer."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.backward()
        self.update()
        self.wait()

    def wait(self) -> None:
        """Wait until the device has done all its work, so that a clock may be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def flat(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a nested state with dotted names, in order."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from flat(inner, f"{name}.{i}")
