"""`holdfast prove`: any command, straight against interrupted and resumed, from outside.

Two undisturbed runs show whether it repeats itself, and what is to be compared. Then it is started
with the files that a kill or a power cut leaves at chosen moments, and really killed and stopped;
each time the end must be that of the undisturbed run. It stops at the first difference.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError
from holdfast.i18n import _
from holdfast.prove.advice import ANEW, DIFFERENT, FAILED, NOT_REPEATABLE, advice
from holdfast.prove.disk import Disk, State
from holdfast.prove.losses import logged
from holdfast.prove.moments import POWER, Moment, Story, Watch, built, story_of, struck, usable
from holdfast.prove.places import Beginning, Mark, Run, workshop, written
from holdfast.prove.recorder import compile_shim, read_log, recording
from holdfast.prove.results import (
    Aside,
    Found,
    Result,
    Said,
    compare,
    compare_losses,
    outcome,
    result,
    series,
    unrepeatable,
)
from holdfast.prove.starts import Ended, Strike, start
from holdfast.prove.states import count_values

_PATIENCE = 60.0  # seconds after which a start is hung, at least
_BEFORE_REAL = 6  # moments that are built from the record before a process is really killed
_SHOWN = 3  # differences at the end that are told
_FIRST = 0.4  # share of the time that the first run may take


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be proved, and how."""

    words: Sequence[str]  # the command
    resume_with: Sequence[str] = ()  # more words for a start that resumes
    output: Path | None = None  # where it saves; left out of what a run begins with
    links: Sequence[Path] = ()  # what is only read: relative to the working directory
    result: str | None = None  # a file or a command whose output is compared
    seconds: float = 600.0  # for everything
    keep: Path | None = None  # a directory for the runs, which stays
    power: bool = True  # whether power cuts are tried


@dataclass(frozen=True, slots=True)
class Step:
    """Progress of a proof: what is being done, and the seconds that the rest may take."""

    name: str
    number: int = 0
    of: int = 0
    left: float | None = None


@dataclass(frozen=True, slots=True)
class Tried:
    """A moment that was tried."""

    name: str
    kind: str
    equal: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "equal": self.equal, "seconds": self.seconds}


@dataclass(slots=True)
class ScriptProof:
    """Result of proving a command; equal if it repeats itself and every moment ended as the
    undisturbed run."""

    cause: str | None = None  # "not repeatable", "failed", "began anew" or "different"
    difference: str | None = None  # the first one, in words
    also: Sequence[str] = ()  # further ones
    advice: Sequence[str] = ()  # what to do
    moments: list[Tried] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # what was not looked at, and why
    files: int = 0  # opened and compared
    tensors: int = 0
    values: int = 0
    losses: int = 0  # logged ones
    kept: Path | None = None  # where the runs lie

    @property
    def equal(self) -> bool:
        return self.cause is None

    def to_json(self) -> dict[str, Any]:
        """The documented form."""
        return {
            "equal": self.equal,
            "cause": self.cause,
            "difference": self.difference,
            "also": list(self.also),
            "advice": list(self.advice),
            "moments": [each.to_json() for each in self.moments],
            "left_out": self.left_out,
            "files": self.files,
            "tensors": self.tensors,
            "values": self.values,
            "losses": self.losses,
            "kept": None if self.kept is None else str(self.kept),
        }


def prove_script(order: Order, progress: Callable[[Step], None]) -> ScriptProof:
    """Prove that a command resumes exactly, as far as what it writes can be opened.

    Raises `ConfigError` where the command cannot be run, fails by itself, or leaves nothing that
    can be compared or resumed from; `OSError` as it comes.
    """
    beginning = Beginning(Path.cwd(), order.output, order.links)
    beginning.survey()
    if beginning.outside is not None and not any(
        str(beginning.outside) in word for word in order.words
    ):
        raise ConfigError(
            "--dir {directory} lies outside of the working directory, and the command does not "
            "name it: the runs would meet there. Give the command an option for it.",
            directory=beginning.outside,
        )
    with workshop(None, order.keep) as place:
        return _Proof(order, beginning, place, progress).prove()


@dataclass(slots=True)
class _Proof:
    order: Order
    beginning: Beginning
    place: Path
    progress: Callable[[Step], None]
    proof: ScriptProof = field(default_factory=ScriptProof)
    _began: float = field(default_factory=time.monotonic)
    _straight: Result = field(default_factory=Result)
    _aside: Aside = field(default_factory=Aside)
    _once: float = 0.0  # seconds of one undisturbed run

    def prove(self) -> ScriptProof:
        self.proof.kept = None if self.order.keep is None else self.place
        self.progress(Step(_("straight")))
        self._straight, ended = self._undisturbed()
        self._once = ended.seconds
        self._count()
        found, story, base = self._again()
        if found is not None:
            self._fail(NOT_REPEATABLE, str(found))
            return self.proof
        self._notes()
        self._interrupt(story, base)
        if not self.proof.moments:
            raise ConfigError(
                "There was nothing to resume from at any moment of this run: each start began "
                "anew. Let the command save more often, or train for more steps."
            )
        return self.proof

    # ------------------------------------------------------------------------- undisturbed runs

    def _undisturbed(
        self, environment: Mapping[str, str] | None = None, watch: Watch | None = None
    ) -> tuple[Result, Ended]:
        run = self._lay_out()
        before = written(run.root)
        limit = self.order.seconds * _FIRST
        ended = start(
            run.words(self.order.words),
            run.work,
            limit=limit,
            environment=environment,
            heard=watch or _nothing,
        )
        if ended.status is None:
            raise ConfigError(
                "The command has not ended in {seconds} seconds. Let it do fewer steps, or give "
                "the proof more time with --time SECONDS.",
                seconds=round(limit),
            )
        if ended.status:
            raise ConfigError("The command fails by itself: {how}.", how=outcome(ended))
        return result(run, ended.lines, self.order.result, before=before), ended

    def _again(self) -> tuple[Found | None, Story, Disk | None]:
        """Repeat the undisturbed run, recorded where that is possible; return the first difference,
        the story of the run, and the disk that it began with if it was recorded."""
        self.progress(Step(_("straight again"), left=None))
        library, log = self.place / "shim.so", self.place / "log"
        watch = Watch(lambda: _marks(self._root, self._straight.patterns), [])
        if not compile_shim(library):
            self._unrecorded(_("that takes Linux and a C compiler"))
            again, ended = self._undisturbed(watch=watch)
            found, self._aside = unrepeatable(self._straight, again)
            return found, Story(ended.lines, watch.saves), None
        base = Disk.read(self._lay_out().root)
        again, ended = self._undisturbed(recording(library, self._root, log), watch)
        found, self._aside = unrepeatable(self._straight, again)
        calls = list(read_log(log)) if log.exists() else []
        links = sum(path.is_symlink() for path in self._root.rglob("*")) > self.beginning.symlinks
        why = usable(calls, copy.deepcopy(base), self._root, links=links)
        if why is not None:
            self._unrecorded(why)
            return found, Story(ended.lines, watch.saves), None
        return found, story_of(calls, self._root, self._straight.patterns), base

    def _count(self) -> None:
        trees = self._straight.trees
        if not trees:
            names = ", ".join(self._straight.unopened) or _("nothing")
            raise ConfigError(
                "Nothing that the command has written can be opened and compared (it wrote: "
                "{names}). Name its result with --result FILE, or a command that prints it.",
                names=names,
            )
        counts = [count_values(tree) for tree in trees.values()]
        self.proof.files = len(trees)
        self.proof.tensors = sum(tensors for tensors, _values in counts)
        self.proof.values = sum(values for _tensors, values in counts)

    def _notes(self) -> None:
        for name, why in self._straight.unopened.items():
            shown = name.removeprefix("work/")
            self._leave_out(f"{shown}: {why}" if why else _("{name}: no known form", name=shown))
        if self._aside.names:
            names = ", ".join(self._aside.names)
            self._leave_out(_("values in which two straight runs differ: {names}", names=names))
        if not self._straight.said:
            self._leave_out(_("whether it begins anew: its output names no step with a loss"))

    def _unrecorded(self, why: str) -> None:
        self._leave_out(_("power cuts, and kills in the middle of a file: {why}", why=why))

    def _leave_out(self, what: str) -> None:
        self.proof.left_out.append(what)

    @property
    def _root(self) -> Path:
        """Where every run takes place: paths that a checkpoint names lead to its own run."""
        return self.place / "run"

    def _lay_out(self, state: State | None = None) -> Run:
        """Make the place of a run: as the command begins, or with these files."""
        shutil.rmtree(self._root, ignore_errors=True)
        if state is None:
            return self.beginning.lay_out(self._root)
        self._root.mkdir()
        state.build(self._root)
        return self.beginning.lay_out(self._root, copy=False)

    # ---------------------------------------------------------------------------- interrupted runs

    def _interrupt(self, story: Story, base: Disk | None) -> None:
        """Try the moments one after the other, until one ends differently or time is up."""
        real = struck(story, recorded=base is not None)
        files = [] if base is None else built(story, base, self._root, power=self.order.power)
        kills = [moment for moment in files if moment.kind != POWER]
        cuts = [moment for moment in files if moment.kind == POWER]
        moments = [*kills[:_BEFORE_REAL], *real, *kills[_BEFORE_REAL:], *cuts]
        for number, moment in enumerate(moments):
            left = self._once * sum(1 if each.state else 2 for each in moments[number:])
            cost = self._once * (1 if moment.state else 2)
            if number and time.monotonic() - self._began + cost > self.order.seconds:
                self._leave_out(
                    _(
                        "{count} of {of} moments, for lack of time: --time SECONDS gives more",
                        count=len(moments) - number,
                        of=len(moments),
                    )
                )
                return
            self.progress(Step(moment.name, number + 1, len(moments), left))
            began = time.monotonic()
            equal = self._try(moment, story)
            if equal is None:
                self._leave_out(
                    _(
                        "{moment}: it had ended already, or nothing had been saved yet",
                        moment=moment.name,
                    )
                )
                continue
            seconds = round(time.monotonic() - began, 2)
            self.proof.moments.append(Tried(moment.name, moment.kind, equal, seconds))
            if not equal:
                return

    def _try(self, moment: Moment, story: Story) -> bool | None:
        """Interrupt and resume; True if the end is as it should be, None if that proves nothing."""
        run = self._lay_out(moment.state)
        before: list[str] = []
        whole = moment.whole
        if moment.state is None:
            ended = self._strike(run, moment)
            if not ended.struck:
                return None
            before = ended.lines
            whole = sum(save.lines + 2 <= len(before) for save in story.saves)
        resumed = start(
            [*run.words(self.order.words), *self.order.resume_with],
            run.work,
            limit=max(_PATIENCE, 5 * self._once),
        )
        if resumed.status != 0:
            return self._fail(FAILED, outcome(resumed), moment)
        if self._began_anew(resumed):
            if not whole:
                return None
            if story.logged_before(story.saves[whole - 1]) > 1:
                text = _(
                    "it began anew at {place}, and {count} saves were complete",
                    place=self._straight.said[0].where,
                    count=whole,
                )
                return self._fail(ANEW, text, moment)
        found = result(run, [*before, *resumed.lines], self.order.result, like=self._straight)
        said, count = compare_losses(self._straight, found, self._aside)
        self.proof.losses += count
        differ = list(compare(self._straight, found, self._aside))
        if said is None and not differ:
            return True
        texts = [_("at the end, {difference}", difference=each) for each in differ[:_SHOWN]]
        if said is not None:
            texts.insert(0, _("logged, {difference}", difference=said))
        return self._fail(DIFFERENT, texts[0], moment, also=texts[1:], found=differ, said=said)

    def _strike(self, run: Run, moment: Moment) -> Ended:
        watch = Watch(lambda: _marks(run.root, self._straight.patterns), [])

        def due(lines: int) -> bool:
            if moment.lines is not None:
                return lines >= moment.lines
            return len(watch.saves) >= moment.saves

        return start(
            run.words(self.order.words),
            run.work,
            limit=max(_PATIENCE, 5 * self._once),
            strike=Strike(moment.signal, due, moment.delay),
            heard=watch if moment.lines is None else _nothing,
        )

    def _began_anew(self, resumed: Ended) -> bool:
        """Return True if a start began at the first step, as far as its output tells."""
        straight = [entry.place for entry in self._straight.said]
        places = [entry.place for entry in logged(resumed.lines) if entry.place in straight]
        return places[:1] == straight[:1] != []

    def _fail(
        self,
        cause: str,
        difference: str,
        moment: Moment | None = None,
        *,
        also: Sequence[str] = (),
        found: Sequence[Found] = (),
        said: Said | None = None,
    ) -> bool:
        self.proof.cause, self.proof.difference, self.proof.also = cause, difference, also
        self.proof.advice = advice(cause, moment, self._straight, found, said)
        return False


def _marks(root: Path, patterns: set[str]) -> dict[Path, Mark]:
    return {path: mark for path, mark in written(root).items() if series(path) in patterns}


def _nothing(_lines: int) -> None:
    """Look at no files."""
