"""Text from a model: top-k sampling with a generator of its own, so that no run is disturbed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from holdfast.training.tokenizer import TextTokenizer


@torch.no_grad()
def sample_text(
    model: Any,
    tokenizer: TextTokenizer,
    prompt: str,
    length: int,
    *,
    context_length: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int = 50,
    may_end: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> str:
    """`prompt` and up to `length` tokens more, ended by an end-of-text token or by `stop()`.

    With `may_end=False` the end-of-text token is never drawn: a model that has learned little ends
    early, and a person would see nothing of what it has learned. The same seed gives the same text
    on the same machine.
    """
    device = next(model.parameters()).device
    generator = torch.Generator("cpu").manual_seed(seed)
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    was_training = model.training
    model.eval()
    try:
        given, cache = torch.tensor([ids[-context_length:]], device=device), None
        for _token in range(min(length, context_length - given.shape[1])):
            if stop():
                break
            output = model(input_ids=given, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[0, -1].float().cpu() / temperature
            if logits.isnan().any():
                break  # the weights are ruined: there is nothing to draw from
            if not may_end:
                logits[tokenizer.eos_id] = -torch.inf
            best = torch.topk(logits, min(top_k, logits.numel()))
            choice = torch.multinomial(torch.softmax(best.values, 0), 1, generator=generator)
            token = int(best.indices[choice])
            if token == tokenizer.eos_id:
                break
            ids.append(token)
            given = torch.tensor([[token]], device=device)
    finally:
        model.train(was_training)
    return tokenizer.decode(ids).rstrip("\ufffd")  # the last character may be cut in its bytes
