"""Write a plan of removals as a table: what goes, what stays and why, and what comes back."""

from __future__ import annotations

from collections.abc import Iterable

from holdfast.formatting import NOTHING, format_bytes
from holdfast.i18n import _
from holdfast.table import Column, Screen, render

Line = tuple[bool, str, int | None, int, str]  # stays, subject, step, bytes, why


def plan_lines(subject: str, lines: Iterable[Line], freed: int, screen: Screen) -> list[str]:
    """Return the lines of a plan, what goes first; `subject` heads the second column and `freed`
    are the bytes that come back."""
    ordered = sorted(lines, key=lambda line: line[0])
    table = [
        [
            _("stays") if stays else _("goes"),
            name,
            NOTHING if step is None else str(step),
            format_bytes(size),
            why,
        ]
        for stays, name, step, size, why in ordered
    ]
    columns = [
        Column(""),
        Column(subject),
        Column(_("step"), right=True, hide=2),
        Column(_("size"), right=True, hide=1),
        Column(_("why")),
    ]
    going = sum(not line[0] for line in ordered)
    footer = _(
        "goes: {going} of {all}, {size} come back",
        going=going,
        all=len(ordered),
        size=format_bytes(freed),
    )
    return [*render(columns, table, screen), "", footer if going else _("Nothing goes.")]
