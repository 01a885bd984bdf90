"""The report of the benchmark: tables as text, JSON with every single measurement, a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.engine import training_loss
from benchmarks.engine.bars import SIZE, Bar, bars
from benchmarks.engine.frameworks import PEERS
from benchmarks.engine.measure import Ratio, Series, interval
from benchmarks.engine.peers import Ours, OursOverlapped, TorchSave
from benchmarks.engine.run import DISK, MEMORY, Report, Result
from holdfast import __version__
from holdfast.formatting import NOTHING, format_bytes
from holdfast.table import PIPE, Column, render

_OURS = Ours.name
_Cell = Callable[[str], str]  # the name of a contender → the text of its cell


# ------------------------------------------------------------------------------------- tables


def lines(report: Report) -> Iterator[str]:
    """Yield the whole report as text."""
    yield from _head(report)
    for result in report.results[:1]:
        for part in (_saves, _loads, _fresh, _training, _regular):
            yield from part(result)
    yield from _growth(report.results)
    yield from _bars(bars(report.results))
    if not report.complete:
        yield from ("", "This run was interrupted: the tables show what there was by then.")


def _head(report: Report) -> Iterator[str]:
    about = report.machine
    device = about["gpu"] or f"{about['processor']}, {about['cores']} cores"
    system, torch, kind = about["system"], about["torch"], about["filesystem"] or NOTHING
    yield f"Machine: {device}; {system}; torch {torch}; file system {kind}"
    for result in report.results[:1]:
        size = f"{format_bytes(result.nbytes)} ({result.nbytes:,} bytes)"
        yield (
            f"State: {result.parameters:,} parameters with AdamW, {size} in {result.tensors} "
            "tensors"
        )
        if result.disk:
            threads, block = result.disk["write"]
            direct = result.disk["direct"]
            how = "direct I/O" if direct else "buffered, this disk has no direct I/O"
            yield f"Limit of the disk: {how}, {threads} × {format_bytes(block)}"
        rounds = max((len(series.rounds) for series in result.series.values()), default=0)
        what = "medians; [95 % interval of the ratios pair by pair]"
        yield f"{rounds} rounds in random order; {what}"


def _saves(result: Result) -> Iterator[str]:
    series, durable = result.part("save"), "durable"

    def core_seconds(name: str) -> str:
        value = series.median(name, "core_seconds")
        return NOTHING if value is None else f"{value / result.nbytes * 1e9:.2f}"

    def beside(other: str) -> _Cell:
        return lambda name: _ratio(series.ratio((name, durable), (other, durable)))

    cells: dict[str, _Cell] = {
        "training stands still": lambda name: _seconds(series.median(name, "stall")),
        "durable after": lambda name: _seconds(series.median(name, durable)),
        "÷ limit of the disk": beside(DISK),
        "÷ ours": beside(_OURS),
        "core-s/GB": core_seconds,
        "syncs itself": lambda name: PEERS[name].syncs if name in PEERS else "",
    }
    yield from _table("Saving", series, [DISK, MEMORY], cells)
    if not series.rounds:
        return
    yield "Files and directories that a saver did not sync were synced for it, within its time."
    for name in series.names():
        if name in PEERS and PEERS[name].note:
            yield f"{name}: {PEERS[name].note}"
    step = series.median(OursOverlapped.name, "step")
    if step is not None:
        yield f"A step of training with a save took {_seconds(step)}."


def _loads(result: Result) -> Iterator[str]:
    series = result.part("load")

    def beside(other: str, metric: str) -> _Cell:
        return lambda name: _ratio(series.ratio((name, metric), (other, metric)))

    cells: dict[str, _Cell] = {
        "cold": lambda name: _seconds(series.median(name, "cold")),
        "warm": lambda name: _seconds(series.median(name, "warm")),
        "cold ÷ direct read": beside(DISK, "cold"),
        "warm ÷ torch.load": beside(TorchSave.name, "warm"),
        "verified": lambda name: "yes" if name == _OURS else "",
    }
    yield from _table("Loading", series, [DISK], cells)


def _fresh(result: Result) -> Iterator[str]:
    series = result.part("fresh")

    def peak(name: str) -> str:
        value = series.median(name, "peak")
        return NOTHING if value is None else format_bytes(round(value))

    def share(name: str) -> str:
        value = series.median(name, "peak")
        return NOTHING if value is None else f"{value / result.nbytes:.2f}"

    cells: dict[str, _Cell] = {
        "first: stands still": lambda name: _seconds(series.median(name, "first_stall")),
        "first: durable after": lambda name: _seconds(series.median(name, "first_durable")),
        "extra memory": peak,
        "÷ state": share,
    }
    title = "In a new process: its first save, and the memory one save takes"
    yield from _table(title, series, [], cells)


def _training(result: Result) -> Iterator[str]:
    lost = training_loss.lost(result.part("training"))

    def beside_ours(name: str) -> str:
        ours, theirs = lost.median(_OURS, "lost"), lost.median(name, "lost")
        return NOTHING if not ours or not theirs or ours < 0 else f"{theirs / ours:.1f}"

    cells: dict[str, _Cell] = {
        "lost": lambda name: _seconds(lost.median(name, "lost")),
        "95 % interval": lambda name: _span(*interval(lost.values(name, "lost")), "s"),
        "÷ ours": beside_ours,
        "step without": lambda name: _seconds(lost.median(name, "step")),
    }
    yield from _table("Training lost for one save in flight", lost, [], cells)


def _regular(result: Result) -> Iterator[str]:
    series, without = result.part("regular"), training_loss.WITHOUT
    cells: dict[str, _Cell] = {
        "steps/s": lambda name: _number(series.median(name, "rate")),
        "÷ no save": lambda name: _ratio(series.ratio((name, "rate"), (without, "rate"))),
    }
    yield from _table("Training with a save every 30 s", series, [without], cells)


def _growth(results: Sequence[Result]) -> Iterator[str]:
    if len(results) < 2:
        return
    titles = "bytes", "stands still", "durable after", "s/GB", "÷ limit of the disk"
    theirs_titles = "torch.save", "torch.save, s/GB"
    columns = [Column("size"), *(Column(title, right=True) for title in (*titles, *theirs_titles))]
    rows = []
    for result in sorted(results, key=lambda result: result.nbytes):
        series, each = result.part("save"), 1e9 / result.nbytes
        ours, theirs = (series.median(name, "durable") for name in (_OURS, TorchSave.name))
        row = [
            result.size,
            format_bytes(result.nbytes),
            _seconds(series.median(_OURS, "stall")),
            _seconds(ours),
            _number(ours and ours * each),
            _ratio(series.ratio((_OURS, "durable"), (DISK, "durable"))),
            _seconds(theirs),
            _number(theirs and theirs * each),
        ]
        rows.append(row)
    yield from ("", "How the cost grows", *render(columns, rows, PIPE))


def _bars(found: Sequence[Bar]) -> Iterator[str]:
    if not found:
        return
    columns = [
        Column("figure"),
        Column("bar", right=True),
        Column("measured", right=True),
        Column(""),
        Column("95 % interval", right=True),
    ]
    rows = []
    for bar in found:
        limit = ("≥ " if bar.least else "≤ ") + _number(bar.limit, bar.unit)
        value, verdict = _number(bar.value, bar.unit), "✓" if bar.met else "✗"
        rows.append([bar.figure, limit, value, verdict, _span(bar.low, bar.high)])
    yield from ("", f"What was to be reached (set for {SIZE})", *render(columns, rows, PIPE))


def _table(
    title: str, series: Series, first: Sequence[str], cells: dict[str, _Cell]
) -> Iterator[str]:
    """Yield a row for each contender: `first`, then in the order of PEERS, then the failed ones."""
    measured = series.names()
    names = [name for name in (*first, *PEERS) if name in measured and name not in series.failed]
    failed = [name for name in PEERS if name in series.failed]
    if not names and not failed:
        return
    columns = [Column("who"), *(Column(key, right=True) for key in cells)]
    rows = [[name, *(cell(name) for cell in cells.values())] for name in names]
    yield from ("", title, *render(columns, rows, PIPE))
    yield from (f"{name}: {series.failed[name]}" for name in failed)


def _seconds(value: float | None) -> str:
    return _number(value, "s")


def _number(value: float | None, unit: str = "") -> str:
    """Return three significant digits; seconds below a tenth in milliseconds."""
    if value is None:
        return NOTHING
    if unit == "s" and abs(value) < 0.1:
        return f"{value * 1e3:.3g} ms"
    digits = next((n for n, end in ((3, 0.995), (2, 9.995), (1, 99.95)) if abs(value) < end), 0)
    return f"{value:.{digits}f} {unit}".rstrip()


def _span(low: float | None, high: float | None, unit: str = "") -> str:
    return "" if low is None or high is None else f"[{_number(low, unit)}, {_number(high, unit)}]"


def _ratio(found: Ratio | None) -> str:
    if found is None:
        return NOTHING
    return f"{_number(found.value)} {_span(found.low, found.high)}".rstrip()


# ---------------------------------------------------------------------------------- JSON and plot


def write(report: Report, directory: Path) -> None:
    """Write engine.json, engine.txt and engine.png (engine_gpu.* on a GPU) to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ("engine_gpu" if report.machine["gpu"] else "engine")
    text = json.dumps(to_json(report), ensure_ascii=False, indent=1)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    path.with_suffix(".txt").write_text("\n".join(lines(report)) + "\n", encoding="utf-8")
    if report.results:
        plot(report.results[0], path.with_suffix(".png"))


def to_json(report: Report) -> dict[str, Any]:
    """Return every single measurement in the order in which it was made, and the bars."""
    return {
        "holdfast": __version__,
        "complete": report.complete,
        "machine": report.machine,
        "options": asdict(report.options),
        "results": [asdict(result) for result in report.results],
        "bars": [{**asdict(bar), "met": bar.met} for bar in bars(report.results)],
    }


def plot(result: Result, path: Path) -> None:
    """Draw stall and time to durable of every contender: docs/images/saving.png."""
    from matplotlib.figure import Figure

    series = result.part("save")
    names = [name for name in (MEMORY, DISK, *PEERS) if name in series.names()][::-1]
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    metrics = (0.2, "stall", "training stands still"), (-0.2, "durable", "durable after")
    for offset, metric, label in metrics:
        values = [series.median(name, metric) or 0.0 for name in names]
        drawn = axes.barh([i + offset for i in range(len(names))], values, 0.4, label=label)
        texts = [_seconds(value) if value else "" for value in values]
        axes.bar_label(drawn, texts, fontsize=7, padding=2)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"s, for {result.nbytes / 1e9:.2f} GB")
    axes.legend(loc="upper right")
    axes.margins(x=0.15)  # room for the figures beside the bars
    figure.savefig(path, dpi=120)
