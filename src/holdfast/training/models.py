"""The models: named shapes built from transformers' configurations, and any causal model it loads.

The loss is ours (`next_token_loss`), computed on the logits: the library's own upcasts and shifts
them, which costs a third of a small model's step on a CPU (benchmarks/train_speed.py).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from holdfast.errors import CheckpointError, ConfigError
from holdfast.i18n import _
from holdfast.training.options.fields import did_you_mean, nearest
from holdfast.training.text.batches import IGNORED
from holdfast.training.text.tokenizer import why_not_loaded

if TYPE_CHECKING:
    from holdfast.training.options.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of ours: an architecture of transformers, its size, and a vocabulary that fits it."""

    architecture: str  # "gpt2" or "llama"
    layers: int
    width: int
    heads: int
    context: int
    vocab_size: int
    inner: int = 0  # width of Llama's feed-forward layers
    kv_heads: int = 0


# "tiny" is for minutes on a CPU, "mini" for an evening, "gpt2-small" for a GPU or much patience.
# A small model wants a small vocabulary: 2048 tokens take a seventh of the parameters of tiny, 8192
# would take 40 %.
SHAPES = {
    "tiny": Shape("llama", 4, 256, 4, 128, 2048, inner=672, kv_heads=4),
    "mini": Shape("llama", 8, 512, 8, 512, 8192, inner=1376, kv_heads=2),
    "gpt2-small": Shape("gpt2", 12, 768, 12, 512, 16_000),
}


def build_model(config: ModelConfig, *, vocab_size: int, eos_id: int) -> Any:
    """A new model with random weights: `config.model` must be a name in SHAPES."""
    import transformers

    shape = SHAPES[config.model]
    context, dropout = config.context_length or shape.context, config.dropout or 0.0
    common = {
        "vocab_size": vocab_size,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
        "tie_word_embeddings": True,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    settings: Any
    if shape.architecture == "gpt2":
        settings = transformers.GPT2Config(
            n_layer=shape.layers,
            n_embd=shape.width,
            n_head=shape.heads,
            n_positions=context,
            # The tanh form as one fused kernel; the library's "gelu_new" spells it out in six.
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            **common,
        )
    else:
        settings = transformers.LlamaConfig(
            num_hidden_layers=shape.layers,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=context,
            attention_dropout=dropout,
            **common,
        )
    return transformers.AutoModelForCausalLM.from_config(settings)


def check_model_exists(name: str) -> None:
    """Raise ConfigError unless `name` is a model of ours, a folder, or known to a hub that answers.

    Asked before anything else is loaded: a typing error is told as what it is, and at once.
    """
    if is_shape(name) or (Path(name) / "config.json").is_file():
        return
    import logging

    import transformers

    near = None if "/" in name else nearest(name, SHAPES)
    problem = ConfigError(
        "--model {model}: none of {names}, no folder with a config.json, and no model that "
        "transformers finds{hint}",
        model=name,
        names=", ".join(SHAPES),
        hint=did_you_mean(near),
    )
    if near is not None:
        raise problem
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # its retries, line by line
    try:
        transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise problem from error


def load_model(config: ModelConfig) -> Any:
    """Return the model that `config.model`, a path or name that transformers knows, stands for.

    Raises ConfigError where its weights cannot be read, or some of them are not there.
    """
    try:
        model, info = read_pretrained(config.model, **_dropout(config))
    except CheckpointError as error:
        raise ConfigError(
            "--model {model} cannot be loaded: {error}", model=config.model, error=error.why
        ) from error
    missing = sorted({*info["missing_keys"], *(name for name, *_shapes in info["mismatched_keys"])})
    if missing:
        message = _(
            "--model {model} has no weights for {names}, or in another shape: they would be "
            "random. Use a complete model.",
            model=config.model,
            names=", ".join(missing[:5]),
        )
        raise ConfigError(message)
    model.config.use_cache = False
    return model


def read_pretrained(name: str | Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model of transformers in fp32, and which weights were missing, left or misshapen.

    Code that lies beside the weights is never run, and nothing is asked: transformers' own question
    "run the custom code? [y/N]" is one keystroke from running a stranger's program. Files of
    pickles are read with `weights_only`. `options` go to `from_pretrained`. Raises CheckpointError.
    """
    import transformers

    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            dtype=torch.float32,
            attn_implementation="sdpa",
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # of files that a stranger wrote it raises whatever they make it
        reason = why_not_loaded(error)
        raise CheckpointError(
            "{path} cannot be loaded by transformers: {reason}",
            path=name,
            reason=reason,
            why=reason,
        ) from error
    _keep_ends(model)
    return model, info


def _keep_ends(model: Any) -> None:
    """Note in the model's configuration the ends of text that only generation_config.json names.

    The configuration travels in every checkpoint: without them a chat runs on behind its end.
    """
    ends: list[int] = []
    for config in (model.config, model.generation_config):
        named = getattr(config, "eos_token_id", None)
        ends += named if isinstance(named, list | tuple) else [named] if named is not None else []
    distinct = list(dict.fromkeys(ends))
    if len(distinct) > 1:
        model.config.eos_token_id = distinct


def rebuild_model(model_config: Mapping[str, Any], config: ModelConfig) -> Any:
    """A model with random weights of the shape that `plain_config` described, in fp32: what a
    checkpoint needs to go on, without the directory or the hub that it came from once.

    Raises ConfigError where this transformers does not know the model.
    """
    import transformers

    kind = model_config.get("model_type")
    try:
        settings = transformers.AutoConfig.for_model(kind).from_dict(
            {**model_config, "use_cache": False, "attn_implementation": "sdpa", **_dropout(config)}
        )
        return transformers.AutoModelForCausalLM.from_config(
            settings, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:  # of settings that a stranger wrote it raises what they make it
        message = _(
            "This transformers ({version}) cannot build the model ({kind}): {error}",
            version=transformers.__version__,
            kind=kind,
            error=why_not_loaded(error),
        )
        raise ConfigError(message) from error


def _dropout(config: ModelConfig) -> dict[str, Any]:
    if config.dropout is None:
        return {}
    return {"resid_pdrop": config.dropout, "attention_dropout": config.dropout}


def vocabulary_of(config: ModelConfig) -> int:
    """The size of the vocabulary that is trained for a model of ours."""
    return config.vocab_size or SHAPES[config.model].vocab_size


def is_shape(name: str) -> bool:
    """Return True if `name` is a shape of ours; a directory of that name is not looked at."""
    return name in SHAPES


def context_of(model: Any, wanted: int | None) -> int:
    """Tokens that a training sample has: what was wanted, within what the model can see."""
    limit = getattr(model.config, "max_position_embeddings", None) or wanted or 1024
    if wanted is not None and wanted > limit:
        message = _(
            "--context-length {wanted} is more than the {limit} tokens this model can see.",
            wanted=wanted,
            limit=limit,
        )
        raise ConfigError(message)
    return int(wanted or min(limit, 1024))


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats over the targets that count.

    `logits` [batch, context, vocabulary] in any float dtype, `targets` int64 [batch, context],
    already shifted. On a GPU in fp32; on a CPU the kernel itself sums bf16 in fp32.
    """
    flat = logits.reshape(-1, logits.size(-1))
    return functional.cross_entropy(flat.float(), targets.reshape(-1), ignore_index=IGNORED)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (biases, norms) do not: the usual split since GPT-2."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def plain_config(model: Any) -> dict[str, Any]:
    """The model's configuration without what depends on the library or the machine."""
    config = model.config.to_dict()
    for name in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        config.pop(name, None)
    return {key: value for key, value in config.items() if not key.startswith("_")}


# --------------------------------------------------------------------------------- the machine


def choose_device() -> torch.device:
    """CUDA, else MPS, else the CPU. `HOLDFAST_DEVICE` overrides."""
    if name := os.environ.get("HOLDFAST_DEVICE"):
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def free_memory(device: torch.device) -> int:
    """Bytes that are free for a training on `device`: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast: bf16 where the hardware computes in it, unless told otherwise."""
    if wanted == "auto":
        wanted = "bf16" if has_bf16(device) else "fp32"
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Return True if `device` multiplies bf16 matrices faster than fp32 ones."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def tune_allocator() -> bool:
    """Tell glibc to keep freed memory instead of giving it back after every tensor.

    Activations are otherwise mapped anew at each step: 35,000 to 100,000 page faults, 10 to 20 % of
    a CPU training. Returns whether there was a glibc to tell.
    """
    if not sys.platform.startswith("linux"):
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # from <malloc.h>
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl
        return False
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(top_pad, 256 << 20)
    return True
