"""Read one value of the state that a resume would go on from. Nothing is changed or locked."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from holdfast.checkpoint import calls
from holdfast.checkpoint.format import Reader
from holdfast.checkpoint.policy import Order
from holdfast.checkpoint.rundir import (
    Catalog,
    Contents,
    cannot_read,
    recovery,
    rollback,
    shared_memory,
    summary,
)
from holdfast.checkpoint.state import codec
from holdfast.errors import ConfigError, DamagedCheckpoint, ForeignCheckpoint

log = logging.getLogger("holdfast")

_SHOWN = 20  # keys in an error


def peek(directory: str | os.PathLike[str], name: str) -> Any:
    """Return the value called `name` from the checkpoint that `resume()` would take in `directory`.

        config = holdfast.peek("runs/a", "config") or Config()
        model = Model(config)                       # now there is something to resume into

    Every byte of that checkpoint is verified first. A damaged one is passed over for the one before
    it, and a newer snapshot that a killed process has left in memory counts. Nothing is changed,
    and no lock is needed: of a training that runs, it is the newest state on the disk.

    Args:
        directory: a run directory.
        name: a key of the state, or a path of keys with dots: "config.n_layer", "history.0".

    Returns None where nothing has been saved yet.

    Raises:
        ConfigError: there is no such key; the message has those that there are.
        DamagedCheckpoint: every checkpoint here is damaged.
        CheckpointError: one that may be the newest cannot be read now.
    """
    place = calls.checked_directory(directory)
    if not isinstance(name, str) or not name:
        raise ConfigError(
            "peek needs the name of a value, such as {example}; this is {value}.",
            example='"config"',
            value=repr(name),
        )
    if place.is_file():
        raise ConfigError(
            "{path} is a file; {call} reads it.", path=place, call="holdfast.load(path, only=name)"
        )
    catalog = Catalog(place)
    contents = catalog.scan()
    damaged = dict(contents.damaged)
    for paths in _newest_first(catalog, contents):
        unread: Exception | None = None
        for path in paths:
            try:
                with Reader(path) as reader:
                    reader.verify()
                    entry = summary(reader.manifest, reader.size)
                    recovery.refuse_older(place, contents, entry)
                    _tell(place, damaged)
                    return _value(reader, name)
            except FileNotFoundError:
                continue
            except (DamagedCheckpoint, ForeignCheckpoint) as error:
                damaged[os.path.relpath(path, place)] = error.why
            except OSError as error:  # says nothing about the file
                unread = unread or cannot_read(path, error)
        if unread is not None:
            raise unread
    recovery.refuse_older(place, contents, None)
    if damaged:
        raise DamagedCheckpoint(
            "Every checkpoint in {directory} is damaged ({names}).",
            directory=place,
            names=", ".join(sorted(damaged)),
        )
    recovery.refuse_to_start_over(catalog, ())
    return None


def _newest_first(catalog: Catalog, contents: Contents) -> Iterator[list[Path]]:
    """Yield the files of each checkpoint here and of each snapshot that was left in memory."""
    found: list[tuple[Order, bool, list[Path]]] = [
        (entry.order, True, [catalog.directory / name for name in entry.names])
        for entry in rollback.foreseen(catalog, contents)
    ]
    run = contents.known.run
    for left in shared_memory.left_by(catalog.directory, *run) if run is not None else ():
        found.append((left.order, False, [left.path]))
    for _order, _on_disk, paths in sorted(found, reverse=True):
        yield paths


def _tell(place: Path, damaged: Mapping[str, str]) -> None:
    for name, why in damaged.items():
        log.warning("%s: %s: %s", place, name, why)


# ------------------------------------------------------------------------------- one value in it


def _value(reader: Reader, name: str) -> Any:
    keys = codec.keys(reader)
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        key = ".".join(parts[:count])
        if key in keys:
            value, rest = _descend(codec.read(reader, only=key, arrays=True), parts[count:])
            if not rest:
                return value
            inside = list(_keys_of(value))
            where = name.removesuffix("." + ".".join(rest))
            if not inside:
                raise ConfigError(
                    "{path} has no {name}: {where} has nothing inside ({kind}).",
                    path=reader.path,
                    name=name,
                    where=where,
                    kind=type(value).__name__,
                )
            raise ConfigError(
                "{path} has no {name}. In {where} there are: {keys}.",
                path=reader.path,
                name=name,
                where=where,
                keys=_some(inside),
            )
    raise ConfigError(
        "{path} has no {name}. There are: {keys}.", path=reader.path, name=name, keys=_some(keys)
    )


def _descend(value: Any, parts: list[str]) -> tuple[Any, list[str]]:
    """Go along `parts`, where keys may have dots of their own, as far as they lead. Return what
    stands there and the parts that are left."""
    best = value, parts
    keys = _keys_of(value) if parts else {}
    for count in range(len(parts), 0, -1):
        key = ".".join(parts[:count])
        if key in keys:
            found = _descend(value[keys[key]], parts[count:])
            if len(found[1]) < len(best[1]):
                best = found
    return best


def _keys_of(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {str(key): key for key in value}
    return {str(i): i for i in range(len(value))} if isinstance(value, list | tuple) else {}


def _some(keys: list[str]) -> str:
    more = f" … (+{len(keys) - _SHOWN})" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more
