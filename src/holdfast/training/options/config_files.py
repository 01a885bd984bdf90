"""Reading and writing configurations: config files, and the order in which layers win.

Flag > config file > preset > default. All problems of all layers are reported in one ConfigError.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError
from holdfast.i18n import N_, _
from holdfast.training.options.config import BY_NAME, OPTIONS, SECTIONS, Config, suggest
from holdfast.training.options.fields import Option, did_you_mean, flag_of, nearest, quote_value

DASHES = "-—–−－"
"""Characters before a flag that was copied from a page which beautifies text."""

_MAX_FILE = 1 << 20  # bytes; no config file comes near it, and a data file given by mistake does

# Options that exclude each other, left from right, and the values that ask for nothing. In one
# layer both are a contradiction; over several the stronger layer wins and the weaker one's wish is
# dropped: `--epochs 2` with a config file that counts in steps means epochs.
_NOTHING = (None, False)
_EXCLUSIVE: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[object, ...]], ...] = (
    (("num_steps",), ("epochs",), _NOTHING),
    (("fresh",), ("resume", "checkpoint"), _NOTHING),
    (("resume",), ("checkpoint",), (*_NOTHING, "auto")),
)

# What json's decoder says, for the catalogue; other versions of Python may say more.
_JSON_WORDS = (
    N_("Expecting value"),
    N_("Expecting ',' delimiter"),
    N_("Expecting ':' delimiter"),
    N_("Expecting property name enclosed in double quotes"),
    N_("Illegal trailing comma before end of object"),
    N_("Illegal trailing comma before end of array"),
    N_("Unterminated string starting at"),
    N_("Invalid control character at"),
    N_("Invalid \\escape"),
    N_("Extra data"),
)


# ---------------------------------------------------------------- one layer


@dataclass(slots=True)
class Layer:
    """One source of options: its accepted values, and the name by which the user gave each.

    `where` opens the line of each problem ("run.json: "); `problems` is shared by all layers.
    """

    source: str
    where: str
    problems: list[str]
    values: dict[str, object] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    def accept(self, option: Option, label: str, written: object) -> None:
        """Take the value `written` there, or say what is wrong with it. Flags are parsed."""
        is_flag = self.source == "flag"
        value = option.parse(written) if is_flag and isinstance(written, str) else written
        if option.accepts(value):
            self.values[option.name] = option.normalise(value)
            self.labels[option.name] = self.where + label
            return
        self.problem(
            _(
                "{name} {value}: expected {allowed}{hint}",
                name=label,
                value=quote_value(written, as_json=not is_flag),
                allowed=option.expected("none" if is_flag else "null"),
                hint=option.hint(value),
            )
        )

    def read_key(self, name: str, label: str, value: object) -> None:
        """Take the value of a key of a config file; `label` is the key as it stands there."""
        option = BY_NAME.get(name)
        if option is None:
            self.problem(_unknown_key(name, label))
        elif option.name in self.values:
            first = self.labels[option.name].removeprefix(self.where)
            self.problem(
                _("{first} and {second} say the same; keep one", first=first, second=label)
            )
        else:
            self.accept(option, label, value)

    def problem(self, text: str) -> None:
        """Note a problem with what this source says."""
        self.problems.append(self.where + text)


def layer_of_flags(flags: Mapping[str, object], problems: list[str]) -> Layer:
    """The layer of command line flags: names or aliases, with typed values or texts to parse."""
    layer = Layer("flag", "", problems)
    for name, given in flags.items():
        value = os.fspath(given) if isinstance(given, os.PathLike) else given
        option = BY_NAME.get(name)
        if option is None:
            layer.problem(unknown_flag(flag_of(name)))
        else:
            layer.accept(option, flag_of(name), value)
    return layer


def layer_of_mapping(
    source: str, data: Mapping[str, object], where: str, problems: list[str]
) -> Layer:
    """The layer of a config file, flat, sectioned or mixed."""
    layer = Layer(source, where, problems)
    for key, value in data.items():
        if key not in SECTIONS or not isinstance(value, Mapping):
            layer.read_key(key, key, value)
            continue
        for inner, inner_value in value.items():
            # {"model": {"name": "tiny"}} is what people write in a sectioned file.
            name = "model" if (key, inner) == ("model", "name") else inner
            layer.read_key(name, f"{key}.{inner}", inner_value)
    return layer


def unknown_flag(flag: str, also: Iterable[str] = ()) -> str:
    """The problem "unknown option --x", with the nearest one (`also`: names of further flags)."""
    name = suggest(flag.lstrip(DASHES), also)
    hint = did_you_mean(flag_of(name) if name else None)
    return _("unknown option {flag}{hint}", flag=flag, hint=hint)


def _unknown_key(name: str, label: str) -> str:
    near = suggest(name, SECTIONS)
    hint = did_you_mean(f'"{near}"' if near else None)
    if name == label and name in SECTIONS:
        return _('"{key}" is a section and takes {{"name": value, ...}}{hint}', key=name, hint=hint)
    return _('unknown key "{key}"{hint}', key=label, hint=hint)


# ---------------------------------------------------------------- from layers to a configuration


def merge(layers: Sequence[Layer], problems: list[str]) -> Config:
    """The configuration of `layers`, strongest first, over the defaults.

    Raises ConfigError with `problems` and with what the values say against each other.
    """
    _settle_exclusive(layers, problems)
    values: dict[str, object] = {name: option.default for name, option in OPTIONS.items()}
    sources = dict.fromkeys(OPTIONS, "default")
    labels: dict[str, str] = {}
    for layer in reversed(layers):
        if layer.values.get("epochs", 0) is None:
            del layer.values["epochs"]  # a saved run by steps: null says nothing against a default
        values.update(layer.values)
        sources.update(dict.fromkeys(layer.values, layer.source))
        labels.update(layer.labels)
    if values["num_steps"] is not None:
        values["epochs"], sources["epochs"] = None, sources["num_steps"]
    if values["val_fraction"] == 0:
        problems += [
            _("{name} needs an evaluation: val_fraction must be more than 0", name=labels[name])
            for name in ("patience", "eval_every")
            if values[name] is not None
        ]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return Config.from_values(values, sources)


def _settle_exclusive(layers: Sequence[Layer], problems: list[str]) -> None:
    for left, right, nothing in _EXCLUSIVE:
        for position, layer in enumerate(layers):
            given = [
                [name for name in side if layer.values.get(name) not in nothing]
                for side in (left, right)
            ]
            if all(given):
                first, second = (layer.labels[side[0]] for side in given)
                problems.append(
                    _(
                        "{first} and {second} exclude each other; give only one of them",
                        first=first,
                        second=second,
                    )
                )
            if any(given):
                for weaker in layers[position + 1 :]:
                    for name in right if given[0] else left:
                        weaker.values.pop(name, None)
                break


def from_mapping(data: Mapping[str, object]) -> Config:
    """Return `data`, flat or sectioned, over the defaults. Raise ConfigError with all problems."""
    problems: list[str] = []
    return merge([layer_of_mapping("file", data, "", problems)], problems)


# ---------------------------------------------------------------- files


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raise ConfigError with line and column otherwise."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(_unreadable(path, error)) from error
    if len(raw) > _MAX_FILE:
        raise ConfigError("{file} is too large to be a config file; is it data?", file=path)
    try:
        data = json.loads(
            raw.decode("utf-8-sig"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except json.JSONDecodeError as error:
        message = _(
            "{file}, line {line}, column {column}: this is not JSON: {reason}",
            file=path,
            line=error.lineno,
            column=error.colno,
            reason=_(error.msg),
        )
        raise ConfigError(message) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            "{file} is not UTF-8 text; save it as UTF-8 or name another file", file=path
        ) from error
    except _NotPlain as error:
        raise ConfigError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise ConfigError("{file}: no config file looks like this", file=path) from error
    if not isinstance(data, dict):
        raise ConfigError(
            '{file}: expected an object such as {{"epochs": 3}}, not a bare value', file=path
        )
    return data


class _NotPlain(ValueError):
    """JSON that Python reads and that still means nothing here."""


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _value in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _NotPlain(_('"{key}" stands there twice; keep one', key=twice))
    return data


def _no_constant(word: str) -> object:
    raise _NotPlain(_("{word} is not a number that can be used", word=word))


def _unreadable(path: Path, error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        siblings: list[str] = []
        with contextlib.suppress(OSError):
            siblings = [entry.name for entry in path.parent.iterdir()]
        near = nearest(path.name, siblings)
        hint = did_you_mean(str(path.with_name(near)) if near else None)
        return _("there is no config file {file}{hint}", file=path, hint=hint)
    if isinstance(error, IsADirectoryError):
        return _("{file} is a folder, not a config file", file=path)
    if isinstance(error, PermissionError):
        return _("{file} may not be read by this user; change its permissions", file=path)
    reason = getattr(error, "strerror", None) or error
    return _("{file} cannot be read: {reason}", file=path, reason=reason)


def save_config(config: Config, path: Path) -> None:
    """Write `config` to `path` as JSON by section, atomically; parent folders are made.

    What belongs to one start only (resume, checkpoint, fresh) is left out: a recipe that says
    "fresh" would archive its own run at every restart. Raises ConfigError when it cannot be done.
    """
    data = {
        section: {n: v for n, v in values.items() if not OPTIONS[n].meta.of_this_start}
        for section, values in config.to_dict().items()
    }
    target = Path(os.path.realpath(path))  # a link stays a link
    temp = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temp.open("wb") as file:
                file.write(_to_json(data))
                file.flush()
                os.fsync(file.fileno())
            temp.replace(target)
        finally:
            temp.unlink(missing_ok=True)
    except OSError as error:
        message = _(
            "the configuration cannot be written to {file}: {reason}; name another place",
            file=path,
            reason=error.strerror or error,
        )
        raise ConfigError(message) from error


def _to_json(data: object) -> bytes:
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    with contextlib.suppress(UnicodeEncodeError):
        return text.encode()
    # A file name that is not UTF-8 reached us as lone surrogates; escapes carry them.
    return (json.dumps(data, indent=2) + "\n").encode()
