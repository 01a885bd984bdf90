"""Which tokens are seen when: permutations, windows and validation, as pure functions."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DataError
from holdfast.training.text.batches import (
    IGNORED,
    Batches,
    bits_per_byte,
    derive_key,
    permute,
    streamed_batches,
    unigram_bits_per_byte,
    validation_batch_count,
    validation_batches,
)
from holdfast.training.text.cache import TokenStream


def stream(tokens: list[int] | range, text_bytes: int = 1) -> TokenStream:
    return TokenStream(
        tokens=np.array(tokens, dtype=np.uint16),
        ends=np.array([len(tokens)]),
        eos_id=0,
        characters=1,
        text_bytes=text_bytes,
    )


# -- permute -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 97, 100, 256, 257, 4099, 65537])
def test_permute_is_a_bijection_whatever_the_key(n: int) -> None:
    for key in (0, 1, 2**64 - 1, derive_key(n)):
        assert sorted(permute(np.arange(n), n, key)) == list(range(n))


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection_property(n: int, key: int) -> None:
    assert len(set(permute(np.arange(n), n, key).tolist())) == n


@given(st.integers(1, 2**48), st.integers(0, 2**64 - 1), st.data())
def test_permute_of_a_few_is_what_permute_of_each_alone_gives(
    n: int, key: int, data: st.DataObject
) -> None:
    index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    together = permute(np.array(index), n, key).tolist()
    assert together == [int(permute(one, n, key)) for one in index]
    assert all(0 <= value < n for value in together)


def test_permute_is_the_same_for_ever() -> None:
    """Old runs resume in this order: if these figures change, the construction was broken."""
    assert permute(np.arange(10), 10, 42).tolist() == GOLDEN_10
    assert permute([0, 1, 10**6, 10**9], 10**9 + 7, 2**63 + 1).tolist() == GOLDEN_LARGE
    assert derive_key(1, -2, 3) == GOLDEN_KEY


GOLDEN_10 = [7, 8, 4, 3, 2, 6, 9, 5, 0, 1]
GOLDEN_LARGE = [866424266, 238150901, 856252112, 136965419]
GOLDEN_KEY = 2711551329624082386


@pytest.mark.parametrize(("n", "expected"), [(3, 100), (5, 12)])
def test_all_permutations_of_a_few_occur_about_equally_often(n: int, expected: int) -> None:
    draws = expected * math.factorial(n)
    counts = Counter(tuple(permute(np.arange(n), n, key)) for key in range(draws))
    assert len(counts) == math.factorial(n)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    degrees = math.factorial(n) - 1
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees), "5 standard deviations"


def test_neighbours_end_up_far_apart() -> None:
    n = 10_007
    order = permute(np.arange(n), n, derive_key(5))
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.05
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert np.abs(np.diff(order)).mean() == pytest.approx(n / 3, rel=0.05)


def test_keys_depend_on_every_number_and_their_order() -> None:
    keys = [derive_key(a, b) for a in range(-20, 20) for b in range(40)]
    assert len(set(keys)) == len(keys)
    assert derive_key(1) != derive_key(1, 0)


# -- Batches -----------------------------------------------------------------------------------


def test_targets_are_the_inputs_moved_on_by_one_as_int64() -> None:
    batches = Batches(stream(range(1000)), context_length=8, batch_size=4, seed=1)
    x, y = batches.batch(0, 0)
    assert x.shape == y.shape == (4, 8)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, (x + 1) % 1000)


@pytest.mark.parametrize(("length", "context", "batch"), [(1000, 8, 4), (997, 13, 5), (64, 16, 2)])
def test_an_epoch_shows_every_token_at_most_once_and_nearly_all(
    length: int, context: int, batch: int
) -> None:
    batches = Batches(stream(range(length)), context_length=context, batch_size=batch, seed=3)
    assert batches.samples_per_epoch == length // context
    assert batches.micro_batches_per_epoch == length // context // batch
    for epoch in range(4):
        seen = torch.cat(
            [
                batches.batch(epoch, position)[1].flatten()
                for position in range(batches.micro_batches_per_epoch)
            ]
        )
        assert len(set(seen.tolist())) == len(seen) > length - context * (batch + 1)


def test_a_batch_is_a_pure_function_of_seed_epoch_and_position() -> None:
    def make(seed: int) -> Batches:
        return Batches(stream(range(5000)), context_length=16, batch_size=4, seed=seed)

    first, again = make(7), make(7)
    positions = range(first.micro_batches_per_epoch)
    forwards = [first.batch(2, position)[0] for position in positions]
    backwards = [again.batch(2, position)[0] for position in reversed(positions)]
    assert all(map(torch.equal, forwards, reversed(backwards)))
    assert not torch.equal(forwards[0], make(8).batch(2, 0)[0])


def test_epochs_differ_in_order_and_in_where_the_text_is_cut() -> None:
    batches = Batches(stream(range(5000)), context_length=16, batch_size=4, seed=7)
    cuts = {int(batches.batch(epoch, 0)[0][0, 0]) % 16 for epoch in range(50)}
    assert len(cuts) > 8


def test_the_order_of_samples_is_the_same_for_ever() -> None:
    batches = Batches(stream(range(1000)), context_length=4, batch_size=6, seed=42)
    assert batches.batch(3, 5)[0][:, 0].tolist() == GOLDEN_STARTS


GOLDEN_STARTS = [731, 607, 287, 367, 399, 491]


def test_fewer_windows_than_a_batch_repeat() -> None:
    batches = Batches(stream(range(40)), context_length=16, batch_size=5, seed=0)
    assert (batches.samples_per_epoch, batches.micro_batches_per_epoch) == (2, 1)
    x, _y = batches.batch(0, 0)
    assert torch.equal(x[0], x[2]) and torch.equal(x[1], x[3]) and torch.equal(x[0], x[4])
    assert not torch.equal(x[0], x[1])
    with pytest.raises(AssertionError):
        batches.batch(0, 1)


def test_a_stream_that_is_too_short_says_which_context_would_do() -> None:
    with pytest.raises(DataError, match="--context-length 40 or less"):
        Batches(stream(range(41)), context_length=41, batch_size=1, seed=0)
    batches = Batches(stream(range(41)), context_length=40, batch_size=1, seed=0)
    assert batches.batch(0, 0)[0].shape == (1, 40)


def test_any_position_of_a_long_epoch_is_reached_at_once() -> None:
    long = stream(range(60_000))
    batches = Batches(long, context_length=4, batch_size=2, seed=0)
    assert batches.batch(10**9, batches.micro_batches_per_epoch - 1)[0].shape == (2, 4)


# -- validation --------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(1, 20), st.integers(1, 5))
def test_validation_predicts_every_token_exactly_once_from_the_one_before(
    length: int, context: int, batch: int
) -> None:
    data = stream(range(1, length + 1))
    found = list(validation_batches(data, context, batch))
    assert len(found) == validation_batch_count(data, context, batch)
    assert all(x.shape == y.shape == (batch, context) for x, y in found)
    inputs = torch.cat([torch.empty(0, dtype=torch.int64), *(x.flatten() for x, _ in found)])
    targets = torch.cat([torch.empty(0, dtype=torch.int64), *(y.flatten() for _, y in found)])
    assert inputs.dtype == targets.dtype == torch.int64
    assert targets[:length].tolist() == list(range(1, length + 1))
    assert bool((targets[length:] == IGNORED).all()) and bool((inputs[length:] == 0).all())
    assert inputs[:length].tolist() == list(range(length)), "0 is the end-of-text token"


@given(st.lists(st.integers(0, 60), max_size=6), st.integers(1, 20), st.integers(1, 5))
def test_tokens_that_come_in_pieces_give_the_same_batches(
    lengths: list[int], context: int, batch: int
) -> None:
    data = stream(range(1, sum(lengths) + 1))
    pieces = np.split(data.tokens, np.cumsum(lengths))
    found = list(streamed_batches(pieces, 0, context, batch))
    wanted = list(validation_batches(data, context, batch))
    assert len(found) == len(wanted)
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])


def test_bits_per_byte_of_an_even_guess_is_its_entropy() -> None:
    """A model that finds all 256 tokens equally likely, one byte each, needs 8 bits a byte."""
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8.0)


def test_the_unigram_baseline_is_the_cross_entropy_of_smoothed_counts() -> None:
    train, val = stream([1, 1, 1, 2]), stream([1, 2, 3], text_bytes=9)
    by_hand = -(math.log2(4 / 8) + math.log2(2 / 8) + math.log2(1 / 8))  # 4 tokens + 4 added
    assert unigram_bits_per_byte(train, val, 9, vocab_size=4) == pytest.approx(by_hand / 9)
