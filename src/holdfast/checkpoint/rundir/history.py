"""Append to `events.jsonl`, the history of a run directory, and read each line of it once.

Several processes append to it (the trainer, clean, pin), so facts come from the file and never from
memory of what this process wrote. Parsing the whole file for each save would slow an old run down:
each line is folded into `Known`, whose size follows the checkpoints that exist now. No torch.
"""

from __future__ import annotations

import datetime
import functools
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from holdfast.checkpoint.format import patiently
from holdfast.checkpoint.policy import Order
from holdfast.checkpoint.system import (
    LARGEST,
    ROTTEN,
    Follower,
    filesystem,
    is_sane,
    objects,
    sealed,
)
from holdfast.i18n import _

log = logging.getLogger("holdfast")

Event = dict[str, Any]

# A whole line about one checkpoint, as `record` writes it, without its checksum.
_mark = re.compile(
    rb'{"time": "[^"]*", "event": "(durable|verified|damaged|removed)", '
    rb'"id": "([0-9a-f]{32})"[^{}]*}'
).fullmatch

ROLLED_BACK = "rolled_back"
_GONE_ON = ("began", "resumed")  # after one of these, or a save, a roll-back is over


def is_later(event: Mapping[str, Any], order: Order, step: int) -> bool:
    """Return True if `event`, one of `Known.announced`, tells of a later save than `order`.

    Lines of earlier versions do not say the sequence; there the step decides, as it did then.
    """
    generation, sequence = event["generation"], event.get("sequence")
    if isinstance(sequence, int):
        return (generation, sequence) > order
    return (generation, event["step"]) > (order[0], step)


@dataclass(frozen=True, slots=True)
class Rollback:
    """A roll-back, as a line of the history tells it."""

    id: str
    run_id: str | None  # of the state; lines of nonsense may not tell
    order: Order  # of the state, as Entry.order
    step: int
    generation: int  # the one that begins with it
    source: str | None  # where the state lies in the archive; None: among the others

    def abandons(self, event: Mapping[str, Any]) -> bool:
        """Return True if this abandons the save that `event`, one of `announced`, tells of."""
        return event["generation"] < self.generation and is_later(event, self.order, self.step)

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Rollback | None:
        """Return the roll-back that a line of the history tells of; None if it makes no sense."""
        id_, order, generation = (event.get(name) for name in ("id", "order", "generation"))
        source = event.get("source")
        if not isinstance(generation, int) or not isinstance(id_, str):
            return None
        if not isinstance(order, list) or [type(number) for number in order] != [int] * 3:
            return None
        if source is not None and not is_archived(source):
            return None
        run_id = event.get("run_id")
        run_id = run_id if isinstance(run_id, str) else None
        return cls(id_, run_id, (order[0], order[2]), order[1], generation, source)


def now() -> str:
    """Return the local time with its zone, ISO 8601."""
    return datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")


def is_archived(source: object) -> bool:
    """Return True if `source`, relative to a run directory, names a file in its archive."""
    parts = PurePosixPath(source).parts if _is_name(source) else ()
    return parts[:1] == ("archive",) and ".." not in parts


def _is_name(value: object) -> TypeGuard[str]:
    """Return True if `value` may name a file; the line may come from a stranger."""
    return isinstance(value, str) and "\0" not in value


@dataclass(slots=True)
class Known:
    """Sum of all events until now. Checkpoints that were removed are forgotten."""

    verified: set[str] = field(default_factory=set)  # ids: read back and right when last checked
    damaged: set[str] = field(default_factory=set)  # ids: `holdfast verify` has found damage since
    pinned: set[str] = field(default_factory=set)  # ids, whether they lie here or in the archive
    announced: dict[str, Event] = field(default_factory=dict)  # "durable" by first name, in order
    saved: set[str] = field(default_factory=set)  # ids, whether they lie here or in the archive
    names: set[str] = field(default_factory=set)  # all names of announced checkpoints
    run: tuple[str, int] | None = None  # run id and generation that were begun last
    generation: int = 0  # the highest that was begun
    sequence: int = 0  # the highest number of a save that was announced
    rotten: int = 0  # lines whose checksum is wrong
    back: Rollback | None = None  # the last roll-back
    pending: Rollback | None = None  # the same, until a training has gone on from it

    def take(self, event: Event) -> None:
        """Take in the next event; its fields may be anything."""
        kind, id_, generation = event.get("event"), event.get("id"), event.get("generation")
        id_ = id_ if isinstance(id_, str) else str(id_)
        if isinstance(generation, int) and generation < LARGEST:
            self.generation = max(self.generation, generation)
            if isinstance(event.get("run_id"), str):
                self.run = event["run_id"], generation
        if kind == "verified":
            self.verified.add(id_)
            self.damaged.discard(id_)
        elif kind == "removed":
            self.verified.discard(id_)
            self.damaged.discard(id_)
            self.saved.discard(id_)
            self._left(event, gone=True)
        elif kind == "durable":
            self.saved.add(id_)
            self._announced(event)
            self.pending = None
        elif kind == "damaged":
            self.verified.discard(id_)
            self.damaged.add(id_)
        elif kind == "pinned":
            self.pinned.add(id_)
        elif kind == "unpinned":
            self.pinned.discard(id_)
        else:
            self._moved(kind, event)

    def _moved(self, kind: object, event: Event) -> None:
        if kind in _GONE_ON:
            self.pending = None
        elif kind == ROLLED_BACK:
            back = Rollback.of(event)
            if back is not None:
                self.back = self.pending = back
        elif kind == "archived":
            self._left(event, gone=False)
        elif kind == "rotten":
            self.rotten += event.get("lines", 1)
            self.pinned |= self.saved  # it may have pinned any of them; these are never removed

    def _announced(self, event: Event) -> None:
        names = _names(event)
        if (
            names
            and isinstance(event.get("step"), int)
            and isinstance(event.get("generation"), int)
            and isinstance(event.get("run_id"), str)
            and isinstance(event.get("time"), str)
        ):
            self.names.update(names)
            self.announced.pop(names[0], None)  # what had this name before is there no more
            self.announced[names[0]] = event
            sequence = event.get("sequence")
            if isinstance(sequence, int) and sequence < LARGEST:
                self.sequence = max(self.sequence, sequence)

    def _left(self, event: Event, *, gone: bool) -> None:
        """Forget the names of a checkpoint that was removed or went to the archive."""
        for name in _names(event):
            there = self.announced.get(name)
            if there is not None and there.get("id") == event.get("id"):
                del self.announced[name]
            if gone:
                self.names.discard(name)


def _lasting(lines: list[bytes]) -> list[bytes]:
    """Leave out the lines of checkpoints that were saved and removed again within `lines`.

    They are most of a long history, and parsing them costs ten times as much as this look. No
    number is lost: the newest checkpoint of a generation, which has the highest, is never removed.
    Of damaged lines the last stands for all: it says the same of more checkpoints.
    """
    if rotten := lines.count(ROTTEN):
        last_one = len(lines) - 1 - lines[::-1].index(ROTTEN)
        lines = [line for i, line in enumerate(lines) if line != ROTTEN or i == last_one]
        lines[lines.index(ROTTEN)] = b'{"event": "rotten", "lines": %d}' % rotten
    marks = [_mark(line) for line in lines]
    last = {mark[2]: mark[1] for mark in marks if mark}
    begun = {mark[2] for mark in marks if mark and mark[1] == b"durable"}
    gone = {id_ for id_ in begun if last[id_] == b"removed"}
    return [
        line for line, mark in zip(lines, marks, strict=True) if not mark or mark[2] not in gone
    ]


def _names(event: Event) -> list[str]:
    names = event.get("names")
    return [name for name in names if _is_name(name)] if isinstance(names, list) else []


@functools.cache
def _tell_rotten(path: Path, lines: int) -> None:
    """Tell it once in this process."""
    message = _(
        "{path}: damaged lines: {lines}. What they said is lost. Checkpoints that were here before "
        "them count as pinned, since they may have been; `holdfast pin` can let them go.",
        path=path,
        lines=lines,
    )
    log.warning("%s", message)


class History:
    """The history at `path`. For any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._follower, self._known = Follower(path), Known()
        self._turn, self._looking = threading.RLock(), False
        self._take: Callable[[Event], None] | None = None
        self._forget: Callable[[], None] = lambda: None

    def record(self, event: str, **fields: Any) -> None:
        """Append one line, durably."""
        line = json.dumps({"time": now(), "event": event, **fields}, ensure_ascii=False)
        filesystem.append_line(self.path, sealed(line))

    def follow(self, take: Callable[[Event], None], forget: Callable[[], None]) -> None:
        """Have `read` call `take` with every event, and `forget` where all of them come again.

        To be called before the first `read`.
        """
        self._take, self._forget = take, forget

    @property
    def known(self) -> Known:
        """Result of `read` now."""
        return self.read()

    def read(self) -> Known:
        """Read what any process has appended since the last time; return what all of it amounts to.

        The object changes with the next call: copy what is to be kept. Raises `OSError` where a few
        tries have failed.
        """
        with self._turn:
            if self._looking:  # a finalizer that saves has interrupted a look in this thread
                return History(self.path).known
            self._looking = True
            try:
                self._look()
            except BaseException:  # an interrupt, too: a line that was read and not taken is lost
                self._follower = Follower(self.path)
                self._begin_again()
                raise
            finally:
                self._looking = False
            return self._known

    def _look(self) -> None:
        while True:
            lines = patiently(self._follower.lines)
            if self._follower.restarted:
                self._begin_again()
            for event in objects(_lasting(lines) if self._take is None else lines):
                self._known.take(event)
                if self._take is not None and is_sane(event):
                    self._take(event)
            if not self._follower.more:
                break
        if self._known.rotten:
            _tell_rotten(self.path, self._known.rotten)

    def _begin_again(self) -> None:
        self._known = Known()
        self._forget()

    def events(self, *kinds: str) -> Iterator[Event]:
        """Yield every event, or those of some kinds, oldest first: reads all of the file. A line
        that a crash has torn is left out."""
        follower = Follower(self.path)
        while True:
            for event in follower.new():
                if not kinds or event.get("event") in kinds:
                    yield event
            if not follower.more:
                return
