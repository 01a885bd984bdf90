"""`holdfast compare`: two or more checkpoints side by side, from their manifests alone.

Identity, metrics and which is better, and where configuration and environment differ. The form of
`--json` is `Comparison.to_json`. No torch in this room.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint.format import Reader, plain_state
from holdfast.checkpoint.rundir import Entry, summary
from holdfast.errors import HoldfastError
from holdfast.formatting import NOTHING, format_bytes, format_loss, format_time
from holdfast.i18n import _
from holdfast.manage.output import flatten
from holdfast.manage.rundir import kind_in_words, look, number
from holdfast.table import Column, Screen, printable, render

_LOWER = ("loss", "perplexity", "bits_per_byte", "error")  # how names end whose low value is good
_HIGHER = ("accuracy", "bleu", "f1")
_CONFIGS = ("config", "model_config")  # the payload keys that hold a configuration


@dataclass(frozen=True, slots=True)
class Subject:
    """One of the checkpoints that are compared."""

    label: str  # "A", "B", ...
    path: Path
    chosen: str  # "file"; "best" or "newest" of the directory that was named
    entry: Entry
    metrics: dict[str, float]
    score: tuple[str, bool] | None  # the metric that decides in its run, whether lower is better
    config: dict[str, Any]  # flat
    environment: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of all subjects by their labels; `better` is None where nothing can be said."""

    name: str
    values: dict[str, float]
    better: str | None

    def difference(self, label: str, to: str) -> float | None:
        """The value of `label` minus that of `to`."""
        if label not in self.values or to not in self.values:
            return None
        return self.values[label] - self.values[to]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Subjects and what differs: `config` and `environment` hold the differing keys only."""

    subjects: list[Subject]
    metrics: list[Metric]
    config: dict[str, dict[str, Any]]  # key → label → value; a label without the key is left out
    environment: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """The documented form."""
        first = self.subjects[0].label
        return {
            "checkpoints": [
                {
                    "label": s.label,
                    "path": str(s.path),
                    "chosen": s.chosen,
                    **{name: getattr(s.entry, name) for name in _IDENTITY},
                }
                for s in self.subjects
            ],
            "metrics": {
                m.name: {
                    "values": m.values,
                    "differences": {
                        label: m.difference(label, first)
                        for label in m.values
                        if label != first and first in m.values
                    },
                    "better": m.better,
                }
                for m in self.metrics
            },
            "config": self.config,
            "environment": self.environment,
        }

    def lines(self, screen: Screen) -> list[str]:
        """Write the comparison for a person."""
        lines = [printable(_subject_line(subject)) for subject in self.subjects]
        lines += ["", *self._identity(screen)]
        lines += ["", screen.bold(_("Metrics")), *self._metrics(screen)]
        known = any(subject.config for subject in self.subjects)
        same = _("no differences") if known else _("none was recorded")
        for title, differences, nothing in (
            (_("Configuration"), self.config, same),
            (_("Environment"), self.environment, _("no differences")),
        ):
            lines += ["", screen.bold(title)]
            lines += self._differences(differences, screen) if differences else [nothing]
        return lines

    def _identity(self, screen: Screen) -> list[str]:
        titles = [
            _("run"),
            _("generation"),
            _("epoch"),
            _("step"),
            _("kind"),
            _("size"),
            _("saved at"),
        ]
        columns = [
            [
                entry.run_id[:8],
                str(entry.generation),
                NOTHING if entry.epoch is None else str(entry.epoch),
                str(entry.step),
                kind_in_words(entry.kind),
                format_bytes(entry.size),
                format_time(entry.created),
            ]
            for entry in (subject.entry for subject in self.subjects)
        ]
        rows = [[title, *cells] for title, *cells in zip(titles, *columns, strict=True)]
        return render([Column(""), *self._labels()], rows, screen)

    def _metrics(self, screen: Screen) -> list[str]:
        if not self.metrics:
            return [_("none was recorded")]
        first, *others = (subject.label for subject in self.subjects)
        rows = []
        for metric in self.metrics:
            cells = [format_loss(metric.values.get(first))]
            for label in others:
                difference = metric.difference(label, first)
                tail = "" if difference is None else f" ({_signed(difference)})"
                cells.append(format_loss(metric.values.get(label)) + tail)
            rows.append([metric.name, *cells, metric.better or NOTHING])
        columns = [Column(_("metric")), *self._labels(right=True), Column(_("better"))]
        return render(columns, rows, screen)

    def _differences(self, found: Mapping[str, Mapping[str, Any]], screen: Screen) -> list[str]:
        labels = [subject.label for subject in self.subjects]
        rows = [
            [key, *(str(values[x]) if x in values else NOTHING for x in labels)]
            for key, values in found.items()
        ]
        return render([Column(""), *self._labels()], rows, screen)

    def _labels(self, *, right: bool = False) -> list[Column]:
        return [Column(subject.label, right=right) for subject in self.subjects]


_IDENTITY = (
    "id",
    "run_id",
    "generation",
    "step",
    "epoch",
    "kind",
    "reason",
    "created",
    "size",
    "parent",
)


def compare(sources: Sequence[str]) -> Comparison:
    """Compare checkpoint files and run directories (each stands for its best checkpoint).

    Raises HoldfastError where one is missing or empty, DamagedCheckpoint, ForeignCheckpoint.
    """
    subjects = [_subject(_label(i), Path(source)) for i, source in enumerate(sources)]
    names = dict.fromkeys(name for subject in subjects for name in subject.metrics)
    return Comparison(
        subjects,
        [_metric(name, subjects) for name in names],
        _differing({subject.label: subject.config for subject in subjects}),
        _differing({subject.label: subject.environment for subject in subjects}),
    )


def _subject(label: str, source: Path) -> Subject:
    path, chosen = source, "file"
    if source.is_dir():
        run = look(source)
        entry = run.contents.best or run.contents.newest
        if entry is None:
            raise HoldfastError("There are no checkpoints in {directory}.", directory=source)
        path, chosen = run.catalog.path(entry), "best" if run.contents.best else "newest"
    if not path.is_file():  # a pipe would be waited for
        raise HoldfastError("There is no checkpoint at {path}.", path=path)
    with Reader(path) as reader:
        manifest, size = reader.manifest, reader.size
    entry = summary(manifest, size)
    metrics = {k: v for k, v in ((k, number(v)) for k, v in entry.metrics.items()) if v is not None}
    if "val_loss" in metrics and "perplexity" not in metrics:
        loss = metrics["val_loss"]
        metrics["perplexity"] = math.inf if loss >= 700 else math.exp(loss)  # NaN stays NaN
    score = manifest.get("score") or {}
    return Subject(
        label,
        path,
        chosen,
        entry,
        metrics,
        (score["name"], score["lower_is_better"]) if entry.loss is not None else None,
        _configuration(manifest, path),
        flatten(manifest.get("environment") or {}),
    )


def _configuration(manifest: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the trainer's options; for another loop, those of its optimizers."""
    state = plain_state(manifest, path)
    flat: dict[str, Any] = {}
    for key in _CONFIGS:
        if isinstance(state.get(key), Mapping):
            flat |= flatten(state[key], "" if key == "config" else key)
    return flat or flatten(manifest.get("configured") or {})


def _metric(name: str, subjects: Sequence[Subject]) -> Metric:
    values = {s.label: s.metrics[name] for s in subjects if name in s.metrics}
    known = {label: value for label, value in values.items() if not math.isnan(value)}
    lower = _lower_is_better(name, subjects)
    better = None
    if lower is not None and len(known) > 1 and len(set(known.values())) > 1:
        better = (min if lower else max)(known, key=lambda label: known[label])
    return Metric(name, values, better)


def _lower_is_better(name: str, subjects: Sequence[Subject]) -> bool | None:
    """Return what the runs say, else what the name says; None where nothing does."""
    said = {s.score[1] for s in subjects if s.score is not None and s.score[0] == name}
    if len(said) == 1:
        return said.pop()
    if name.endswith(_LOWER):
        return True
    return False if name.endswith(_HIGHER) else None


def _differing(flat: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The keys whose values are not the same for all labels, in the order of their first sight."""
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    found = {}
    for key in keys:
        values = {label: flat[label][key] for label in flat if key in flat[label]}
        shown = {repr(value) for value in values.values()}  # 1 and True are not the same setting
        if len(shown) > 1 or len(values) < len(flat):
            found[key] = values
    return found


def _subject_line(subject: Subject) -> str:
    directory = subject.path.parent
    if subject.chosen == "best":
        return _(
            "{label}  {path} (the best of {directory})",
            label=subject.label,
            path=subject.path,
            directory=directory,
        )
    if subject.chosen == "newest":
        return _(
            "{label}  {path} (the newest of {directory}, where none has a score)",
            label=subject.label,
            path=subject.path,
            directory=directory,
        )
    return f"{subject.label}  {subject.path}"


def _label(index: int) -> str:
    return string.ascii_uppercase[index] if index < 26 else str(index + 1)


def _signed(value: float) -> str:
    if value == 0:
        return _("same")
    return f"{'+' if value > 0 else ''}{format_loss(value)}"
