"""The words for a moment of a run, the same on the screen and in a pipe: labels and values.

Each value is one line; the caller decides on width and colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from holdfast.formatting import (
    NOTHING,
    format_age,
    format_bytes,
    format_loss,
    format_seconds,
    parse_time,
)
from holdfast.i18n import N_, _
from holdfast.manage.rundir import kind_in_words, number
from holdfast.manage.story import describe, story
from holdfast.monitor.machine import Gpu, Machine
from holdfast.monitor.run_view import EMPTY, FINISHED, STOPPED, TRAINING
from holdfast.monitor.terminal.snapshot import Row, Snapshot
from holdfast.table import Column, Screen, printable, render

Pair = tuple[str, str]  # a label and its value
BETWEEN = " · "  # two figures: the same in both languages

_STATES = {
    TRAINING: N_("training"),
    FINISHED: N_("finished"),
    STOPPED: N_("stopped before the end"),
    EMPTY: N_("nothing here yet"),
}


def state(snapshot: Snapshot) -> str:
    """Return what the run is doing."""
    if snapshot.state == STOPPED and not snapshot.started and snapshot.last is None:
        return _("stopped")  # a stranger's loop: where its end is, it has not said
    text = _(_STATES[snapshot.state])
    if snapshot.saving_fails and snapshot.state == TRAINING:
        return text + _(", saving fails")
    if snapshot.overdue:
        return text + _(", silent for {time}", time=format_age(snapshot.silent))
    return text


def counts(snapshot: Snapshot) -> list[str]:
    """Return epoch and step, of how many."""
    parts = []
    if snapshot.epoch is not None:
        of = f"/{snapshot.epochs}" if snapshot.epochs else ""
        parts.append(_("epoch {epoch}", epoch=f"{snapshot.epoch}{of}"))
    of = f"/{snapshot.total_steps}" if snapshot.total_steps else ""
    return [*parts, _("step {step}", step=f"{snapshot.step}{of}")]


def percent(share: float) -> str:
    """Return `share` of 1 as a percentage, rounded down: 100 % means that all is done."""
    return f"{math.floor(1000 * share) / 10:.1f} %"


def left(snapshot: Snapshot) -> str:
    """Return the time to the end of the plan; empty where it is not known, and for the last
    save."""
    if not snapshot.eta:
        return ""
    return _("{time} left", time=format_seconds(snapshot.eta))


def model(snapshot: Snapshot) -> list[str]:
    """Return what is trained, where, and how fast, the most important first."""
    parts = []
    if snapshot.last is not None and snapshot.last.tokens_per_second is not None:
        parts.append(_("{rate} tokens/s", rate=f"{snapshot.last.tokens_per_second:,.0f}"))
    if snapshot.last is not None and snapshot.last.learning_rate is not None:
        parts.append(_("learning rate {rate}", rate=f"{snapshot.last.learning_rate:.2e}"))
    started = snapshot.started
    if started.get("model"):
        size = started.get("parameters")
        count = f" ({_count(size)})" if isinstance(size, int) else ""
        parts.append(printable(f"{started['model']}{count}"))
    if started.get("device"):
        parts.append(printable(str(started["device"])))
    if snapshot.elsewhere:
        parts.append(_("on {host}", host=printable(str(started.get("host")))))
    return parts


def _count(value: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return str(value)


def losses(snapshot: Snapshot) -> list[Pair]:
    """Return training loss, its smoothed course, validation."""
    last, validation = snapshot.last, snapshot.validation
    loss = last.loss if last else None
    return [
        (_("train"), format_loss(math.nan if loss is None and snapshot.nan_since else loss)),
        (_("smoothed"), format_loss(last.smoothed if last else None)),
        (_("validation"), format_loss(validation.val_loss if validation else None)),
    ]


def no_number(snapshot: Snapshot) -> str:
    """Return since which step the loss is NaN; empty where it is a number."""
    if snapshot.nan_since is None:
        return ""
    return _("the loss has been NaN or infinite since step {step}", step=snapshot.nan_since)


def best(snapshot: Snapshot) -> str:
    """Return the best validation loss and its step; empty where there is none."""
    found = snapshot.best_validation
    if found is None:
        return ""
    return _("best {loss} at step {step}", loss=format_loss(found.val_loss), step=found.step)


# ---------------------------------------------------------------------------------------- safety


def safety(snapshot: Snapshot) -> list[Pair]:
    """Return the cost of each kind of failure."""
    return [
        (_("power cut"), _power_cut(snapshot)),
        (_("kill"), _kill(snapshot)),
        (_("disk loss"), _("all, no remote copy")),
        (_("durable"), _durable(snapshot)),
    ]


def _power_cut(snapshot: Snapshot) -> str:
    risk = snapshot.safety
    if risk.disk_unknown:
        return NOTHING if risk.disk_seconds is None else format_seconds(risk.disk_seconds)
    if not risk.disk_steps:
        return _("nothing")
    text = _steps(risk.disk_steps)
    if risk.disk_seconds is not None:
        text += BETWEEN + format_seconds(risk.disk_seconds)
    return text


def _kill(snapshot: Snapshot) -> str:
    risk = snapshot.safety
    if risk.memory_unknown and risk.disk_unknown:  # no snapshot newer than what is on the disk
        return _power_cut(snapshot)
    return _steps(risk.memory_steps)


def _durable(snapshot: Snapshot) -> str:
    risk = snapshot.safety
    text = NOTHING if risk.disk_step is None else _("step {step}", step=risk.disk_step)
    if risk.memory_step is not None and risk.memory_step > (risk.disk_step or 0):
        text += _(", in memory {step}", step=risk.memory_step)
    return text


def _steps(count: int) -> str:
    if count == 0:
        return _("nothing")
    return _("1 step") if count == 1 else _("{steps} steps", steps=count)


# --------------------------------------------------------------------------------------- machine


def disk(snapshot: Snapshot) -> list[Pair]:
    """Return the room for checkpoints, and when it ends."""
    found = snapshot.disk
    if found is None:
        return [(_("disk free"), NOTHING)]
    room = format_bytes(found.free)
    if found.next_size:
        room += _(", next {size}", size=format_bytes(found.next_size))
    if not found.next_size:  # nothing has been saved yet, so the size is unknown
        full = NOTHING
    elif not found.fits:
        full = _("the next does not fit!")
    elif math.isfinite(found.hours_left):
        full = _("in {time}", time=format_seconds(3600 * found.hours_left))
    else:
        full = _("not in sight")
    return [(_("disk free"), room), (_("disk full"), full)]


def machine(snapshot: Snapshot) -> list[Pair]:
    """Return CPU, memory and GPUs of this machine and of the training."""
    found = snapshot.machine
    pairs = [(_("machine"), _load(found.cpu, found.memory_used, found.memory_total))]
    if found.process_cpu is not None or found.process_memory is not None:
        pairs.append((_("process"), _load(found.process_cpu, found.process_memory, None)))
    taken = snapshot.last.gpu_bytes if snapshot.last is not None else None
    for i, gpu in enumerate(found.gpus):
        pairs.append((f"GPU {i}" if len(found.gpus) > 1 else "GPU", _gpu(gpu)))
    if taken is not None:
        pairs.append((_("own GPU"), format_bytes(taken)))
    elif not found.gpus:
        pairs.append(("GPU", _("none")))
    return pairs


def _load(cpu: float | None, used: int | None, total: int | None) -> str:
    parts = [] if cpu is None else [f"CPU {cpu:.0f} %"]
    if used is not None:
        parts.append(_of(used, total))
    return BETWEEN.join(parts) or NOTHING


def _of(used: int, total: int | None) -> str:
    """Return bytes of how many, in one unit where both have the same: 3.21/15.6 GiB."""
    if total is None:
        return format_bytes(used)
    value, unit = format_bytes(used).split(" ")
    whole = format_bytes(total)
    return f"{value}/{whole}" if whole.endswith(f" {unit}") else f"{value} {unit}/{whole}"


def _gpu(gpu: Gpu) -> str:
    parts = [] if gpu.percent is None else [f"{gpu.percent:.0f} %"]
    if gpu.used is not None:
        parts.append(_of(gpu.used, gpu.total))
    if gpu.celsius is not None:
        parts.append(f"{gpu.celsius:.0f} °C")
    return BETWEEN.join(parts) or NOTHING


def has_figures(machine: Machine) -> bool:
    """Return whether psutil was there to be asked."""
    return machine.cpu is not None


# ----------------------------------------------------------------------------- checkpoints, events


def checkpoints(rows: Sequence[Row], width: int | None) -> list[str]:
    """Return a table, its header first; on `width` cells the least important columns step back."""
    columns = [
        Column(_("file")),
        Column(_("kind"), hide=4),
        Column(_("step"), right=True),
        Column(_("val loss"), right=True, hide=5),
        Column(_("size"), right=True, hide=2),
        Column(_("age"), right=True, hide=3),
        Column(_("verified"), hide=1),
        Column(_("mark")),
    ]
    cells = [
        [
            row.entry.names[0],
            kind_in_words(row.entry.kind),
            str(row.entry.step),
            format_loss(number(row.entry.metrics.get("val_loss"))),
            format_bytes(row.entry.size),
            format_age(row.age),
            _("damaged") if row.damaged else _("yes") if row.entry.verified else _("no"),
            " ".join(_marks(row)),
        ]
        for row in rows
    ]
    return render(columns, cells, Screen(width))


def _marks(row: Row) -> list[str]:
    marks = [(row.best, _("best")), (row.latest, _("latest")), (row.entry.pinned, _("pinned"))]
    return [text for set_, text in marks if set_]


def clock(time: object, today: str) -> str:
    """Return a time of the history in short: 03:35:30, or with its day where that is not
    `today`."""
    parsed = parse_time(time)
    if parsed is None:
        return NOTHING
    same = parsed.strftime("%Y-%m-%d") == today
    return parsed.strftime("%H:%M:%S" if same else "%m-%d %H:%M")


def sentence(event: dict[str, object]) -> str:
    """Return an event in words, on one line."""
    return printable(describe(event))


# ------------------------------------------------------------------------------------- plain text


def lines(snapshot: Snapshot, events: int = 10) -> list[str]:
    """Return the whole moment in plain, complete lines, for a pipe or a person without the
    screen."""
    done = snapshot.progress
    progress = [*counts(snapshot), *([percent(done)] if done is not None else []), left(snapshot)]
    losses_ = [f"{label} {value}" for label, value in losses(snapshot)]
    pairs: list[Pair] = [
        (_("run"), str(snapshot.directory)),
        (_("state"), BETWEEN.join(filter(None, [state(snapshot), snapshot.owner]))),
        (_("progress"), BETWEEN.join(filter(None, progress))),
        (_("loss"), BETWEEN.join(filter(None, [*losses_, best(snapshot)]))),
        (_("speed"), BETWEEN.join(model(snapshot)) or NOTHING),
        *(
            (_("lost after {failure}", failure=label), value)
            for label, value in safety(snapshot)[:-1]
        ),
        safety(snapshot)[-1],
        *disk(snapshot),
        *(machine(snapshot) if has_figures(snapshot.machine) else []),
    ]
    if snapshot.nan_since is not None:
        pairs.insert(2, (_("loss"), no_number(snapshot)))
    if snapshot.saving_fails:
        pairs.insert(2, (_("saving fails"), snapshot.saving_fails))
    found = [printable(f"{label}: {value}") for label, value in pairs]
    if snapshot.rows:
        found += ["", *checkpoints(snapshot.rows, None)]
    if snapshot.notices:
        found += ["", *story(snapshot.notices[-events:], everything=True)]
    return found
