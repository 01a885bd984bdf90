"""Put events into words: all that a person is told, in the log and at a console, when saving does
not go as it should."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.i18n import N_, _

_SENTENCES = {
    "failed": N_(
        "Step {step} could not be saved. Training goes on; the last durable step is {durable}. The "
        "reason: {reason}"
    ),
    "recovered": N_("✅ Saving works again: step {step} is durable."),
    "unverified": N_(
        "Step {step} is durable, but could not be read back to check it ({reason}). Nothing "
        "older is removed until a later save has been checked."
    ),
    "unread": N_(
        "{name} cannot be read now ({reason}). It is older than the newest; it stays where it is."
    ),
    "quarantined": N_("{names}: {reason}. Moved to quarantine/."),
    "configured": N_("Settings that you have changed take effect: {changes}"),
    "reseeded": N_(
        "The random streams that resume() restored were seeded anew before the first step: this "
        "run draws other numbers than it would have. Call resumed.restore_rng() after the seeding."
    ),
    "archived": N_("📦 {count} checkpoints were moved to {to}."),
    "step_back": "{reason}",
    "room_made": N_(
        "The disk is nearly full: {names} went sooner than asked for, so that the next "
        "checkpoint fits."
    ),
    "lock_renewed": N_(
        "The lock file of {directory} was removed while this training holds it, and has been "
        "made anew. Leave it: without it two trainings would write over each other."
    ),
}


def sentence(event: str, fields: Mapping[str, Any]) -> str | None:
    """Return what to tell a person of `event`; None if it is nothing to worry about."""
    if event == "unsafe":
        return _unsafe(fields)
    text = _SENTENCES.get(event)
    if text is None:
        return None
    said = dict(fields)
    for key, separator in (("names", ", "), ("changes", "; ")):
        if key in fields:
            said[key] = separator.join(fields[key])
    if event == "failed":
        said["durable"] = fields.get("durable") or "-"
    return _(text, **said)


def _unsafe(fields: Mapping[str, Any]) -> str:
    text = _(
        "UNSAFE: nothing could be saved for {minutes} minutes; the last durable step is {step}. A "
        "power cut now costs all the work since.",
        minutes=f"{fields['minutes']:.0f}",
        step=fields["step"],
    )
    reason = fields["reason"] or _("a save is under way and does not end")
    return text + " " + _("The reason: {reason}", reason=reason)
