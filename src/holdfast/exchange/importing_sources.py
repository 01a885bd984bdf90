"""Read a model from elsewhere: its weights, its configuration, its tokenizer, its optimizer.

Files of others are read with `weights_only`, and no code of theirs is run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from holdfast.checkpoint.rundir import EVENTS
from holdfast.checkpoint.state import WEIGHT_KEYS, bare, load, load_foreign
from holdfast.errors import (
    CheckpointError,
    ConfigError,
    ForeignCheckpoint,
    StateMismatch,
)
from holdfast.exchange import importing_nanogpt as nanogpt
from holdfast.exchange.export_formats import quiet
from holdfast.i18n import _
from holdfast.training import models
from holdfast.training.options.config import ModelConfig
from holdfast.training.plausible import check_configuration
from holdfast.training.text.tokenizer import TOKENIZER_FILES, TextTokenizer

_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict")
_STEP_KEYS = ("global_step", "step", "iter_num", "iteration")
_LISTED = 5  # problems that a message shows

# Buffers that older versions of the libraries saved and newer ones compute.
_COMPUTED = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True, slots=True)
class Source:
    """A model from elsewhere, built and filled; the rest is None or 0 where it was not there."""

    form: str
    model: Any
    order: list[str]  # the names of its weights in the order of the model that was saved
    tokenizer: TextTokenizer | None = None
    optimizer: Mapping[str, Any] | None = None
    step: int = 0
    epoch: int | None = None
    notes: list[str] = field(default_factory=list)


def read_source(path: Path, model_config: str | None, tokenizer: str | None) -> Source:
    """Read a Hugging Face directory or any `.pt`.

    Raises ConfigError where something has to be said that the source does not say, CheckpointError
    where it cannot be read, StateMismatch, by name, where weights do not fit.
    """
    if not path.exists():
        raise CheckpointError("There is nothing at {path}.", path=path)
    given = None if tokenizer is None else TextTokenizer.from_directory(tokenizer)
    found = _read_directory(path) if path.is_dir() else _read_file(path, model_config)
    return found if given is None else replace(found, tokenizer=given)


# ------------------------------------------------------------------------- a Hugging Face directory


def _read_directory(path: Path) -> Source:
    if not (path / "config.json").is_file() or (path / EVENTS).is_file():
        hint = _("it is a run already: holdfast train --checkpoint-dir {path} --resume", path=path)
        raise ConfigError(
            "{path} is no Hugging Face directory: {reason}",
            path=path,
            reason=hint if (path / EVENTS).is_file() else _("it has no config.json"),
        )
    with contextlib.suppress(OSError, ValueError):  # transformers says what is wrong with it
        said = json.loads((path / "config.json").read_text("utf-8"))
        check_configuration(said, [[_bytes_of_weights(path)]], path)
    with quiet():
        model, info = models.read_pretrained(path, local_files_only=True)
    wrong = [_("{name} is missing", name=name) for name in sorted(info["missing_keys"])]
    for name, theirs, ours in info["mismatched_keys"]:
        wrong.append(_shapes(name, theirs, ours))
    _refuse(path, wrong)
    notes = []
    if info["unexpected_keys"]:
        notes.append(
            _(
                "Left out, since the model has no place for it: {names}",
                names=_some(sorted(info["unexpected_keys"])),
            )
        )
    has_tokenizer = any((path / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = TextTokenizer.from_directory(path) if has_tokenizer else None
    return Source("hf", model, list(model.state_dict()), tokenizer, notes=notes)


def _bytes_of_weights(path: Path) -> int:
    """Return how many bytes of weights lie in a directory: there are no more numbers than that."""
    files = (*path.glob("*.safetensors"), *path.glob("*.bin"))
    return sum(file.stat().st_size for file in files if file.is_file())


# ----------------------------------------------------------------------------------- any file


def _read_file(path: Path, model_config: str | None) -> Source:
    state = _load(path)
    form, weights = _weights_in(state, path)
    whole = state if form != "bare" else {}
    optimizer = _first(whole, _OPTIMIZER_KEYS, Mapping)
    arguments = nanogpt.arguments_of(state)
    if arguments is None:
        settings = _configuration(state, path, model_config)
    else:
        settings, form = nanogpt.settings_of(arguments), "nanoGPT"
        weights = {bare(name): tensor for name, tensor in weights.items()}
    check_configuration(settings, [list(tensor.shape) for tensor in weights.values()], path)
    theirs = weights
    if arguments is not None:
        weights, optimizer = nanogpt.converted(theirs, optimizer)
    model = models.rebuild_model(settings, ModelConfig())
    weights = _as_named(weights, set(model.state_dict()))
    _fill(model, weights, path)
    if arguments is not None:
        _check_nanogpt(model, theirs, arguments, path)
    tokenizer = whole.get("tokenizer")
    return Source(
        form,
        model,
        list(weights),
        TextTokenizer.from_state(tokenizer) if isinstance(tokenizer, Mapping) else None,
        optimizer,
        max(0, _first(whole, _STEP_KEYS, int) or 0),
        _first(whole, ("epoch",), int),
    )


@torch.no_grad()
def _check_nanogpt(
    model: Any, theirs: nanogpt.Weights, arguments: Mapping[str, int], path: Path
) -> None:
    """Raise StateMismatch unless the converted model computes what nanoGPT computes."""
    tokens = min(64, arguments["block_size"])
    ids = (torch.arange(tokens) * 7919 % arguments["vocab_size"])[None]
    expected, found = nanogpt.logits(theirs, arguments, ids), model.eval()(ids).logits
    largest, allowed = (expected - found).abs().max(), 1e-4 * expected.abs().max()
    if not largest <= allowed:
        raise StateMismatch(
            "{path} is no model of nanoGPT, though it has its model_args: as a GPT-2 it "
            "computes other logits (difference {difference}).",
            path=path,
            difference=f"{largest:.3g}",
        )


def _load(path: Path) -> Any:
    try:
        return load(path)
    except ForeignCheckpoint:
        return load_foreign(path)


def _weights_in(state: Any, path: Path) -> tuple[str, Mapping[str, torch.Tensor]]:
    """Return (their place, the weights): under the usual keys, or the file is nothing else."""
    if isinstance(state, Mapping):
        for key in (*WEIGHT_KEYS, None):
            inner = state if key is None else state.get(key)
            if not isinstance(inner, Mapping):
                continue
            tensors = {k: v for k, v in inner.items() if isinstance(v, torch.Tensor)}
            if tensors and (key is not None or len(tensors) == len(inner)):
                return key or "bare", tensors
    raise ForeignCheckpoint("{path} holds no weights that could be found.", path=path)


def _configuration(state: Any, path: Path, file: str | None) -> dict[str, Any]:
    """Return the configuration of the model: from `file`, else from the checkpoint itself."""
    if file is not None:
        return _read_configuration(Path(file))
    for key in ("model_config", "config"):
        found = state.get(key) if isinstance(state, Mapping) else None
        if isinstance(found, Mapping) and isinstance(found.get("model_type"), str):
            return dict(found)
    raise ConfigError(
        "{path} does not say what its model is. Give the config.json that transformers would "
        "write for it (model_type, sizes): --model-config FILE",
        path=path,
    )


def _read_configuration(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("--model-config {path}: {reason}", path=path, reason=error) from error
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise ConfigError(
            "--model-config {path}: it names no model_type (gpt2, llama, ...)", path=path
        )
    for name in ("transformers_version", "dtype", "torch_dtype", "_name_or_path"):
        found.pop(name, None)
    return found


def _as_named(weights: Mapping[str, torch.Tensor], expected: set[str]) -> dict[str, torch.Tensor]:
    """Return the weights under the names of the bare model: without what wrappers put into them."""
    found = {n if n in expected else bare(n): tensor for n, tensor in weights.items()}
    if len(found) < len(weights):  # two names became one: they are no wrappers' words
        found = dict(weights)
    if not expected & set(found) and all(name.startswith("model.") for name in found):
        found = {name.removeprefix("model."): tensor for name, tensor in found.items()}  # Lightning
    elif "model.model.embed_tokens.weight" in found:
        found = {name.removeprefix("model."): tensor for name, tensor in found.items()}
    return {
        name: tensor
        for name, tensor in found.items()
        if name in expected or not name.endswith(_COMPUTED)
    }


@torch.no_grad()
def _fill(model: Any, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Copy `weights` into `model`, after all of them have been found to fit."""
    mine = model.state_dict()
    there = {mine[name].data_ptr() for name in weights if name in mine}
    wrong = [
        _shapes(name, list(weights[name].shape), list(tensor.shape))
        if name in weights
        else _("{name} is missing", name=name)
        for name, tensor in mine.items()
        if (name in weights and weights[name].shape != tensor.shape)
        or (name not in weights and tensor.data_ptr() not in there)  # tied: one name is enough
    ]
    wrong += [_("{name} is only in the file", name=name) for name in weights if name not in mine]
    _refuse(path, wrong)
    for name, tensor in weights.items():
        mine[name].copy_(tensor)


def _shapes(name: str, theirs: Any, ours: Any) -> str:
    return _(
        "{name} is {theirs} in the file and {ours} in the model",
        name=name,
        theirs=list(theirs),
        ours=list(ours),
    )


def _refuse(path: Path, wrong: list[str]) -> None:
    if wrong:
        raise StateMismatch(
            "The weights in {path} do not fit the model: {problems}",
            path=path,
            problems=_some(wrong, "; "),
        )


def _some(items: Iterable[str], separator: str = ", ") -> str:
    shown = list(items)
    more = len(shown) - _LISTED
    text = separator.join(shown[:_LISTED])
    return text + _(" … and {count} more", count=more) if more > 0 else text


def _first(state: Mapping[str, Any], keys: Iterable[str], kind: Any) -> Any:
    """Return the first value under `keys` that is of `kind`; numbers may be tensors of one
    element."""
    for key in keys:
        value = state.get(key)
        if kind is int and isinstance(value, torch.Tensor) and value.numel() == 1:
            value = int(value.item())
        if isinstance(value, kind) and not isinstance(value, bool):
            return value
    return None
