"""What a person is told when saving does not go as it should: the words, and how loud they are.

Said once, repeated rarely, and said again when it is over: a warning at every step is read by
nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from holdfast.i18n import _

if TYPE_CHECKING:
    from holdfast.training.console import Console

Fields = Mapping[str, Any]


def tell(console: Console, event: str, fields: Fields) -> None:
    """Tell an event of the checkpoint manager, if it is one of these."""
    teller = {
        "failed": _failed,
        "recovered": _recovered,
        "unsafe": _unsafe,
        "unverified": _unverified,
        "unread": _unread,
        "step_back": _step_back,
        "room_made": _room_made,
        "directory_lost": _directory_lost,
        "lock_renewed": _lock_renewed,
    }.get(event)
    if teller is not None:
        teller(console, fields)


def unsafe_words(fields: Fields) -> str:
    """What the event "unsafe" says, at the console and through `--notify`."""
    text = _(
        "UNSAFE: nothing could be saved for {minutes} minutes; the last durable step is {step}. A "
        "power cut now costs all the work since.", minutes=f"{fields['minutes']:.0f}",
        step=fields["step"],
    )  # fmt: skip
    reason = fields["reason"] or _("a save is under way and does not end")
    return text + " " + _("The reason: {reason}", reason=reason)


def _failed(console: Console, fields: Fields) -> None:
    durable = console.status.durable_step
    text = _(
        "Step {step} could not be saved. Training goes on; the last durable step is {durable}. The "
        "reason: {reason}", step=fields["step"], reason=fields["reason"],
        durable="-" if durable is None else durable,
    )  # fmt: skip
    if fields.get("repeated"):  # said a short while ago; the bar shows that it is still so
        console.note(text)
    else:
        console.warn(text)


def _recovered(console: Console, fields: Fields) -> None:
    console.say(
        _("✅ Saving works again: step {step} is durable.", step=fields["step"]), important=True
    )


def _unsafe(console: Console, fields: Fields) -> None:
    console.alarm(unsafe_words(fields))


def _unverified(console: Console, fields: Fields) -> None:
    console.warn(
        _("Step {step} is durable, but could not be read back to check it ({reason}). Nothing "
          "older is removed until a later save has been checked.", step=fields["step"],
          reason=fields["reason"])
    )  # fmt: skip


def _unread(console: Console, fields: Fields) -> None:
    console.warn(
        _("{name} cannot be read now ({reason}). It is older than the newest; it stays where it "
          "is.", name=fields["name"], reason=fields["reason"])
    )  # fmt: skip


def _step_back(console: Console, fields: Fields) -> None:
    console.warn(fields["reason"])


def _room_made(console: Console, fields: Fields) -> None:
    console.warn(
        _("The disk is nearly full: {names} went sooner than asked for, so that the next "
          "checkpoint fits.", names=", ".join(fields["names"]))
    )  # fmt: skip


def _directory_lost(console: Console, fields: Fields) -> None:
    console.status.durable_step = None
    if fields["moved_to"]:
        text = _(
            "The run directory {directory} was renamed to {moved_to} while training: its "
            "checkpoints and its history are there. A new one has been made in its place, and the "
            "next step is saved there.", directory=fields["directory"],
            moved_to=fields["moved_to"],
        )  # fmt: skip
    else:
        text = _(
            "The run directory {directory} was deleted while training: its checkpoints and its "
            "history are gone. A new one has been made in its place, and the next step is saved "
            "there.", directory=fields["directory"],
        )  # fmt: skip
    console.alarm(text)


def _lock_renewed(console: Console, fields: Fields) -> None:
    console.warn(
        _("The lock file of {directory} was removed while this training holds it, and has been "
          "made anew. Leave it: without it two trainings would write over each other.",
          directory=fields["directory"])
    )  # fmt: skip
