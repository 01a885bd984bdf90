"""The runs under some directories, looked at once a second while a page asks, for all pages.

One RunView a run. Each directory has threads of its own, so that one that hangs (a lost network
disk) holds up no other. Pages read finished pictures, never a view.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.monitor.measured import Point
from holdfast.monitor.run_view import RunView, find_runs
from holdfast.monitor.web import data as web_data

LOOK_EVERY = 0.9  # seconds: a little less than a page waits between two questions
SEARCH_EVERY = 3.0  # seconds between two searches for new runs
PATIENCE = 3.0  # seconds that an answer waits for directories that are slow
_STEADY = 15.0  # seconds after which a picture is drawn anew without news: the disk, the minutes
_THREADS = 3  # of a directory: one looks, the others read logs and compare


@dataclass(frozen=True, slots=True)
class Picture:
    """A run at one moment; never changed. `era` is another where points have been taken back."""

    number: int
    era: int
    row: dict[str, Any]
    detail: dict[str, Any]
    points: tuple[Point, ...]

    @property
    def version(self) -> str:
        """The text by which a page names the picture that it has, to get only what has come
        since."""
        return f"{self.number}.{self.era}.{len(self.points)}"

    def news(self, have: str) -> dict[str, Any]:
        """Return what a page that has the picture of version `have` ("" for none) must be told.

        `same`: nothing. `more`: everything anew but the curves, of which only the points that have
        come. Else everything, the curves thinned.
        """
        if have == self.version:
            return {"same": True}
        told = {**self.detail, **self.row, "version": self.version}
        era, count = _known(have)
        new = self.points[count:]
        if era == self.era and count and len(new) < web_data.CURVE_POINTS:
            return {**told, "more": True, "curves": web_data.curves(new)}
        return {**told, "curves": web_data.curves(web_data.thin(self.points))}


def _known(version: str) -> tuple[int, int]:
    """Return era and points of a version as a page sends it; a page may send anything."""
    with contextlib.suppress(ValueError):
        _number, era, count = map(int, version.split("."))
        return era, max(0, count)
    return -1, 0


class Workers:
    """A few threads for work that may hang.

    An executor would be waited for when the program ends. A thread that is stuck in a dead disk
    must not keep Ctrl-C from ending it.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._to_start = _THREADS

    def submit(self, work: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Let a thread do `work`; call it from the loop that awaits the result."""
        if self._to_start:
            self._to_start -= 1
            threading.Thread(target=self._loop, name="look", daemon=True).start()
        future: Future[Any] = Future()
        self._work.put((future, lambda: work(*args)))
        return asyncio.wrap_future(future)

    def _loop(self) -> None:
        while True:
            future, work = self._work.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
                    future.set_exception(error)


class Feed:
    """One run: draws a new picture where there is something new. Looked at by one thread."""

    def __init__(self, root: Path, directory: Path) -> None:
        self.directory = directory
        self.id = web_data.run_id(directory)
        self.name = _name(root, directory)
        self.picture: Picture | None = None
        self.problem = ""
        self._view = RunView(directory)
        self._seen: tuple[str, int | None] = "", None
        self._drawn = 0.0

    def look(self) -> bool:
        """Read what has come; return whether the directory is still there."""
        try:
            news = self._view.refresh()
            # Both change without a line: the one with a kill, the other with every snapshot.
            seen = self._view.state, self._view.memory_step
            old = time.monotonic() - self._drawn > _STEADY
            if news or old or self.picture is None or seen[0] != self._seen[0]:
                self._draw()
                self._drawn = time.monotonic()
            elif seen != self._seen:
                row = web_data.summary(self._view, self.id, self.name)
                self.picture = replace(self.picture, row=row)  # the rest is as it was
            self._seen = seen
            self.problem = ""
        except Exception as error:  # noqa: BLE001 - any file may lie there: it is shown, not lost
            self.problem = str(error)
            return self.directory.is_dir()
        return True

    def _draw(self) -> None:
        before, points = self.picture, tuple(self._view.points)
        number = era = 0
        if before is not None:
            count = len(before.points)
            grown = len(points) >= count and (not count or points[count - 1] is before.points[-1])
            number, era = before.number + 1, before.era + (not grown)
        found = web_data.detail(self._view, self.id, self.name)
        row = web_data.summary(self._view, self.id, self.name)
        self.picture = Picture(number, era, row, found, points)


class Root:
    """One directory with the runs below it; everything here runs in its looking thread."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.workers = Workers()
        self.feeds: dict[str, Feed] = {}
        self.problem = ""  # why it could not be searched
        self._searched = -SEARCH_EVERY

    def look(self) -> None:
        """Look for new runs now and then, and at every run."""
        if time.monotonic() - self._searched >= SEARCH_EVERY:
            self._searched = time.monotonic()
            self._search()
        there = {id_: feed for id_, feed in list(self.feeds.items()) if feed.look()}
        self.feeds = there  # exchanged in one piece: pages read it meanwhile

    def _search(self) -> None:
        """Take in new runs. find_runs follows no links; what a race puts in is checked here."""
        try:
            found = [p for p in find_runs(self.path) if p.resolve().is_relative_to(self.path)]
            self.path.stat()
        except OSError as error:
            self.problem = str(error.strerror or error)
            return
        self.problem = ""
        known = {feed.directory for feed in self.feeds.values()}
        new = [Feed(self.path, directory) for directory in found if directory not in known]
        self.feeds = {**self.feeds, **{feed.id: feed for feed in new}}


class Hub:
    """All runs under some directories. Everything here runs in one event loop."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = [Root(path) for path in roots]
        self._looks: dict[Root, tuple[asyncio.Future[Any], float]] = {}  # the last, and its begin

    async def fresh(self) -> None:
        """Look at what was looked at long ago, and wait a while for directories that are slow."""
        now = time.monotonic()
        for root in self._roots:
            look, began = self._looks.get(root, (None, 0.0))
            if look is None or (look.done() and now - began >= LOOK_EVERY):
                self._looks[root] = root.workers.submit(root.look), now
        looks = self._looks.values()
        waiting = [look for look, began in looks if not look.done() and now - began < PATIENCE]
        if waiting:
            await asyncio.wait(waiting, timeout=PATIENCE)

    def problems(self) -> dict[str, str]:
        """Return what cannot be read, directories and runs, and why."""
        roots = {str(root.path): root.problem for root in self._roots if root.problem}
        runs = {str(feed.directory): feed.problem for feed in self._feeds() if feed.problem}
        return {**roots, **runs}

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of all runs, those that train first, then by the newest."""
        rows = [feed.picture.row for feed in self._feeds() if feed.picture is not None]
        rows.sort(key=lambda row: row["name"])
        rows.sort(key=lambda row: row["updated"] or 0, reverse=True)
        rows.sort(key=lambda row: row["state"] != "training")
        return rows

    def chosen(self, identities: Iterable[str]) -> list[Feed]:
        """Return the feeds of these ids; an id that is none of ours is left out."""
        known = {feed.id: feed for feed in self._feeds()}
        return [known[each] for each in dict.fromkeys(identities) if each in known]

    async def read(self, feeds: Sequence[Feed], work: Callable[..., Any], *args: Any) -> Any:
        """Let the threads of the first of `feeds` do something that touches the disk."""
        first = feeds[0].id if feeds else ""
        root = next((root for root in self._roots if first in root.feeds), self._roots[0])
        return await root.workers.submit(work, *args)

    def _feeds(self) -> list[Feed]:
        return list(
            {id_: feed for root in self._roots for id_, feed in root.feeds.items()}.values()
        )


def _name(root: Path, directory: Path) -> str:
    """Return what a person calls the run: its path below the directory that was given."""
    below = directory.relative_to(root).as_posix()
    return root.name or str(root) if below == "." else below
