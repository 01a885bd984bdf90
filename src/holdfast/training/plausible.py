"""Refuse a model or tokenizer of impossible size before it is built.

Anybody can write ten million layers, or a word that grows a billionfold, into a few kilobytes. To
find out by building them takes all memory or never ends. No torch here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import DataError, ForeignCheckpoint
from holdfast.i18n import _

_MOST_LAYERS = 10_000  # the deepest language models have about 130
_MOST = 1 << 40  # of any other number: contexts, windows
_MOST_GROWTH = 64  # times that a tokenizer's replacements may make a text longer
# What weights are as large as, at least; a window or a position is not.
_SIZES = re.compile(r"(size|dim|embd|inner|d_model|d_ff|heads?|experts|rank|width|ffn)$")
_NOT_SIZES = re.compile(r"chunk|window|position")


def check_configuration(
    config: Mapping[str, Any], shapes: Iterable[Sequence[int]], path: Path
) -> None:
    """Raise ForeignCheckpoint where `config`, of transformers, asks for more than weights of these
    `shapes` can be: it is not built then. `path` is the file, for the message."""
    elements = sum(math.prod(shape) for shape in shapes)
    for key, value in _numbers(config):
        most = _MOST
        if "layer" in key:
            most = _MOST_LAYERS
        elif _SIZES.search(key) and not _NOT_SIZES.search(key):
            most = elements or _MOST  # without any, reading them says so
        if value > most or (value < 1 and key in ("max_position_embeddings", "n_positions")):
            message = _(
                "{path} says that its model has {key} = {value}, which its weights ({count} "
                "numbers) cannot be.",
                path=path,
                key=key,
                value=value,
                count=f"{elements:,}",
            )
            raise ForeignCheckpoint(message)


def _numbers(value: object, key: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _numbers(each, str(name))
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(each, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


def check_tokenizer(text: str) -> None:
    """Raise DataError where the replacements of a tokenizer.json would make texts grow without
    bounds: thirty that double each letter make a gigabyte of one."""
    try:
        found = json.loads(text)
    except ValueError:
        return  # its library says what is wrong
    if not isinstance(found, dict):
        return
    growth = 1.0
    for part in _parts([found.get("normalizer"), found.get("decoder")]):
        pattern = part.get("pattern")
        if part.get("type") == "Replace" and isinstance(pattern, dict):
            before = len(str(pattern["String"])) if "String" in pattern else 1
            growth *= max(1.0, len(str(part.get("content"))) / max(1, before))
    if growth > _MOST_GROWTH:
        raise DataError(
            "The tokenizer would make texts {growth} times as long.", growth=f"{growth:,.0f}"
        )


def _parts(value: object) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        for each in value:
            yield from _parts(each)
    elif isinstance(value, dict):
        yield value
        yield from _parts([each for each in value.values() if isinstance(each, list)])
