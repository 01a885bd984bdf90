"""What the benchmark tells: tables for a terminal, JSON with every single measurement, a plot."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.engine import training_loss
from benchmarks.engine.bars import SIZE, Bar, bars
from benchmarks.engine.frameworks import PEERS
from benchmarks.engine.measure import Ratio, Series
from benchmarks.engine.peers import Ours, OursOverlapped, TorchSave
from benchmarks.engine.run import DISK, MEMORY, Report, Result
from holdfast import __version__
from holdfast.formatting import NOTHING, format_bytes
from holdfast.i18n import _
from holdfast.manage.table import Column, Screen, render

_OURS = Ours.name
_Cell = Callable[[str], str]  # the name of a contender → what stands in the column


# ------------------------------------------------------------------------------------- tables


def lines(report: Report, screen: Screen) -> Iterator[str]:
    """Everything there is to tell, for a terminal or a pipe."""
    yield from _head(report)
    for result in report.results[:1]:
        for part in (_saves, _loads, _fresh, _training, _regular):
            yield from part(result, screen)
    yield from _growth(report.results, screen)
    yield from _bars(bars(report.results), screen)
    if not report.complete:
        yield from ("", _("This run was interrupted: the tables show what there was by then."))


def _head(report: Report) -> Iterator[str]:
    about = report.machine
    device = about["gpu"] or _("{model}, {count} cores", model=about["processor"],
                               count=about["cores"])  # fmt: skip
    yield _("Machine: {device}; {system}; torch {torch}; file system {filesystem}", device=device,
            system=about["system"], torch=about["torch"],
            filesystem=about["filesystem"] or NOTHING)  # fmt: skip
    for result in report.results[:1]:
        yield _("State: {parameters} parameters with AdamW, {size} ({bytes} bytes) in {count} "
                "tensors", parameters=f"{result.parameters:,}", size=format_bytes(result.nbytes),
                bytes=f"{result.nbytes:,}", count=result.tensors)  # fmt: skip
        if result.disk:
            threads, block = result.disk["write"]
            yield _("Limit of the disk: {how}, {threads} × {block}", threads=threads,
                    how=_("direct I/O") if result.disk["direct"] else _("buffered, this disk has "
                    "no direct I/O"), block=format_bytes(block))  # fmt: skip
        rounds = max((len(series.rounds) for series in result.series.values()), default=0)
        yield _("{rounds} rounds in random order, seed {seed}; medians; [95 % interval of the "
                "ratios pair by pair]", rounds=rounds, seed=report.options.seed)  # fmt: skip


def _saves(result: Result, screen: Screen) -> Iterator[str]:
    series, durable = result.part("save"), "durable"

    def core_seconds(name: str) -> str:
        value = series.median(name, "core_seconds")
        return NOTHING if value is None else f"{value / result.nbytes * 1e9:.2f}"

    yield from _table(_("Saving"), series, screen, [DISK, MEMORY], {
        _("training stands still"): lambda name: _seconds(series.median(name, "stall")),
        _("durable after"): lambda name: _seconds(series.median(name, durable)),
        _("÷ limit of the disk"): lambda name: _ratio(series.ratio((name, durable), (DISK, durable))),  # noqa: E501
        _("÷ ours"): lambda name: _ratio(series.ratio((name, durable), (_OURS, durable))),
        _("core-s/GB"): core_seconds,
        _("syncs itself"): lambda name: _(PEERS[name].syncs) if name in PEERS else "",
    })  # fmt: skip
    if not series.rounds:
        return
    yield _("Who does not sync what it wrote, files and directories, had that done for it within "
            "the time.")  # fmt: skip
    for name in series.names():
        if name in PEERS and PEERS[name].note:
            yield f"{name}: {_(PEERS[name].note)}"
    step = series.median(OursOverlapped.name, "step")
    if step is not None:
        yield _("A step of training with a save took {time}.", time=_seconds(step))


def _loads(result: Result, screen: Screen) -> Iterator[str]:
    series = result.part("load")
    yield from _table(_("Loading"), series, screen, [DISK], {
        _("cold"): lambda name: _seconds(series.median(name, "cold")),
        _("warm"): lambda name: _seconds(series.median(name, "warm")),
        _("cold ÷ direct read"): lambda name: _ratio(series.ratio((name, "cold"), (DISK, "cold"))),
        _("warm ÷ torch.load"): lambda name: _ratio(
            series.ratio((name, "warm"), (TorchSave.name, "warm"))),
        _("verified"): lambda name: _("yes") if name == _OURS else "",
    })  # fmt: skip


def _fresh(result: Result, screen: Screen) -> Iterator[str]:
    series = result.part("fresh")

    def peak(name: str) -> str:
        value = series.median(name, "peak")
        return NOTHING if value is None else format_bytes(round(value))

    def share(name: str) -> str:
        value = series.median(name, "peak")
        return NOTHING if value is None else f"{value / result.nbytes:.2f}"

    yield from _table(_("In a new process: its first save, and the memory one save takes"), series,
                      screen, [], {
        _("first: stands still"): lambda name: _seconds(series.median(name, "first_stall")),
        _("first: durable after"): lambda name: _seconds(series.median(name, "first_durable")),
        _("extra memory"): peak,
        _("÷ state"): share,
    })  # fmt: skip


def _training(result: Result, screen: Screen) -> Iterator[str]:
    lost = training_loss.lost(result.part("training"))

    def of_theirs(name: str) -> str:
        ours, theirs = lost.median(_OURS, "lost"), lost.median(name, "lost")
        return NOTHING if not ours or not theirs or ours < 0 else f"{theirs / ours:.1f}"

    yield from _table(_("Training lost for one save in flight"), lost, screen, [], {
        _("lost"): lambda name: _seconds(lost.median(name, "lost")),
        _("95 % interval"): lambda name: _span(*lost.interval(name, "lost"), "s"),
        _("÷ ours"): of_theirs,
        _("step without"): lambda name: _seconds(lost.median(name, "step")),
    })  # fmt: skip


def _regular(result: Result, screen: Screen) -> Iterator[str]:
    series, rate = result.part("regular"), "rate"
    plain = training_loss.WITHOUT, rate
    yield from _table(_("Training with a save every 30 s"), series, screen, [plain[0]], {
        _("steps/s"): lambda name: _number(series.median(name, rate)),
        _("÷ no save"): lambda name: _ratio(series.ratio((name, rate), plain)),
    })  # fmt: skip


def _growth(results: Sequence[Result], screen: Screen) -> Iterator[str]:
    if len(results) < 2:
        return
    columns = [Column(_("size")), *(Column(title, right=True) for title in (
        _("bytes"), _("stands still"), _("durable after"), _("s/GB"), _("÷ limit of the disk"),
        "torch.save", _("torch.save, s/GB")))]  # fmt: skip
    rows = []
    for result in sorted(results, key=lambda result: result.nbytes):
        series, each = result.part("save"), 1e9 / result.nbytes
        ours, theirs = (series.median(name, "durable") for name in (_OURS, TorchSave.name))
        rows.append([
            result.size, format_bytes(result.nbytes), _seconds(series.median(_OURS, "stall")),
            _seconds(ours), _number(ours and ours * each),
            _ratio(series.ratio((_OURS, "durable"), (DISK, "durable"))),
            _seconds(theirs), _number(theirs and theirs * each),
        ])  # fmt: skip
    yield from ("", screen.bold(_("How the cost grows")), *render(columns, rows, screen))


def _bars(found: Sequence[Bar], screen: Screen) -> Iterator[str]:
    if not found:
        return
    columns = [Column(_("figure")), Column(_("bar"), True), Column(_("measured"), True),
               Column(""), Column(_("95 % interval"), True)]  # fmt: skip
    rows = [
        [bar.figure, ("≥ " if bar.least else "≤ ") + _number(bar.limit, bar.unit),
         _number(bar.value, bar.unit), "✓" if bar.met else "✗", _span(bar.low, bar.high)]
        for bar in found
    ]  # fmt: skip
    title = _("What was to be reached (set for {size})", size=SIZE)
    yield from ("", screen.bold(title), *render(columns, rows, screen))


def _table(
    title: str, series: Series, screen: Screen, first: Sequence[str], cells: dict[str, _Cell]
) -> Iterator[str]:
    """A row a contender: `first` ones first, then in the order of PEERS, then who is missing."""
    measured = series.names()
    names = [name for name in (*first, *PEERS) if name in measured]
    failed = [name for name in PEERS if name in series.failed]
    if not names and not failed:
        return
    columns = [Column(_("who")), *(Column(key, right=True, hide=i) for i, key in enumerate(cells))]
    rows = [
        [name, *(cell(name) for cell in cells.values())] for name in names if name not in failed
    ]
    yield from ("", screen.bold(title), *render(columns, rows, screen))
    yield from (f"{name}: {series.failed[name]}" for name in failed)


def _seconds(value: float | None) -> str:
    return NOTHING if value is None else _number(value, "s")


def _number(value: float | None, unit: str = "") -> str:
    """Three significant digits; seconds below a tenth in milliseconds."""
    if value is None:
        return NOTHING
    if unit == "s" and abs(value) < 0.1:
        return _("{number} ms", number=f"{value * 1e3:.3g}")
    text = f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"
    if abs(value) < 0.995:
        text = f"{value:.3f}"
    return _("{seconds} s", seconds=text) if unit else text


def _span(low: float | None, high: float | None, unit: str = "") -> str:
    return "" if low is None or high is None else f"[{_number(low, unit)}, {_number(high, unit)}]"


def _ratio(found: Ratio | None) -> str:
    if found is None:
        return NOTHING
    return f"{_number(found.value)} {_span(found.low, found.high)}".rstrip()


# ---------------------------------------------------------------------------------- JSON and plot


def to_json(report: Report) -> dict[str, Any]:
    """Every single measurement in the order it was made, and what was concluded."""
    return {
        "holdfast": __version__,
        "complete": report.complete,
        "machine": report.machine,
        "options": asdict(report.options),
        "results": [asdict(result) for result in report.results],
        "bars": [{**asdict(bar), "met": bar.met} for bar in bars(report.results)],
    }


def write(report: Report, directory: Path) -> list[Path]:
    """Write engine.json, engine.txt and, where matplotlib is installed, engine.png there."""
    directory.mkdir(parents=True, exist_ok=True)
    name = "engine_gpu" if report.machine["gpu"] else "engine"
    written = [directory / f"{name}.json", directory / f"{name}.txt"]
    text = json.dumps(to_json(report), ensure_ascii=False, indent=1)
    written[0].write_text(text + "\n", encoding="utf-8")
    written[1].write_text("\n".join(lines(report, Screen())) + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None and report.results:
        written.append(directory / f"{name}.png")
        plot(report.results, written[-1])
    return written


def plot(results: Sequence[Result], path: Path) -> None:
    """Stall and time to durable of everybody, and growth where there are several sizes."""
    from matplotlib.figure import Figure

    series = results[0].part("save")
    names = [name for name in (MEMORY, DISK, *PEERS) if name in series.names()][::-1]
    figure = Figure(figsize=(12 if len(results) > 1 else 8, 4.8), layout="constrained")
    axes = figure.subplots(1, 2 if len(results) > 1 else 1, squeeze=False)[0]
    for offset, metric, label in ((0.2, "stall", "training stands still"),
                                  (-0.2, "durable", "durable after")):  # fmt: skip
        values = [series.median(name, metric) or 0.0 for name in names]
        bars_drawn = axes[0].barh([i + offset for i in range(len(names))], values, 0.4, label=label)
        texts = [_number(value, "s") if value else "" for value in values]
        axes[0].bar_label(bars_drawn, texts, fontsize=7, padding=2)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_xlabel(f"s, for {results[0].nbytes / 1e9:.2f} GB")
    axes[0].legend(loc="upper right")
    axes[0].margins(x=0.15)  # room for the figures beside the bars
    if len(results) > 1:
        ordered = sorted(results, key=lambda result: result.nbytes)
        for name in (DISK, _OURS, TorchSave.name):
            points = [(r.nbytes / 1e9, r.part("save").median(name, "durable")) for r in ordered]
            known = [(x, y) for x, y in points if y is not None]
            axes[1].plot([x for x, _y in known], [y for _x, y in known], "o-", label=name)
        axes[1].set(xlabel="GB", ylabel="s until durable", xscale="log", yscale="log")
        axes[1].legend()
    figure.savefig(path, dpi=120)
