"""Curves as a picture (matplotlib) and as a page (plotly); terminal_plot.py draws them in text.

The page is one file that needs no network: the script comes from the installed package.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast import i18n
from holdfast.errors import HoldfastError
from holdfast.i18n import N_, _, language
from holdfast.manage.output import write_output
from holdfast.monitor.curves import CHECKPOINT, INTERRUPTED, RESUMED, TROUBLE, Curves, Series

# Okabe and Ito, "Color Universal Design" (2008), which the colour-blind tell apart; the lines of
# the runs differ in their dashes as well, and the marks in their shapes.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_DASHES = (("-", "solid"), ("--", "dash"), ("-.", "dashdot"), (":", "dot"))
_MARKS = {  # kind: word, line and colour, for matplotlib and for plotly
    CHECKPOINT: (N_("checkpoint"), ":", "dot", "#999999"),
    INTERRUPTED: (N_("interrupted"), "--", "dash", "#D55E00"),
    RESUMED: (N_("went on"), "-.", "dashdot", "#009E73"),
    TROUBLE: (N_("trouble"), "-", "solid", "#000000"),
}
_LOSS, _TRAIN, _VAL = N_("loss (nats a token)"), N_("training loss"), N_("validation loss")
_STEP, _STALL = N_("step"), N_("stall for a checkpoint (ms)")
_PANELS = (
    ("learning_rate", N_("learning rate"), 1.0),
    ("tokens_per_second", N_("tokens per second"), 1.0),
    ("stalls", _STALL, 1000.0),
)
_CJK = ("Noto Sans CJK SC", "Source Han Sans SC", "Source Han Sans CN", "Microsoft YaHei",
        "PingFang SC", "Hiragino Sans GB", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei",
        "Noto Sans CJK JP", "Noto Serif CJK SC", "Droid Sans Fallback")  # fmt: skip
_CJK_FILES = ("NotoSansCJK", "SourceHanSans", "wqy-", "msyh", "simhei", "PingFang", "NotoSerifCJK")


def write_png(runs: Sequence[Curves], path: Path) -> None:
    """Write the curves of `runs` as a picture. Raises OSError as it comes, HoldfastError where
    there is nothing to draw, ModuleNotFoundError where matplotlib is missing."""
    runs = _known(runs)
    import matplotlib as mpl

    font = _cjk_font() if language() == "zh" or not _is_plain(runs) else None
    spoken = language()
    style = {"font.family": [font, "DejaVu Sans"] if font else ["DejaVu Sans"],
             "axes.unicode_minus": False}  # fmt: skip
    try:
        if font is None:
            i18n.set_language("en")  # boxes instead of characters help nobody
        with mpl.rc_context(style):
            data = _picture(runs)
    finally:
        i18n.set_language(spoken)
    write_output(path, data)


def _picture(runs: Sequence[Curves]) -> bytes:
    from matplotlib.figure import Figure

    below = [panel for panel in _PANELS if any(getattr(run, panel[0]) for run in runs)]
    heights = [3.0, *([1.0] * len(below))]
    figure = Figure(figsize=(10, 1.6 + 1.55 * sum(heights)), dpi=130, layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_losses(axes[0], runs)
    for axis, (name, title, scale) in zip(axes[1:], below, strict=True):
        for i, run in enumerate(runs):
            series: Series = getattr(run, name)
            colour, dash = PALETTE[i % len(PALETTE)], _DASHES[i % len(_DASHES)][0]
            dashes = {"linestyle": dash}
            points = {"linestyle": "", "marker": "osD^"[i % 4]}
            look = points if name == "stalls" else dashes
            values = [value * scale for value in series.values]
            axis.plot(series.steps, values, color=colour, linewidth=1.2, **look)
        axis.set_ylabel(_(title).replace(" (", "\n("))
        if name == "stalls":
            axis.set_ylim(0, 1.12 * scale * max(v for run in runs for v in run.stalls.values) or 1)
    for axis in axes:
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(_(_STEP))
    figure.suptitle(", ".join(run.label for run in runs))
    written = io.BytesIO()
    figure.savefig(written, format="png", metadata={"Software": "holdfast"})
    return written.getvalue()


def _draw_losses(axis: Any, runs: Sequence[Curves]) -> None:
    for i, run in enumerate(runs):
        name = f"{run.label}: " if len(runs) > 1 else ""
        colour, dash = PALETTE[i % len(PALETTE)], _DASHES[i % len(_DASHES)][0]
        if run.loss:
            axis.plot(run.loss.steps, run.loss.values, color=colour, linestyle=dash, linewidth=1.2,
                      alpha=0.85, label=name + _(_TRAIN))  # fmt: skip
        if run.val_loss:
            axis.plot(run.val_loss.steps, run.val_loss.values, color=colour, linestyle="",
                      marker="osD^"[i % 4], markersize=7, markeredgecolor="black",
                      label=name + _(_VAL))  # fmt: skip
    if len(runs) == 1:
        for kind, steps in runs[0].marks.items():
            word, dash, _plotly, colour = _MARKS[kind]
            for j, step in enumerate(steps):
                axis.axvline(step, color=colour, linestyle=dash, linewidth=1.0, zorder=0,
                             label=_(word) if j == 0 else None)  # fmt: skip
    axis.set_ylabel(_(_LOSS))
    axis.legend(loc="upper right", framealpha=0.9)


def _cjk_font() -> str | None:
    """A font with Chinese characters; one that was installed after matplotlib's list was made is
    found as a file."""
    from matplotlib import font_manager

    names = {font.name for font in font_manager.fontManager.ttflist}
    found = next((name for name in _CJK if name in names), None)
    if found is not None:
        return found
    files = font_manager.findSystemFonts()
    for path in sorted(files, key=lambda file: ("Regular" not in file, file)):
        if any(part in path for part in _CJK_FILES):
            font_manager.fontManager.addfont(path)
            return str(font_manager.FontProperties(fname=path).get_name())
    return None


def _is_plain(runs: Sequence[Curves]) -> bool:
    return all(run.label.isascii() for run in runs)


def _known(runs: Sequence[Curves]) -> list[Curves]:
    found = [run for run in runs if run]
    if not found:
        raise HoldfastError(_("There is nothing to plot yet: no losses were recorded."))
    return found


# --------------------------------------------------------------------------------------- the page


def write_html(runs: Sequence[Curves], path: Path) -> None:
    """Write the curves of `runs` as one page to look into with a browser. Raises as `write_png`."""
    runs = _known(runs)
    from plotly.offline import get_plotlyjs

    traces, layout = _figure(runs)
    title = html.escape(", ".join(run.label for run in runs))
    data = _PAGE.format(
        lang="zh-CN" if language() == "zh" else "en",
        title=title,
        script=get_plotlyjs(),
        figure=json.dumps([traces, layout], allow_nan=False).replace("<", "\\u003c"),
    ).encode("utf-8")
    write_output(path, data)


_PAGE = """<!DOCTYPE html>
<html lang="{lang}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  html, body {{ margin: 0; height: 100%; background: #fff; color: #222; }}
  h1 {{ font: 600 18px sans-serif; margin: 0; padding: 12px 20px 0; overflow-wrap: anywhere; }}
  #plot {{ height: max(calc(100vh - 40px), 720px); }}
  @media (prefers-color-scheme: dark) {{ html, body {{ background: #111; color: #ddd; }} }}
</style>
<script>{script}</script>
</head>
<body>
<h1>{title}</h1>
<div id="plot"></div>
<script>
  const [traces, layout] = {figure};
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  function draw() {{
    const ink = dark.matches ? "#ddd" : "#222", line = dark.matches ? "#333" : "#ddd";
    const shown = structuredClone(layout);
    Object.assign(shown, {{paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
                          font: {{color: ink}}}});
    for (const [name, axis] of Object.entries(shown))
      if (/^[xy]axis/.test(name))
        Object.assign(axis, {{gridcolor: line, zeroline: false, linecolor: ink}});
    Plotly.react("plot", traces, shown, {{responsive: true, displaylogo: false}});
  }}
  dark.addEventListener("change", draw);
  draw();
</script>
</body>
</html>
"""


def _figure(runs: Sequence[Curves]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Traces and layout as plotly wants them: the losses in the upper half, the rest below."""
    below = [panel for panel in _PANELS if any(getattr(run, panel[0]) for run in runs)]
    traces: list[dict[str, Any]] = []
    for i, run in enumerate(runs):
        traces += _loss_traces(run, i, several=len(runs) > 1)
        for j, (name, title, scale) in enumerate(below, 2):
            series: Series = getattr(run, name)
            mode = "markers" if name == "stalls" else "lines"
            shown = Series(series.steps, [value * scale for value in series.values])
            words = _words(run, _(title), several=len(runs) > 1)
            traces.append(_trace(shown, words, i, mode=mode, axis=f"y{j}", legend=False))
    layout: dict[str, Any] = {
        "hovermode": "x unified",
        "margin": {"l": 60, "r": 20, "t": 60, "b": 50},
        "legend": {"orientation": "h", "y": 1.06, "yanchor": "bottom"},
        "xaxis": {"title": {"text": _(_STEP)}, "rangemode": "tozero",
                  "anchor": f"y{len(below) + 1}" if below else "y"},
        "shapes": [],
        "annotations": [],
    }  # fmt: skip
    tops = _domains(len(below))
    for j, ((low, high), title) in enumerate(
        zip(tops, [_LOSS, *(panel[1] for panel in below)], strict=True), 1
    ):
        layout["yaxis" if j == 1 else f"yaxis{j}"] = {
            "domain": [low, high],
            "rangemode": "tozero" if title == _STALL else "normal",
            "exponentformat": "e",  # a learning rate of 3e-4, not of 300 µ
        }
        layout["annotations"].append({  # above its panel: turned by 90 degrees it fits no phone
            "text": _(title), "xref": "paper", "yref": "paper", "x": 0, "y": high,
            "xanchor": "left", "yanchor": "bottom", "showarrow": False,
        })  # fmt: skip
    if len(runs) == 1:
        shapes, named = _mark_shapes(runs[0])
        layout["shapes"], traces = shapes, traces + named
    return traces, layout


def _domains(below: int) -> list[tuple[float, float]]:
    """From the top: the losses take what three small panels would, a gap between all."""
    gap = 0.07
    unit = (1 - gap * below) / (3 + below)
    found, top = [(1 - 3 * unit, 1.0)], 1 - 3 * unit - gap
    for _panel in range(below):
        found.append((max(0.0, top - unit), top))
        top -= unit + gap
    return found


def _loss_traces(run: Curves, number: int, *, several: bool) -> list[dict[str, Any]]:
    found = []
    for series, word, mode in ((run.loss, _TRAIN, "lines"), (run.val_loss, _VAL, "markers")):
        if series:
            words = _words(run, _(word), several=several)
            found.append(_trace(series, words, number, mode=mode))
    return found


def _words(run: Curves, text: str, *, several: bool) -> str:
    return html.escape(f"{run.label}: {text}" if several else text)


def _trace(
    series: Series, name: str, number: int, *, mode: str, axis: str = "y", legend: bool = True
) -> dict[str, Any]:
    return {
        "type": "scatter", "x": series.steps, "y": series.values, "name": name, "mode": mode,
        "xaxis": "x", "yaxis": axis, "showlegend": legend,
        "line": {"color": PALETTE[number % len(PALETTE)], "width": 1.6,
                 "dash": _DASHES[number % len(_DASHES)][1]},
        "marker": {"color": PALETTE[number % len(PALETTE)], "size": 9,
                   "symbol": ["circle", "square", "diamond", "triangle-up"][number % 4]},
    }  # fmt: skip


def _mark_shapes(run: Curves) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A vertical line a mark, and a trace without points a kind, for the legend."""
    shapes, named = [], []
    for kind, steps in run.marks.items():
        word, _mpl, dash, colour = _MARKS[kind]
        colour = "#888888" if kind == TROUBLE else colour  # black is not seen on a dark page
        line = {"color": colour, "dash": dash, "width": 1}
        shapes += [
            {"type": "line", "xref": "x", "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1,
             "line": line, "layer": "below"}
            for step in steps
        ]  # fmt: skip
        if steps:
            named.append({"type": "scatter", "x": [None], "y": [None], "mode": "lines",
                          "name": _(word), "line": line, "xaxis": "x", "yaxis": "y"})  # fmt: skip
    return shapes, named
