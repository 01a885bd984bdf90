"""Write the drift between two checkpoints: a table of layers, and what is left.

On a terminal the layers that changed most, in a pipe all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.formatting import NOTHING
from holdfast.i18n import _
from holdfast.manage.compare.drift import Drift, LayerDrift
from holdfast.manage.compare.sums import Sums
from holdfast.manage.tensors import Tensor
from holdfast.table import Column, Screen, printable, render

_LAYERS, _NAMES = 20, 6  # that a terminal is shown; a pipe gets all


def lines(drift: Drift, screen: Screen) -> list[str]:
    """The whole section, its title first."""
    a, b = drift.labels
    what = ", ".join(drift.sections)
    shown = [screen.bold(_("Tensors of {b} against {a} ({sections})", a=a, b=b, sections=what))]
    if drift.identical:
        count = len(drift.tensors)
        return [*shown, _("All {count} tensors are the same, bit by bit.", count=count)]
    if drift.tensors:
        shown += _layers(drift, screen)
    else:
        shown.append(_("No tensor is in both with the same name and shape."))
    tied = [f"{tensor.a.dotted} = {tensor.same_as}" for tensor in drift.tied]
    shown += _list(_("Tied, counted once:"), tied, screen)
    unlike = [f"{u.a.dotted} ({_form(u.a)} → {_form(u.b)})" for u in drift.unlike]
    shown += _list(_("Not comparable:"), unlike, screen)
    for label, tensors in drift.only.items():
        shown += _list(_("Only in {label}:", label=label), [t.dotted for t in tensors], screen)
    return shown


def _layers(drift: Drift, screen: Screen) -> list[str]:
    layers = drift.layers
    most = layers[:_LAYERS] if screen.terminal else layers
    several = len(drift.sections) > 1
    rows = [_row(layer, several) for layer in most]
    left = len(layers) - len(most)
    if left:
        rows.append([_("… {count} more", count=left), *[""] * 6])
    total = drift.total
    rows.append([_("all"), *_cells(total), ""])
    columns = [
        Column(_("layer")),
        Column(_("relative"), right=True),
        Column(_("cosine"), right=True),
        Column(_("changed"), right=True, hide=1),
        Column(_("largest"), right=True),
        Column("NaN/Inf", right=True, hide=2),
        Column(_("where the largest is"), hide=3),
    ]
    if not any((*total.nan, *total.inf)):
        rows = [[*row[:5], *row[6:]] for row in rows]
        del columns[5]
    return render(columns, rows, screen)


def _row(layer: LayerDrift, several: bool) -> list[str]:
    name = f"{layer.section}/{layer.name}" if several else layer.name
    most, where = layer.most, ""
    if most is not None:
        inner = most.a.dotted.removeprefix(f"{layer.name}.")
        where = f"{inner}{most.index}" if most.index else inner
    return [name, *_cells(layer.sums), where]


def _cells(sums: Sums) -> list[str]:
    """Relative change, cosine, elements changed, the largest change, what is no number."""
    nan, inf = sums.nan, sums.inf
    odd = f"{sum(nan)}/{sum(inf)}" if any((*nan, *inf)) else ""
    return [
        _short(sums.relative),
        NOTHING if sums.cosine is None else f"{sums.cosine:.6f}",
        _share(sums.changed, sums.elements),
        _short(sums.largest if sums.numeric else None),
        odd,
    ]


def _short(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def _share(part: int, whole: int) -> str:
    if part in (0, whole):
        return f"{1 if part else 0:.0%}"
    share = part / whole
    if share > 0.999:
        return ">99.9%"
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}"


def _list(title: str, names: Sequence[str], screen: Screen) -> list[str]:
    """A title and names: in one line on a terminal, one a line in a pipe."""
    if not names:
        return []
    if not screen.terminal:
        return [printable(f"{title} {name}") for name in names]
    shown = [*names[:_NAMES]]
    if len(names) > _NAMES:
        shown.append(_("… {count} more", count=len(names) - _NAMES))
    return [title, *(printable(f"  {name}") for name in shown)]
