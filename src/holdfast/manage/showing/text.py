"""Write the findings of `holdfast show` as lines: facts, tables, commands to copy."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len

from holdfast.formatting import (
    NOTHING,
    format_age,
    format_bytes,
    format_loss,
    format_time,
    parse_time,
)
from holdfast.i18n import N_, _
from holdfast.manage.output import flatten
from holdfast.manage.rundir import kind_in_words, number
from holdfast.manage.showing import zip_look
from holdfast.manage.showing.layers import MODEL, OPTIMIZER, OTHER
from holdfast.manage.showing.show import DAMAGED, FOREIGN, Inside, Shown, commands_for
from holdfast.manage.story import ENDS
from holdfast.manage.tensors import Tensor
from holdfast.table import PIPE, Column, Screen, printable, render, wrapped

_RECORDS = 12  # of a file that is not ours, the largest first
_LONG = 60  # characters of a value; a longer one is cut on a terminal
_MODEL_FACTS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "n_embd",
    "n_layer",
    "n_head",
    "n_positions",
    "tie_word_embeddings",
)
_KINDS = {MODEL: N_("model"), OPTIMIZER: N_("optimizer"), OTHER: N_("other")}
_REASONS = {
    "scheduled": N_("on schedule"),
    "save_every": N_("by --save-every"),
    "best": N_("the best so far"),
    "end": N_("the end of the training"),
    "unsafe": N_("too long nothing had been saved"),
}
_FORMS = {
    zip_look.TORCH: N_("a file of torch.save"),
    zip_look.ZIP: N_("a ZIP archive, not one of torch.save"),
    zip_look.PICKLE: N_("a pickle, or a file of torch.save from before PyTorch 1.6"),
    zip_look.EMPTY: N_("an empty file"),
    zip_look.UNKNOWN: N_("no ZIP archive and no pickle"),
}


def lines(shown: Shown, screen: Screen, *, tensors: bool = False) -> list[str]:
    """The whole text; every tensor instead of the layers where `tensors` asks for it."""
    blocks = [[screen.bold(printable(str(shown.path)))]]
    if shown.inside is None:
        blocks[0] += _without_manifest(shown, screen)
        blocks += [_records(shown, screen)] if shown.records else []
    else:
        blocks[0] += _facts(shown, shown.inside, screen)
        blocks += _values(shown.inside, screen)
        if tensors:
            blocks.append(_every_tensor(shown.inside, screen))
        else:
            blocks.append(_layers(shown.inside, screen))
        blocks.append(_sections(shown, shown.inside, screen))
    todo = commands_for(shown)
    if todo:
        blocks.append([screen.bold(_("What can be done with it")), *_pairs(todo)])
    return [line for i, block in enumerate(blocks) for line in ([""] if i else []) + block]


# ------------------------------------------------------------------------------------------ facts


def _facts(shown: Shown, inside: Inside, screen: Screen) -> list[str]:
    entry = inside.entry
    created = parse_time(entry.created)
    age = NOTHING
    if created is not None:
        now = datetime.datetime.now().astimezone()
        age = format_age((now - created).total_seconds())
    where = _("step {step}", step=entry.step)
    if entry.epoch is not None:
        where = _("epoch {epoch}, step {step}", epoch=entry.epoch, step=entry.step)
    parent = entry.parent or {}
    before = _("none: the run began here")
    if parent:
        before = _(
            "step {step} of generation {generation} ({id})",
            step=parent.get("step"),
            generation=parent.get("generation"),
            id=parent.get("id"),
        )
    facts = [
        (_("state"), _health(shown, inside)),
        (_("where"), where),
        (
            _("saved"),
            f"{format_time(entry.created)} "
            + _("({age} ago)", age=age)
            + f" · {_reason(entry.kind, entry.reason)}",
        ),
        (_("names"), ", ".join(entry.names) or shown.path.name),
        (_("marks"), _marks(shown, inside)),
        (_("size"), _size(shown.size)),
        (
            _("run"),
            _("{run}, generation {generation}", run=entry.run_id, generation=entry.generation),
        ),
        (_("id"), entry.id),
        (_("parent"), before),
        (
            _("format"),
            _(
                "version {version}, every byte under xxh3-128 and CRC-32",
                version=inside.format_version,
            ),
        ),
    ]
    return _pairs(facts, screen)


def _reason(kind: str, reason: str) -> str:
    """Kind and reason in words; the reason only where it says more."""
    words = kind_in_words(kind)
    if reason in ENDS:
        return words + _(ENDS[reason])
    if reason in (kind, ""):
        return words
    return f"{words} ({_(_REASONS[reason]) if reason in _REASONS else reason})"


def _health(shown: Shown, inside: Inside) -> str:
    if shown.state == DAMAGED:
        return _("DAMAGED: {reason}", reason=shown.reason)
    if inside.entry.verified:
        return _("verified: read back from the disk and intact")
    return _("whole as far as its headers tell; its contents were never read back here")


def _marks(shown: Shown, inside: Inside) -> str:
    marks = [
        (shown.is_best, _("⭐ best")),
        (shown.is_newest, _("📌 latest")),
        (inside.entry.pinned, _("🔒 pinned")),
    ]
    return " ".join(text for there, text in marks if there) or NOTHING


def _values(inside: Inside, screen: Screen) -> Iterator[list[str]]:
    """Metrics, configuration and environment, as far as there are any."""
    metrics = {name: format_loss(number(v)) for name, v in inside.entry.metrics.items()}
    if inside.score in metrics:
        metrics[str(inside.score)] += " " + _("(decides which is best)")
    model = {
        name: inside.model_config[name] for name in _MODEL_FACTS if name in inside.model_config
    }
    sections: list[tuple[str, Mapping[str, Any]]] = [
        (_("Metrics"), metrics),
        (_("Model"), model),
        (_("Configuration"), flatten(inside.config)),
        (_("Environment"), flatten(inside.environment)),
    ]
    for title, values in sections:
        known = [
            f"{key}={_short(value, screen)}" for key, value in values.items() if value is not None
        ]
        if known:
            yield [screen.bold(title), *_flow(known, screen)]


def _short(value: Any, screen: Screen) -> str:
    text = printable(str(value))
    return text[: _LONG - 1] + "…" if screen.terminal and len(text) > _LONG else text


def _flow(items: Iterable[str], screen: Screen) -> list[str]:
    """Items in lines that fit a terminal; each on a line of its own in a pipe."""
    if not screen.width:
        return [f"  {item}" for item in items]
    found: list[str] = []
    for item in items:
        if found and cell_len(found[-1]) + 3 + cell_len(item) < screen.width:
            found[-1] += f"   {item}"
        else:
            found.append(f"  {item}")
    return found


def _pairs(pairs: Sequence[tuple[str, str]], screen: Screen = PIPE) -> list[str]:
    """Names and what they are, the second in one column, wrapped there on a `screen`."""
    width = max(cell_len(name) for name, _value in pairs)
    found: list[str] = []
    for name, value in pairs:
        head = f"  {name}{' ' * (width - cell_len(name))}  "
        found += wrapped(printable(value), screen, head)
    return found


# ----------------------------------------------------------------------------------------- tables


def _layers(inside: Inside, screen: Screen) -> list[str]:
    columns = [
        Column(_("layer")),
        Column(_("tensors"), right=True, hide=3),
        Column(_("shape"), hide=2),
        Column(_("dtype"), hide=4),
        Column(_("parameters"), right=True),
        Column(_("size"), right=True, hide=1),
        Column(_("share"), right=True, hide=5),
    ]
    whole = inside.model_bytes or 1
    rows = [
        [
            row.name,
            str(row.tensors),
            _shape(next(iter(row.shapes))) if len(row.shapes) == 1 else _("several"),
            ", ".join(sorted(row.dtypes)),
            _count(row.numel),
            format_bytes(row.nbytes) if row.numel else _("shared"),
            f"{row.nbytes / whole:.1%}",
        ]
        for row in inside.rows
    ]
    count, tensors = sum(r.numel for r in inside.rows), sum(r.tensors for r in inside.rows)
    total = _("Parameters: {count} in {tensors} tensors", count=_count(count), tensors=tensors)
    return [screen.bold(total), *(render(columns, rows, screen) if rows else [])]


def _every_tensor(inside: Inside, screen: Screen) -> list[str]:
    columns = [
        Column(_("tensor")),
        Column(_("shape")),
        Column(_("dtype")),
        Column(_("elements"), right=True, hide=2),
        Column(_("size"), right=True, hide=1),
    ]

    def row(tensor: Tensor) -> list[str]:
        size = format_bytes(tensor.nbytes)
        if tensor.same_as is not None:
            size = f"= {tensor.same_as}"
        return [
            f"{tensor.section}/{tensor.name}",
            _shape(tensor.shape),
            tensor.dtype,
            _count(tensor.numel),
            size,
        ]

    title = _("Tensors: {count}", count=len(inside.tensors))
    rows = [row(tensor) for tensor in inside.tensors]
    return [screen.bold(title), *(render(columns, rows, screen) if rows else [])]


def _sections(shown: Shown, inside: Inside, screen: Screen) -> list[str]:
    columns = [
        Column(_("section")),
        Column(_("kind"), hide=3),
        Column(_("tensors"), right=True, hide=2),
        Column(_("elements"), right=True),
        Column(_("size"), right=True),
        Column(_("share"), right=True, hide=1),
    ]
    rows = [
        [
            section.name,
            _(_KINDS[section.kind]),
            str(section.tensors),
            _count(section.numel),
            format_bytes(section.nbytes),
            f"{section.nbytes / max(1, shown.size):.1%}",
        ]
        for section in inside.sections
    ]
    rest = shown.size - sum(section.nbytes for section in inside.sections)
    rows.append(
        [
            _("values, manifest, padding"),
            "",
            "",
            "",
            format_bytes(rest),
            f"{rest / max(1, shown.size):.1%}",
        ]
    )
    return [screen.bold(_("The file by section")), *render(columns, rows, screen)]


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) if shape else _("one number")


def _size(size: int) -> str:
    """In a unit that is read at a glance, and exactly."""
    return format_bytes(size) if size < 1024 else f"{format_bytes(size)} ({size} B)"


def _count(count: int) -> str:
    return f"{count:,}"


# ------------------------------------------------------------------------------ without a manifest


def _without_manifest(shown: Shown, screen: Screen) -> list[str]:
    size = _size(shown.size)
    if shown.state == DAMAGED:
        whole = [record for record in shown.records if record.whole]
        told = _(
            "its manifest cannot be read; of the records in front {whole} of {count} are "
            "whole, {size}",
            whole=len(whole),
            count=len(shown.records),
            size=format_bytes(sum(record.size for record in whole)),
        )
        return _pairs(
            [
                (_("state"), _("DAMAGED: {reason}", reason=shown.reason)),
                (_("readable"), told),
                (_("size"), size),
            ],
            screen,
        )
    facts = [
        (_("state"), _("not a checkpoint of ours: {reason}", reason=shown.reason)),
        (_("what it is"), _(_FORMS[shown.form])),
        (_("size"), size),
    ]
    if shown.records:
        inside = sum(record.size for record in shown.records)
        facts.append(
            (
                _("records"),
                _("{count}, {size} in all", count=len(shown.records), size=format_bytes(inside)),
            )
        )
    if shown.imports:
        names = _("{names} (nothing was unpickled)", names=", ".join(shown.imports))
        facts.append((_("its pickle names"), names))
    return _pairs(facts, screen)


def _records(shown: Shown, screen: Screen) -> list[str]:
    """The records: the largest of a foreign file, all of a damaged one in a pipe."""
    chosen, title = shown.records, _("Records")
    if shown.state == FOREIGN or screen.terminal:
        chosen = sorted(chosen, key=lambda record: -record.size)[:_RECORDS]
        if len(chosen) < len(shown.records):
            title = _("Records, the {count} largest", count=len(chosen))
    words = {True: _("whole"), False: _("DAMAGED"), None: ""}
    columns = [Column(_("record")), Column(_("size"), right=True), Column("")]
    rows = [[r.name, format_bytes(r.size), words[r.whole]] for r in chosen]
    return [screen.bold(title), *render(columns, rows, screen)]
