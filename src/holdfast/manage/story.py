"""The history of a run in sentences: one line of events.jsonl, one line for a person."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from holdfast.formatting import format_bytes, format_seconds, format_time
from holdfast.i18n import N_, _
from holdfast.table import PIPE, Screen, printable, wrapped

# What happens all the time while everything goes well; shown with `--events` only.
ROUTINE = ("durable", "verified", "removed")

# Why something was made durable at an end that was not planned.
ENDS = {
    "signal": N_("; a signal asked the training to stop"),
    "error": N_("; an error ended the training"),
}
_SENTENCES = {
    "began": N_("the run began"),
    "durable": N_("step {step} is durable: {names} ({size})"),
    "verified": N_("step {step} was read back and is intact"),
    "unverified": N_("step {step} could not be read back to check it: {reason}"),
    "damaged": N_("step {step} is damaged: {reason}"),
    "removed": N_("step {step} was removed ({reason}): {names}"),
    "quarantined": N_("{names} went to quarantine/: {reason}"),
    "archived": N_("{names} went to {to}/"),
    "rolled_back": N_("the run went back to step {step}; generation {generation} begins"),
    "pinned": N_("step {step} was pinned"),
    "unpinned": N_("step {step} is no longer pinned"),
    "resumed": N_("training went on from step {step}, generation {generation}"),
    "failed": N_("step {step} could not be saved: {reason}"),
    "recovered": N_("saving worked again at step {step}; failed before it: {failures}"),
    "unsafe": N_("nothing could be saved for {minutes} minutes; durable was step {step}"),
    "lock_renewed": N_("the lock file was removed while training, and made anew"),
    "diverged": N_("step {step} went wrong ({reason}); training went back to step {back_to}"),
    "interrupted": N_("training was interrupted at step {step}"),
    "broke_off": N_(
        "training broke off at step {step}, before that was saved: killed, or the machine failed"
    ),
    "rescued": N_("step {step} was found in memory and made durable"),
    "finished": N_("training was finished at step {step}"),
    "rotten": N_("a damaged line: what it said is lost"),
}
_REASONS = {
    "retention": N_("older than what is kept"),
    "clean": N_("holdfast clean"),
    "space": N_("the disk was nearly full"),
    "signal": N_("a signal"),
}


def story(
    events: Iterable[Mapping[str, Any]], *, everything: bool = False, screen: Screen = PIPE
) -> list[str]:
    """Interruptions, resumes, quarantines, failures, each with its local time; or all events."""
    lines: list[str] = []
    for event in events:
        if everything or is_story(event):
            time = f"{format_time(event.get('time'))}  "
            lines += wrapped(printable(describe(event)), screen, time)
    return lines


def is_story(event: Mapping[str, Any]) -> bool:
    """Return True for what a person wants to know; an unknown event counts as such."""
    return event.get("event") not in ROUTINE or str(event.get("reason")) in ENDS


def describe(event: Mapping[str, Any]) -> str:
    """One event as a sentence; all of its fields where no sentence knows it."""
    kind = str(event.get("event"))
    fields = {name: _field(name, value) for name, value in event.items()}
    try:
        text = _(_SENTENCES[kind]).format(**fields)
    except KeyError:
        rest = [
            f"{name}={value}" for name, value in fields.items() if name not in ("time", "event")
        ]
        return " ".join([kind, *rest])
    if kind == "resumed" and event.get("steps_lost"):
        text += _steps_lost(event["steps_lost"], event.get("minutes_lost"))
    if kind == "durable" and str(event.get("reason")) in ENDS:
        text += _(ENDS[str(event["reason"])])
    return text


def _steps_lost(steps: object, minutes: object) -> str:
    if isinstance(minutes, int | float) and minutes > 0:
        time = format_seconds(60 * minutes)
        return _("; steps lost: {steps} ({time} of work)", steps=steps, time=time)
    return _("; steps lost: {steps}", steps=steps)  # as an earlier version has recorded it


def _field(name: str, value: Any) -> str:
    if name == "size" and isinstance(value, int):
        return format_bytes(value)
    if name == "reason" and isinstance(value, str) and value in _REASONS:
        return _(_REASONS[value])
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
