"""The forms that an export has, each with its way back: what was written is read as others read it.

Hugging Face's directory, safetensors alone, and a `.pt` of weights; ONNX has a room of its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from holdfast.checkpoint.format import image
from holdfast.checkpoint.rundir import now
from holdfast.checkpoint.save import environment
from holdfast.checkpoint.state import codec, normalise
from holdfast.checkpoint.system import filesystem
from holdfast.exchange.export_check import Deviation
from holdfast.i18n import _
from holdfast.training.inference import Loaded, load_for_inference
from holdfast.training.text.tokenizer import TextTokenizer

SHARD_BYTES = 5_000_000_000  # a larger model is written as several files, as the hub likes it
_ONE_FILE = 1 << 62

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

# As the samples of training are drawn.
_SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 50}

# What a text goes through on its way to tokens: spaces, line ends, special tokens, what is rare.
_TRICKY = (
    "  two  spaces, a\ttab\r\nand lines\n\n",
    "今天天气很好，我们去公园吧！　全角空格",
    "é e\u0301 ﬁ ① ½ Å \u00a0\u200b\ufeff \U0001f469\u200d\U0001f4bb \U00020000 𝔘 \x00 ؀",
    "end",
)


def write_hf(model: Any, tokenizer: TextTokenizer, folder: Path) -> None:
    """Write the directory that `AutoModelForCausalLM` and `AutoTokenizer` load, without its
    card."""
    import transformers

    special = {name: getattr(model.config, name, None) for name in _SPECIAL}
    model.generation_config = transformers.GenerationConfig(**special, **_SAMPLING)
    _save(model, folder, SHARD_BYTES)
    tokenizer.save(folder)
    _pad_at_the_left(folder / "tokenizer_config.json")


def _pad_at_the_left(config: Path) -> None:
    """Say in the configuration to pad at the left: `generate` goes on from the last token of each
    text of a batch, and padding behind the shorter ones would be that token."""
    said = json.loads(config.read_text("utf-8")) if config.exists() else None
    if isinstance(said, dict) and "padding_side" not in said:
        told = json.dumps({**said, "padding_side": "left"}, indent=2, ensure_ascii=False)
        config.write_text(told + "\n", "utf-8")


def write_safetensors(model: Any, folder: Path) -> None:
    """Write one file of weights, however large, and the configuration."""
    _save(model, folder, _ONE_FILE)
    (folder / "generation_config.json").unlink(missing_ok=True)


def _save(model: Any, folder: Path, shard: int) -> None:
    model.config.use_cache = True
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    with quiet():
        model.save_pretrained(folder, max_shard_size=shard)


def read_pretrained(folder: Path) -> Any:
    """Return the model in a directory as other tools read it, in the dtype that it has on the
    disk."""
    import transformers

    with quiet():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]})
    if wrong:
        raise Deviation(
            _(
                "The export misses weights: {names}. It was not kept.",
                names=", ".join(map(str, wrong[:3])),
            )
        )
    return model.eval()


def check_tokenizer(folder: Path, tokenizer: TextTokenizer) -> None:
    """Raise Deviation unless `AutoTokenizer` gives the ids of training for `tricky_texts`."""
    import transformers

    with quiet():
        theirs = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    for text in tricky_texts(tokenizer):
        if theirs.encode(text, add_special_tokens=False) != tokenizer.encode(text):
            raise Deviation(
                _(
                    "The exported tokenizer gives other tokens than training's for {text}; the "
                    "export was not kept.",
                    text=ascii(text[:40]),
                )
            )


def tricky_texts(tokenizer: TextTokenizer) -> list[str]:
    """Return texts in which tokenizers differ, `tokenizer`'s own special tokens in the middle
    included."""
    special = tokenizer.special_tokens
    return [*_TRICKY, *(f"a {token} b{token}\n{token}{token}" for token in special)]


# ------------------------------------------------------------------------------ weights in a .pt


def write_weights(loaded: Loaded, state: Mapping[str, Any], target: Path) -> None:
    """Write a `.pt` that torch.load(weights_only=True) opens: the model, and all that its use
    needs.

    It is a file of our format with a run id of its own: among the checkpoints of its run it is a
    stranger, and never gone on from. `state` are plain values that go with the model.
    """
    payload = {
        "epoch": loaded.entry.epoch,
        "global_step": loaded.entry.step,
        "model": loaded.model.state_dict(),
        "model_config": loaded.model_config,
        "tokenizer": loaded.tokenizer.to_state(),
        **state,
    }
    write_state(payload, target, loaded.manifest)


def write_state(payload: Mapping[str, Any], target: Path, origin: Mapping[str, Any] | None) -> None:
    """Write `payload` as a file of our format; `origin` is the manifest of the file it comes
    from."""
    tree = normalise(payload)
    source = origin or {}
    identity = source.get("identity") or {}
    parent = {
        key: identity[key] for key in ("id", "run_id", "generation", "step") if key in identity
    }
    manifest = {
        "identity": {
            "id": uuid.uuid4().hex,
            "run_id": uuid.uuid4().hex,
            "generation": 1,
            "step": identity.get("step", 0),
            "sequence": 0,
            "parent": parent or None,
        },
        "kind": "weights",
        "reason": "export",
        "epoch": source.get("epoch"),
        "created": now(),
        "metrics": source.get("metrics") or {},
        "score": source.get("score")
        or {"name": "val_loss", "value": None, "lower_is_better": True},
        "environment": source.get("environment") or environment(),
        "configured": {},
        **codec.to_json(tree),
    }
    whole = image.build(tree.payloads(), manifest)
    filesystem.write_file(target, whole.pieces, whole.size, mode=0o644)


def read_weights(path: Path) -> Any:
    """Return the model in a file of `write_weights`, as `holdfast serve` and `generate` read it."""
    torch.load(path, map_location="meta", weights_only=True)  # what everybody else would do
    return load_for_inference(path, device="cpu").model


# -------------------------------------------------------------------------------------- the noise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and advice of libraries; our own messages say what went wrong."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        theirs.set_verbosity_error()
        theirs.disable_progress_bar()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
        for logger, was in zip(loggers, before, strict=True):
            logger.setLevel(was)
