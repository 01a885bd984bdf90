"""What a run has left and said, and how two runs differ in it.

Of a numbered series of files (`step_10.pt`, `step_20.pt`) the last one is compared. Values in which
two undisturbed runs differ, such as times, are not compared; tensors always are.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError
from holdfast.i18n import _
from holdfast.prove.foreign import Unopened, is_state, opened
from holdfast.prove.losses import Logged, by_place, lines_of, logged
from holdfast.prove.places import Mark, Run, written
from holdfast.prove.starts import Ended
from holdfast.prove.states import Difference, differences

WORK = "work/"  # where the working directory lies in the place of a run
RESULT = "--result"  # the name under which what `--result` gives is compared
_STREAM = re.compile(r"(^|[._])(rng|random|generator)", re.IGNORECASE)  # names of random states
_NUMBER = re.compile(r"\d+")
_BORING = (".distcp", ".log", ".txt", ".json", ".jsonl", ".csv", ".md", ".yaml", ".yml", ".py")


def series(path: Path) -> str:
    """Return the name of a file with its numbers taken out."""
    return _NUMBER.sub("#", str(path))


def _numbers(path: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in _NUMBER.findall(str(path)))


@dataclass(slots=True)
class Result:
    """What is compared of one run."""

    files: dict[str, Path] = field(default_factory=dict)  # the last of each series
    trees: dict[str, Any] = field(default_factory=dict)  # what is in them
    unopened: dict[str, str] = field(default_factory=dict)  # why not
    said: list[Logged] = field(default_factory=list)  # on the terminal, in its order
    told: dict[str, list[Logged]] = field(default_factory=dict)  # in text files

    @property
    def patterns(self) -> set[str]:
        """The series of files that hold states."""
        return {*self.files} - {RESULT}


@dataclass(frozen=True, slots=True)
class Found:
    """One difference, and the file that it is in."""

    name: str  # of its series
    file: str
    difference: Difference

    def __str__(self) -> str:
        return f"{self.file}: {self.difference}"


def result(
    run: Run,
    lines: Iterable[str],
    wanted: str | None,
    *,
    before: Mapping[Path, Mark] | None = None,
    like: Result | None = None,
) -> Result:
    """Open what a run has written since `before`, or what is there of the files of `like`.

    `wanted` is a file, or else a command that says the result. Raises `ConfigError` where it is
    neither.
    """
    found = Result(said=logged(lines))
    newest: dict[str, Path] = {}
    for path in sorted(written(run.root, before), key=_numbers):
        if like is None or series(path) in {*like.trees, *like.told}:
            newest[series(path)] = path
    for name, path in newest.items():
        _look(found, name, run.root / path, path)
    if wanted is not None:
        _ask(found, run, wanted)
    return found


def _look(found: Result, name: str, path: Path, shown: Path) -> None:
    try:
        if is_state(path):
            found.files[name] = shown
            found.trees[name] = opened(path)
        elif (lines := lines_of(path)) is not None:
            if told := logged(lines):
                found.told[name] = told
        elif path.suffix not in _BORING:
            found.unopened[name] = ""
    except Unopened as error:
        found.unopened[name] = str(error)
    except OSError:  # a temporary file that is gone again
        pass


def _ask(found: Result, run: Run, wanted: str) -> None:
    path = run.work / run.words([wanted])[0]
    if path.is_file():
        found.files[RESULT] = Path(wanted)
        try:
            found.trees[RESULT] = opened(path) if is_state(path) else path.read_bytes().hex()
        except Unopened as error:
            found.unopened[wanted] = str(error)
        return
    done = subprocess.run(
        run.words([wanted])[0], shell=True, cwd=run.work, capture_output=True, check=False
    )
    if done.returncode:
        raise ConfigError(
            "--result {value}: there is no such file when the command has ended, and as a command "
            "it ends with status {status}.",
            value=wanted,
            status=done.returncode,
        )
    found.files[RESULT] = Path(wanted)
    found.trees[RESULT] = done.stdout.decode("utf-8", "replace").splitlines()


# -------------------------------------------------------------------------------- two side by side


@dataclass(frozen=True, slots=True)
class Aside:
    """What is not compared, because two undisturbed runs differ in it."""

    paths: frozenset[tuple[str, str]] = frozenset()  # (series, dotted name)
    numbered: frozenset[str] = frozenset()  # series whose last number is chance
    losses: frozenset[tuple[object, str]] = frozenset()

    @property
    def names(self) -> list[str]:
        """Their names, shortened, to be told."""
        return sorted({".".join(path.split(".")[:2]) for _file, path in self.paths})


def compare(a: Result, b: Result, aside: Aside) -> Iterator[Found]:
    """Yield what differs between the ends of an undisturbed run `a` and of another one."""
    for name, tree in a.trees.items():
        file = str(a.files[name]).removeprefix(WORK)
        if name in b.unopened or name not in b.trees:
            why = b.unopened.get(name) or _("nothing")
            yield Found(name, file, Difference("", None, _("a whole file"), why))
            continue
        if a.files[name] != b.files[name] and name not in aside.numbered:
            yield Found(
                name, file, Difference("", None, file, str(b.files[name]).removeprefix(WORK))
            )
            continue
        for difference in differences(tree, b.trees[name]):
            if (name, difference.path) not in aside.paths:
                yield Found(name, file, difference)


def unrepeatable(a: Result, b: Result) -> tuple[Found | None, Aside]:
    """Return the first tensor in which two undisturbed runs differ, if there is one; and the other
    things in which they do. What `--result` gives must be equal as well.

    A random stream that nothing has seeded differs; if nothing else does, nothing draws from it.
    """
    paths = set()
    for found in compare(a, b, Aside()):
        path = found.difference.path
        is_tensor = found.difference.index is not None and not _STREAM.search(path)
        if is_tensor or found.name == RESULT:
            return found, Aside()
        paths.add((found.name, path))
    numbered = {name for name in a.files if a.files[name] != b.files.get(name)}
    says, again = (by_place(each.said) for each in (a, b))
    losses = {key for key in says if says[key] != again.get(key)}
    if losses and not a.trees:
        place, name = next(iter(losses))
        values = says[place, name], again.get((place, name)) or _("nothing")
        return Found("", Logged(place, ()).where, Difference(name, None, *values)), Aside()
    return None, Aside(frozenset(paths), frozenset(numbered), frozenset(losses))


@dataclass(frozen=True, slots=True)
class Said:
    """A logged value that differs: where, and both."""

    where: str
    name: str
    a: str
    b: str
    first: bool  # whether nothing that the resumed run said before was equal

    def __str__(self) -> str:
        return f"{self.where}: {self.name} {self.a} ≠ {self.b}"


def compare_losses(a: Result, b: Result, aside: Aside) -> tuple[Said | None, int]:
    """Return the first logged value that differs, and how many were compared."""
    count = 0
    for name, entries in {"": a.said, **a.told}.items():
        straight = by_place(entries)
        equal = 0
        for entry in b.said if not name else b.told.get(name, []):
            for what, number in entry.values:
                key = entry.place, what
                if key in aside.losses or key not in straight:
                    continue
                count += 1
                if straight[key] != number:
                    return Said(entry.where, what, straight[key], number, not equal), count
                equal += 1
    return None, count


def outcome(ended: Ended) -> str:
    """Say how a start ended."""
    if ended.status is None:
        return _("it has not ended in {seconds} seconds", seconds=round(ended.seconds))
    return _("it ended with status {status}: {words}", status=ended.status, words=ended.words)
