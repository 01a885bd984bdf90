"""ONNX: a graph that onnxruntime runs with nothing of ours and nothing of torch beside it.

With a cache of keys and values where the model keeps one of the plain kind: a first call gives it
empty, each later one gives back what the last call returned, and only the new tokens.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast.errors import ConfigError, HoldfastError
from holdfast.exchange.export_formats import quiet

OPSET = 18  # what torch's exporter writes without converting; onnxruntime knows it since 1.14
MODEL = "model.onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_EXAMPLE = (2, 5, 7)  # batch, new tokens, tokens in the cache: no two the same, and none of them 1

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def check_packages() -> None:
    """Raise ConfigError where something is not installed that this export needs."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            "This needs the package {name}: pip install 'holdfast-train[export]'",
            name=", ".join(missing),
        )


def write_onnx(model: Any, folder: Path) -> bool:
    """Write `model.onnx`, and `model.onnx.data` where the weights are over 2 GB; returns whether it
    takes a cache.

    Inputs: `input_ids` [batch, sequence] and `attention_mask` [batch, total], both int64, where
    total counts the cache too, and 0 in the mask is padding at the left; for each layer i
    `past_key_values.i.key` and `.value` [batch, heads, past, width]. Outputs: `logits` [batch,
    sequence, vocabulary] and `present.i.key` and `.value`. Raises HoldfastError where torch cannot
    make a graph of the model.
    """
    try:
        cache = _cache_of(model)
        if cache:
            return _export(model, folder, cache)
    except _FAILURES:  # some models keep caches that no graph can hold: without one it may do
        pass
    try:
        return _export(model, folder, [])
    except _FAILURES as error:
        raise HoldfastError(
            "torch cannot make an ONNX graph of this model ({kind}): {reason}",
            kind=type(model).__name__,
            reason=_first_line(error),
        ) from error


class _Graph(torch.nn.Module):
    """The module that becomes the graph; the mask counts positions, so that padding has none."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: Any = None
    ) -> Any:
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if past is None:
            return self.model(**given, position_ids=positions, use_cache=False).logits
        from transformers import DynamicCache

        output = self.model(
            **given,
            position_ids=positions[:, -input_ids.shape[1] :],
            use_cache=True,
            past_key_values=DynamicCache([(key, value) for key, value in past]),
        )
        return output.logits, [
            (layer.keys, layer.values) for layer in output.past_key_values.layers
        ]


Layer = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def _cache_of(model: Any) -> list[Layer]:
    """Return keys and values of a few tokens; [] where the model keeps something else."""
    from transformers.cache_utils import DynamicLayer

    batch, _new, past = _EXAMPLE
    ids = torch.zeros((batch, past), dtype=torch.long)
    layers = getattr(model(input_ids=ids, use_cache=True).past_key_values, "layers", [])
    if any(type(layer) is not DynamicLayer for layer in layers):
        return []
    return [(layer.keys, layer.values) for layer in layers]


def _export(model: Any, folder: Path, cache: list[Layer]) -> bool:
    batch, new, past = _EXAMPLE
    ids = torch.zeros((batch, new), dtype=torch.long)
    mask = torch.ones((batch, new + past if cache else new), dtype=torch.long)
    layers = [f"{i}.{kind}" for i in range(len(cache)) for kind in ("key", "value")]
    held = {0: "batch", 2: "past"}
    shapes: dict[str, Any] = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total" if cache else "sequence"},
        "past": [(held, held) for _layer in cache] if cache else None,
    }
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Graph(model).eval(),
            (ids, mask, cache or None),
            input_names=["input_ids", "attention_mask", *(f"past_key_values.{n}" for n in layers)],
            output_names=["logits", *(f"present.{n}" for n in layers)],
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None, "torch.onnx.export with dynamo returns the program"
        _forget_the_machine(program.model)
        program.save(str(folder / MODEL))  # weights in a file of their own where they need it
    return bool(cache)


def _forget_the_machine(model: Any) -> None:
    """Take out what the exporter notes for its own authors: each node's lines of source, with the
    paths of this machine."""
    graphs = [model.graph, *model.functions.values()]
    for holder in (model, *graphs, *(node for graph in graphs for node in graph.all_nodes())):
        holder.metadata_props.clear()
        holder.doc_string = None
    for graph in graphs:
        for node in graph.all_nodes():
            for value in node.outputs:
                value.metadata_props.clear()


# What torch.export and the exporter raise over a model that they do not understand.
_FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    NotImplementedError,
    AssertionError,
)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


# ---------------------------------------------------------------------------------- reading back


class Session:
    """A graph of `write_onnx` in onnxruntime on the CPU."""

    def __init__(self, path: Path) -> None:
        """Raises HoldfastError where onnxruntime does not take it."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; its advice about initializers is no help
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its errors have no common class of their own
            raise HoldfastError(
                "onnxruntime does not open the graph: {reason}", reason=_first_line(error)
            ) from error
        self._past = [i for i in self._session.get_inputs() if i.name.startswith("past_")]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits [rows, length, vocabulary] of `ids` [rows, length].

        With a cache in two calls, so that it is tried as well.
        """
        rows, length = ids.shape
        cache = {
            i.name: np.zeros((rows, i.shape[1], 0, i.shape[3]), _DTYPES[i.type]) for i in self._past
        }
        cut = length // 2 if self._past and length > 1 else length
        found = []
        for start, end in ((0, cut), (cut, length)):
            if start == end:
                continue
            feed = {
                "input_ids": ids[:, start:end].numpy(),
                "attention_mask": np.ones((rows, end), np.int64),
                **cache,
            }
            logits, *present = self._session.run(None, feed)
            cache = dict(zip(cache, present, strict=True))
            found.append(torch.from_numpy(logits).float())
        return torch.cat(found, 1)
