"""ResumableLoader: the same batches, to the bit, from any position, with any number of workers."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from holdfast import CheckpointManager, ResumableLoader
from holdfast.errors import ConfigError, StateMismatch


class Augmented(Dataset[torch.Tensor]):
    """Samples that draw from every global stream."""

    def __init__(self, samples: int = 23) -> None:
        self.samples, self.read = samples, list[int]()

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read.append(index)
        drawn = [random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item()]
        return torch.tensor([index, *drawn], dtype=torch.float64)


def mixed(samples: list[torch.Tensor]) -> torch.Tensor:
    """A collate_fn that draws too, and sums enough for two threads to change the bits."""
    noise = torch.randn(100_000).sum() + random.random() + np.random.rand()
    return torch.stack([*samples, samples[0] * noise])


def loader(workers: int = 0, *, seed: int = 3, **options: Any) -> ResumableLoader:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more workers than processors
        options = {"batch_size": 4, "shuffle": True, "collate_fn": mixed, **options}
        made: DataLoader[Any] = DataLoader(Augmented(), num_workers=workers, **options)
        return ResumableLoader(made, seed=seed)


def indices(batches: Any) -> list[list[int]]:
    return [[int(value) for value in batch] for batch in batches]


def numbers(samples: int = 10, **options: Any) -> DataLoader[Any]:
    return DataLoader(list(range(samples)), **options)  # type: ignore[arg-type]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def streams() -> tuple[Any, ...]:
    numpy = np.random.get_state(legacy=False)
    return random.getstate(), repr(numpy), torch.get_rng_state().tolist(), torch.get_num_threads()


# ----------------------------------------------------------------------------------------- bits


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [2, 8])
def test_any_number_of_workers_gives_the_same_bits(workers: int) -> None:
    torch.set_num_threads(2)
    alone, many = loader(), loader(workers, persistent_workers=workers == 2)
    for _epoch in range(2):
        assert same(list(alone), list(many))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_streams_of_this_process_are_left_alone(workers: int) -> None:
    np.random.standard_normal()  # leaves a number behind that a seed would forget
    before = streams()
    for _batch in loader(workers):
        assert streams() == before
    assert streams() == before


def test_epochs_seeds_and_positions_have_orders_and_draws_of_their_own() -> None:
    first = loader()
    epochs = [list(first), list(first), list(loader(seed=4))]
    drawn = torch.cat([batch[:-1] for epoch in epochs for batch in epoch])
    assert [sorted(torch.cat([b[:-1, 0] for b in e]).tolist()) for e in epochs] == [
        list(range(23))
    ] * 3
    for column in drawn.T[1:]:
        assert len(set(column.tolist())) == len(drawn)
    assert len({tuple(torch.cat([b[:-1, 0] for b in e]).tolist()) for e in epochs}) == 3
    assert not set(drawn[:, 1].tolist()) & set(drawn[:, 2].tolist()), "Python's are not NumPy's"


def test_every_position_is_gone_on_from_to_the_bit_with_other_workers() -> None:
    whole, later = loader(), loader()
    batches = [*whole, *whole]
    states = [loader().state_dict()]
    states += [later.state_dict() for _epoch in range(2) for _batch in later]
    for position, state in enumerate(states):
        resumed = loader(workers=2 if position == 4 else 0)
        resumed.load_state_dict(state)
        rest = [*resumed, *resumed] if position <= 6 else [*resumed]
        assert same(rest, batches[position:]), position


def test_saved_after_the_last_batch_the_rest_of_the_epoch_is_empty_and_then_it_has_ended() -> None:
    first = loader()
    for _batch in first:
        state = first.state_dict()
    assert (first.epoch, first.position) == (1, 0)
    resumed = loader(workers=2)
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.position) == (0, len(resumed)) == (0, 6)
    assert list(resumed) == []
    assert (resumed.epoch, resumed.position) == (1, 0)
    assert same(list(resumed), list(first))


class Endless(Dataset[int]):
    """A trillion samples; it counts what is read."""

    read = 0

    def __len__(self) -> int:
        return 10**12

    def __getitem__(self, index: int) -> int:
        self.read += 1
        return index


@pytest.mark.parametrize("shuffle", [False, True])
def test_no_sample_is_read_and_no_order_computed_to_reach_a_position(shuffle: bool) -> None:
    dataset = Endless()

    def made() -> ResumableLoader:
        return ResumableLoader(DataLoader(dataset, 8, shuffle=shuffle), fingerprint="")

    first = made()
    state = {**first.state_dict(), "position": 10**11}
    first.load_state_dict(state)
    expected = [next(iter(first)), next(iter(first))]
    assert dataset.read == 16
    second = made()
    second.load_state_dict({**state, "position": 10**11 + 1})
    assert torch.equal(next(iter(second)), expected[1])
    assert not torch.equal(*expected)


# -------------------------------------------------------------------------------------- samplers


class OwnStream:
    """A sampler with a generator of its own, of NumPy's or Python's kind."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[int]:
        order = list(range(10))
        self.stream.shuffle(order)
        return iter(order)


class OwnEpoch(OwnStream):
    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([(number + self.epoch) % 10 for number in range(10)])


class Uneven:
    """A batch sampler whose batches are of different sizes."""

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(10).tolist()
        for start, stop in ((0, 1), (1, 3), (3, 6), (6, 10)):
            yield order[start:stop]


KEPT: dict[str, Any] = {
    "sequential": lambda: numbers(batch_size=3),
    "shuffled, the last batch dropped": lambda: numbers(batch_size=3, shuffle=True, drop_last=True),
    "with a generator": lambda: numbers(shuffle=True, generator=torch.Generator().manual_seed(5)),
    "with replacement": lambda: numbers(sampler=RandomSampler(range(10), replacement=True)),
    "a number of samples": lambda: numbers(sampler=RandomSampler(range(10), num_samples=4)),
    "weighted": lambda: numbers(sampler=WeightedRandomSampler([0.1] * 10, 10), batch_size=4),
    "a part": lambda: numbers(sampler=SubsetRandomSampler([1, 5, 7, 8, 9]), batch_size=2),
    "a part in order": lambda: numbers(sampler=SequentialSampler(range(4)), batch_size=3),
    "uneven batches": lambda: numbers(batch_sampler=Uneven()),
    "batches of batches": lambda: numbers(batch_sampler=BatchSampler(OwnEpoch(), 3, False)),
    "samples alone": lambda: numbers(batch_size=None, shuffle=True),
    "samples of a sampler": lambda: numbers(batch_size=None, sampler=OwnEpoch()),
    "NumPy": lambda: numbers(sampler=OwnStream(np.random.default_rng())),
    "old NumPy": lambda: numbers(sampler=OwnStream(np.random.RandomState())),
    "Python": lambda: numbers(sampler=OwnStream(random.Random())),
    "global": lambda: numbers(sampler=OwnStream(random)),
    "with set_epoch": lambda: numbers(sampler=OwnEpoch()),
}


@pytest.mark.parametrize("kind", KEPT)
def test_samplers_are_kept_and_each_epoch_is_the_same_again(kind: str) -> None:
    plain = KEPT[kind]()
    first, second = (ResumableLoader(KEPT[kind](), seed=1) for _ in range(2))
    before = streams()
    epochs = [[value.tolist() if isinstance(value, torch.Tensor) else value for value in first]
              for _epoch in range(3)]  # fmt: skip
    assert streams() == before
    assert [len(epoch) for epoch in epochs] == [len(plain)] * 3 == [len(first)] * 3
    if "order" in kind or kind == "sequential":
        assert epochs[0] == [value.tolist() for value in plain]
    else:
        assert epochs[0] != epochs[1] != epochs[2]
    second.set_epoch(1)
    part = iter(second)
    next(part)
    third = ResumableLoader(KEPT[kind](), seed=9)  # the seed of the state counts
    third.load_state_dict(second.state_dict())
    rest = [value.tolist() if isinstance(value, torch.Tensor) else value for value in third]
    assert rest == epochs[1][1:]


class Batched(Augmented):
    def __getitems__(self, which: list[int]) -> list[int]:
        return [index + 100 for index in which]


def test_a_dataset_is_asked_as_a_plain_loader_asks_it() -> None:
    expected = [batch.tolist() for batch in DataLoader(Batched(9), 4)]
    assert [batch.tolist() for batch in ResumableLoader(DataLoader(Batched(9), 4))] == expected
    made = ResumableLoader(DataLoader(Augmented(9), 4, num_workers=2, prefetch_factor=3))
    assert (made.batch_size, made.num_workers, made.prefetch_factor) == (4, 2, 3)
    assert isinstance(made.dataset, Augmented)


class Opened(Dataset[int]):
    file = -1

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return self.file


def open_file(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.file = 7 + worker  # type: ignore[attr-defined]


def test_worker_init_fn_finds_the_dataset_of_the_user() -> None:
    made = ResumableLoader(DataLoader(Opened(), 4, num_workers=2, worker_init_fn=open_file))
    assert indices(made) == [[7] * 4, [8] * 4]


# ------------------------------------------------------------------------------------ positions


def test_after_a_break_the_rest_of_the_epoch_is_handed_out_and_set_epoch_drops_it() -> None:
    whole = ResumableLoader(numbers(shuffle=True))
    epochs = [indices(whole), indices(whole)]
    made = ResumableLoader(numbers(shuffle=True))
    for batch in made:
        if batch.tolist() == epochs[0][3]:
            break
    assert (made.epoch, made.position) == (0, 4)
    made.set_epoch(0)
    assert made.position == 4, "it is this epoch already"
    assert indices(made) == epochs[0][4:]
    for _batch in made:
        break
    made.set_epoch(0)
    assert indices(made) == epochs[0]


def test_a_loop_that_was_left_behind_by_a_newer_one_or_a_loaded_state_says_so() -> None:
    made = ResumableLoader(numbers())
    state = made.state_dict()
    for leave in (lambda: next(iter(made)), lambda: made.load_state_dict(state)):
        old = iter(made)
        next(old)
        leave()
        position = made.position
        with pytest.raises(ConfigError, match="left behind"):
            next(old)
        assert made.position == position


def test_persistent_workers_go_on_after_a_break() -> None:
    made, expected = loader(2, persistent_workers=True), list(loader())
    for _batch in made:
        break
    assert same(list(made), expected[1:])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_are_handed_slices_of_the_global_batch_and_another_world_goes_on(world: int) -> None:
    def ranks(count: int) -> list[ResumableLoader]:
        plain = numbers(40, batch_size=8, shuffle=True)
        return [ResumableLoader(plain, seed=2, rank=rank, world=count) for rank in range(count)]

    def together(parts: list[ResumableLoader], steps: int) -> list[list[int]]:
        running = [iter(part) for part in parts]
        return [[*chain(*indices(next(part) for part in running))] for _ in range(steps)]

    alone = indices(ResumableLoader(numbers(40, batch_size=8, shuffle=True), seed=2))
    many = ranks(world)
    assert together(many, 2) == alone[:2]
    state = many[0].state_dict()
    assert all(part.state_dict() == state for part in many)
    fewer = ranks(world - 1)
    for part in fewer:
        part.load_state_dict(state)
    assert together(fewer, 3) == alone[2:]


def test_a_batch_with_too_few_samples_for_its_ranks_says_so() -> None:
    made = ResumableLoader(numbers(9, batch_size=4), rank=0, world=2)
    with pytest.raises(ConfigError, match="1 samples has no slice for each of 2 ranks"):
        indices(made)
    with pytest.raises(ConfigError, match="no slices"):
        next(iter(ResumableLoader(numbers(9, batch_size=None), rank=0, world=2)))


# -------------------------------------------------------------------------------------- refusals


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Unending(OwnEpoch):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 1


class Lengthless:
    def __iter__(self) -> Iterator[int]:
        return iter([1, 2])


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: DataLoader(Stream()), "IterableDataset.*StatefulDataLoader.*datasets"),
        (lambda: [1, 2], "wraps a DataLoader of PyTorch; this is a list"),
        (lambda: ResumableLoader(numbers()), "hands out batches in its own way"),
        (lambda: numbers(num_workers=1, in_order=False), "in_order=True"),
        (lambda: numbers(sampler=DistributedSampler(range(4), 2, 0)), "leave the Distributed"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused_in_words(made: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ResumableLoader(made())


@pytest.mark.parametrize(
    ("sampler", "words"), [(Unending(), "len.. says, 10"), (Lengthless(), "has no len")]
)
def test_samplers_without_an_end_are_refused_when_an_epoch_begins(sampler: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        next(iter(ResumableLoader(numbers(batch_size=None, sampler=sampler))))


@pytest.mark.parametrize(
    "options", [{"seed": -1}, {"seed": "x"}, {"rank": 0}, {"rank": 2, "world": 2}]
)
def test_arguments_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ResumableLoader(numbers(), **options)


def half(samples: int = 12, *, batch_size: int = 2, plus: int = 0, **options: Any) -> Any:
    dataset = TensorDataset(torch.arange(samples) + plus)
    return ResumableLoader(DataLoader(dataset, batch_size, shuffle=True), **options)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: half(13), "has 13 samples and had 12"),
        (lambda: half(plus=1), "has other samples.*fingerprint='"),
        (lambda: half(batch_size=3), "batches of epoch 0 are not those"),
        (lambda: half(fingerprint="mine"), "has other samples.*'mine', then"),
    ],
)
def test_other_data_than_those_of_the_save_are_refused_and_nothing_changes(
    tmp_path: Path, other: Any, words: str
) -> None:
    made, weights = half(), torch.zeros(2)
    with CheckpointManager(tmp_path, {"weights": weights, "loader": made}) as manager:
        next(iter(made))
        manager.save(step=1, strict=True)
    weights.fill_(5)
    changed = other()
    before = changed.state_dict()
    with CheckpointManager(tmp_path, {"weights": weights, "loader": changed}) as manager:
        with pytest.raises(StateMismatch, match=words):
            manager.resume()
        assert weights.tolist() == [5, 5]
        assert changed.state_dict() == before


def test_a_fingerprint_that_is_given_lets_the_same_data_be_read_in_another_way() -> None:
    state = half().state_dict()
    for fingerprint in (state["fingerprint"], ""):
        changed = half(plus=1, fingerprint=fingerprint)
        changed.load_state_dict(state)
    named = half(fingerprint="v1").state_dict()
    half(plus=1, fingerprint="v1").load_state_dict(named)


class Restless(Dataset[float]):
    def __init__(self) -> None:
        self.own = np.random.default_rng()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        return self.own.random()


def test_a_dataset_that_draws_from_a_generator_of_its_own_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="Restless is another one each time"):
        next(iter(ResumableLoader(DataLoader(Restless()))))
    assert next(iter(ResumableLoader(DataLoader(Restless()), fingerprint=""))) is not None


def test_samples_of_any_kind_have_the_same_fingerprint_each_time() -> None:
    def fingerprint(last: Any) -> str:
        words = np.array(["a", last], dtype=object)
        tensors = [
            torch.eye(2).to_sparse(),
            torch.tensor(True),
            torch.ones(2, dtype=torch.bfloat16),
        ]
        sample = {"words": words, "tensors": tensors, "none": (None, b"x", 1.5, object())}
        return ResumableLoader(DataLoader([sample] * 3)).fingerprint  # type: ignore[arg-type]

    assert fingerprint("b" * 1000) == fingerprint("".join("b" for _ in range(1000)))
    assert fingerprint("b") != fingerprint("c")


def test_the_samples_for_the_fingerprint_are_read_in_a_worker_where_there_are_workers() -> None:
    """A file that a dataset opens at its first sample must not be open when workers are forked."""
    made = ResumableLoader(DataLoader(dataset := Augmented(), 4, num_workers=1))
    assert made.fingerprint == ResumableLoader(DataLoader(Augmented(), 4)).fingerprint
    assert dataset.read == []


# ------------------------------------------------------------------------------------ exceptions


def test_a_batch_that_an_exception_has_met_is_handed_out_again(tmp_path: Path) -> None:
    def run(fail: int) -> list[list[int]]:
        made, seen = ResumableLoader(numbers(shuffle=True, batch_size=2)), []
        with CheckpointManager(tmp_path, {"loader": made}) as manager:
            resumed = manager.resume()
            step = resumed.step if resumed else 0
            for batch in made:
                if step == fail:
                    raise ZeroDivisionError
                step += 1
                seen.append(batch.tolist())
                manager.after_step(step)
            if fail == 5:
                raise ZeroDivisionError  # in the validation
            assert fail > 5 and made.epoch == 1
        return seen

    with pytest.raises(ZeroDivisionError):
        run(2)
    with pytest.raises(ZeroDivisionError):
        run(5)
    assert run(6) == [], "the epoch's end comes again"


def test_importing_holdfast_does_not_import_torch() -> None:
    from tests.support import python

    python("import sys, holdfast; assert 'torch' not in sys.modules; holdfast.ResumableLoader")
