"""`prove_resume`: does a training loop go on bit for bit as if nothing had happened?

    def make():
        torch.manual_seed(0)
        model = ...
        state = {"model": model, "optimizer": optimizer, "data": loader}
        return state, lambda: train_one_step(model, optimizer, loader)

    proof = holdfast.prove_resume(make, steps=20, more=10)
    assert proof, proof.difference

One run goes straight on. Another one saves after `steps`, begins a step more and is killed; a new
one is made, resumes and does the rest. Each lives in a forked process of its own, so that nothing
but the checkpoint can carry anything over. Only where the two differ, more runs tell why.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast import errors
from holdfast.checkpoint.manager import CheckpointManager
from holdfast.checkpoint.state import RandomState, load
from holdfast.errors import ConfigError, HoldfastError
from holdfast.i18n import N_, _
from holdfast.prove.states import Difference, count_values, differences, first_difference

Make = Callable[[], tuple[MutableMapping[str, Any], Callable[[], object]]]

NOT_REPEATABLE, NOT_RESTORED, OUTSIDE = "not repeatable", "not restored", "outside the state"

_WHY = {
    NOT_REPEATABLE: N_(
        "two runs that nothing interrupted differ already: seed every generator, and ask torch for "
        "deterministic algorithms"
    ),
    NOT_RESTORED: N_(
        "it differs right after resuming: its load_state_dict() does not bring back "
        "what its state_dict() gave"
    ),
    OUTSIDE: N_(
        "what was saved came back as it was: a step depends on something that is not in the state"
    ),
}


@dataclass(frozen=True, slots=True)
class Proof:
    """Result of `prove_resume`; true exactly if the two runs ended equal to the last bit."""

    equal: bool
    difference: str | None = None  # the first one, and why, in words
    first: Difference | None = None  # the same as data: where, and both values
    cause: str | None = None  # "not repeatable", "not restored" or "outside the state"
    also: tuple[str, ...] = ()  # the other top-level names and random streams that differ
    tensors: int = 0  # compared
    values: int = 0  # compared, beside the tensors
    killed: bool = False  # whether the interrupted run was a process that SIGKILL has ended

    def __bool__(self) -> bool:
        return self.equal

    def to_json(self) -> dict[str, Any]:
        """The documented form."""
        return {
            "equal": self.equal,
            "difference": self.difference,
            "first": None if self.first is None else self.first.to_json(),
            "cause": self.cause,
            "also": list(self.also),
            "tensors": self.tensors,
            "values": self.values,
            "killed": self.killed,
        }


def prove_resume(
    make: Make,
    *,
    steps: int = 10,
    more: int = 10,
    directory: str | os.PathLike[str] | None = None,
    rng: bool = True,
) -> Proof:
    """Train `steps` + `more` steps straight, and `steps`, SIGKILL, resume, `more`; compare.

    Args:
        make: begins the training anew: returns `(state, step)`, the state as CheckpointManager
            takes it and a function that does one training step. Everything that a new process would
            make must be made in it; it is called once for each run.
        steps: steps before the interruption, at least 1.
        more: steps after it, at least 1.
        directory: where the temporary run directories go (the system's temporary directory).
        rng: as CheckpointManager has it.

    Where a process can be forked each run has its own, and torch computes with one thread there,
    since its pool of threads does not survive a fork. Without fork, or where CUDA is in use in this
    process already, everything happens here and the interrupted run is thrown away instead.

    Raises:
        ConfigError: `steps` or `more` is not positive.
        HoldfastError: `make` or a step failed in its process, or a run could not be saved or
            resumed. What fails in this process is raised as it comes.
    """
    if steps < 1 or more < 1:
        message = _(
            "steps and more must be at least 1, and are {steps} and {more}.",
            steps=steps,
            more=more,
        )
        raise ConfigError(message)
    with tempfile.TemporaryDirectory(prefix="holdfast-prove-", dir=directory) as name:
        runs = _Forked() if _can_fork() else _InThisProcess()
        with runs:
            return _Experiment(make, steps, more, rng, Path(name), runs).run()


def judge(a: Any, b: Any, *, killed: bool) -> Proof:
    """Compare the final state `a` of an undisturbed run with `b` of an interrupted one."""
    tensors, values = count_values(a)
    found = list(differences(a, b))
    if not found:
        return Proof(True, tensors=tensors, values=values, killed=killed)
    first = found[0]
    also = dict.fromkeys(_group(each.path) for each in found)
    also.pop(_group(first.path))
    return Proof(False, str(first), first, None, tuple(also), tensors, values, killed)


def explain(proof: Proof, cause: str, first: Difference | None = None) -> Proof:
    """`proof` with its cause, said in words as well; `first` is a difference that shows it better
    than the one at the end."""
    first = first or proof.first
    text = f"{first}: {_(_WHY[cause])}"
    if proof.also:
        text += _(" (also different: {names})", names=", ".join(proof.also))
    return replace(proof, difference=text, first=first, cause=cause)


def _group(path: str) -> str:
    """The part of a state that a path belongs to; each random stream is one of its own."""
    parts = path.split(".")
    return ".".join(parts[:2]) if parts[0] == "rng" else parts[0]


# ---------------------------------------------------------------------------------- the experiment


@dataclass(frozen=True, slots=True)
class _Experiment:
    make: Make
    steps: int
    more: int
    rng: bool
    place: Path
    runs: _Forked | _InThisProcess

    def run(self) -> Proof:
        end = self.steps + self.more
        self.runs.finish(self._straight("straight", end))
        self.runs.kill(self._interrupted)
        self.runs.finish(self._resumed)
        a, b = self._state("straight", end), self._state("interrupted", end)
        proof = judge(a, b, killed=self.runs.kills)
        return proof if proof.equal else self._explained(proof, a)

    def _explained(self, proof: Proof, straight: Any) -> Proof:
        """Find out by more runs why the two differ."""
        end = self.steps + self.more
        self.runs.finish(self._straight("again", end))
        if first_difference(straight, self._state("again", end)) is not None:
            return explain(proof, NOT_REPEATABLE)
        self.runs.finish(self._restored)
        saved, restored = (self._state(name, self.steps) for name in ("interrupted", "restored"))
        lost = first_difference(saved, restored)
        return explain(proof, OUTSIDE if lost is None else NOT_RESTORED, lost)

    def _state(self, run: str, step: int) -> Any:
        return load(self._file(run, step))

    def _file(self, run: str, step: int) -> Path:
        return self.place / run / f"checkpoint_step_{step}.pt"

    def _manager(self, run: str, state: MutableMapping[str, Any]) -> CheckpointManager:
        return CheckpointManager(self.place / run, state, keep_last=0, rng=self.rng)

    # Each of these is one run, in a process of its own where that is possible.

    def _straight(self, name: str, end: int) -> Callable[[], None]:
        def run() -> None:
            state, step = self.make()
            for _number in range(end):
                step()
            with self._manager(name, state) as manager:
                manager.save(step=end, strict=True)

        return run

    def _interrupted(self) -> None:
        state, step = self.make()
        with self._manager("interrupted", state) as manager:
            manager.resume()
            for _number in range(self.steps):
                step()
            manager.save(step=self.steps, strict=True)
            step()  # the work that is lost
            self.runs.die()

    def _resumed(self) -> None:
        state, step = self.make()
        with self._manager("interrupted", state) as manager:
            manager.resume()
            for _number in range(self.more):
                step()
            manager.save(step=self.steps + self.more, strict=True)

    def _restored(self) -> None:
        state, _step = self.make()
        with self._manager("restored", state) as manager:
            manager.resume(self._file("interrupted", self.steps))
            manager.save(step=self.steps, strict=True)


# ------------------------------------------------------------------------- where runs take place


class _InThisProcess:
    """Runs one after the other here; each finds the random streams as the first one found them."""

    kills = False

    def __enter__(self) -> None:
        self._random = RandomState()
        self._before = self._random.state_dict()

    def __exit__(self, *_exc: object) -> None:
        self._random.load_state_dict(self._before)

    def finish(self, run: Callable[[], None]) -> None:
        self._random.load_state_dict(self._before)
        run()
        gc.collect()

    def kill(self, run: Callable[[], None]) -> None:
        self.finish(run)

    def die(self) -> None:
        """The run returns, and everything that it has made is forgotten."""


class _Forked:
    """Each run in a forked process, which begins as this one is now."""

    kills = True

    def __init__(self) -> None:
        self._child = 0
        # Python seeds its stream anew in a forked process, and NumPy may not be loaded yet. Those
        # of torch are left alone: asking a GPU for its stream here would end all forking.
        self._streams = random.getstate(), np.random.get_state()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_exc: object) -> None:
        if self._child:  # Ctrl-C here must not leave a training behind
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)

    def finish(self, run: Callable[[], None]) -> None:
        status, said = self._fork(run)
        if status:
            raise _failure(status, said)

    def kill(self, run: Callable[[], None]) -> None:
        status, said = self._fork(run)
        if status != -signal.SIGKILL or said:
            raise _failure(status, said)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _fork(self, run: Callable[[], None]) -> tuple[int, bytes]:
        """Exit status of the process, or minus its signal; and what it said of its failure."""
        reading, writing = os.pipe()
        self._child = _fork()
        if self._child == 0:
            os.close(reading)
            _be_a_child(run, writing, *self._streams)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        _pid, status = os.waitpid(self._child, 0)
        self._child = 0
        return os.waitstatus_to_exitcode(status), said


def _fork() -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():  # Python 3.12 warns of threads; see `prove_resume` about them
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _be_a_child(run: Callable[[], None], failure: int, python: Any, numpy: Any) -> None:
    """Run, tell of what went wrong, and end without the parent's clean-up."""
    status = 1
    try:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads(1)
        run()
        status = 0
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        with os.fdopen(failure, "wb") as pipe:
            pipe.write(_packed(error))
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _packed(error: BaseException) -> bytes:
    if isinstance(error, HoldfastError):
        return json.dumps([type(error).__name__, str(error)]).encode()
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}: "
    return json.dumps(["HoldfastError", f"{where}{type(error).__name__}: {error}"]).encode()


def _failure(status: int, said: bytes) -> HoldfastError:
    if not said:
        return HoldfastError("The process of the run ended with status {status}.", status=status)
    return revived(*json.loads(said))


def revived(kind: str, text: str) -> HoldfastError:
    """An error that another process has told of, by the name of its class and its message."""
    found = getattr(errors, kind, HoldfastError)
    return HoldfastError(text) if found is errors.Interrupted else found(text)


def _can_fork() -> bool:
    """Return True if a forked process can compute: CUDA in use does not survive a fork."""
    if not hasattr(os, "fork"):
        return False
    child = _fork()
    if child == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    return os.waitpid(child, 0)[1] == 0
