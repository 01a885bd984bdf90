"""Decide how a start begins, and check that the saved run fits the options.

Which checkpoint that is, `recovery.choose` decides. Only manifests are read here. A run's own
configuration is the layer under everything that the user gives: `holdfast train --resume` needs no
other option to go on as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint.format import NewerFormat, container
from holdfast.checkpoint.rundir import Contents, cannot_read, recovery
from holdfast.checkpoint.state import codec
from holdfast.errors import CheckpointError, StateMismatch
from holdfast.i18n import N_, _
from holdfast.training import unattended
from holdfast.training.options.config import OPTIONS, Config
from holdfast.training.options.config_files import from_mapping
from holdfast.training.options.fields import flag_of, format_value
from holdfast.training.plausible import check_configuration


@dataclass(frozen=True, slots=True)
class SavedRun:
    """The run of a checkpoint, read from the manifest alone."""

    path: Path
    id: str
    step: int
    config: dict[str, Any]
    model_config: dict[str, Any]
    tokenizer: dict[str, Any]
    data: dict[str, Any]
    progress: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Start:
    """A decision: begin anew, from a saved run, or from the weights of a file."""

    choice: recovery.Choice | None = None  # go on from the first of these that is intact
    saved: SavedRun | None = None  # the run of that one
    weights: Path | None = None  # a new run with these weights
    anew: bool = False  # a new run begins: what lies here goes to the archive at its first save

    @property
    def named(self) -> bool:
        """True if the user has named the checkpoint to go on from."""
        return self.choice is not None and self.choice.named


def decide(config: Config, contents: Contents, ask: Callable[..., bool] | None) -> Start:
    """Decide from the options and from what lies in the run directory.

    `ask(question, default=…)` asks a person; None where there is no person to answer. Raises
    `CheckpointError` where a file that was named is not there, or cannot be read now.
    """
    options, directory = config.checkpoint, Path(config.checkpoint.checkpoint_dir)
    if not unattended.goes_on(contents.newest.id if contents.newest else None):
        if options.fresh:
            return Start(anew=True)
        if options.checkpoint is not None:
            choice = recovery.choose(directory, contents, options.checkpoint)
            return Start(choice) if choice.entries else Start(weights=choice.paths[0], anew=True)
        if options.resume not in (None, "auto"):
            choice = recovery.choose(directory, contents, options.resume)
            return Start(choice, anew=not choice.entries)
        if options.resume is None and ask is not None and _begins_anew(config, contents, ask):
            return Start(anew=True)
    return Start(recovery.choose(directory, contents))


def _begins_anew(config: Config, contents: Contents, ask: Callable[..., bool]) -> bool:
    """Ask a person whether to go on, if a run lies here; return True to begin a new one. Where
    going on could only end in a refusal, ask whether to begin a new one."""
    if not (contents.entries or contents.damaged or contents.unreadable):
        return False
    directory, newest = Path(config.checkpoint.checkpoint_dir), contents.newest
    saved, refused = first_readable([directory / e.names[0] for e in contents.entries]), []
    if saved is not None:
        refused = fixed_differences(saved, merged(config, saved, start=Start(saved=saved)))
    if refused:
        question = _(
            "{directory} holds a run of another model ({refused}). Move it to "
            "archive/ and start a new one?",
            directory=directory,
            refused="; ".join(refused),
        )
        return ask(question, default=False)
    question = _(
        "{directory} holds a run (newest step {step}). Go on from it?",
        directory=directory,
        step=newest.step if newest else "?",
    )
    return not ask(question)


def first_readable(paths: Sequence[Path], *, named: bool = False) -> SavedRun | None:
    """Return the run of the first of `paths` that holds one of this trainer, if any. Raises
    `CheckpointError` where none does though it was `named`."""
    for path in paths:
        try:
            return read_saved(path)
        except NewerFormat:  # it may be the one that is meant
            raise
        except (CheckpointError, FileNotFoundError):
            if named and path is paths[-1]:
                raise
        except OSError as error:
            raise cannot_read(path, error) from error
    return None


def read_saved(path: Path) -> SavedRun:
    """Return the run of the checkpoint at `path`.

    Raises `CheckpointError` where it is damaged or holds no run of this trainer.
    """
    with container.Reader(path) as reader:
        names = ("config", "model_config", "tokenizer", "data", "progress")
        try:
            values = {name: codec.read(reader, only=name) for name in names}
        except CheckpointError as error:
            message = _(
                "{path} holds no run of this trainer. Use --checkpoint to start from its weights.",
                path=path,
            )
            raise CheckpointError(message) from error
        tensors = [t for t in reader.manifest["tensors"] if str(t["path"]).startswith("model/")]
        check_configuration(values["model_config"], [t["shape"] for t in tensors], path)
        identity = reader.manifest["identity"]
        return SavedRun(path, identity["id"], identity["step"], **values)


def merged(config: Config, saved: SavedRun, *, start: Start) -> Config:
    """Return `config` with the run's own values for what the user has not said this time.

    With `--checkpoint FILE`, `epochs` and `num_steps` count from that file, whether it belongs to
    this run or begins a new one.
    """
    values = {n: getattr(getattr(config, o.section), n) for n, o in OPTIONS.items()}
    sources = dict(config.sources)
    old = from_mapping(_known(saved.config))
    said = {name for name, source in sources.items() if source != "default"}
    length = {"epochs", "num_steps"}
    counted = config.checkpoint.checkpoint is not None and start.saved is not None
    if counted and not start.named:
        said -= length  # `holdfast run` starts it again: counted from there at the first start
    for name, option in OPTIONS.items():
        if name in said or option.meta.of_this_start or name == "checkpoint_dir":
            continue
        if name in length and said & length:
            continue  # how long to train is one decision: steps and epochs exclude each other
        values[name] = getattr(getattr(old, option.section), name)
        sources[name] = "run"
    if counted:
        done = saved.progress
        if "epochs" in said and values["epochs"] is not None:
            values["epochs"] += done["epoch"] - (0 if done["position"] else 1)
        if "num_steps" in said and values["num_steps"] is not None:
            values["num_steps"] += saved.step
    return Config.from_values(values, sources)


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a saved configuration that this version still has."""
    return {
        section: {name: value for name, value in values.items() if name in OPTIONS}
        for section, values in config.items()
    }


# ------------------------------------------------------------------------------- does it fit?

# What a change of an option means for a run that goes on.
_FREE = {
    "learning_rate": N_("takes effect from the next step on"),
    "batch_size": N_("the position in the epoch is kept in samples"),
    "gradient_accumulation": N_("the position in the epoch is kept in samples"),
    "epochs": N_("the learning-rate schedule is stretched to the new end"),
    "num_steps": N_("the learning-rate schedule is stretched to the new end"),
    "schedule": N_("takes effect from the next step on"),
    "warmup_ratio": N_("takes effect from the next step on"),
    "weight_decay": N_("takes effect from the next step on"),
    "grad_clip": N_("takes effect from the next step on"),
    "dropout": N_("takes effect from the next step on"),
    "precision": N_("results differ from here on in their last bits"),
    "threads": N_("results differ from here on in their last bits"),
    "compile": N_("results differ from here on in their last bits"),
    "seed": N_("another order of the data: this epoch begins anew"),
    "val_fraction": N_("another split: validation losses cannot be compared with earlier ones"),
    "data_file": N_("checked by its content, not by its name"),
}
_FIXED = {"model", "context_length", "vocab_size"}


def differences(saved: SavedRun, config: Config) -> list[list[str]]:
    """Return rows (option, saved, now, what it means) of everything that is different now.

    Raises `StateMismatch` with the words of the difference where it makes going on impossible.
    """
    refused = fixed_differences(saved, config)
    if refused:
        message = _(
            "This run cannot go on with another model: {refused}. Leave these options out to "
            "go on; for a new run add --checkpoint-dir DIR, or --fresh, which moves this one "
            "to archive/.",
            refused="; ".join(refused),
        )
        raise StateMismatch(message)
    return [
        [name, format_value(before), format_value(now), _(_FREE[name])]
        for name, before, now in _changed(saved, config)
        if name in _FREE
    ]


def fixed_differences(saved: SavedRun, config: Config) -> list[str]:
    """Return, in words, what of the model is to be another now, and which option says so."""
    return [
        _(
            "{option} was {before} and is now {now}",
            option=_origin(name, config),
            before=format_value(before),
            now=format_value(now),
        )
        for name, before, now in _changed(saved, config)
        if name in _FIXED
    ]


def _changed(saved: SavedRun, config: Config) -> Iterator[tuple[str, object, object]]:
    """Yield name, saved value and present value of each option that differs."""
    old = from_mapping(_known(saved.config))
    for name, option in OPTIONS.items():
        before = getattr(getattr(old, option.section), name)
        now = getattr(getattr(config, option.section), name)
        if before != now:
            yield name, before, now


def _origin(name: str, config: Config) -> str:
    """Return the option that the user typed to get this value of `name`."""
    source, option = config.sources[name], flag_of(name)
    if source in ("preset", "file"):
        by = "--preset" if source == "preset" else "--config"
        return _("{option} (set by {by})", option=name, by=by)
    return option


def check_model(saved: SavedRun, model_config: Mapping[str, Any]) -> None:
    """Refuse a model of other shape, with the words of the difference. Raises StateMismatch."""
    may_differ = ("dropout", "pdrop", "use_cache")
    other = [
        f"{key}: {saved.model_config.get(key)} → {model_config.get(key)}"
        for key in sorted(saved.model_config.keys() | model_config.keys())
        if saved.model_config.get(key) != model_config.get(key)
        and not any(word in key for word in may_differ)
    ]
    if other:
        message = _(
            "{path} is of another model ({differences}). Nothing was changed.",
            path=saved.path,
            differences="; ".join(other),
        )
        raise StateMismatch(message)
