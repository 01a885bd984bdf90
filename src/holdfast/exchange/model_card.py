"""The model card: what this model is, what it learned from and how, for whoever is handed it.

Both languages stand in every card, so its Chinese lives here and not in the catalogue. Nothing in
it says where on which machine anything lay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
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
_SETTINGS = (
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
)
_VERSIONS = ("holdfast", "torch", "transformers", "python", "platform", "cuda")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a checkpoint, its run and its cache say of a model; None and {} where they do not."""

    name: str
    architecture: str
    parameters: int
    context: int
    vocabulary: int
    step: int
    epoch: int | None
    created: str
    identity: str
    metrics: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, Any]
    git: str
    began_from: str  # "" where the weights began as random numbers
    data_name: str
    data_hash: str  # "" where nothing was trained here: the model came from elsewhere
    tokens_seen: int | None
    documents: int | None = None
    characters: int | None = None
    data_tokens: int | None = None
    data_bytes: int | None = None
    history: dict[str, Any] = field(default_factory=dict)
    samples: list[tuple[int | None, int, str]] = field(default_factory=list)  # (epoch, step, text)
    prompt: str = ""


def parts_of(loaded: Loaded) -> dict[str, Any]:
    """The plain values beside the model in its checkpoint; what is not there is {}."""
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
    """The data of the run, where its tokens are in the cache of this machine."""
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


def facts_of(loaded: Loaded, parts: Mapping[str, Any], data: prepare.PreparedData | None) -> Facts:
    """Gather what is known of `loaded`."""
    options = {
        k: v
        for section in loaded.config.values()
        if isinstance(section, Mapping)
        for k, v in section.items()
    }
    environment = loaded.manifest.get("environment") or {}
    name = base_name(options.get("model") or loaded.model_config.get("model_type", "model"))
    prompt = str(options.get("sample_prompt", OPTIONS["sample_prompt"].default))
    seen, content = parts["progress"].get("tokens"), str(parts["data"].get("content_hash", ""))
    return Facts(
        name=name,
        architecture=type(loaded.model).__name__,
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        context=loaded.max_context,
        vocabulary=int(loaded.model.config.vocab_size),
        step=loaded.entry.step,
        epoch=loaded.entry.epoch,
        created=loaded.entry.created[:10],
        identity=loaded.entry.id,
        metrics={k: v for k, v in loaded.entry.metrics.items() if isinstance(v, int | float)},
        settings={k: options[k] for k in _SETTINGS if content and options.get(k) is not None},
        versions={k: environment[k] for k in _VERSIONS if environment.get(k)},
        git=_git(environment.get("git")),
        began_from="" if models.is_shape(str(options.get("model"))) else name,
        data_name=base_name(options.get("data_file", "")),
        data_hash=content,
        tokens_seen=seen if isinstance(seen, int) and seen > 0 else None,
        documents=data.documents if data else None,
        characters=data.characters if data else None,
        data_tokens=data.tokens if data else None,
        data_bytes=data.train_bytes + data.val_bytes if data else None,
        history=dict(parts["history"]),
        samples=_recorded(loaded) or _fresh(loaded, prompt),
        prompt=prompt,
    )


def base_name(path: object) -> str:
    """The last part of a path of any system: where it lay is nobody's business."""
    return PurePosixPath(PureWindowsPath(str(path)).as_posix()).name


def _git(value: object) -> str:
    if isinstance(value, Mapping):
        commit = str(value.get("commit", ""))
        return commit + (" (with uncommitted changes)" if value.get("dirty") and commit else "")
    return value if isinstance(value, str) else ""


def _recorded(loaded: Loaded) -> list[tuple[int | None, int, str]]:
    """The last samples that the run has written down up to this step."""
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


# --------------------------------------------------------------------------------------- the text

_WORDS: dict[str, dict[str, str]] = {
    "en": {
        "intro": "A causal language model ({architecture}, {parameters} parameters), trained with "
        "Holdfast.",
        "use": "How to use it",
        "results": "Results",
        "results_of": "At step {step}{epoch}, on the part of the data that was kept aside for "
        "validation:",
        "none": "No validation loss was measured at this step.",
        "val_loss": "validation loss (nats a token)",
        "perplexity": "perplexity (a token)",
        "bits_per_byte": "bits per byte of UTF-8 text",
        "train_loss": "training loss (nats a token)",
        "in_epoch": ", the end of epoch {epoch}",
        "course": "Losses by epoch",
        "epoch": "epoch",
        "data": "Training data",
        "data_name": "name",
        "data_size": "size",
        "size": "{documents} documents, {characters} characters, {bytes} bytes, {tokens} tokens",
        "unknown_size": "not recorded in the checkpoint",
        "data_hash": "content hash (xxh3-128)",
        "seen": "tokens trained on, repetitions included",
        "training": "How it was trained",
        "setting": "setting",
        "value": "value",
        "steps": "steps",
        "git": "project that trained (git)",
        "checkpoint": "checkpoint",
        "weights": "weights in this directory",
        "samples": "Samples",
        "samples_of": "What the model wrote after “{prompt}”, as it came:",
        "at": "step {step}",
        "at_epoch": "epoch {epoch}, step {step}",
        "intended": "Intended use and limits",
        "limits": "It continues text of the kind that it learned from. {past}It is no "
        "assistant, repeats the mistakes and biases of its texts, and invents. Do not "
        "rely on what it writes where that could harm anybody. It sees {context} tokens "
        "at once. Nobody has stated a licence: whoever publishes this model states it, "
        "and sees to the rights in the data.",
        "alone": "It was trained on the data above alone and knows nothing beyond it. ",
        "further": "It did not begin here: what the weights of `{began}` had learned from before "
        "is not recorded. ",
        "llama": "llama.cpp: its converter recognises tokenizers by a list of hashes, and one that "
        "was trained anew is on no list. Where it stops with “BPE pre-tokenizer was not "
        "recognized”, map the hash that it prints to `gpt-2` in `get_vocab_base_pre`: "
        "{splits}.",
        "gpt2": "this tokenizer splits text exactly as GPT-2's does{nfc}",
        "nfc": " (and normalises it to NFC first, which llama.cpp does not: give it NFC)",
        "not_gpt2": "but only if this tokenizer splits text as GPT-2's does",
    },
    "zh": {
        "intro": "因果语言模型（{architecture}，{parameters} 个参数），用 Holdfast 训练。",
        "use": "用法",
        "results": "结果",
        "results_of": "第 {step} 步{epoch}，在留作验证的那部分数据上：",
        "none": "这一步没有测验证损失。",
        "val_loss": "验证损失（nat/token）",
        "perplexity": "困惑度（每 token）",
        "bits_per_byte": "每字节比特数（UTF-8 文本）",
        "train_loss": "训练损失（nat/token）",
        "in_epoch": "（第 {epoch} 轮结束）",
        "course": "各轮损失",
        "epoch": "轮",
        "data": "训练数据",
        "data_name": "名称",
        "data_size": "规模",
        "size": "{documents} 篇文档，{characters} 个字符，{bytes} 字节，{tokens} 个 token",
        "unknown_size": "检查点里没有记录",
        "data_hash": "内容哈希（xxh3-128）",
        "seen": "训练过的 token 数（含重复）",
        "training": "训练方式",
        "setting": "设置",
        "value": "值",
        "steps": "步数",
        "git": "训练所用项目（git）",
        "checkpoint": "检查点",
        "weights": "本目录中的权重",
        "samples": "样例",
        "samples_of": "模型接着“{prompt}”写的内容，未经挑选：",
        "at": "第 {step} 步",
        "at_epoch": "第 {epoch} 轮，第 {step} 步",
        "intended": "用途与局限",
        "limits": "它续写与训练文本同类的文字。{past}它不是助手，会重复文本里的错误和偏见，"
        "也会编造。凡可能伤及他人之处，不要依赖它写的内容。"
        "它一次看到 {context} 个 token。"
        "许可证尚未声明：发布这个模型的人负责声明许可证，并处理好数据的权利。",
        "alone": "它只学过上述数据，此外一无所知。",
        "further": "它不是从这里开始的：`{began}` 的权重此前学过什么，没有记录。",
        "llama": "llama.cpp：它的转换脚本靠一张哈希表识别分词器，新训练的分词器不在任何表里。"
        "若它停在 “BPE pre-tokenizer was not recognized”，请在 `get_vocab_base_pre` 里"
        "把它打印的哈希映射到 `gpt-2`：{splits}。",
        "gpt2": "这个分词器切分文本的方式与 GPT-2 完全相同{nfc}",
        "nfc": "（之前还会规范化为 NFC，而 llama.cpp 不做这一步：请给它 NFC 文本）",
        "not_gpt2": "但仅当这个分词器切分文本的方式与 GPT-2 相同时才可以",
    },
}

_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer({prompt}, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=48)[0]))
```"""


def card(facts: Facts, *, dtype: str, tokenizer_json: str) -> str:
    """The README.md of an exported directory, in English and Chinese."""
    tags = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if re.search(
        r"[\u4e00-\u9fff]", facts.prompt + "".join(text for _e, _s, text in facts.samples)
    ):
        tags += ["language:", "- zh"]
    tags += ["tags:", "- holdfast", "---", ""]
    parts = [*tags, f"# {facts.name}", "", "English · [中文](#中文)", ""]
    parts += [*_body(facts, "en", dtype, tokenizer_json)]
    parts += ["# 中文", "", *_body(facts, "zh", dtype, tokenizer_json)]
    return "\n".join(parts).rstrip() + "\n"


def _body(facts: Facts, language: str, dtype: str, tokenizer_json: str) -> list[str]:
    w = _WORDS[language]
    epoch = w["in_epoch"].format(epoch=facts.epoch) if facts.history.get("epochs") else ""
    metrics = [
        (w[k], format_loss(float(facts.metrics[k])))
        for k in ("val_loss", "perplexity", "bits_per_byte", "train_loss")
        if k in facts.metrics
    ]
    size = w["unknown_size"]
    if facts.documents is not None:
        size = w["size"].format(
            documents=f"{facts.documents:,}",
            characters=f"{facts.characters:,}",
            bytes=f"{facts.data_bytes:,}",
            tokens=f"{facts.data_tokens:,}",
        )
    data = [
        (w["data_name"], f"`{facts.data_name}`"),
        (w["data_size"], size),
        (w["data_hash"], f"`{facts.data_hash}`"),
    ]
    if not facts.data_hash:
        data = [(w["data_name"], w["unknown_size"])]
    if facts.tokens_seen is not None:
        data.append((w["seen"], f"{facts.tokens_seen:,}"))
    training = [
        (w["steps"], f"{facts.step:,}"),
        *((f"`{k}`", v) for k, v in facts.settings.items()),
    ]
    training += [
        *facts.versions.items(),
        (w["weights"], dtype),
        (w["checkpoint"], f"{facts.identity} ({facts.created})"),
    ]
    training += [(w["git"], f"`{facts.git}`")] if facts.git else []
    blocks = "\n\n".join(
        f"- {w['at' if epoch is None else 'at_epoch'].format(epoch=epoch, step=f'{step:,}')}"
        f"\n\n  > {text}"
        for epoch, step, text in facts.samples
    )
    told = w["results_of"].format(step=f"{facts.step:,}", epoch=epoch) if metrics else w["none"]
    use = _USE.format(prompt=json.dumps(facts.prompt, ensure_ascii=False))
    return [
        w["intro"].format(architecture=facts.architecture, parameters=f"{facts.parameters:,}"),
        "",
        f"## {w['use']}",
        "",
        use,
        "",
        f"- {w['llama'].format(splits=_splits(w, tokenizer_json))}",
        "",
        f"## {w['results']}",
        "",
        told,
        "",
        *(_table(w, metrics) if metrics else []),
        *_course(w, facts.history),
        f"## {w['data']}",
        "",
        *_table(w, data),
        f"## {w['training']}",
        "",
        *_table(w, training),
        f"## {w['samples']}",
        "",
        w["samples_of"].format(prompt=facts.prompt),
        "",
        blocks,
        "",
        f"## {w['intended']}",
        "",
        w["limits"].format(
            context=f"{facts.context:,}",
            past=w["further" if facts.began_from else "alone"].format(began=facts.began_from),
        ),
        "",
    ]


def _table(words: Mapping[str, str], rows: list[tuple[str, Any]]) -> list[str]:
    cells = [f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in rows]
    return [f"| {words['setting']} | {words['value']} |", "|---|---|", *cells, ""]


def _course(words: Mapping[str, str], history: Mapping[str, Any]) -> list[str]:
    columns = [history.get(name) for name in ("epochs", "train_loss", "val_loss")]
    if not all(isinstance(column, list) and column for column in columns):
        return []
    rows = [
        f"| {epoch} | {format_loss(train)} | {format_loss(val)} |"
        for epoch, train, val in zip(*columns, strict=False)
    ]
    head = f"| {words['epoch']} | {words['train_loss']} | {words['val_loss']} |"
    return [f"### {words['course']}", "", head, "|---|---|---|", *rows, ""]


def _splits(words: Mapping[str, str], tokenizer_json: str) -> str:
    """Whether text is cut before BPE as GPT-2 does it: byte level, its regular expression."""
    tokenizer = json.loads(tokenizer_json)
    step, before = tokenizer.get("pre_tokenizer") or {}, tokenizer.get("normalizer") or {}
    if step.get("type") != "ByteLevel" or step.get("use_regex", True) is not True:
        return words["not_gpt2"]
    return words["gpt2"].format(nfc=words["nfc"] if before.get("type") == "NFC" else "")
