"""The runs under some directories, looked at once a second while somebody watches, for all who do.

One RunView a run, shared by every page; each directory has threads of its own, so that one that
hangs (a lost network disk) holds up nobody else. Pages read finished pictures, never a view.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.monitor import web_data
from holdfast.monitor.run_view import Point, RunView, find_runs

LOOK_EVERY = 1.0  # seconds
SEARCH_EVERY = 3.0  # seconds between two searches for new runs
FIRST_PATIENCE = 3.0  # seconds that the first look waits for directories that are slow
_PATIENCE = 1.0  # and every later one
_STEADY = 15.0  # seconds after which a picture is drawn anew without news: the disk, the minutes
_THREADS = 3  # of a directory


@dataclass(frozen=True, slots=True)
class Picture:
    """A run at one moment; never changed. `era` is another where points have been taken back."""

    number: int
    era: int
    row: dict[str, Any]
    detail: dict[str, Any]
    points: tuple[Point, ...]


class Workers:
    """A few threads that do what may hang. An executor would be waited for when the program ends;
    a thread that is stuck in a dead disk must not keep Ctrl-C from ending it."""

    def __init__(self, count: int) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._free = count  # threads that have not been started yet

    def submit(self, work: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Let a thread do `work`; call it from the loop that awaits the result."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def tell(result: Any, error: BaseException | None) -> None:
            if future.done():  # nobody waits any more
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def run() -> None:
            result, error = None, None
            try:
                result = work(*args)
            except BaseException as met:  # noqa: BLE001 - it is raised where it is awaited
                error = met
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(tell, result, error)

        if self._free:
            self._free -= 1
            threading.Thread(target=self._loop, name="look", daemon=True).start()
        self._work.put(run)
        return future

    def close(self) -> None:
        """The threads end when they have done what they are at."""
        for _i in range(_THREADS):
            self._work.put(None)

    def _loop(self) -> None:
        while (run := self._work.get()) is not None:
            run()


class Feed:
    """One run: draws a new picture where there is something new."""

    def __init__(self, root: Path, directory: Path) -> None:
        self.directory = directory
        self.id = web_data.run_id(directory)
        self.name = _name(root, directory)
        self.picture: Picture | None = None
        self.problem = ""
        self.missing = False  # the directory is gone
        self._view = RunView(directory)
        self._lock = threading.Lock()
        self._seen: tuple[str, int | None] = "", None
        self._drawn = 0.0

    def look(self) -> None:
        """Read what has come. In a thread; does nothing where another is at it already."""
        if not self._lock.acquire(blocking=False):
            return
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
            self.problem, self.missing = "", False
        except Exception as error:  # noqa: BLE001 - anybody may have written there: it is shown, not lost
            self.problem, self.missing = str(error), not self.directory.is_dir()
        finally:
            self._lock.release()

    def _draw(self) -> None:
        before, points = self.picture, tuple(self._view.points)
        era = 0
        if before is not None:
            count = len(before.points)
            grown = len(points) >= count and (not count or points[count - 1] is before.points[-1])
            era = before.era if grown else before.era + 1
        found = web_data.detail(self._view, self.id, self.name)
        row = web_data.summary(self._view, self.id, self.name)
        number = before.number + 1 if before is not None else 1
        self.picture = Picture(number, era, row, found, points)


class Hub:
    """All runs under `roots`; `watching` while a page is open."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = [root.resolve() for root in roots]
        self.feeds: dict[str, Feed] = {}
        self.closing = False
        self.problems: dict[str, str] = {}  # directories that could not be searched
        self._workers = {root: Workers(_THREADS) for root in self.roots}
        self._busy: dict[object, asyncio.Future[None]] = {}
        self._searched = -SEARCH_EVERY
        self._watchers: set[asyncio.Event] = set()
        self._task: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Let every stream end. May be called from a signal handler."""
        self.closing = True
        for event in list(self._watchers):
            with contextlib.suppress(RuntimeError):
                event.set()

    def shut(self) -> None:
        """Give the threads back; one that hangs in a dead directory is left to itself."""
        self.close()
        for workers in self._workers.values():
            workers.close()

    # ------------------------------------------------------------------------------------- asking

    def troubles(self) -> dict[str, str]:
        """What cannot be read, directories and runs, and why."""
        runs = {
            str(f.directory): f.problem
            for f in list(self.feeds.values())
            if f.problem and not f.missing
        }
        return {**self.problems, **runs}

    def rows(self) -> list[dict[str, Any]]:
        """The runs, those that train first, then by the newest."""
        pictures = [feed.picture for feed in self.feeds.values() if feed.picture is not None]
        rows = [picture.row for picture in pictures]
        rows.sort(key=lambda row: row["name"])
        rows.sort(key=lambda row: row["updated"] or 0, reverse=True)
        rows.sort(key=lambda row: row["state"] != "training")
        return rows

    def chosen(self, identities: Iterable[str]) -> list[Feed]:
        """The feeds of these ids; an id that is none of ours is left out."""
        return [self.feeds[each] for each in dict.fromkeys(identities) if each in self.feeds]

    async def read(self, feeds: Sequence[Feed], work: Callable[..., Any], *args: Any) -> Any:
        """Let the threads of the first of `feeds` do something that touches the disk."""
        root = self._root_of(feeds[0]) if feeds else self.roots[0]
        return await self._workers[root].submit(work, *args)

    async def fresh(self) -> None:
        """Look now, unless a page that watches has it looked at anyway."""
        if self._task is None or self._task.done():
            await self._look(patience=FIRST_PATIENCE)

    # ----------------------------------------------------------------------------------- watching

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[asyncio.Event]:
        """An event that is set whenever there was a look; runs are looked at while this is open."""
        event = asyncio.Event()
        event.set()
        self._watchers.add(event)
        try:
            if self._task is None or self._task.done():
                await self._look(patience=FIRST_PATIENCE)
                if self._task is None or self._task.done():
                    self._task = asyncio.create_task(self._keep_looking())
            yield event
        finally:
            self._watchers.discard(event)

    async def _keep_looking(self) -> None:
        while self._watchers and not self.closing:
            await asyncio.sleep(LOOK_EVERY)
            await self._look(patience=_PATIENCE)
            for event in list(self._watchers):
                event.set()

    async def _look(self, *, patience: float) -> None:
        if self.closing:
            return
        if time.monotonic() - self._searched >= SEARCH_EVERY:
            self._searched = time.monotonic()
            for root in self.roots:
                self._begin(root, root, self._search, root)
            await self._settle(patience)
        for feed in list(self.feeds.values()):
            if feed.missing:
                del self.feeds[feed.id]
            else:
                self._begin(feed.id, self._root_of(feed), feed.look)
        await self._settle(patience)

    def _begin(self, key: object, root: Path, work: Any, *args: Any) -> None:
        if key not in self._busy or self._busy[key].done():
            self._busy[key] = self._workers[root].submit(work, *args)

    async def _settle(self, patience: float) -> None:
        waiting = {future for future in self._busy.values() if not future.done()}
        if waiting:
            await asyncio.wait(waiting, timeout=patience)

    def _root_of(self, feed: Feed) -> Path:
        return next(r for r in self.roots if feed.directory.is_relative_to(r))

    def _search(self, root: Path) -> None:
        """In a thread. Links are not followed by find_runs; what a race puts in is checked here."""
        try:
            found = [path for path in find_runs(root) if path.resolve().is_relative_to(root)]
            root.stat()
        except OSError as error:
            self.problems[str(root)] = str(error.strerror or error)
            return
        self.problems.pop(str(root), None)
        for path in found:
            identity = web_data.run_id(path)
            if identity not in self.feeds:
                self.feeds[identity] = Feed(root, path)


def _name(root: Path, directory: Path) -> str:
    """What a person calls the run: its path below the directory that was given."""
    below = directory.relative_to(root).as_posix()
    return root.name or str(root) if below == "." else below


class Cursor:
    """What one page has been told already, and what it has to be told next."""

    def __init__(self, hub: Hub, wanted: Sequence[str]) -> None:
        self._hub, self._wanted = hub, list(wanted)
        self._told: dict[str, tuple[int, int, int]] = {}  # picture, era, points
        self._sent: dict[str, int] = {}  # points since the page has had all of a run, thinned
        self._rows: list[dict[str, Any]] | None = None
        self._problems: dict[str, str] = {}

    def news(self) -> list[tuple[str, dict[str, Any]]]:
        """Events for the page: "runs" (all rows), "rows" (those that have changed, where they are
        the same runs in the same order), "run" (one, whole), "more" (one, what has come).

        "more" has everything but the curves anew, and the points since the last one.
        """
        found = self._news_of_rows(self._hub.rows(), self._hub.troubles())
        for feed in self._hub.chosen(self._wanted):
            picture = feed.picture
            if picture is not None:
                found += self._news_of(feed.id, picture)
        return found

    def _news_of_rows(
        self, rows: list[dict[str, Any]], problems: dict[str, str]
    ) -> list[tuple[str, dict[str, Any]]]:
        before, told = self._rows or [], self._rows is not None
        same = [row["id"] for row in rows] == [row["id"] for row in before]
        moved = not told or not same or problems != self._problems
        self._rows, self._problems = rows, problems
        if moved:
            return [("runs", {"runs": rows, "problems": problems})]
        changed = [row for row, old in zip(rows, before, strict=True) if row != old]
        return [("rows", {"runs": changed})] if changed else []

    def _news_of(self, identity: str, picture: Picture) -> list[tuple[str, dict[str, Any]]]:
        number, era, count = self._told.get(identity, (0, -1, 0))
        if number == picture.number:
            return []
        new = picture.points[count:]
        self._told[identity] = (picture.number, picture.era, len(picture.points))
        self._sent[identity] = self._sent.get(identity, 0) + len(new)
        if era == picture.era and self._sent[identity] < web_data.CURVE_POINTS:
            return [("more", {**picture.detail, "curves": web_data.curves(new)})]
        self._sent[identity] = 0
        return [("run", whole(picture))]


def whole(picture: Picture) -> dict[str, Any]:
    """A run with its curves, thinned; the row is newer than the rest where only memory moved."""
    return {
        **picture.detail,
        **picture.row,
        "curves": web_data.curves(web_data.thin(picture.points)),
    }
