"""What takes several moves is done or not done after a kill between any two of them."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from holdfast.checkpoint import Catalog
from tests.checkpoint.moves import MOVES, Move, start
from tests.support import Toy, damage, everything, killed_at, make_run, tree_of, twin


@pytest.fixture(params=[9, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def moments(request: pytest.FixtureRequest) -> list[int]:
    """The calls to the disk to die at: the first, and each so many from a random one on."""
    first = random.randrange(2, 2 + request.param)
    print("from call", first)
    return [1, *range(first, 300, request.param)]


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.name)
def test_a_step_back_is_done_or_not_done(fast_path: Path, moments: list[int], move: Move) -> None:
    """Kill it at its calls to the disk."""
    template, outcomes = fast_path / "template", set()
    make_run(template, move.steps)
    ids = everything(template)
    for moment in moments:
        run = twin(template, fast_path / str(moment))
        died = killed_at(moment, lambda run=run: move.work(run))  # type: ignore[misc]
        went, problem = move.judge(run, ids)
        assert not problem, moment
        outcomes.add(went)
        shutil.rmtree(run)
        if not died:
            break
    assert went == move.new, "it was not interrupted"
    assert outcomes == {move.old, move.new}
    assert moment > 10


def test_a_resume_from_elsewhere_until_its_first_save(fast_path: Path, moments: list[int]) -> None:
    make_run(fast_path / "template", 3)
    make_run(fast_path / "elsewhere", 1)

    def work(run: Path) -> None:
        toy = Toy(seed=3)
        with toy.manager(run) as manager:
            manager.resume(fast_path / "elsewhere")
            toy.step()
            manager.save(step=2, strict=True)

    outcomes = set()
    for moment in moments:
        run = twin(fast_path / "template", fast_path / str(moment))
        died = killed_at(moment, lambda run=run: work(run))  # type: ignore[misc]
        went, resumed = start(run)
        assert went in ((3, 1), (3, 2), (2, 2)), moment  # its generation is begun, or not yet
        assert resumed is not None and resumed.steps_lost == 0
        outcomes.add(went and went[0])
        if not died:
            break
    assert outcomes == {3, 2}
    assert {entry.step for entry in Catalog(run).scan().entries} == {2}
    assert everything(run) > everything(fast_path / "template")


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_setting_a_damaged_newest_aside(
    fast_path: Path, moments: list[int], links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of its names says the same again: an older one is gone on from, and the loss is
    told each time."""
    if not links:
        monkeypatch.setenv("HOLDFAST_DISABLE", "hardlinks,reflink")
    template = fast_path / "template"
    make_run(template, 3)
    for name in ("checkpoint_step_3.pt", *(() if links else ("latest.pt", "model.pt"))):
        damage(template / name)

    def work(run: Path) -> None:
        with Toy(seed=5).manager(run) as manager:
            manager.resume()

    for moment in moments:
        run = twin(template, fast_path / str(moment))
        died = killed_at(moment, lambda run=run: work(run))  # type: ignore[misc]
        with Toy(seed=5).manager(run) as manager:
            resumed = manager.resume()
        assert resumed is not None
        assert (resumed.step, resumed.steps_lost) == (2, 1), moment
        assert not any(name in tree_of(run) for name in ("checkpoint_step_3.pt",)), moment
        if not died:
            break
    assert moment > 8
