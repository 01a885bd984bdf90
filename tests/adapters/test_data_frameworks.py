"""ResumableLoader under Accelerate and Fabric; and what it refuses, exact through its own state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from holdfast import CheckpointManager, ResumableLoader


def made(samples: int = 10, **options: Any) -> ResumableLoader:
    plain: DataLoader[Any] = DataLoader(TensorDataset(torch.arange(samples)), 2, shuffle=True)
    return ResumableLoader(plain, **options)


# ------------------------------------------------------------------------------------- Accelerate


@pytest.fixture
def accelerator() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate", reason="pip install accelerate")
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def syncs(accelerator: Any, loader: Any) -> list[bool]:
    """Whether each batch ends a step, as `accumulate` sees it."""
    model = torch.nn.Linear(1, 1)
    found = []
    for _batch in loader:
        with accelerator.accumulate(model):
            found.append(accelerator.sync_gradients)
    return found


@pytest.mark.parametrize("done", [0, 2, 5])
def test_accelerate_prepares_it_and_accumulate_ends_its_step_with_the_data(
    accelerator: Any, done: int
) -> None:
    first, second = made(), made()
    prepared = accelerator.prepare(first)
    assert prepared is first
    running = iter(prepared)
    seen = [next(running)[0].tolist() for _ in range(done)]
    second.load_state_dict(first.state_dict())
    assert second.position == done, "nothing is read ahead"
    prepared = accelerator.prepare(second)
    rest = [batch[0].tolist() for batch in prepared]
    assert seen + rest == [batch[0].tolist() for batch in made()]
    del running
    third = made()
    third.load_state_dict({**first.state_dict(), "position": 0, "order": ""})
    assert syncs(accelerator, accelerator.prepare(third)) == [False, True, False, True, True]
    assert not accelerator.gradient_state.in_dataloader


def test_accelerate_is_told_of_no_end_where_the_loop_is_left_early(accelerator: Any) -> None:
    loader = accelerator.prepare(made())
    for _batch in loader:
        assert accelerator.gradient_state.active_dataloader is not None
        break
    assert not accelerator.gradient_state.in_dataloader
    assert syncs(accelerator, loader) == [False, True, False, True]


def test_batches_come_to_the_device_of_accelerate(
    accelerator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import PartialState

    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("meta"))
    assert {batch[0].device.type for batch in accelerator.prepare(made())} == {"meta"}
    assert {batch[0].device.type for batch in made()} == {"cpu"}, "it was not prepared"


# ----------------------------------------------------------------------------------------- Fabric


def test_fabric_sets_it_up_and_it_counts_what_fabric_hands_out() -> None:
    lightning = pytest.importorskip("lightning.fabric", reason="pip install lightning")
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    expected = made()
    epochs = [[batch[0].tolist() for batch in expected] for _ in range(2)]
    loader = made()
    fabrics = fabric.setup_dataloaders(loader)
    assert len(fabrics) == 5
    assert [batch[0].tolist() for batch in fabrics] == epochs[0]
    running = iter(fabrics)
    seen = [next(running)[0].tolist()]
    assert (loader.epoch, loader.position) == (1, 1)
    resumed = made()
    resumed.load_state_dict(loader.state_dict())
    seen += [batch[0].tolist() for batch in fabric.setup_dataloaders(resumed)]
    assert seen == epochs[1]


# ---------------------------------------------------------------- streams with a state of their own


class Noisy(Dataset[float]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> float:
        return index + torch.rand(()).item()


def resumed_rest(directory: Path, make: Any, done: int) -> tuple[list[Any], list[Any]]:
    """What is read after `done` batches: undisturbed, and after a resume in new objects."""

    def read(batches: Any) -> list[Any]:
        return [batch if isinstance(batch, dict) else batch.tolist() for batch in batches]

    torch.manual_seed(0)
    first = make()
    with CheckpointManager(directory, {"loader": first}) as manager:
        running = iter(first)
        for _ in range(done):
            next(running)
        manager.save(step=done, strict=True)
        rest = read(running)
    torch.manual_seed(1)
    second = make()
    with CheckpointManager(directory, {"loader": second}) as manager:
        assert manager.resume() is not None
        return rest, read(second)


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader_is_exact_through_its_own_state_but_for_random_samples(
    tmp_path: Path, workers: int
) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="pip install torchdata")

    def plain() -> Any:
        return stateful.StatefulDataLoader(range(24), 4, shuffle=True, num_workers=workers)

    def noisy() -> Any:
        return stateful.StatefulDataLoader(Noisy(), 4, shuffle=True, num_workers=workers)

    rest, again = resumed_rest(tmp_path / "plain", plain, 2)
    assert len(rest) == 4
    assert again == rest
    rest, again = resumed_rest(tmp_path / "noisy", noisy, 2)
    assert [[int(v) for v in batch] for batch in again] == [[int(v) for v in b] for b in rest]
    assert again != rest, "where that is exact now, say so in the docs"


@pytest.mark.parametrize("own", [False, True])
def test_stateful_data_loader_draws_from_the_stream_of_training_without_a_generator_of_its_own(
    own: bool,
) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="pip install torchdata")
    options = {"generator": torch.Generator()} if own else {}
    loader = stateful.StatefulDataLoader(range(24), 4, shuffle=True, **options)
    before = torch.get_rng_state()
    next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before) == own, "see the docs"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("buffer", [1, 4])
def test_a_streamed_dataset_of_hugging_face_is_exact_through_its_own_state_but_for_its_buffer(
    tmp_path: Path, buffer: int
) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install datasets")

    def make() -> Any:
        whole = datasets.Dataset.from_dict({"n": list(range(24))})
        return whole.to_iterable_dataset(num_shards=3).shuffle(seed=3, buffer_size=buffer)

    rest, again = resumed_rest(tmp_path, make, 7)
    assert len(rest) == 17
    assert (again == rest) == (buffer == 1), "where a buffer is exact now, say so in the docs"


def test_the_fingerprint_of_hugging_face_is_taken(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    whole = datasets.Dataset.from_dict({"n": list(range(24))})
    loader = ResumableLoader(DataLoader(whole, 4))
    assert loader.fingerprint == whole._fingerprint
    assert next(iter(loader))["n"].tolist() == [0, 1, 2, 3]
