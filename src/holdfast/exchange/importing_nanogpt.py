"""nanoGPT's `ckpt.pt` as the GPT-2 of transformers.

The matrices of its blocks are torch's [out, in], those of transformers' GPT-2 [in, out]: each is
transposed, the square one of `attn.c_proj` too, which fits as it stands and then computes nonsense.
A model without biases gets zeros, which compute the same and are trained from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_WITH_BIAS = (*_TRANSPOSED, ".ln_1.weight", ".ln_2.weight", ".ln_f.weight")

Weights = Mapping[str, torch.Tensor]


def arguments_of(state: object) -> dict[str, int] | None:
    """Return the sizes that a checkpoint of nanoGPT states; None where it is no such checkpoint."""
    found = state.get("model_args") if isinstance(state, Mapping) else None
    if not isinstance(found, Mapping) or not all(type(found.get(n)) is int for n in _SIZES):
        return None
    return {name: int(found[name]) for name in _SIZES}


def settings_of(arguments: Mapping[str, int]) -> dict[str, Any]:
    """Return the configuration of transformers' GPT-2 for such a model."""
    return {
        "model_type": "gpt2",
        **{name: arguments[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")},
        "n_positions": arguments["block_size"],
        "activation_function": "gelu",  # the exact one, not GPT-2's tanh
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def converted(weights: Weights, optimizer: object) -> tuple[dict[str, torch.Tensor], object]:
    """Return weights and optimizer in the layout of transformers' GPT-2, in nanoGPT's order.

    An optimizer whose groups are not nanoGPT's (matrices, then vectors) is returned as it is: its
    shapes do not fit then, and importing says so.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if name.endswith(".attn.bias"):  # the causal mask, which older versions saved
            continue
        found[name] = tensor.t().contiguous() if name.endswith(_TRANSPOSED) else tensor
        bias = name.removesuffix("weight") + "bias"
        if name.endswith(_WITH_BIAS) and bias not in weights:
            found[bias] = torch.zeros(tensor.shape[0], dtype=tensor.dtype)
    return found, _transposed_moments(weights, optimizer)


def _transposed_moments(weights: Weights, optimizer: object) -> object:
    matrices = [
        name
        for name, tensor in weights.items()
        if tensor.dim() == 2 and name != "lm_head.weight"  # tied: one parameter
    ]
    try:
        indices = optimizer["param_groups"][0]["params"]  # type: ignore[index]
        state = dict(optimizer["state"])  # type: ignore[index]
        for index, name in zip(indices, matrices, strict=True):
            if name.endswith(_TRANSPOSED):
                state[index] = {
                    key: value.t().contiguous()
                    if isinstance(value, torch.Tensor) and value.dim() == 2
                    else value
                    for key, value in state[index].items()
                }
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return optimizer
    return {**optimizer, "state": state}  # type: ignore[dict-item]


@torch.no_grad()
def logits(weights: Weights, arguments: Mapping[str, int], ids: torch.Tensor) -> torch.Tensor:
    """Return the logits [batch, tokens, vocabulary] that nanoGPT's forward pass computes for token
    ids [batch, tokens], from its own weights: what the converted model is checked against."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = weights[f"{name}.weight"]
        return functional.layer_norm(x, weight.shape, weight, weights.get(f"{name}.bias"), 1e-5)

    batch, tokens = ids.shape
    heads, width = arguments["n_head"], arguments["n_embd"]
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][:tokens]
    for layer in range(arguments["n_layer"]):
        block = f"transformer.h.{layer}"
        q, k, v = (
            part.view(batch, tokens, heads, width // heads).transpose(1, 2)
            for part in linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, dim=-1)
        )
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(seen.transpose(1, 2).reshape(batch, tokens, width), f"{block}.attn.c_proj")
        inner = functional.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        x = x + linear(inner, f"{block}.mlp.c_proj")
    head = weights.get("lm_head.weight", weights["transformer.wte.weight"])
    return functional.linear(norm(x, "transformer.ln_f"), head)
