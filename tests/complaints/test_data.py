"""What people have complained of in resumed data, each shown not to happen to ResumableLoader."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from holdfast import CheckpointManager, ResumableLoader
from holdfast.errors import StateMismatch


def made(samples: int = 12, batch_size: int = 2, workers: int = 0, **options: Any) -> Any:
    plain: DataLoader[Any] = DataLoader(
        range(samples),  # type: ignore[arg-type]
        batch_size,
        shuffle=True,
        num_workers=workers,
    )
    return ResumableLoader(plain, **options)


def read(batches: Any, most: int | None = None) -> list[list[int]]:
    return [batch.tolist() for batch in islice(batches, most)]


def resumed(directory: Path, saved: Any, *loaders: Any) -> None:
    """Save one loader, and resume others from the file."""
    with CheckpointManager(directory, {"loader": saved}) as manager:
        manager.save(step=1, strict=True)
    for loader in loaders:
        with CheckpointManager(directory, {"loader": loader}) as manager:
            assert manager.resume() is not None


def test_data_1437_no_epoch_is_empty_after_a_state_that_was_saved_between_two(
    tmp_path: Path,
) -> None:
    """A state saved after an epoch made the next one empty: 3 epochs of 4 were run.

    https://github.com/meta-pytorch/data/issues/1437
    """
    first, second, straight = made(), made(), made()
    epochs = [read(first), read(first)]
    resumed(tmp_path, first, second)
    epochs += [read(second), read(second)]
    assert [len(epoch) for epoch in epochs] == [6] * 4
    assert epochs == [read(straight) for _ in range(4)]


@pytest.mark.parametrize("done", range(1, 12))
def test_datasets_7901_no_shuffled_sample_is_lost_or_comes_twice(tmp_path: Path, done: int) -> None:
    """A shuffled stream lost what lay in its buffer at a resume, and gave other samples twice.

    https://github.com/huggingface/datasets/issues/7901
    """
    first, second = made(batch_size=1), made(batch_size=1)
    running = iter(first)
    seen = [next(running).item() for _ in range(done)]
    resumed(tmp_path, first, second)
    assert sorted(seen + [number for (number,) in read(second)]) == list(range(12))


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_880_a_loop_over_a_loaded_loader_begins_at_its_position(
    tmp_path: Path, workers: int
) -> None:
    """The state of step 25 was loaded into the loader, and the loop began with the first batch.

    https://github.com/mosaicml/streaming/issues/880
    """
    first, second = (made(120, 4, workers, fingerprint="") for _ in range(2))
    straight = read(made(120, 4, fingerprint=""))
    assert read(first, 25) == straight[:25]
    resumed(tmp_path, first, second)
    assert read(second) == straight[25:]


def test_swift_10050_a_later_epoch_is_gone_on_with_in_its_own_order(tmp_path: Path) -> None:
    """In a later epoch the sampler was made anew, and the order of the first one came again.

    https://github.com/modelscope/ms-swift/issues/10050
    """
    first, second, straight = made(), made(), made()
    epochs = [read(straight) for _ in range(3)]
    read(first)
    running = iter(first)
    next(running)
    resumed(tmp_path, first, second)
    assert [read(second), read(second)] == [epochs[1][1:], epochs[2]]


def test_lerobot_4692_preparing_the_loader_after_the_resume_keeps_epoch_and_position(
    tmp_path: Path,
) -> None:
    """`accelerator.prepare` set the epoch of the sampler that had been restored back to 0.

    https://github.com/huggingface/lerobot/pull/4692
    """
    accelerate = pytest.importorskip("accelerate", reason="pip install accelerate")
    first, second, straight = made(9), made(9), made(9)
    epochs = [read(straight), read(straight)]
    read(first)
    running = iter(first)
    next(running)
    resumed(tmp_path, first, second)
    try:
        prepared = accelerate.Accelerator(cpu=True).prepare(second)
        assert read(prepared) == epochs[1][1:]
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (4, 1)])
def test_automodel_533_another_number_of_ranks_goes_on_with_the_same_samples(
    tmp_path: Path, before: int, after: int
) -> None:
    """Each rank kept a place of its own, so that another number of ranks could not go on.

    https://github.com/NVIDIA-NeMo/Automodel/issues/533
    """

    def ranks(world: int) -> list[Any]:
        return [made(40, 8, rank=rank, world=world) for rank in range(world)]

    def together(loaders: list[Any], most: int | None = None) -> list[list[int]]:
        parts = zip(*(read(loader, most) for loader in loaders), strict=True)
        return [[number for part in step for number in part] for step in parts]

    old, new = ranks(before), ranks(after)
    straight = read(made(40, 8))
    assert together(old, 2) == straight[:2]
    resumed(tmp_path, old[0], *new)
    assert together(new) == straight[2:]


@pytest.mark.parametrize("workers", [0, 1])
def test_megatron_bridge_5257_the_restored_random_streams_are_not_drawn_from(
    tmp_path: Path, workers: int
) -> None:
    """Each `iter()` drew a seed from the stream that had just been restored: all draws moved.

    https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/5257
    """
    first, second = made(workers=workers), made(workers=workers)
    running = iter(first)
    next(running)
    resumed(tmp_path, first, second)
    state = torch.get_rng_state()
    next(iter(second))
    assert torch.equal(torch.get_rng_state(), state)


def test_nemo_rl_2519_another_dataset_is_not_begun_in_its_middle(tmp_path: Path) -> None:
    """With another dataset, as many of its samples were passed over as had been seen of the first.

    https://github.com/NVIDIA-NeMo/RL/pull/2519
    """
    first = made()
    running = iter(first)
    next(running)
    with pytest.raises(StateMismatch, match="has 20 samples and had 12"):
        resumed(tmp_path, first, made(20))
