"""Steps back that are made of several moves, and what the next start may go on from when one of
them was interrupted. `test_moves.py` and the fault matrix interrupt them."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

from holdfast.checkpoint import Resumed
from holdfast.manage import rollback as desk
from tests.support import Toy, events, everything

Went = tuple[int, int] | None  # step and generation that a start goes on from


@dataclass(frozen=True, slots=True)
class Move:
    """A step back in a run of so many saved `steps`: `work(run)` leads from `old` to `new`."""

    name: str
    steps: int
    work: Callable[[Path], None]
    old: Went
    new: Went

    def judge(self, run: Path, ids: Set[str]) -> tuple[Went, str]:
        """Start, and say what it went on from and what is wrong: neither the old state nor the new
        one, called lost, never announced, or one of the states `ids` is gone. "" if nothing is."""
        went, resumed = start(run)
        announced = [each["step"] for each in events(run) if each["event"] == "durable"]
        if went not in (self.old, self.new):
            return went, f"it goes on from {went}"
        if resumed is not None and (resumed.steps_lost or resumed.step not in announced):
            return went, f"it calls {resumed.steps_lost} steps lost"
        gone = ids - everything(run)
        return went, f"gone: {gone}" if gone else ""


def start(run: Path) -> tuple[Went, Resumed | None]:
    """What the next start goes on from; it says the same when asked again."""
    found: list[tuple[Went, Resumed | None]] = []
    for _again in range(2):
        with Toy(seed=5).manager(run, keep_last=0) as manager:
            resumed = manager.resume()
            found.append((resumed and (resumed.step, resumed.generation), resumed))
    assert found[0][0] == found[1][0]
    return found[0]


def _resume(run: Path) -> None:
    with Toy(seed=5).manager(run) as manager:
        manager.resume(run / "checkpoint_step_2.pt")


def _go_back(run: Path) -> None:
    with Toy(seed=5).manager(run, keep_last=0) as manager:
        manager.resume()
        assert manager.go_back(3, "loss is NaN") is not None


def _roll_back(run: Path) -> None:
    desk.execute(desk.plan(run, "2"))


def _first_save(run: Path) -> None:
    """Of a run that did not resume; it takes the name of the newest of the old run."""
    toy = Toy(seed=3)
    with toy.manager(run) as manager:
        for _step in range(3):
            toy.step()
        manager.save(step=3, strict=True)


MOVES = [
    Move("a resume from an older one", 4, _resume, old=(4, 1), new=(2, 2)),
    Move("going back because training went wrong", 4, _go_back, old=(4, 1), new=(2, 2)),
    Move("rolling back at the desk", 4, _roll_back, old=(4, 1), new=(2, 2)),
    Move("the first save of a run that did not resume", 3, _first_save, old=(3, 1), new=(3, 2)),
]
