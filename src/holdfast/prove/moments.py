"""The moments at which a proof interrupts a training, and what its files are then.

Where the calls of an undisturbed run were recorded, the files of any moment are built from the
record: as SIGKILL leaves them, and as a power cut may. Otherwise only lines of output and files
that change tell where the training is.
"""

from __future__ import annotations

import itertools
import random
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from holdfast.i18n import _
from holdfast.prove.disk import Disk, State
from holdfast.prove.losses import Logged, logged
from holdfast.prove.recorder import Call
from holdfast.prove.results import series

BETWEEN, BOUNDARY, SAVING, POWER = "between", "boundary", "saving", "power"
_RESUMES, _KILLS, _CUTS = 5, 4, 4  # moments of each kind, at most
_HEAVY = 1 << 30  # bytes that replaying a record may copy
_VALIDATES = re.compile(r"(?<![a-z])(val|eval|test|dev)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Save:
    """One save of the undisturbed run: its first call, the one behind its last, and the lines of
    output before it."""

    first: int
    end: int
    lines: int


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment to interrupt at; `state` is what lies on the disk then, where it can be built."""

    name: str
    kind: str
    whole: int = 0  # saves that were complete
    state: State | None = None
    # Else a process is struck, once it has said so many lines or its files show so many saves.
    signal: int = signal.SIGKILL
    lines: int | None = None
    saves: int = 0
    delay: float = 0.0  # seconds behind that


@dataclass(frozen=True, slots=True)
class Story:
    """The undisturbed run: its lines, its saves in their order, and its calls if recorded."""

    lines: Sequence[str]
    saves: Sequence[Save]
    calls: Sequence[Call] = ()

    @property
    def boundaries(self) -> list[int]:
        """Saves nearest to a change of the epoch, by their number from 0: those before it."""
        lines = [_epoch(entry) for entry in _per_line(self.lines)]
        known = [(at, epoch) for at, epoch in enumerate(lines) if epoch is not None]
        changes = [b for (_a, x), (b, y) in itertools.pairwise(known) if x != y]
        found = []
        for at in changes:
            before = [n for n, save in enumerate(self.saves) if save.lines <= at]
            found += before[-1:]
        return list(dict.fromkeys(found))

    def logged_before(self, save: Save) -> int:
        return len(logged(self.lines[: save.lines]))

    @property
    def validation(self) -> int | None:
        """A line of output that comes before one about a validation, behind the first save."""
        first = self.saves[0].lines if self.saves else 0
        for at, line in enumerate(self.lines):
            if at > max(1, first) and _VALIDATES.search(line) and logged([line]):
                return at - 1
        return None


def _per_line(lines: Sequence[str]) -> Iterator[Logged | None]:
    for line in lines:
        yield next(iter(logged([line])), None)


def _epoch(entry: Logged | None) -> str | None:
    return None if entry is None else dict(entry.place).get("epoch")


# --------------------------------------------------------------------------------- from the record


def story_of(calls: Sequence[Call], root: Path, patterns: set[str]) -> Story:
    """Find the saves among recorded calls: `patterns` are the series of files that hold states."""
    belongs = _of_states(calls, str(root.resolve()), patterns)
    lines: list[str] = []
    saves: list[Save] = []
    rest, opened = b"", set[str]()
    heard = True  # a line since the save began
    for at, call in enumerate(calls):
        if call.name == "out":
            *whole, rest = (rest + call.data).replace(b"\r", b"\n").split(b"\n")
            said = [line.decode("utf-8", "replace") for line in whole if line.strip()]
            lines += said
            heard = heard or bool(said)
        elif belongs[at]:
            begins = call.name in ("open", "truncating", "mkdir")
            name = series(Path(call.path))
            if begins and (heard or (call.name != "mkdir" and name in opened)):
                saves.append(Save(at, at + 1, len(lines)))
                opened, heard = set(), False
            if begins:
                opened.add(name)
            if saves:
                saves[-1] = replace(saves[-1], end=at + 1)
        elif saves and not heard:  # a pointer to the newest, say
            saves[-1] = replace(saves[-1], end=at + 1)
    return Story(lines, saves, calls)


def _of_states(calls: Sequence[Call], root: str, patterns: set[str]) -> list[bool]:
    """Tell of each call whether it is about a state, under its last name or one it had before."""
    holders = {str(Path(name).parent) for name in patterns}
    temporary: set[str] = set()
    found = []
    for call in reversed(calls):
        names = [name for name in (call.path, call.other) if name]
        is_state = any(
            series(Path(name).relative_to(root)) in patterns
            or any(str(part) in temporary for part in (Path(name), *Path(name).parents))
            for name in names
            if name.startswith(root + "/")
        )
        if call.name == "rename" and call.other.startswith(root + "/"):
            is_state = is_state or series(Path(call.other).relative_to(root)) in holders
            if is_state:
                temporary.add(call.path)
        found.append(is_state)
    return found[::-1]


def usable(calls: Sequence[Call], base: Disk, root: Path, *, links: bool) -> str | None:
    """Say why the files cannot be built from the record; None where they can. `links`: whether the
    run has made symbolic ones, which are not recorded."""
    if any(call.name == "full" for call in calls):
        return _("it writes more than can be recorded; give it a smaller model")
    copied, sizes = 0, dict[str, int]()
    for call in calls:
        if call.name == "write":
            sizes[call.path] = max(sizes.get(call.path, 0), call.offset + len(call.data))
            copied += sizes[call.path]
        elif call.name == "truncating":
            sizes[call.path] = 0
    if copied > 8 * _HEAVY:
        return _("it writes more than can be recorded; give it a smaller model")
    try:
        for call in calls:
            _apply(base, call, root)
            if call.name != "write":  # what is kept for a power cut is not asked for here
                base.settle()
    except (KeyError, ValueError):
        return _("it writes in ways that the record does not explain")
    if base.now().digest != Disk.read(root).now().digest or links:
        return _("it writes in ways that the record does not explain")
    return None


def _apply(disk: Disk, call: Call, root: Path) -> None:
    if call.name not in ("out", "full"):
        disk.apply(call, str(root))


def chosen(count: int, boundaries: Sequence[int]) -> list[int]:
    """Return the saves to resume from, the most telling first: in the middle, at the ends of
    epochs, then evenly the others. The last one is the end of the training."""
    if count < 2:
        return []
    inner = range(count - 1)
    evenly = [round(n * (count - 2) / max(1, _RESUMES - 1)) for n in range(_RESUMES)]
    first = [(count - 1) // 2, *boundaries[:2], *(b - 1 for b in boundaries[:1]), *evenly]
    return [n for n in dict.fromkeys(first) if n in inner][:_RESUMES]


def built(story: Story, base: Disk, root: Path, *, power: bool) -> list[Moment]:
    """Return the moments whose files can be built, the most telling first.

    What was written before a save that a power cut interrupts counts as durable: time has passed.
    """
    count = len(story.saves)
    if count < 2:
        return []
    resumes = chosen(count, story.boundaries)
    into = max(1, count // 2)  # the save that is interrupted
    save = story.saves[into]
    cuts = _cuts_of(story, resumes, into)
    begins = {each.first for each in story.saves}
    largest = _largest(story, save)
    kills: list[Moment] = []
    powers: list[Moment] = []
    for at, call in enumerate(story.calls):
        if at in begins:
            base.settle()
        kills += [Moment(name, kind, whole, base.now()) for kind, name, whole in cuts.get(at, [])]
        if at == largest:
            base.apply(replace(call, data=call.data[: len(call.data) // 2]), str(root))
            name = _("SIGKILL in the middle of writing save {number}", number=into + 1)
            kills.append(Moment(name, SAVING, into, base.now()))
        _apply(base, call, root)
        if power and save.first <= at < save.end:
            powers += _power(base, into, after=at == save.end - 1)
    between = [m for n in resumes for m in kills if m.kind != SAVING and m.whole == n + 1]
    saving = [m for m in kills if m.kind == SAVING][:_KILLS]
    return [*_distinct([*between[:2], *saving, *between[2:]]), *_spread(powers)]


def _cuts_of(
    story: Story, resumes: Sequence[int], into: int
) -> dict[int, list[tuple[str, str, int]]]:
    """Return what is to be looked at before which call: kind, name, saves that are whole."""
    cuts: dict[int, list[tuple[str, str, int]]] = {}
    for n in resumes:
        boundary = n in story.boundaries
        name = (
            _("SIGKILL at an epoch's end, after save {number}", number=n + 1)
            if boundary
            else _("SIGKILL between saves {number} and {next}", number=n + 1, next=n + 2)
        )
        at = story.saves[n + 1].first
        cuts.setdefault(at, []).append((BOUNDARY if boundary else BETWEEN, name, n + 1))
    if into >= 0:
        save = story.saves[into]
        name = _("SIGKILL during save {number}, between two of its file calls", number=into + 1)
        renames = [
            at
            for at in range(save.first, save.end)
            if story.calls[at].name in ("rename", "link", "unlink", "truncating")
        ]
        for at in [save.first + 1, *renames[-1:], *renames[:-1]][: _KILLS - 1]:
            cuts.setdefault(at, []).append((SAVING, name, into))
    return cuts


def _largest(story: Story, save: Save) -> int:
    writes = [at for at in range(save.first, save.end) if story.calls[at].name == "write"]
    return max(writes, key=lambda at: len(story.calls[at].data), default=-1)


def _power(disk: Disk, number: int, *, after: bool) -> Iterator[Moment]:
    """Yield telling states after a power cut now; those that a kill leaves as well are left out."""
    name = (
        _("power cut after save {number}", number=number + 1)
        if after
        else _("power cut during save {number}", number=number + 1)
    )
    seen = {disk.now().digest}
    for state in disk.states(random.Random(0), 0):
        if state.digest not in seen:
            seen.add(state.digest)
            yield Moment(name, POWER, number, state)


def _spread(moments: Sequence[Moment]) -> list[Moment]:
    """Choose among the states of power cuts: those of the latest moment, else evenly."""
    distinct = _distinct(moments[::-1])
    last = max(1, min(_CUTS, len(distinct)) - 1)
    return [distinct[n * (len(distinct) - 1) // last] for n in range(min(_CUTS, len(distinct)))]


def _distinct(moments: Sequence[Moment]) -> list[Moment]:
    by_state: dict[bytes, Moment] = {}
    for moment in moments:
        assert moment.state is not None
        by_state.setdefault(moment.state.digest, moment)
    return list(by_state.values())


# ----------------------------------------------------------------------------------- real signals


def struck(story: Story, *, recorded: bool) -> list[Moment]:
    """Return moments at which a process is really killed, and one at which it is told to stop."""
    count = len(story.saves)
    if count < 2:  # it may save at a signal, or keep what it has in memory
        return _anywhere(story)
    middle = (count - 1) // 2
    term = _at(story, middle, _("SIGTERM after save {number}", number=middle + 1))
    found = []
    if story.validation is not None:
        name = _("SIGKILL during validation")
        found.append(Moment(name, BETWEEN, lines=story.validation + 1, delay=0.001))
    elif recorded:
        name = _("SIGKILL of the process after save {number}", number=middle + 1)
        found.append(_at(story, middle, name))
    found.append(replace(term, signal=signal.SIGTERM))
    if recorded:
        return found
    more = []
    for n in chosen(count, story.boundaries):
        name = _("SIGKILL of the process after save {number}", number=n + 1)
        more.append(_at(story, n, name))
    name = _("SIGKILL as save {number} shows", number=middle + 2)
    saving = Moment(name, SAVING, saves=middle + 2)
    return [*more[:2], saving, *found, *more[2:]]


def _anywhere(story: Story) -> list[Moment]:
    """Strike at two thirds of the output, at the half, and at a third."""
    count = len(story.lines)
    if count < 3:
        return []
    found = []
    for line, number in (
        (count * 2 // 3, signal.SIGKILL),
        (count // 2, signal.SIGTERM),
        (count // 3, signal.SIGKILL),
    ):
        name = _("{signal} after line {number} of its output", signal=number.name, number=line)
        found.append(Moment(name, BETWEEN, signal=number, lines=line))
    return found


def _at(story: Story, number: int, name: str) -> Moment:
    """Strike behind a save: at the second line after it began, where there is one in time."""
    here, following = story.saves[number], story.saves[number + 1]
    if following.lines - here.lines >= 2:
        return Moment(name, BETWEEN, lines=here.lines + 2)
    return Moment(name, BETWEEN, saves=number + 1, delay=0.02)


@dataclass(slots=True)
class Watch:
    """The saves of a run as its files show them while it goes on."""

    marks: Callable[[], object]  # of the files that hold states
    saves: list[Save]
    _last: object = None
    _busy: bool = False

    def __call__(self, lines: int) -> None:
        """Look once; `lines` are the lines of output so far."""
        marks = self.marks()
        changed = marks != self._last
        self._last = marks
        if changed and marks and not (self._busy and self.saves and self.saves[-1].lines == lines):
            self.saves.append(Save(0, 0, lines))
        self._busy = changed
