"""WHAT to keep: the floor holds whatever the policies say, and the policies do what they say."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.checkpoint.policy.keep import (
    Candidate,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepRollingTemps,
    Policy,
    select,
)

KINDS = ["epoch", "step", "best", "temp"]
LOSSES = st.one_of(
    st.none(), st.floats(0, 9), st.sampled_from([math.nan, math.inf, -math.inf, 1.0])
)


def candidate(step: int, kind: str = "epoch", loss: float | None = None) -> Candidate:
    return Candidate(f"{kind}{step}", (1, step), kind, loss, verified=True, step=step)


@st.composite
def directories(draw: st.DrawFn) -> list[Candidate]:
    """Checkpoints of several generations, some saved twice at one step, in any order."""
    made = []
    for sequence in range(draw(st.integers(0, 12))):
        order = (draw(st.integers(1, 2)), sequence)
        made.append(
            Candidate(
                str(sequence), order, draw(st.sampled_from(KINDS)), draw(LOSSES),
                verified=draw(st.booleans()), pinned=draw(st.integers(0, 9)) == 0,
                epoch=draw(st.one_of(st.none(), st.integers(0, 6))), step=draw(st.integers(0, 6)),
            )
        )  # fmt: skip
    return draw(st.permutations(made))


@st.composite
def policies(draw: st.DrawFn) -> list[Policy]:
    some: list[Policy] = [
        KeepLast(draw(st.sampled_from(KINDS)), draw(st.integers(0, 3))),
        KeepBest(draw(st.integers(0, 2))),
        KeepRollingTemps(draw(st.integers(0, 2))),
        KeepEvery(draw(st.integers(1, 3))),
    ]
    return draw(st.lists(st.sampled_from(some), max_size=3))


@given(directories(), policies())
@settings(max_examples=300, deadline=None, print_blob=True)
def test_the_floor_never_goes(found: list[Candidate], chosen: list[Policy]) -> None:
    kept = {c.id for c, keep in zip(found, select(found, chosen), strict=True) if keep}
    verified = [c for c in found if c.verified]
    if len({(c.order[0], c.step) for c in verified}) < 2:
        assert len(kept) == len(found), "nothing goes before two states are verified"
        return
    assert {c.id for c in found if c.pinned} <= kept
    assert max(found, key=lambda c: c.order).id in kept, "the newest"
    newest = max(verified, key=lambda c: c.order)
    others = [c for c in verified if (c.order[0], c.step) != (newest.order[0], newest.step)]
    second = max(others, key=lambda c: c.order)
    assert {newest.id, second.id} <= kept, "two distinct verified states"
    scored = [c for c in found if c.loss is not None and math.isfinite(c.loss)]
    if scored:
        assert min(scored, key=lambda c: (c.loss, c.order)).id in kept, "the best"
    newest_verified = max(c.order for c in found if c.verified)
    assert {c.id for c in found if c.order > newest_verified} <= kept, "what no successor secures"


@given(directories(), policies())
@settings(max_examples=100, deadline=None, print_blob=True)
def test_what_a_policy_keeps_stays(found: list[Candidate], chosen: list[Policy]) -> None:
    answer = select(found, chosen)
    for policy in chosen:
        assert all(keep for keep, wanted in zip(answer, policy(found), strict=True) if wanted)


@given(directories(), policies())
@settings(max_examples=100, deadline=None, print_blob=True)
def test_the_order_of_the_list_does_not_matter(
    found: list[Candidate], chosen: list[Policy]
) -> None:
    def kept(listed: list[Candidate]) -> set[str]:
        return {c.id for c, keep in zip(listed, select(listed, chosen), strict=True) if keep}

    assert kept(found) == kept(list(reversed(found)))


def test_keep_last_counts_its_own_kind() -> None:
    found = [candidate(i) for i in range(1, 6)] + [candidate(i, "step") for i in range(6, 9)]
    assert KeepLast("epoch", 2)(found) == [False] * 3 + [True] * 2 + [False] * 3
    assert KeepLast("epoch", 0)(found) == [True] * 5 + [False] * 3
    assert select(found, [KeepLast("epoch", 1)]) == [False] * 4 + [True, False, True, True]


def test_a_later_generation_is_newer_than_any_step_of_an_earlier_one() -> None:
    old, new = candidate(100), replace(candidate(20), id="new", order=(2, 1))
    assert KeepLast("epoch", 1)([old, new]) == [False, True]


def test_the_best_is_the_lowest_finite_loss_and_the_earlier_of_two() -> None:
    losses = [math.nan, 2.0, 1.0, 1.0, -math.inf, None, math.inf]
    found = [candidate(i, loss=loss) for i, loss in enumerate(losses)]
    assert KeepBest()(found) == [False, False, True, False, False, False, False]
    assert KeepBest(2)(found) == [False, False, True, True, False, False, False]
    assert KeepBest(0)(found) == [False] * 7


def test_every_counts_epochs_by_their_number_and_steps_by_theirs() -> None:
    epochs = [replace(candidate(100 * n), epoch=n) for n in range(1, 7)]
    assert KeepEvery(3)(epochs) == [False, False, True] * 2
    assert KeepEvery(100)(epochs) == [False] * 6, "their steps do not count"
    steps = [replace(candidate(n, "step"), epoch=3) for n in (50, 75, 100)]
    assert KeepEvery(50)(steps) == [True, False, True]
    others = [replace(candidate(3, kind), epoch=3) for kind in ("temp", "best")]
    assert KeepEvery(3)([*others, candidate(3)]) == [False] * 3, "and an epoch without a number"
    assert KeepEvery(1)([*epochs, *steps]) == [True] * 9


def test_temps_roll_in_pairs_until_something_lasting_is_verified() -> None:
    temps = [candidate(i, "temp") for i in (1, 2, 3)]
    assert KeepRollingTemps()(temps) == [False, True, True]
    lasting = candidate(4)
    assert KeepRollingTemps()([*temps, lasting]) == [False] * 4
    assert KeepRollingTemps()([*temps, replace(lasting, verified=False)]) == [
        False,
        True,
        True,
        False,
    ]
    later = candidate(5, "temp")
    assert KeepRollingTemps()([*temps, lasting, later]) == [False] * 4 + [True]


def test_two_saves_of_one_step_are_one_state() -> None:
    """A temporary and an epoch's checkpoint of one step are one chance to go on, not two."""
    found = [candidate(1), candidate(2, "temp"), replace(candidate(2), order=(1, 3))]
    assert select(found, [KeepLast("epoch", 1)]) == [True, False, True]
