"""The batch in the model: rows that join and leave between steps, over transformers' own forward.

Each row has a place in one key-value cache, left-aligned, and a length of its own. A row that joins
is written behind the others; one that leaves makes room for the last; no other keys are copied.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from holdfast.i18n import _
from holdfast.training.models import free_memory

log = logging.getLogger("holdfast")

_ROWS, _LENGTHS = 8, 64  # a cache grows by so many rows and tokens at a time
_SHARE = 0.5  # of the memory that is free when a model is loaded: what its cache may take
_TRIED = 8  # tokens that the trial of a model needs


class Batch(Protocol):
    """Texts under way in a model, in rows 0, 1, ….

    `limit` is the most rows, whatever their length; logits are fp32 on the model's device.
    """

    limit: int
    capacity: int
    """Tokens that there is memory for: rows times the longest of them."""

    @property
    def count(self) -> int: ...

    def add(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Add rows behind the others; return the logits [prompts, vocabulary] of what follows
        each."""
        ...

    def add_with_all(self, prompt: Sequence[int]) -> torch.Tensor:
        """Add a row; return the logits [tokens, vocabulary] of what follows each of its tokens."""
        ...

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Add a token to each row; return the logits [rows, vocabulary] of what follows."""
        ...

    def remove(self, row: int) -> None:
        """Free `row`; the last row takes its place."""
        ...

    def clear(self) -> None:
        """Drop all rows, whatever state a failed step has left."""
        ...


@dataclass(slots=True)
class _Place:
    """The places of the keys of a forward pass: each token's row, and its place in it."""

    rows: torch.Tensor | None = None  # [tokens]
    positions: torch.Tensor | None = None  # [tokens]
    begins: bool = False  # whole texts in new rows; else one token more of every row
    count: int = 0  # rows, new ones included
    longest: int = 0  # keys that the longest row has, this pass's included


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values [rows, heads, length, width] of one layer. They start as zeros: what the mask
    leaves out is multiplied by 0, and memory as it comes may hold NaN."""

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self._place = place
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: `update` makes room when it knows for how many."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the keys of this pass; the keys it attends to: texts that begin see only each other
        (and the mask sees to it that they do not), those that go on see all that is kept."""
        place = self._place
        self.keys = _room(self.keys, key_states, place.count, place.longest)
        self.values = _room(self.values, value_states, place.count, place.longest)
        self.keys[place.rows, :, place.positions] = _by_token(key_states)
        self.values[place.rows, :, place.positions] = _by_token(value_states)
        if place.begins:
            return key_states, value_states
        kept = slice(None, place.count), slice(None), slice(None, place.longest)
        return self.keys[kept], self.values[kept]

    def move(self, source: int, target: int, length: int) -> None:
        for tensor in (self.keys, self.values):
            assert tensor is not None, "a row has keys"
            tensor[target, :, :length] = tensor[source, :, :length]

    def bytes_per_token(self) -> int:
        tensors = [tensor for tensor in (self.keys, self.values) if tensor is not None]
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in tensors)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return max(self._place.longest, query_length), 0

    def get_seq_length(self) -> int:
        return 0 if self._place.begins else self._place.longest - 1

    def get_max_length(self) -> int:
        return -1


def _by_token(states: torch.Tensor) -> torch.Tensor:
    """Return [texts, heads, tokens, width] as [texts x tokens, heads, width]."""
    return states.transpose(1, 2).flatten(0, 1)


def _room(have: torch.Tensor | None, like: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Return `have`, or a tensor with the same content for `rows` of `length`. Its size follows
    what is needed now, not what was needed once."""
    if have is not None and have.shape[0] >= rows and have.shape[2] >= length:
        return have
    rows, length = -(-rows // _ROWS) * _ROWS, -(-length // _LENGTHS) * _LENGTHS
    new = like.new_zeros(rows, like.shape[1], length, like.shape[3])
    if have is not None:
        kept = have[:rows, :, :length]
        new[: kept.shape[0], :, : kept.shape[2]] = kept
    return new


class Rows:
    """Rows of a model whose layers all attend to everything before them."""

    def __init__(self, model: Any, limit: int, capacity: int = 1 << 40) -> None:
        self.limit, self.capacity = limit, capacity
        self._model = model
        self._device = next(model.parameters()).device
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.clear()

    @property
    def count(self) -> int:
        return len(self._lengths)

    def clear(self) -> None:
        self._place = _Place()
        self._lengths: list[int] = []
        self._cache = Cache(layer_class_to_replicate=functools.partial(_Layer, self._place))

    def add(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        ends = list(itertools.accumulate(map(len, prompts)))
        lasts = torch.tensor(ends, device=self._device) - 1
        logits = self._prefill(prompts, lasts)
        return (logits if self._keeps else logits[lasts]).float()

    def add_with_all(self, prompt: Sequence[int]) -> torch.Tensor:
        return self._prefill([prompt], None).float()

    def _prefill(
        self, prompts: Sequence[Sequence[int]], places: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the logits [places, vocabulary] (None: of all tokens). The prompts are one text
        behind the other, each seeing itself alone: filled up to one length they took 2.5 times as
        long."""
        place, device = self._place, self._device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        starts = lengths.cumsum(0) - lengths
        number = torch.arange(len(prompts), device=device).repeat_interleave(lengths)  # [tokens]
        place.begins = True
        place.rows = number + self.count
        place.positions = torch.arange(len(number), device=device) - starts[number]
        place.count = self.count + len(prompts)
        place.longest = max([*self._lengths, *map(len, prompts)])
        mask = (number[:, None] == number).tril()
        more: dict[str, Any] = {}
        if self._keeps and places is not None:
            more["logits_to_keep"] = places
        logits: torch.Tensor = self._model(
            input_ids=torch.tensor([[*itertools.chain(*prompts)]], device=device),
            attention_mask=mask[None, None],
            position_ids=place.positions[None],
            past_key_values=self._cache,
            use_cache=True,
            **more,
        ).logits
        self._lengths += map(len, prompts)
        return logits[0]

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        place, device = self._place, self._device
        positions = torch.tensor(self._lengths, device=device)
        place.begins, place.count = False, self.count
        place.rows, place.positions = torch.arange(self.count, device=device), positions
        place.longest = max(self._lengths) + 1
        mask = torch.arange(place.longest, device=device) <= positions[:, None]
        logits: torch.Tensor = self._model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            attention_mask=mask[:, None, None],
            position_ids=positions[:, None],
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        self._lengths = [length + 1 for length in self._lengths]
        return logits[:, -1].float()

    def bytes_per_token(self) -> int:
        """Return the memory that a token of a row takes; known once there was one."""
        return sum(layer.bytes_per_token() for layer in self._cache.layers)

    def remove(self, row: int) -> None:
        last = self._lengths.pop()
        if row < self.count:
            self._lengths[row] = last
            for layer in self._cache.layers:
                layer.move(self.count, row, last)


class Single:
    """One row with the model's own cache: for models that `Rows` cannot hold."""

    limit = 1
    capacity = 1 << 40  # one row is always tried

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._cache: Any = None
        self.count = 0

    def clear(self) -> None:
        self._cache, self.count = None, 0

    def add(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        (prompt,) = prompts
        return self.add_with_all(prompt)[-1:]

    def add_with_all(self, prompt: Sequence[int]) -> torch.Tensor:
        assert self.count == 0, "there is one row"
        logits = self._forward(prompt)
        self.count = 1
        return logits

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        return self._forward(tokens)

    def remove(self, row: int) -> None:
        assert row == 0, row
        self.clear()

    def _forward(self, tokens: Sequence[int]) -> torch.Tensor:
        output = self._model(
            input_ids=torch.tensor([list(tokens)], device=self._device),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = output.past_key_values
        logits: torch.Tensor = output.logits[0].float()
        return logits


# ------------------------------------------------------------------------------------- which one


def batch_for(model: Any, limit: int, context: int) -> Batch:
    """Return Rows where this model's answers stay the same in them, else one row at a time.

    Tried with the model itself: two texts of different length, together and each on its own.
    """
    config = model.config
    alike = _attends_to_all(config) and not _turns_with_length(config)
    if context >= _TRIED and alike and (size := _try(model)):
        free = free_memory(next(model.parameters()).device)
        return Rows(model, limit, int(free * _SHARE / size))
    kind = getattr(config, "model_type", "?")
    log.warning(_("Models of the kind {kind} answer one request at a time here.", kind=kind))
    return Single(model)


def _attends_to_all(config: Any) -> bool:
    """Return whether no layer forgets (sliding windows) or keeps another state than keys and
    values."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds) == {"full_attention"}
    return not getattr(config, "sliding_window", None)


def _turns_with_length(config: Any) -> bool:
    """Return whether positions mean something else as soon as one text is long (LongRoPE): a long
    text would change what the short ones beside it say. No trial with short texts shows that."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [one for one in rope.values() if isinstance(one, Mapping)]
    return any(one.get("rope_type") == "longrope" for one in [rope, *by_layer])


@torch.inference_mode()
def _try(model: Any) -> int:
    """Return the bytes that a token takes in rows; 0 where answers in rows are not the model's
    own."""
    size = model.get_input_embeddings().num_embeddings
    texts = [[(7 * i * i + 3) % size for i in range(5)], [(11 * i + 1) % size for i in range(3)]]
    rows, dtype = Rows(model, 2), next(model.parameters()).dtype
    try:
        logits = rows.add(texts)
        for _step in range(2):
            if not _close(logits, [_plain(model, text) for text in texts], dtype):
                return 0
            for text, token in zip(texts, logits.argmax(-1).tolist(), strict=True):
                text.append(token)
            logits = rows.step([text[-1] for text in texts])
        rows.remove(0)
        texts[1].append(5 % size)
        same = _close(rows.step([texts[1][-1]])[:1], [_plain(model, texts[1])], dtype)
        return rows.bytes_per_token() if same else 0
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        log.debug("no rows for this model: %s", error)  # it was made for another kind of cache
        return 0


def _plain(model: Any, text: list[int]) -> torch.Tensor:
    device = next(model.parameters()).device
    output = model(input_ids=torch.tensor([text], device=device), use_cache=False)
    logits: torch.Tensor = output.logits[0, -1].float()
    return logits


def _close(logits: torch.Tensor, expected: Sequence[torch.Tensor], dtype: torch.dtype) -> bool:
    """Return whether they are the same but for rounding, measured by the spread of the logits."""
    wanted = torch.stack(list(expected))
    spread = float(wanted.std()) or 1.0
    allowed = 1e-3 if dtype == torch.float32 else 0.25
    return bool((logits - wanted).abs().max() <= allowed * spread)
