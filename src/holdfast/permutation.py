"""Permute any number of things, each place by itself: an order of data that costs no memory.

NumPy alone; the trainer and the loader under other people's loops draw their orders from here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # the increment of splitmix64
_ROUNDS = 8


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of splitmix64 (Steele, Lea, Flood 2014), element by element."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def derive_key(*numbers: int) -> int:
    """A 64-bit key from whole numbers of any size and sign; it differs with their order too."""
    state = np.array([len(numbers)], dtype=np.uint64)
    for number in numbers:
        state = _mix(state + np.uint64((number + _GOLDEN) & _MASK64))
    return int(state[0])


def permute(index: npt.ArrayLike, n: int, key: int) -> npt.NDArray[np.int64]:
    """Return where each of `index` (in range(n), any shape) goes in the permutation `key`.

    Construction, fixed for ever, since resuming an old run depends on it (numpy's own shuffles
    may change from release to release): a balanced Feistel network of 8 rounds over numbers of
    2h bits, h the smallest with 4**h >= n, but at least 3, since smaller networks favour some
    permutations (their chi-square shows it). A round is (L, R) -> (R, L xor F(R)), where F is
    the highest h bits of mix(R + k), `mix` the output function of splitmix64 and k the
    splitmix64 stream of `key`, one value a round. What lands on or above n goes through again
    until it does not (cycle walking; on average fewer than 4 times, for n < 16 up to 64 times):
    a bijection of range(n).
    """
    half = max(3, ((n - 1).bit_length() + 1) // 2)
    shift, mask, down = np.uint64(half), np.uint64(2**half - 1), np.uint64(64 - half)
    seeds = [(key + (number + 1) * _GOLDEN) & _MASK64 for number in range(_ROUNDS)]
    round_keys = _mix(np.array(seeds, dtype=np.uint64))

    def network(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = value >> shift, value & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) >> down)
        return (left << shift) | right

    where = np.asarray(index)
    flat = where.astype(np.uint64).reshape(-1)
    assert n >= 1 and bool((flat < n).all()), "indices lie in range(n)"
    flat = network(flat)
    while (outside := flat >= n).any():
        flat[outside] = network(flat[outside])
    return flat.astype(np.int64).reshape(where.shape)
