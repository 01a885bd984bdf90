"""The choice of tokens: transformers' own definitions, and each row for itself."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from holdfast.serving.engine.json_text import JsonText
from holdfast.serving.engine.sampling import LogProb, Sampler, Sampling, limit

SIZE = 3000  # more than are sorted at first


@dataclass(eq=False)
class One:
    sampling: Sampling
    random: random.Random = field(default_factory=lambda: random.Random("7"))
    counts: dict[int, int] = field(default_factory=dict)
    guide: JsonText | None = None


def row(seed: int = 7, **options: Any) -> One:
    return One(Sampling(max_tokens=9, **options), random.Random(str(seed)))


def choose(logits: torch.Tensor, *rows: One, ends: tuple[int, ...] = ()) -> list[int | None]:
    return Sampler(ends).choose(logits.clone(), list(rows))[0]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(4, SIZE, generator=torch.Generator().manual_seed(3)) * 2


@pytest.mark.parametrize("top_k", [1, 5, 2000])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 0.999, 1.0])
def test_the_limits_are_those_of_transformers(
    logits: torch.Tensor, top_k: int, top_p: float
) -> None:
    expected = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, logits))
    count = len(logits)
    found = limit(logits, torch.tensor([top_k] * count), torch.tensor([top_p] * count))
    assert torch.equal(found > -torch.inf, expected > -torch.inf)


def test_each_row_has_limits_of_its_own(logits: torch.Tensor) -> None:
    none = 1 << 40
    top_k, top_p = torch.tensor([none, 3, none, none]), torch.tensor([1.0, 1.0, 0.5, 0.0])
    kept = (limit(logits, top_k, top_p) > -torch.inf).sum(-1).tolist()
    half = int((TopPLogitsWarper(0.5)(None, logits[2:3]) > -torch.inf).sum())
    assert kept == [SIZE, 3, half, 1]


def test_a_row_draws_the_same_whoever_is_beside_it(logits: torch.Tensor) -> None:
    alone = [choose(logits[:1], row(s, temperature=1.3, top_p=0.95))[0] for s in range(50)]
    beside = [
        choose(logits, row(s, temperature=1.3, top_p=0.95), row(1, top_k=2), row(temperature=0),
               row(5))[0]
        for s in range(50)
    ]  # fmt: skip
    assert alone == beside and len(set(alone)) > 20


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    one, sampler = row(), Sampler([])
    drawn = [sampler.choose(logits.clone(), [one])[0][0] for _ in range(4000)]
    shares = [drawn.count(token) / len(drawn) for token in range(3)]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.03)


def test_greedy_takes_the_likeliest_and_leaves_the_generator_alone(logits: torch.Tensor) -> None:
    one = row(temperature=0)
    before = one.random.getstate()
    assert choose(logits[:1], one) == [int(logits[0].argmax())]
    assert choose(logits[:2], one, row()) and one.random.getstate() == before


def test_penalties_bias_and_the_end_change_what_is_chosen() -> None:
    logits = torch.tensor([[3.0, 2.5, 1.0, 0.9]])
    used = row(temperature=0, frequency_penalty=0.2, presence_penalty=0.2)
    used.counts = {0: 2}
    assert choose(logits, used) == [1], "3.0 - 0.2 - 2 x 0.2 is less than 2.5"
    assert choose(logits, row(temperature=0, logit_bias={3: 5.0})) == [3]
    assert choose(logits, row(temperature=0, ignore_eos=True), ends=(0, 1)) == [2]


def changed_one_by_one(logits: torch.Tensor, one: One, ends: tuple[int, ...]) -> torch.Tensor:
    """What bias, penalties and `ignore_eos` make of the logits of a row, token by token."""
    wanted, changed = one.sampling, logits.clone()
    for token in range(len(changed)):
        count = one.counts.get(token, 0)
        changed[token] += wanted.logit_bias.get(token, 0.0)
        changed[token] -= wanted.presence_penalty * (count > 0) + wanted.frequency_penalty * count
        if wanted.ignore_eos and token in ends:
            changed[token] = -torch.inf
    return changed


@pytest.mark.parametrize("seed", range(8))
def test_what_is_changed_in_all_rows_at_once_is_what_each_row_asks_for(seed: int) -> None:
    dice = random.Random(seed)
    size, ends = 12, (0, 7)

    def any_row() -> One:
        def sometimes(value: Any, nothing: Any) -> Any:
            return value if dice.random() < 0.5 else nothing

        tokens = range(size)
        return row(
            temperature=0,
            presence_penalty=sometimes(dice.uniform(-2, 2), 0.0),
            frequency_penalty=sometimes(dice.uniform(-2, 2), 0.0),
            logit_bias=sometimes({t: dice.uniform(-9, 9) for t in dice.sample(tokens, 4)}, {}),
            ignore_eos=sometimes(True, False),
        )

    sampler, rows = Sampler(ends), [any_row() for _ in range(6)]
    torch.manual_seed(seed)
    for step in range(40):  # tokens are counted, rows leave and join: nothing old may be added
        logits = torch.randn(len(rows), size)
        expected = torch.stack(
            [changed_one_by_one(x, one, ends) for x, one in zip(logits, rows, strict=True)]
        )
        tokens, _told = sampler.choose(logits, rows)
        torch.testing.assert_close(logits, expected, msg=f"seed {seed}, step {step}")
        assert tokens == expected.argmax(-1).tolist()
        for token, one in zip(tokens, rows, strict=True):
            if token is not None and one.sampling.penalises:
                one.counts[token] = one.counts.get(token, 0) + 1
        if step % 3 == 0:
            rows[dice.randrange(len(rows))] = rows[-1]
            rows.pop()
        rows = list(dict.fromkeys(rows))
        while len(rows) < 1 or dice.random() < 0.4:
            rows.append(any_row())


def test_probabilities_are_the_models_own_before_anything_is_changed() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    asked = row(temperature=0, logprobs=2, logit_bias={2: 9.0})
    _tokens, told = Sampler([]).choose(logits.clone(), [asked, row()])
    truth = logits[0].log_softmax(-1).tolist()
    assert told == [LogProb(truth[2], ((0, truth[0]), (1, truth[1]))), None]


@pytest.mark.parametrize("ruined", [float("nan"), float("inf")])
def test_a_row_of_no_numbers_is_told_and_the_others_go_on(ruined: float) -> None:
    logits = torch.zeros(2, 5)
    logits[0, 3], logits[1, 4] = ruined, 1.0
    assert choose(logits, row(), row(temperature=0)) == [None, 4]
