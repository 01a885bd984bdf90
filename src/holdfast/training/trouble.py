"""What a person is told when saving does not go as it should: the words, and how loud they are.

Said once, repeated rarely, and said again when it is over: a warning at every step is read by
nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from holdfast.checkpoint.rundir import sentence
from holdfast.i18n import _

if TYPE_CHECKING:
    from holdfast.training.console import Console

Fields = Mapping[str, Any]


def tell(console: Console, event: str, fields: Fields) -> None:
    """Tell an event of the checkpoint manager, if it is one of these."""
    if event == "failed":
        _failed(console, fields)
    elif event == "recovered":
        console.say(
            _("✅ Saving works again: step {step} is durable.", step=fields["step"]), important=True
        )
    elif text := sentence(event, fields):
        (console.alarm if event == "unsafe" else console.warn)(text)


def _failed(console: Console, fields: Fields) -> None:
    durable = console.status.durable_step = fields.get("durable", console.status.durable_step)
    text = _(
        "Step {step} could not be saved. Training goes on; the last durable step is {durable}. The "
        "reason: {reason}", step=fields["step"], reason=fields["reason"],
        durable="-" if durable is None else durable,
    )  # fmt: skip
    if fields.get("repeated"):  # said a short while ago; the bar shows that it is still so
        console.note(text)
    else:
        console.warn(text)
