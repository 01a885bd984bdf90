"""The four presets, and the resolution of a command line into one checked configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError
from holdfast.i18n import N_, _
from holdfast.table import Column, Screen, render
from holdfast.training.options.config import Config
from holdfast.training.options.config_files import (
    Layer,
    layer_of_flags,
    layer_of_mapping,
    merge,
    read_config_file,
)
from holdfast.training.options.fields import did_you_mean, format_value, nearest

PRESET_DIR = Path(__file__).parents[2] / "presets"

PRESETS: dict[str, str] = {
    "quick": N_("prove that everything works, about a minute on a CPU"),
    "standard": N_("daily use"),
    "extended": N_("long training"),
    "precision": N_("the best quality"),
}
"""Purpose of each preset; its values stand in `training_<name>.json`, an ordinary config file."""


def preset_file(name: str) -> Path:
    """Return the file of the preset `name`. Raise ConfigError if there is no such preset."""
    if name not in PRESETS:
        message = _(
            "--preset {name}: expected one of {choices}{hint}",
            name=name or "''",
            choices=", ".join(PRESETS),
            hint=did_you_mean(nearest(name, PRESETS)),
        )
        raise ConfigError(message)
    return PRESET_DIR / f"training_{name}.json"


def load_preset(name: str) -> dict[str, Any]:
    """Return the values of the preset `name` as its file has them."""
    return read_config_file(preset_file(name))


def resolve(
    preset: str | None = None,
    file: Path | None = None,
    flags: Mapping[str, object] | None = None,
    *,
    problems: Sequence[str] = (),
) -> Config:
    """The configuration of a run: flag > config file > preset > default.

    `flags` maps option names (or aliases) to typed values or to texts as typed on a command line;
    `problems` are those that the command line itself had. Raises ConfigError with all problems of
    all sources, a line each.
    """
    found = list(problems)
    layers = [layer_of_flags(flags or {}, found)]
    if file is not None:
        layers.append(_file_layer("file", file, f"{file}: ", found))
    if preset is not None:
        try:
            path = preset_file(preset)
        except ConfigError as error:
            found.append(str(error))
        else:
            layers.append(_file_layer("preset", path, f"{path.name}: ", found))
    return merge(layers, found)


def _file_layer(source: str, path: Path, where: str, problems: list[str]) -> Layer:
    try:
        data = read_config_file(path)
    except ConfigError as error:
        problems.append(str(error))
        data = {}
    return layer_of_mapping(source, data, where, problems)


def presets_table(screen: Screen) -> list[str]:
    """Return the lines of a table of the presets, in the user's language."""
    titles = [
        _("preset"),
        _("batch"),
        _("epochs"),
        _("learning rate"),
        _("default model"),
        _("for"),
    ]
    rows = []
    for name, purpose in PRESETS.items():
        config = resolve(preset=name)
        training = config.training
        figures = (training.batch_size, training.epochs, training.learning_rate)
        rows.append((name, *map(format_value, figures), config.model.model, _(purpose)))
    return render([Column(title) for title in titles], rows, screen)


def presets_json() -> list[dict[str, Any]]:
    """Return the presets for scripts: name, purpose, and the options that each sets."""
    return [
        {"name": name, "purpose": _(purpose), "configuration": load_preset(name)}
        for name, purpose in PRESETS.items()
    ]
