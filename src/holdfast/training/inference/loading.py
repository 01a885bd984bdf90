"""From a checkpoint to a model that answers: weights, configuration and tokenizer, nothing else.

Whoever uses a trained model (comparing, serving, exporting) comes through here. The optimizer is
never read, nothing is unpickled, and every byte that is used has been verified.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from holdfast.checkpoint.format import Reader
from holdfast.checkpoint.rundir import Catalog, Entry, summary
from holdfast.checkpoint.state import codec
from holdfast.errors import CheckpointError, DataError, ForeignCheckpoint, HoldfastError
from holdfast.i18n import _
from holdfast.training import models
from holdfast.training.plausible import check_configuration
from holdfast.training.text.tokenizer import TextTokenizer, why_not_loaded

log = logging.getLogger("holdfast")

_LISTED = 3  # names of weights that a message shows


@dataclass(frozen=True, slots=True)
class Loaded:
    """A trained model ready to answer, and what its checkpoint says of it."""

    path: Path
    """The file; where a run directory was named, the one that was chosen in it."""
    entry: Entry
    """Identity, metrics and time of the checkpoint; `names` only where a directory was named."""
    manifest: dict[str, Any]
    model: Any
    """A causal language model of transformers in eval mode, without gradients."""
    tokenizer: TextTokenizer
    context_length: int
    """Tokens that a training sample had: what the model is known to be good for."""
    max_context: int
    """Tokens that the model can see at most; not less than `context_length`."""
    model_config: dict[str, Any]
    """The configuration of transformers, with its `model_type`."""
    config: dict[str, Any]
    """The options of the training by section; {} where another loop trained it."""

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = next(self.model.parameters()).device
        return device


def load_for_inference(
    source: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Loaded:
    """The model and tokenizer in a checkpoint, or in the best (else newest) one of a run directory.

    Only the tensors of the model are read, verified, into the memory that the model then uses: the
    peak is one copy of the weights as they are in the file. `device` is where the model goes (None:
    CUDA, MPS or CPU, as training chooses), `dtype` what its weights are cast to (None: as saved).

    Raises HoldfastError where there is none, ForeignCheckpoint where it does not say what its model
    or its tokenizer is, DamagedCheckpoint, CheckpointError where the weights do not fit the model.
    """
    path, entry = find_checkpoint(source)
    try:
        with Reader(path) as reader:
            return _load(reader, path, entry, device, dtype)
    except FileNotFoundError as error:
        raise _nothing_at(path) from error


def find_checkpoint(source: str | os.PathLike[str]) -> tuple[Path, Entry | None]:
    """The file that `source` stands for: itself, or the best (else newest) of a run directory.

    The entry is that of the directory's catalogue, None for a file. Raises HoldfastError where
    there is none.
    """
    path = Path(source)
    if not path.is_dir():
        if not path.exists():
            raise _nothing_at(path)
        return path, None
    catalog = Catalog(path)
    contents = catalog.scan()
    for name, reason in contents.unreadable:  # it may be the best or the newest
        log.warning(_("{name} is passed over: {reason}", name=name, reason=reason))
    entry = contents.best or contents.newest
    if entry is None:
        raise HoldfastError("There are no checkpoints in {directory}.", directory=path)
    return catalog.path(entry), entry


def _nothing_at(path: Path) -> HoldfastError:
    return HoldfastError("There is no checkpoint at {path}.", path=path)


def _load(
    reader: Reader,
    path: Path,
    entry: Entry | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Loaded:
    model_config = _part(reader, "model_config", "model_type")
    tokenizer_state = _part(reader, "tokenizer", "tokenizer.json")
    if model_config is None or tokenizer_state is None:
        message = _(
            "{path} does not say what its {missing} is, so it cannot be used for text: it was "
            "saved by another training loop than holdfast train.",
            path=path,
            missing=_("model") if model_config is None else _("tokenizer"),
        )
        raise ForeignCheckpoint(message)
    config = _part(reader, "config") or {}
    try:
        tokenizer = TextTokenizer.from_state(tokenizer_state)
    except DataError as error:
        raise ForeignCheckpoint(f"{path}: {error}") from error
    tensors = [t for t in reader.manifest["tensors"] if str(t["path"]).startswith("model/")]
    check_configuration(model_config, [t["shape"] for t in tensors], path)
    model = _bare_model(model_config, path)
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > rows:
        message = _(
            "The tokenizer in {path} has {tokens} tokens, and the model knows {rows}: it is "
            "another model's.",
            path=path,
            tokens=f"{tokenizer.vocab_size:,}",
            rows=f"{rows:,}",
        )
        raise ForeignCheckpoint(message)
    _fill(model, codec.read(reader, only="model"), path, dtype)
    model.to(models.choose_device() if device is None else torch.device(device))
    options = config.get("model")
    wanted = options.get("context_length") if isinstance(options, Mapping) else None
    try:
        context = models.context_of(model, wanted)
    except HoldfastError as error:  # options and configuration contradict each other
        raise ForeignCheckpoint(f"{path}: {error}") from error
    return Loaded(
        path,
        entry or summary(reader.manifest, reader.size),
        reader.manifest,
        model,
        tokenizer,
        context,
        getattr(model.config, "max_position_embeddings", None) or context,
        model_config,
        config,
    )


def _part(reader: Reader, name: str, needed: str | None = None) -> dict[str, Any] | None:
    """The mapping under one top-level key; None where there is none, or none with `needed`."""
    tree = reader.manifest.get("tree")
    pairs = tree.get("dict") if isinstance(tree, Mapping) else None
    names = [pair[0] for pair in pairs or () if isinstance(pair, list) and pair]
    if name not in names:
        return None
    value = codec.read(reader, only=name)
    if not isinstance(value, dict) or (needed is not None and needed not in value):
        return None
    return value


# ------------------------------------------------------------------------------------- the model


def _bare_model(model_config: Mapping[str, Any], path: Path) -> Any:
    """Return the model without memory for its weights. Raise ForeignCheckpoint if unknown."""
    import transformers

    kind = model_config["model_type"]
    try:
        settings: Any = transformers.AutoConfig.for_model(kind).from_dict(
            {**model_config, "use_cache": True, "attn_implementation": "sdpa"}
        )
        with _weights_without_memory():
            model = transformers.AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    except Exception as error:  # of settings that a stranger wrote it raises what they make it
        message = _(
            "{path} is of a model that this transformers {version} does not know ({kind}): "
            "{reason}",
            path=path,
            version=transformers.__version__,
            kind=kind,
            reason=why_not_loaded(error),
        )
        raise ForeignCheckpoint(message) from error
    model.requires_grad_(False)
    return model.eval()


_building = threading.Lock()  # one at a time: they share torch's one `register_parameter`


@contextlib.contextmanager
def _weights_without_memory() -> Iterator[None]:
    """Modules that this thread makes here have their parameters on the meta device, which costs
    neither memory nor the time of random numbers. Buffers are made for real: those that a state
    does not hold (rotary frequencies) are computed while the module is made.
    """
    me = threading.get_ident()

    def without_memory(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and threading.get_ident() == me:
            param = torch.nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    with _building:
        register = (
            torch.nn.Module.register_parameter
        )  # read under the lock: never another thread's patch
        torch.nn.Module.register_parameter = without_memory  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _fill(model: Any, weights: Any, path: Path, dtype: torch.dtype | None) -> None:
    """Make the tensors of `weights` the model's own; no second copy of them is made.

    Raises CheckpointError where they do not fit.
    """
    if not isinstance(weights, dict):
        raise ForeignCheckpoint("{path} holds no weights that could be found.", path=path)
    if dtype is not None:
        _cast(weights, dtype)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
        model.tie_weights()
    except RuntimeError as error:  # shapes; its first line says only which class it was
        lines = [line.strip() for line in str(error).splitlines()]
        raise _misfit(path, lines[1:2] or lines) from error
    weights.clear()
    left = [name for name, p in model.named_parameters() if p.is_meta]
    wrong = [*left, *unexpected, *(n for n in missing if n in dict(model.named_buffers()))]
    if wrong:
        raise _misfit(path, wrong)
    model.requires_grad_(False)


def _cast(weights: dict[str, Any], dtype: torch.dtype) -> None:
    """Cast the floating-point tensors one after the other, tied ones once, so that what has been
    cast is freed on the way."""
    storages: dict[tuple[Any, ...], torch.Tensor] = {}
    for name, value in weights.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != dtype:
            key = value.data_ptr(), value.shape, value.stride()
            if key not in storages:
                storages[key] = value.to(dtype)
            weights[name] = storages[key]


def _misfit(path: Path, names: list[str]) -> CheckpointError:
    shown = ", ".join(names[:_LISTED])
    if len(names) > _LISTED:
        shown += _(" … and {count} more", count=len(names) - _LISTED)
    return CheckpointError(
        "The weights in {path} do not fit the model that it describes: {names}",
        path=path,
        names=shown,
    )
