"""The model card: what this model is, what it learned from and how.

Its text, in both languages, is model_card.md.jinja; here is what fills it in. Nothing in it says
where on which machine anything lay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from holdfast.checkpoint.format import Reader
from holdfast.checkpoint.rundir import EVENTS
from holdfast.checkpoint.state import codec
from holdfast.errors import CheckpointError
from holdfast.formatting import format_loss
from holdfast.training import models
from holdfast.training.inference import Loaded, sample_text
from holdfast.training.options.config import OPTIONS
from holdfast.training.text import prepare

_SAMPLES = 3  # the last ones of the run
_SAMPLE_TOKENS = 48
_DEPTH = 3  # a checkpoint lies at most so deep in its run directory
_SETTINGS = [
    "epochs",
    "num_steps",
    "batch_size",
    "gradient_accumulation",
    "learning_rate",
    "schedule",
    "warmup_ratio",
    "weight_decay",
    "grad_clip",
    "dropout",
    "precision",
    "seed",
    "val_fraction",
]
_METRICS = ("val_loss", "perplexity", "bits_per_byte", "train_loss")
_VERSIONS = ("holdfast", "torch", "transformers", "python", "platform", "cuda")


def parts_of(loaded: Loaded) -> dict[str, Any]:
    """Return the plain values beside the model in its checkpoint; what is not there is {}."""
    found = {}
    with Reader(loaded.path) as reader:
        for name in ("data", "progress", "history"):
            try:
                value = codec.read(reader, only=name)
            except CheckpointError:  # another loop's checkpoint: the card says less
                value = None
            found[name] = value if isinstance(value, dict) else {}
    return found


def data_of(loaded: Loaded, parts: Mapping[str, Any]) -> prepare.PreparedData | None:
    """Return the data of the run, where its tokens are in the cache of this machine."""
    options, data = loaded.config.get("data") or {}, parts["data"]
    try:
        return prepare.reopen_data(
            str(data["content_hash"]),
            loaded.tokenizer,
            val_fraction=options["val_fraction"],
            seed=data["seed"],
            text_field=options["text_field"],
            cache_dir=options["cache_dir"],
        )
    except (KeyError, TypeError, OSError):
        return None


def card(
    loaded: Loaded, parts: Mapping[str, Any], data: prepare.PreparedData | None, dtype: str
) -> str:
    """Return the README.md of an exported directory, in English and Chinese."""
    return render({**_facts(loaded, parts, data), "dtype": dtype})


def render(facts: Mapping[str, Any]) -> str:
    """Fill the template in."""
    import jinja2

    environment = jinja2.Environment(
        trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    template = Path(__file__).with_name("model_card.md.jinja").read_text("utf-8")
    return environment.from_string(template).render(facts)


def _facts(
    loaded: Loaded, parts: Mapping[str, Any], data: prepare.PreparedData | None
) -> dict[str, Any]:
    """Gather what a checkpoint, its run and its cache say of a model, as the template names it.

    What is not known is empty or None.
    """
    options: dict[str, Any] = {}
    for section in loaded.config.values():
        options |= section if isinstance(section, Mapping) else {}
    environment = loaded.manifest.get("environment") or {}
    name = base_name(options.get("model") or loaded.model_config.get("model_type", "model"))
    prompt = str(options.get("sample_prompt", OPTIONS["sample_prompt"].default))
    seen, content = parts["progress"].get("tokens"), str(parts["data"].get("content_hash", ""))
    entry, history = loaded.entry, parts["history"]
    samples = _recorded(loaded) or _fresh(loaded, prompt)
    return {
        "name": name,
        "architecture": type(loaded.model).__name__,
        "parameters": _count(sum(p.numel() for p in loaded.model.parameters())),
        "context": _count(loaded.max_context),
        "splits": _splits(loaded.tokenizer.json),
        "step": _count(entry.step),
        "epoch": entry.epoch,
        "ends_epoch": bool(history.get("epochs")),
        "created": entry.created[:10],
        "identity": entry.id,
        "metrics": {
            k: format_loss(float(entry.metrics[k]))
            for k in _METRICS
            if isinstance(entry.metrics.get(k), int | float)
        },
        "course": _course(history),
        "settings": {k: options[k] for k in _SETTINGS if content and options.get(k) is not None},
        "versions": {k: environment[k] for k in _VERSIONS if environment.get(k)},
        "git": _git(environment.get("git")),
        # "" where the weights began as random numbers
        "began_from": "" if models.is_shape(str(options.get("model"))) else name,
        "data_name": base_name(options.get("data_file", "")),
        "data_hash": content,  # "" where nothing was trained here: the model came from elsewhere
        "tokens_seen": _count(seen) if isinstance(seen, int) and seen > 0 else None,
        "documents": _count(data.documents) if data else None,
        "characters": _count(data.characters) if data else None,
        "data_tokens": _count(data.tokens) if data else None,
        "data_bytes": _count(data.train_bytes + data.val_bytes) if data else None,
        "samples": [(epoch, _count(step), text) for epoch, step, text in samples],
        "prompt": prompt,
        "prompt_literal": json.dumps(prompt, ensure_ascii=False),
        "chinese": re.search(r"[\u4e00-\u9fff]", prompt + "".join(s[2] for s in samples)),
    }


def _count(value: int) -> str:
    return f"{value:,}"


def _course(history: Mapping[str, Any]) -> list[tuple[Any, str, str]]:
    """Return (epoch, training loss, validation loss) of each epoch."""
    columns = [history.get(name) for name in ("epochs", "train_loss", "val_loss")]
    if not all(isinstance(column, list) for column in columns):
        return []
    return [
        (epoch, format_loss(train), format_loss(val))
        for epoch, train, val in zip(*columns, strict=False)
    ]


def _splits(tokenizer_json: str) -> str:
    """Return "gpt2" or "gpt2-nfc" where text is cut before BPE as GPT-2 does it (byte level, with
    its regular expression), else ""."""
    tokenizer = json.loads(tokenizer_json)
    step, before = tokenizer.get("pre_tokenizer") or {}, tokenizer.get("normalizer") or {}
    if step.get("type") != "ByteLevel" or step.get("use_regex", True) is not True:
        return ""
    return "gpt2-nfc" if before.get("type") == "NFC" else "gpt2"


def base_name(path: object) -> str:
    """Return the last part of a path of any system; the rest tells of a machine."""
    return PurePosixPath(PureWindowsPath(str(path)).as_posix()).name


def _git(value: object) -> str:
    if isinstance(value, Mapping):
        commit = str(value.get("commit", ""))
        return commit + (" (with uncommitted changes)" if value.get("dirty") and commit else "")
    return value if isinstance(value, str) else ""


def _recorded(loaded: Loaded) -> list[tuple[int | None, int, str]]:
    """Return the last samples that the run has written down up to this step."""
    places = [
        loaded.path.absolute().parents[i]
        for i in range(_DEPTH)
        if i < len(loaded.path.absolute().parents)
    ]
    directory = next((place for place in places if (place / EVENTS).is_file()), None)
    found: list[tuple[int | None, int, str]] = []
    for line in _lines(directory / "metrics.jsonl") if directory else []:
        step = line.get("step")
        if isinstance(step, int) and step <= loaded.entry.step and line.get("event") == "sample":
            epoch = line.get("epoch")
            found.append((epoch if isinstance(epoch, int) else None, step, str(line.get("text"))))
    return found[-_SAMPLES:]


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text("utf-8", "replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue  # a crash tears a line
        if isinstance(value, dict):
            found.append(value)
    return found


def _fresh(loaded: Loaded, prompt: str) -> list[tuple[int | None, int, str]]:
    text = sample_text(
        loaded.model,
        loaded.tokenizer,
        prompt,
        _SAMPLE_TOKENS,
        context_length=loaded.context_length,
        seed=loaded.entry.step,
        may_end=False,
    )
    return [(None, loaded.entry.step, " ".join(text.replace("\ufffd", "").split()))]
