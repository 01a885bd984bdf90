"""Define every option of a training run once: its name, type, default, help and bounds.

Config files, presets, flags and `--help` all come from the four dataclasses here. `presets.py`
reads the layers and lets the strongest win; what may change on resume is the trainer's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from holdfast.i18n import N_
from holdfast.training.options.fields import Option, nearest, option, options_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model, and its arithmetic."""

    model: str = option(
        "tiny",
        help=N_("tiny, mini, gpt2-small, or a path or name of a causal model for transformers"),
        metavar="PATH_OR_NAME",
        short="m",
        near=("model_name", "name", "architecture"),
    )
    context_length: int | None = option(
        None,
        help=N_("tokens that the model sees at once (the model's own length where not given)"),
        metavar="TOKENS",
        ge=8,
        le=1_048_576,
        near=("block_size", "max_length", "seq_len"),
    )
    vocab_size: int | None = option(
        None,
        help=N_("size of the tokenizer's vocabulary (what suits model and text where not given)"),
        metavar="TOKENS",
        ge=260,  # 256 bytes and the special tokens
        le=1_000_000,
    )
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        help=N_("arithmetic of forward and backward; auto takes bf16 where the hardware has it"),
        near=("dtype",),
    )
    compile: bool = option(
        False, help=N_("compile the model with torch.compile: a slow start, then faster steps")
    )
    dropout: float | None = option(
        None, help=N_("dropout probability (the model's own where not given)"), ge=0, lt=1
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The text, and how it is split and cached."""

    data_file: str = option(
        "data/zh_sample.txt",
        help=N_("text to learn from: .txt, .jsonl or .parquet (also .gz, .zst), a folder, a glob"),
        metavar="FILE",
        short="d",
        near=("data", "data_path", "train_file", "dataset", "input"),
    )
    text_field: str = option(
        "text", help=N_("field of .jsonl and .parquet that holds the text"), metavar="NAME"
    )
    strict_text: bool = option(
        False,
        help=N_("refuse a damaged text, instead of leaving out up to 0.1 % of it"),
        near=("strict", "strict_encoding"),
    )
    val_fraction: float = option(
        0.05,
        help=N_("share of the documents kept aside for validation; 0 for none"),
        ge=0,
        lt=1,
        near=("validation_split", "val_split"),
    )
    cache_dir: str | None = option(
        None,
        help=N_("folder for prepared tokens (the user's cache where not given)"),
        metavar="DIR",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Length, speed and order of learning, and reports on the way."""

    epochs: int | None = option(
        3,
        help=N_("passes over the data in all, those before a resume included"),
        ge=1,
        le=1_000_000,
        short="e",
        near=("num_epochs", "num_train_epochs", "max_epochs"),
    )
    num_steps: int | None = option(
        None,
        help=N_("train for this many steps in all, instead of epochs"),
        ge=1,
        le=10**12,
        near=("steps", "max_steps"),
    )
    batch_size: int = option(
        4, help=N_("sequences in a micro-batch"), ge=1, le=1_000_000, short="b", near=("bs",)
    )
    learning_rate: float = option(
        3e-4, help=N_("highest learning rate, reached after the warm-up"), gt=0, le=1, near=("lr",)
    )
    gradient_accumulation: int = option(
        1,
        help=N_("micro-batches whose gradients make one step"),
        ge=1,
        le=1_000_000,
        near=("gradient_accumulation_steps", "accumulation_steps"),
    )
    warmup_ratio: float = option(
        0.05,
        help=N_("share of the steps in which the learning rate rises"),
        ge=0,
        lt=1,
        near=("warmup",),
    )
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine",
        help=N_("how the learning rate falls after the warm-up"),
        near=("lr_scheduler", "scheduler"),
    )
    weight_decay: float = option(0.1, help=N_("weight decay of AdamW on matrices"), ge=0, le=10)
    grad_clip: float = option(
        1.0,
        help=N_("largest norm of the gradient; 0 for no limit"),
        ge=0,
        near=("max_grad_norm", "gradient_clip"),
    )
    on_nan: Literal["stop", "rollback", "ignore"] = option(
        "stop",
        help=N_("when the loss is no number or jumps up: stop, go back and skip the data, or warn"),
        near=("nan", "on_spike", "detect_anomaly"),
    )
    seed: int = option(
        42, help=N_("seed of weights, dropout and the order of the data"), ge=0, le=2**32 - 1
    )
    eval_every: int | None = option(
        None,
        help=N_("also evaluate every so many steps, not only after an epoch"),
        metavar="STEPS",
        ge=1,
        near=("eval_steps", "eval_interval"),
    )
    patience: int | None = option(
        None,
        help=N_("stop after this many evaluations without a better validation loss"),
        ge=1,
        near=("early_stopping_patience", "early_stop"),
    )
    threads: int | None = option(
        None, help=N_("CPU threads (torch decides where not given)"), ge=1, le=4096
    )
    log_every: int = option(
        10,
        help=N_("write metrics every so many steps"),
        metavar="STEPS",
        ge=1,
        near=("logging_steps", "log_interval"),
    )
    sample_prompt: str = option(
        "今天",
        help=N_("beginning of the text that is generated as a sample after an epoch"),
        may_be_empty=True,
        near=("prompt",),
    )
    sample_tokens: int = option(
        48, help=N_("length of that sample; 0 for none"), metavar="TOKENS", ge=0, le=1_000_000
    )
    tensorboard: bool = option(
        False, help=N_("also write TensorBoard event files (extra: holdfast-train[tensorboard])")
    )
    price_per_hour: float | None = option(
        None, help=N_("price of an hour of this machine, for the cost in --dry-run"), ge=0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """The run directory, its saves and their retention, and the state to go on from."""

    checkpoint_dir: str = option(
        "checkpoints",
        help=N_("run directory: everything that belongs to the run lies there"),
        metavar="DIR",
        near=("output_dir", "save_dir", "run_dir"),
    )
    save_every_epoch: bool = option(True, help=N_("keep a checkpoint at the end of each epoch"))
    keep_last_n: int = option(
        3,
        help=N_("how many epochs' checkpoints to keep, beside the best and the newest; 0 for all"),
        ge=0,
        near=("save_total_limit", "keep"),
    )
    save_every: int | None = option(
        None,
        help=N_("keep a checkpoint every so many steps"),
        metavar="STEPS",
        ge=1,
        near=("save_steps", "save_interval"),
    )
    temp_every_steps: int | None = option(
        None,
        help=N_("save a rolling checkpoint within the epoch every so many steps"),
        metavar="STEPS",
        ge=1,
    )
    temp_every_minutes: float | None = option(
        None,
        help=N_(
            "save one every so many minutes; 0 for never (without either, risk and cost decide)"
        ),
        metavar="MINUTES",
        ge=0,
    )
    write_budget: float = option(
        200.0,
        help=N_("GB a day for rolling checkpoints where risk and cost decide; 0 for no limit"),
        metavar="GB",
        ge=0,
        near=("daily_writes", "max_writes"),
    )
    memory_every: str = option(
        "auto",
        help=N_(
            "snapshots in memory, safe from kills; auto: as often as 1 % of the time allows; "
            "0: never"
        ),
        metavar="STEPS|auto",
        count_or="auto",
        near=("memory_steps", "snapshot_every"),
    )
    grace: float = option(
        0.0,
        help=N_("seconds from a signal until the machine is gone; 0: as long as a save takes"),
        metavar="SECONDS",
        ge=0,
        near=("grace_period", "preemption_time"),
    )
    io_limit: float = option(
        0.0,
        help=N_("write checkpoints at this many MB a second at most; 0 for no limit"),
        metavar="MB",
        ge=0,
        near=("io_rate", "max_write_speed"),
    )
    max_unsafe: float = option(
        60.0,
        help=N_("raise the alarm when nothing could be saved for so many minutes; 0 for never"),
        metavar="MINUTES",
        ge=0,
    )
    on_unsafe: Literal["warn", "stop"] = option(
        "warn", help=N_("what to do then: only say so, or try once more and end the training")
    )
    notify: str | None = option(
        None,
        help=N_("program to run, with a message as last argument, on a crash, the end, an alarm"),
        metavar="COMMAND",
        near=("on_event", "alert", "notification"),
        of_this_start=True,
        private=True,
    )
    resume: str | None = option(
        None,
        help=N_("go on without asking: from the newest intact checkpoint, or from this one"),
        metavar="FILE|GLOB|DIR",
        aliases=("resume_from",),
        const="auto",
        near=("resume_from_checkpoint",),
        of_this_start=True,
    )
    checkpoint: str | None = option(
        None,
        help=N_(
            "go on from this file of the run, or from another's weights; epochs and steps count "
            "from there"
        ),
        metavar="FILE",
        near=("init_from",),
        of_this_start=True,
    )
    fresh: bool = option(
        False,
        help=N_("start anew; the run that is here goes to archive/ at the first verified save"),
        near=("restart", "overwrite"),
        of_this_start=True,
    )


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "checkpoint": CheckpointConfig,
}

SECTION_TITLES: dict[str, str] = {
    "model": N_("Model"),
    "data": N_("Data"),
    "training": N_("Training"),
    "checkpoint": N_("Checkpoints and resuming"),
}

OPTIONS: dict[str, Option] = {}
"""All options by name, in the order of the sections; names are unique over all of them."""

for _section, _cls in SECTIONS.items():
    for _name, _option in options_of(_section, _cls).items():
        assert _name not in OPTIONS, f"two options are called {_name}"
        OPTIONS[_name] = _option

BY_NAME: dict[str, Option] = {name: opt for opt in OPTIONS.values() for name in opt.names}
"""All options by name and by alias."""

_NEAR: dict[str, str] = {near: opt.name for opt in OPTIONS.values() for near in opt.meta.near}


def suggest(word: str, also: Iterable[str] = ()) -> str | None:
    """The option (or one of `also`) that an unknown name such as `lr` or `bacth_size` means."""
    word = word.lower().replace("-", "_")
    return _NEAR.get(word) or nearest(word, [*BY_NAME, *also])


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All options of a run, checked. Made by `presets.resolve` and
    `config_files.from_mapping`.

    `epochs` is None exactly where the run is counted in steps (`num_steps`). `sources` tells for
    each option whether its value is a "flag", from the "file", the "preset" or the "default".
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sources: dict[str, str] = field(
        default_factory=lambda: dict.fromkeys(OPTIONS, "default"), compare=False
    )

    @classmethod
    def from_values(cls, values: Mapping[str, Any], sources: Mapping[str, str]) -> Config:
        """A configuration of checked values, one for each option."""
        sections = {
            section: made(**{n: values[n] for n, o in OPTIONS.items() if o.section == section})
            for section, made in SECTIONS.items()
        }
        return cls(**sections, sources=dict(sources))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """All values by section, plain and complete, ready for JSON."""
        return {section: asdict(getattr(self, section)) for section in SECTIONS}

    def to_state(self) -> dict[str, dict[str, Any]]:
        """`to_dict` for a checkpoint, which others may come to read: without what is private."""
        return {
            section: {n: v for n, v in values.items() if not OPTIONS[n].meta.private}
            for section, values in self.to_dict().items()
        }
