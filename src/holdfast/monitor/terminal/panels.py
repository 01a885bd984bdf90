"""Write each part of the terminal monitor as lines of text that fit its width.

Pure: a snapshot and a width in, lines out. Nothing is cut in the middle of a number: a part that
does not fit goes to the next line or stays away as a whole. Widths are cells: Chinese takes two.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from rich.cells import cell_len, chop_cells
from rich.text import Text

from holdfast.formatting import wrap_cells
from holdfast.i18n import _, language
from holdfast.monitor.run_view import FINISHED, STOPPED, TRAINING
from holdfast.monitor.terminal import plot, words
from holdfast.monitor.terminal.snapshot import is_warning
from holdfast.monitor.terminal.watcher import Look
from holdfast.monitor.terminal.words import Pair
from holdfast.table import printable

_GAP = "  "
_NARROWEST_BAR = 8
_NARROWEST_NAME = 12
_STATE_STYLES = {TRAINING: "bold green", FINISHED: "bold cyan", STOPPED: "bold yellow"}
LABEL, ALARM, WARNING = "dim", "bold red", "color(220)"


def header(look: Look, width: int) -> Text:
    """Return the name of the run, its state, the time."""
    now = datetime.datetime.now().astimezone()
    state = Text()
    if look.snapshot is not None:
        snapshot = look.snapshot
        wrong = snapshot.overdue or (snapshot.saving_fails and snapshot.state == TRAINING)
        state = Text(
            words.state(snapshot), ALARM if wrong else _STATE_STYLES.get(snapshot.state, "bold")
        )
    number = f"[{look.index + 1}/{len(look.runs)}] " if len(look.runs) > 1 else ""
    room = width - cell_len(number) - _NARROWEST_NAME - len(_GAP)
    clocks = [Text(now.strftime(form), LABEL) for form in ("%H:%M:%S %z", "%H:%M:%S")]
    rights = [Text(_GAP).join([state, clock] if state else [clock]) for clock in clocks]
    right = next((each for each in rights if each.cell_len <= room), state)
    name = printable(str(look.runs[look.index] if look.runs else look.root))
    room = width - right.cell_len - len(_GAP) - cell_len(number)
    left = Text(number + _end_of(name, room), "bold")
    return left + " " * max(1, width - left.cell_len - right.cell_len) + right


def progress(look: Look, width: int) -> list[Text]:
    """Return progress and speed; or what is wrong, or waited for."""
    snapshot = look.snapshot
    if snapshot is None:
        hint = _("start one: holdfast train --checkpoint-dir DIR; q quits")
        return [Text(_beginning_of(look.problem, width), WARNING), Text(fit([hint], width), LABEL)]
    left = _GAP.join(words.counts(snapshot))
    share = snapshot.progress
    right = _GAP.join(filter(None, [words.percent(share or 0), words.left(snapshot)]))
    room = width - cell_len(left) - cell_len(right) - 2 * len(_GAP)
    first = Text(left)
    if share is not None and room >= _NARROWEST_BAR:
        full = round(share * room)
        first.append(_GAP + "█" * full, "green")
        first.append("░" * (room - full) + _GAP, LABEL)
        first.append(right)
    elif share is not None:
        first = Text(fit([left, right], width, _GAP))
    if look.problem:
        return [first, Text(_beginning_of(look.problem, width), ALARM)]
    if snapshot.saving_fails and snapshot.state == TRAINING:
        why = _("saving fails: {reason}", reason=printable(snapshot.saving_fails))
        return [first, Text(_beginning_of(why, width), ALARM)]
    if snapshot.nan_since is not None:
        return [first, Text(_beginning_of(words.no_number(snapshot), width), ALARM)]
    return [first, Text(fit(words.model(snapshot), width, " · "), LABEL)]


def loss(look: Look, width: int, height: int) -> list[Text]:
    """Return the legend with the newest values, and the curve under it."""
    if look.snapshot is None or width < 20 or height < 2:
        return []
    colours = (plot.TRAINING, plot.SMOOTHED, plot.VALIDATION)
    parts = [
        Text(f"{plot.SYMBOLS[colour]} {label} {value}", f"color({colour})")
        for (label, value), colour in zip(words.losses(look.snapshot), colours, strict=True)
    ]
    legend = [Text()]
    for part in parts:
        if legend[-1] and legend[-1].cell_len + len(_GAP) + part.cell_len > width:
            legend.append(Text())
        legend[-1].append(_GAP if legend[-1] else "").append(part)
    best = words.best(look.snapshot)
    if best and legend[-1].cell_len + cell_len(_GAP + best) <= width:
        legend[-1].append(_GAP + best, LABEL)
    curves, room = look.curves, height - len(legend)
    drawn = [] if curves is None else plot.losses(curves, width, room)
    if not drawn:
        empty = words.no_number(look.snapshot) or _("no curve yet")
        drawn = [Text(_beginning_of(empty, width), LABEL)]
    return [*legend, *drawn]


def pairs(found: Sequence[Pair], width: int, styles: Sequence[str] = ()) -> list[Text]:
    """Return labels and values in two columns; a long value goes on in the next line."""
    column = max((cell_len(label) for label, _value in found), default=0) + len(_GAP)
    lines = []
    for i, (label, value) in enumerate(found):
        style = styles[i] if i < len(styles) else ""
        for j, part in enumerate(_wrapped(value, max(8, width - column))):
            head = label if j == 0 else ""
            text = Text().append(head + " " * (column - cell_len(head)), LABEL)
            lines.append(text.append(part, style))
    return lines


def safety(look: Look, width: int) -> list[Text]:
    """Return what would be lost now."""
    if look.snapshot is None:
        return []
    risk = look.snapshot.safety
    worst = ALARM if look.snapshot.saving_fails else WARNING
    cut, kill = risk.disk_steps or risk.disk_unknown, risk.memory_steps or risk.memory_unknown
    styles = [worst if cut else "green", worst if kill else "green"]
    return pairs(words.safety(look.snapshot), width, styles)


def machine(look: Look, width: int) -> list[Text]:
    """Return disk, CPU, memory and GPU."""
    if look.snapshot is None:
        return []
    found = words.disk(look.snapshot)
    disk = look.snapshot.disk
    full = disk is not None and disk.next_size > 0 and not disk.fits
    soon = disk is not None and disk.hours_left < 24
    return pairs(
        [*found, *words.machine(look.snapshot)], width, ["", ALARM if full else WARNING * soon]
    )


def checkpoints(look: Look, width: int) -> list[Text]:
    """Return the table, newest first."""
    if look.snapshot is None:
        return []
    rows = look.snapshot.rows
    if not rows:
        return [Text(_("none is durable yet"), WARNING)]
    head, *lines = words.checkpoints(rows, width)
    found = [Text(head, LABEL)]
    for row, line in zip(rows, lines, strict=True):
        found.append(Text(line, ALARM if row.damaged else "bold" if row.best else ""))
    return found


def events(look: Look, width: int) -> list[Text]:
    """Return the events, newest first; those that a person should worry about are marked."""
    if look.snapshot is None:
        return []
    today = datetime.datetime.now().strftime("%Y-%m-%d")
    lines = []
    for event in reversed(look.snapshot.notices):
        worry = is_warning(event)
        head = f"{'!' if worry else ' '} {words.clock(event.get('time'), today)}{_GAP}"
        room = max(16, width - cell_len(head))
        for i, part in enumerate(_wrapped(words.sentence(event), room)):
            text = Text().append(head if i == 0 else " " * cell_len(head), LABEL)
            lines.append(text.append(part, WARNING if worry else ""))
    return lines


def keys(several: bool, width: int) -> Text:
    """Return the line at the foot."""
    found = [
        ("?", _("help")),
        ("q", _("quit")),
        ("l", "English" if language() == "zh" else "中文"),
        *([("←→", _("other run"))] if several else []),
        ("Tab", _("next panel")),
        ("Enter", _("enlarge")),
    ]
    text = Text()
    for key, what in found:
        gap = _GAP if text else ""
        if text.cell_len + cell_len(f"{gap}{key} {what}") <= width:
            text.append(gap).append(key, "bold cyan").append(f" {what}", LABEL)
    return text


def titles() -> dict[str, str]:
    """Return the title of each panel by its id."""
    return {
        "loss": _("Loss"),
        "safety": _("Lost if it failed now"),
        "machine": _("Disk and machine"),
        "checkpoints": _("Checkpoints"),
        "events": _("What happened"),
    }


def help_lines(width: int) -> list[Text]:
    """Return the keys, and the meaning of the words on the screen."""
    found = [
        ("q, Ctrl+C", _("quit; the training is not touched")),
        ("Tab, ↑ ↓", _("next panel, panel above or below")),
        ("Enter, Esc", _("enlarge the panel, and back")),
        ("PgUp, PgDn", _("scroll in the panel")),
        ("← →, 1-9", _("another run, where the directory holds several")),
        ("l", _("Chinese or English")),
    ]
    terms = [
        (_("durable"), _("on the disk: a power cut does not take it")),
        (_("verified"), _("read back from the disk and found right, to the last byte")),
        (_("power cut"), _("steps and minutes of work since the newest durable checkpoint")),
        (_("kill"), _("steps since the newest snapshot in memory, which outlives the process")),
        (_("disk full"), _("when checkpoints fill it, by the plan and by what is kept")),
    ]
    return [*pairs(found, width), Text(), *pairs(terms, width)]


# ---------------------------------------------------------------------------------------- fitting


def fit(parts: Sequence[str], width: int, gap: str = "") -> str:
    """Join as many of `parts`, from the first on, as fit whole."""
    shown: list[str] = []
    for part in parts:
        if cell_len(gap.join([*shown, part])) > width:
            break
        shown.append(part)
    return gap.join(shown)


def _wrapped(text: str, width: int) -> list[str]:
    """Wrap `text` in lines of at most `width`; only a word that is longer than a line is broken."""
    return [piece for line in wrap_cells(text, width) for piece in chop_cells(line, width) or [""]]


def _end_of(text: str, width: int) -> str:
    """Return the end of a path that is too long: its beginning tells the least."""
    if cell_len(text) <= width:
        return text
    while text and cell_len(text) > max(1, width - 1):
        text = text[1:]
    return f"…{text}"


def _beginning_of(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return text
    while text and cell_len(text) > max(1, width - 1):
        text = text[:-1]
    return f"{text}…"
