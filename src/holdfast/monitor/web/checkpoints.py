"""The checkpoints of a run as a timeline: those that are there, and those that were, and why.

From the catalogue and the history together; what is gone is known from its events alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.checkpoint.rundir import Entry
from holdfast.formatting import parse_time
from holdfast.manage.rundir import DAMAGED, names_of, number
from holdfast.monitor.measured import integer
from holdfast.monitor.run_view import RunView

KEPT, REMOVED, QUARANTINED, ARCHIVED = "kept", "removed", "quarantined", "archived"
GONE_SHOWN = 200  # of those that are gone, the newest


def checkpoint_rows(view: RunView) -> tuple[list[dict[str, Any]], int]:
    """Return a row for each checkpoint, newest first, and how many older ones were left out."""
    rows = _from_history(view)
    best = view.run.contents.best if view.run is not None else None
    newest = view.entries[0] if view.entries else None
    for entry in view.entries:
        row = rows.pop(entry.id, {})  # moves to the end: the catalogue's order is the truth
        rows[entry.id] = {**row, **_of_entry(entry, best, newest)}
    if view.run is not None:
        damaged = {name for name, _why in view.run.contents.damaged}
        for row in rows.values():
            lies_damaged = row["fate"] == REMOVED and not damaged.isdisjoint(row["names"])
            row["fate"] = DAMAGED if lies_damaged else row["fate"]
            row["damaged"] = lies_damaged or row["id"] in view.run.distrusted
    there = [row for row in rows.values() if row["fate"] == KEPT]
    gone = [row for row in rows.values() if row["fate"] != KEPT]
    shown = there + gone[-GONE_SHOWN:]
    shown.sort(key=_order, reverse=True)
    return shown, max(0, len(gone) - GONE_SHOWN)


def _order(row: dict[str, Any]) -> tuple[int, int, int]:
    """Sort by the step last: many loops count it anew in each epoch."""
    return row["generation"] or 0, row["time"] or 0, row["step"]


def _from_history(view: RunView) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    by_name: dict[str, str] = {}
    for event in view.events:
        kind, id_ = event.get("event"), str(event.get("id"))
        names = names_of(event)
        if kind == "durable" and isinstance(event.get("step"), int):
            rows.pop(id_, None)
            rows[id_] = _of_event(event, names)
            by_name |= dict.fromkeys(names, id_)
        elif kind == "verified" and id_ in rows:
            rows[id_]["verified"] = True
        elif kind in (REMOVED, QUARANTINED, ARCHIVED):
            meant = [id_] if id_ in rows else [by_name[n] for n in names if n in by_name]
            for each in meant:
                reason = event.get("reason")
                rows[each] |= {"fate": kind, "why": None if reason is None else str(reason)}
    for row in rows.values():
        if row["fate"] == KEPT:  # of a history that does not say where it went
            row["fate"] = REMOVED
    return rows


_UNKNOWN: dict[str, Any] = {  # a checkpoint of which only the history tells
    "epoch": None,
    "generation": None,
    "size": None,
    "seconds": None,
    "stall": None,
    "verified": False,
    "damaged": False,
    "pinned": False,
    "best": False,
    "newest": False,
    "val_loss": None,
    "fate": KEPT,
    "why": None,
}


def _of_event(event: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    return {
        **_UNKNOWN,
        "id": str(event.get("id")),
        "step": event["step"],
        "kind": str(event.get("kind") or ""),
        "reason": str(event.get("reason") or ""),
        "time": milliseconds(event.get("time")),
        "names": names,
        **{name: integer(event.get(name)) for name in ("epoch", "generation", "size")},
        **{name: number(event.get(name)) for name in ("seconds", "stall")},
    }


def _of_entry(entry: Entry, best: Entry | None, newest: Entry | None) -> dict[str, Any]:
    same = ("id", "step", "epoch", "generation", "kind", "reason", "size", "verified", "pinned")
    return {
        **{name: getattr(entry, name) for name in same},
        "time": milliseconds(entry.created),
        "names": list(entry.names),
        "damaged": False,
        "best": best is not None and best.id == entry.id,
        "newest": newest is not None and newest.id == entry.id,
        "val_loss": number(entry.metrics.get("val_loss")),
        "fate": KEPT,
        "why": None,
    }


def milliseconds(text: object) -> int | None:
    """Return a time as a page counts it, since 1970; None where it is none."""
    time = parse_time(text)
    return None if time is None else round(time.timestamp() * 1000)
