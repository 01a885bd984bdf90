"""`holdfast show`: one checkpoint in full, what it says of itself and what can be done with it.

The form of `--json` is `Shown.to_json`. Reads the manifest and the headers, not the tensors, and
never unpickles. No torch in this room.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.checkpoint.format import NewerFormat, Reader, plain_state
from holdfast.checkpoint.rundir import QUARANTINE, Entry, summary
from holdfast.errors import CheckpointError, DamagedCheckpoint, ForeignCheckpoint
from holdfast.i18n import _
from holdfast.manage.choosing import directory_of
from holdfast.manage.listing import record_of
from holdfast.manage.output import flatten
from holdfast.manage.rundir import RunDirectory, look
from holdfast.manage.showing import zip_look
from holdfast.manage.showing.layers import (
    MODEL,
    OTHER,
    Row,
    Section,
    rows_of,
    sections_of,
)
from holdfast.manage.tensors import Tensor, tensors_of

OURS, DAMAGED, FOREIGN = "ours", "damaged", "foreign"
_TEXT_MODEL = ("model_config", "tokenizer")  # keys of a state that a text can be generated from


@dataclass(frozen=True, slots=True)
class Inside:
    """The content of a checkpoint's manifest."""

    entry: Entry  # under the names that it has in its run directory
    format_version: int
    environment: dict[str, Any]
    score: str | None  # the metric that decides which is best
    config: dict[str, Any]  # nested, as the training was told it
    model_config: dict[str, Any]
    progress: dict[str, Any]
    tensors: list[Tensor]
    sections: list[Section]
    rows: list[Row]  # the layers of the model
    generates: bool  # whether it holds all that generating text takes

    @property
    def model_bytes(self) -> int:
        """Of what `rows` describe."""
        return sum(row.nbytes for row in self.rows)


@dataclass(frozen=True, slots=True)
class Shown:
    """All that is known of one file."""

    path: Path
    size: int
    state: str  # OURS, DAMAGED or FOREIGN
    reason: str | None = None  # what is wrong
    inside: Inside | None = None
    run: RunDirectory | None = None  # the one that it lies in
    form: str = ""  # of a file that is not ours: one of zip_look's
    records: list[zip_look.Record] = field(default_factory=list)  # where there is no manifest
    imports: list[str] = field(default_factory=list)

    @property
    def is_best(self) -> bool:
        return self._is("best")

    @property
    def is_newest(self) -> bool:
        return self._is("newest")

    def _is(self, role: str) -> bool:
        chosen = getattr(self.run.contents, role) if self.run is not None else None
        return chosen is not None and self.inside is not None and chosen.id == self.inside.entry.id

    def to_json(self, *, tensors: bool = False) -> dict[str, Any]:
        """The documented form; every tensor only where `tensors` asks for them."""
        told: dict[str, Any] = {
            "path": str(self.path),
            "size": self.size,
            "state": self.state,
            "reason": self.reason,
            "run": str(self.run.directory) if self.run is not None else None,
        }
        if self.inside is None:
            told |= {
                "form": self.form,
                "records": [r.to_json() for r in self.records],
                "imports": self.imports,
            }
            return told
        found = self.inside
        told |= {
            "checkpoint": record_of(
                found.entry, damaged=self.state == DAMAGED, best=self.is_best, latest=self.is_newest
            ),
            "format_version": found.format_version,
            "score": found.score,
            "config": found.config,
            "model_config": found.model_config,
            "environment": found.environment,
            "progress": found.progress,
            "sections": [section.to_json() for section in found.sections],
            "layers": [row.to_json() for row in found.rows],
        }
        if tensors:
            told["tensors"] = [tensor.to_json() for tensor in found.tensors]
        told["commands"] = [{"purpose": p, "command": c} for p, c in commands_for(self)]
        return told


def show(source: str | os.PathLike[str]) -> Shown:
    """Look into `source`, a checkpoint, or a run directory for its newest one.

    Raises CheckpointError where there is none, OSError as it comes.
    """
    path = Path(source)
    run: RunDirectory | None
    if path.is_dir():
        run = look(path)
        if run.contents.newest is None:
            raise CheckpointError("There are no checkpoints in {directory}.", directory=path)
        path = run.catalog.path(run.contents.newest)
    elif not path.is_file():  # a pipe would be waited for
        raise CheckpointError(
            "There is no checkpoint at {source}; `holdfast list` shows what is there.", source=path
        )
    else:
        place = directory_of(str(path))
        run = look(place) if place is not None else None
    size = path.stat().st_size
    try:
        with Reader(path) as reader:
            inside = _inside(reader.manifest, path, size, run)
            state, reason = _health(reader, inside, run)
    except DamagedCheckpoint as error:
        return Shown(
            path, size, DAMAGED, error.why, run=run, form=OURS, records=zip_look.salvage(path)
        )
    except NewerFormat as error:
        return _foreign(path, size, run, error.why)
    except ForeignCheckpoint as error:
        announced = run is not None and _was_ours(run, path)
        if announced:
            return Shown(
                path, size, DAMAGED, error.why, run=run, form=OURS, records=zip_look.salvage(path)
            )
        return _foreign(path, size, run, error.why)
    return Shown(path, size, state, reason, inside, run)


def _foreign(path: Path, size: int, run: RunDirectory | None, reason: str) -> Shown:
    found = zip_look.look_into(path)
    return Shown(path, size, FOREIGN, reason, None, run, found.form, found.records, found.imports)


def _was_ours(run: RunDirectory, path: Path) -> bool:
    """Return True if the history announced this name: then it has been overwritten."""
    return any(
        (run.directory / name).absolute() == path.absolute()
        for name, _reason in run.contents.damaged
    )


def _health(reader: Reader, inside: Inside, run: RunDirectory | None) -> tuple[str, str | None]:
    """Return the state and what is wrong, if it is known; the payloads are not read."""
    try:
        reader.check_structure()
    except DamagedCheckpoint as error:
        return DAMAGED, error.why
    if run is not None and inside.entry.id in run.distrusted:
        return DAMAGED, _("its last check found damage; `holdfast verify` says what")
    if QUARANTINE in reader.path.absolute().parent.parts:
        return DAMAGED, _("it lies in quarantine/, set aside as damaged")
    return OURS, None


def _inside(manifest: Mapping[str, Any], path: Path, size: int, run: RunDirectory | None) -> Inside:
    entry = summary(manifest, size)
    here = [e for e in run.entries if e.id == entry.id] if run is not None else []
    state = plain_state(manifest, path)
    tensors = tensors_of(manifest, path)
    sections = sections_of(tensors, state)
    models = {section.name for section in sections if section.kind == MODEL}
    models = models or {s.name for s in sections if s.kind == OTHER and s.name != "rng"}
    shown = [tensor for tensor in tensors if tensor.section in models]
    score = manifest.get("score")
    configured = manifest.get("configured")
    config = state.get("config") or configured
    return Inside(
        here[0] if here else entry,
        int(manifest["format_version"]),
        _mapping(manifest.get("environment")),
        str(score["name"]) if isinstance(score, Mapping) and score.get("name") else None,
        _mapping(config),
        _mapping(state.get("model_config")),
        {k: v for k, v in flatten(_mapping(state.get("progress"))).items() if _is_plain(v)},
        tensors,
        sections,
        rows_of(shown),
        all(isinstance(state.get(key), Mapping) for key in _TEXT_MODEL),
    )


def _mapping(value: object) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


# ---------------------------------------------------------------------------- what can be done


def commands_for(shown: Shown) -> list[tuple[str, str]]:
    """Purpose and command, in the order in which a person would want them."""
    file = shlex.quote(str(shown.path))
    directory = shlex.quote(str(shown.run.directory)) if shown.run is not None else ""
    if shown.inside is None:
        if shown.state != DAMAGED or shown.run is None:
            return []
        return [(_("see what is intact beside it"), f"holdfast list {directory}")]
    generates, found = shown.inside.generates, []
    if shown.state == DAMAGED:
        found.append((_("see what is wrong"), f"holdfast verify {file}"))
        if directory:
            found.append((_("see what is intact beside it"), f"holdfast list {directory}"))
        return found
    if directory and shown.is_newest and generates:
        going_on = f"holdfast train --checkpoint-dir {directory} --resume"
        found.append((_("go on training from it"), going_on))
    elif directory and not shown.is_newest:
        found.append((_("go back to it; nothing is removed"), f"holdfast rollback {file}"))
    if not generates:
        path = json.dumps(str(shown.path), ensure_ascii=False)
        code = f"import holdfast; state = holdfast.load({path})"
        loading = f"python -c {shlex.quote(code)}"
        found.append((_("load it in a program of your own"), loading))
    found.append((_("check every byte"), f"holdfast verify {file}"))
    if shown.run is not None and not shown.is_best:
        found.append((_("compare it with the best"), f"holdfast compare {file} {directory}"))
    elif shown.run is not None and not shown.is_newest and shown.run.contents.newest is not None:
        newest = shlex.quote(str(shown.run.catalog.path(shown.run.contents.newest)))
        found.append((_("compare it with the newest"), f"holdfast compare {file} {newest}"))
    if not shown.inside.entry.pinned and directory:
        found.append((_("keep it for good"), f"holdfast pin {file}"))
    if generates:
        prompt = shlex.quote(_prompt(shown.inside))
        found += [
            (_("let it write"), f"holdfast generate {prompt} --checkpoint {file}"),
            (_("serve it"), f"holdfast serve {file}"),
            (_("export it for other tools"), f"holdfast export {file} --to hf"),
        ]
    return found


def _prompt(inside: Inside) -> str:
    """Return the prompt that the training itself had continued; else any word."""
    said = flatten(inside.config).get("training.sample_prompt")
    return said if isinstance(said, str) and said.strip() else "..."
