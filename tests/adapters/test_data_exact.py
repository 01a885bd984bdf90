"""A vision loop with augmentation in workers, killed and started again with other numbers of them.

The proof must fail where the loader is made wrongly: each mutant is a mistake that is often made.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from holdfast import load
from tests.protection.loops import EXAMPLES, changed, start
from tests.support import assert_same

LOOP = EXAMPLES / "vision_workers.py"
EPOCH, STEPS = 13, 26
KILL, TERM = signal.SIGKILL, signal.SIGTERM


def trained(
    script: Path, directory: Path, ends: Sequence[tuple[str, int]], workers: Sequence[int] = (2,)
) -> tuple[dict[str, Any], dict[str, str]]:
    """Train to the end, killed after each of `ends`, a line's first word: state and losses.

    `workers` are those of the first start, the second, ...; the last is for all that follow.
    """
    losses: dict[str, str] = {}
    for count, (word, number) in enumerate([*ends, ("", 0)]):
        run = start(script, directory, str(workers[min(count, len(workers) - 1)]))
        if run.until(lambda line, word=word: line.startswith(f"{word} ")):  # type: ignore[misc]
            run.send(number)
        status = run.end()
        if status != {0: 0, KILL: -KILL}.get(number, 128 + number):
            raise RuntimeError(run.stderr)  # no mutant may be found by this
        for line in run.lines:
            name, _space, value = line.rpartition(" ")
            known = losses.setdefault(name, value)
            assert value == known, f"{name} was {known} and is {value}"
    return dict(load(directory / "latest.pt")), losses


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, str]]:
    return trained(LOOP, tmp_path_factory.mktemp("straight") / "run", [])


ENDS = {
    "in mid-epoch": [("5", KILL), ("8", TERM), ("17", KILL)],
    "after the last batch of an epoch": [(f"{EPOCH}", KILL), ("epoch 0:", KILL), ("20", TERM)],
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("moment", ENDS)
def test_killed_and_gone_on_with_other_workers_it_is_bit_identical(
    tmp_path: Path, straight: tuple[dict[str, Any], dict[str, str]], moment: str
) -> None:
    state, losses = trained(LOOP, tmp_path / "run", ENDS[moment], [0, 2, 8, 0])
    assert losses == straight[1]
    assert len(losses) == STEPS + 2
    assert_same(state, straight[0])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_fifty_times_with_any_workers_it_is_bit_identical(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    script = changed(LOOP, tmp_path / "long.py", ("size = 2, 8", "size = 20, 8"))
    chance = random.Random(seed)
    steps = sorted(chance.sample(range(2, 240, 4), 50))
    ends = [(str(step), chance.choice([KILL, TERM])) for step in steps]
    state, losses = trained(script, tmp_path / "run", ends, chance.choices([0, 2, 4], k=51))
    expected = trained(script, tmp_path / "straight", [])
    assert losses == expected[1]
    assert_same(state, expected[0])


MUTANTS = {
    "the streams are restored before iter(), which draws from them": {
        "generator=torch.Generator(),": "generator=None,",
    },
    "the position is counted in the sampler": {
        "self._position += 1": "pass",
        "start, part = 0, batch": "start, part, self._position = 0, batch, position + 1",
    },
    "workers draw from streams of their own": {"with seeded(keys_of(*numbers)):": "if True:"},
    "the epoch begins anew": {'state["position"], order)': "0, order)"},
}

_PREAMBLE = """\
import holdfast
from holdfast.adapters import data
from holdfast.adapters.data import loader, making, orders
changes = {changes!r}
for module in (making, orders, loader):
    text = open(module.__file__, encoding="utf-8").read()
    for before in [before for before in changes if text.count(before) == 1]:
        text = text.replace(before, changes.pop(before))
    exec(compile(text, module.__file__, "exec"), vars(module))
assert not changes, changes
data.ResumableLoader = loader.ResumableLoader
"""


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_loader_that_is_made_wrongly_is_found(tmp_path: Path, mistake: str) -> None:
    """The mutant's own undisturbed run is what it must repeat, and does not."""
    preamble = _PREAMBLE.format(changes=MUTANTS[mistake])
    script = changed(LOOP, tmp_path / "mutant.py", ("import holdfast\n", preamble))
    expected = trained(script, tmp_path / "straight", [])
    with pytest.raises(AssertionError):
        state, losses = trained(script, tmp_path / "run", [("7", KILL)], [2, 0])
        assert losses == expected[1]
        assert_same(state, expected[0])
