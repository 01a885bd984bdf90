"""A snapshot is of exactly one step, however it is copied; and what waits for the disk is dropped,
kept or waited for as promised."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from holdfast import CheckpointManager, load
from holdfast.checkpoint import EverySteps
from holdfast.checkpoint.format import container
from holdfast.checkpoint.format.layout import Record
from holdfast.checkpoint.rundir import shared_memory
from holdfast.checkpoint.save import copy as copies
from holdfast.checkpoint.save import staging
from holdfast.checkpoint.system import filesystem, slots
from holdfast.errors import SaveFailed
from tests.support import Toy, assert_same, events, python, snapshot

# ----------------------------------------------------------------------------- of exactly one step


class Busy:
    """A training in which everything changes as early as PyTorch allows."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(40, 60), torch.nn.BatchNorm1d(60), torch.nn.Linear(60, 40)
        )
        self.model[2].bias.requires_grad_(False)  # in no optimizer: anybody may write it
        self.critic = torch.nn.Linear(40, 30)
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = [
            torch.optim.AdamW(weights, lr=0.1),
            torch.optim.SGD(self.critic.parameters(), lr=0.1, momentum=0.9),
        ]
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.state: dict[str, Any] = {
            "model": self.model,
            "critic": self.critic,
            "optimizers": self.optimizers,
            "average": self.average,
        }

    def disturb(self) -> None:
        """What happens right after a snapshot was asked for: nothing here waits for anybody."""
        for tensor in self.average.values():
            tensor.mul_(0.5)
        self.model[2].bias.data.add_(1.0)

    def step(self) -> None:
        out = self.model(torch.randn(8, 40))  # BatchNorm counts and averages here
        (out.square().mean() + self.critic(out).square().mean()).backward()
        self.optimizers[1].step()  # the second optimizer steps first
        self.optimizers[0].step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for parameter in self.model.parameters():
            parameter.data.clamp_(-0.05, 0.05)  # no hook sees a write into .data


class Held:
    """The thread that copies what may wait begins when training goes on, and stops in the middle
    until training has come to the end of its step without it, or has had `patience` seconds."""

    def __init__(self) -> None:
        self.patience = 1.0
        self.asked, self.begun, self.stepped = (threading.Event() for _ in range(3))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    """Small segments, and one thread beside training, which is held at its second segment."""
    state, move = Held(), ctypes.memmove
    copied = 0

    def move_late(target: int, source: int, size: int) -> None:
        nonlocal copied
        if threading.current_thread() is not threading.main_thread():
            assert state.asked.wait(30)
            copied += 1
            if copied == 2:
                state.begun.set()
                state.stepped.wait(state.patience)
        move(target, source, size)

    monkeypatch.setattr(copies, "SEGMENT", 512)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(ctypes, "memmove", move_late)
    return state


def disturbed_save(directory: Path, held: Held) -> tuple[Any, Any]:
    """What a training is when a snapshot is asked for, and what the file says."""
    busy = Busy()
    for _step in range(3):
        busy.step()
    with CheckpointManager(directory, busy.state, overlap="always") as manager:
        expected = snapshot(busy.state)
        pending = manager.save_async(step=3)
        held.asked.set()
        busy.disturb()
        assert held.begun.wait(30), "the copier has never been in the middle"
        busy.step()
        held.stepped.set()
        saved = pending.durable.result()
        assert saved is not None
        state = load(saved.path)
    return expected, {name: state[name] for name in expected}


def plain(state: Any) -> Any:
    """Only types that a file has: what a state dictionary is made of beside."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [plain(value) for value in state]
    return state


def test_an_overlapped_snapshot_is_of_one_step(tmp_path: Path, held: Held) -> None:
    expected, found = disturbed_save(tmp_path, held)
    assert_same(plain(expected), plain(found))


def test_without_the_wait_the_snapshot_would_be_of_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: Held
) -> None:
    """The test above can fail: it does when the hook waits for nothing."""
    monkeypatch.setattr(staging.Staging, "before_step", lambda *_arguments: None)
    held.patience = 30.0
    expected, found = disturbed_save(tmp_path, held)
    with pytest.raises(AssertionError):
        assert_same(plain(expected), plain(found))


def test_copying_everything_late_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: Held
) -> None:
    """The test above can fail: it does when averages and buffers are not copied at once."""

    class Everything(set[int]):
        def __contains__(self, _address: object) -> bool:
            return True

    monkeypatch.setattr(staging, "stable_storages", lambda _state, **_device: Everything({0}))
    expected, found = disturbed_save(tmp_path, held)
    with pytest.raises(AssertionError):
        assert_same(plain(expected), plain(found))


def test_an_eager_snapshot_needs_no_hook(tmp_path: Path) -> None:
    """A stranger's loop: whatever it does after the call returns, in whatever way."""
    busy = Busy()
    busy.step()
    with CheckpointManager(tmp_path, busy.state) as manager:
        expected = snapshot(busy.state)
        pending = manager.save_async(step=1)
        assert pending.staged.done()
        for parameter in [*busy.model.parameters(), *busy.critic.parameters()]:
            parameter.data.zero_()
        busy.disturb()
        saved = pending.durable.result()
        assert saved is not None
        state = load(saved.path)
        assert_same(plain(expected), plain({name: state[name] for name in expected}))


def test_replaced_weights_are_saved_as_they_were(tmp_path: Path) -> None:
    """`.data` set to other memory, a parameter gone: the snapshot holds on to what it copies."""
    busy = Busy()
    busy.step()
    with CheckpointManager(tmp_path, busy.state, overlap="always") as manager:
        expected = snapshot(busy.state["model"])
        pending = manager.save_async(step=1)
        for parameter in busy.model.parameters():
            parameter.data = torch.zeros_like(parameter)
        saved = pending.durable.result()
        assert saved is not None
        assert_same(plain(expected), plain(load(saved.path, only="model")))


def test_the_fast_path_writes_what_the_plain_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every record of the file, byte for byte; only identity and times are of each save."""
    busy = Busy()
    busy.step()

    def save(where: str, **options: Any) -> Path:
        with CheckpointManager(tmp_path / where, busy.state, **options) as manager:
            saved = manager.save(step=7, epoch=2, metrics={"val_loss": 1.5}, strict=True)
        assert saved is not None
        return saved.path

    fast = [save("eager"), save("overlapped", overlap="always"), save("memory", memory_every=1)]
    monkeypatch.setattr(slots, "available_memory", lambda: 0)
    monkeypatch.setattr("holdfast.checkpoint.save.slots.available_memory", lambda: 0)
    slow = save("direct")
    for path in fast:
        with container.Reader(path) as a, container.Reader(slow) as b:
            assert [(r.name, r.offset, r.size) for r in a.records[:-1]] == [
                (r.name, r.offset, r.size) for r in b.records[:-1]
            ]
            for mine, theirs in zip(a.records[:-1], b.records[:-1], strict=True):
                assert a.read(mine) == b.read(theirs), mine.name
            of_each_save = {"identity", "created"}
            assert {k: v for k, v in a.manifest.items() if k not in of_each_save} == {
                k: v for k, v in b.manifest.items() if k not in of_each_save
            }
        assert_same(torch.load(path, weights_only=True), torch.load(slow, weights_only=True))


def test_what_lies_on_a_device_is_under_way_before_anybody_can_follow(tmp_path: Path) -> None:
    """The disk follows the copy: it must never find a copy that has not been told to the device."""

    class Elsewhere:
        def __init__(self) -> None:
            self.source = SimpleNamespace(device=torch.device("xpu"), data_ptr=lambda: 0)
            self.nbytes = 5000

        def tensor(self) -> torch.Tensor:
            return torch.full((self.nbytes,), 7, dtype=torch.uint8)

    place = slots.Slot(1 << 20)
    copy = copies.Copy(place, [(Elsewhere(), Record("a", 0, 4096, 5000))])  # type: ignore[list-item]
    copy.await_bytes(1 << 20)
    assert bytes(place.buffer[4096:9096]) == b"\7" * 5000


# ------------------------------------------------------------------------------------ back-pressure


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Checkpoints are not written before this is set."""
    gate, real = threading.Event(), filesystem.write_file

    def write(target: Path, *args: Any, **kwargs: Any) -> None:
        if target.suffix == ".pt":
            assert gate.wait(30)
        real(target, *args, **kwargs)

    monkeypatch.setattr(filesystem, "write_file", write)
    yield gate
    gate.set()


def test_the_newest_waits_and_those_between_are_dropped(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    toy = Toy()
    with toy.manager(tmp_path) as manager:
        pending = []
        for step in range(1, 7):
            toy.step()
            pending.append(manager.save_async(step=step))
        assert manager.saved_step == 0
        slow_disk.set()
        manager.wait()
        found = [promise.durable.result() for promise in pending]
        assert [saved.entry.step if saved else None for saved in found] == [
            1, None, None, None, None, 6
        ]  # fmt: skip
        assert [entry.step for entry in manager.list()] == [6, 1]


def test_what_must_be_kept_makes_training_wait_and_that_is_counted(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    toy = Toy()
    with toy.manager(tmp_path, keep_last=0) as manager:
        manager.save_async(step=1, epoch=1, kind="epoch")
        manager.save_async(step=2, epoch=2, kind="epoch")
        threading.Timer(0.4, slow_disk.set).start()
        third = manager.save_async(step=3, epoch=3, kind="epoch")
        assert slow_disk.is_set(), "there are two buffers: the third waits for one"
        manager.wait()
        saved = third.durable.result()
        assert saved is not None
        assert 0.3 < saved.stall <= manager.stalled
        assert [entry.step for entry in manager.list()] == [3, 2, 1]
    durable = [event for event in events(tmp_path) if event["event"] == "durable"]
    assert durable[2]["stall"] == pytest.approx(saved.stall, abs=1e-3)


def test_with_one_buffer_a_dropped_save_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_disk: threading.Event
) -> None:
    monkeypatch.setattr("holdfast.checkpoint.save.slots.PRIVATE_SLOTS", 1)
    toy = Toy()
    with toy.manager(tmp_path, save_when=[EverySteps(2)]) as manager:
        manager.resume()
        for step in range(1, 6):
            toy.step()
            manager.after_step(step)
        slow_disk.set()
        manager.wait()
        assert [entry.step for entry in manager.list()] == [2]
        toy.step()
        assert manager.after_step(7) is not None, "no multiple of 2: the dropped one was owed"
        manager.wait()
        assert manager.saved_step == 7


@pytest.mark.skipif(not shared_memory.usable(), reason="nothing outlives a process here")
def test_training_is_safe_once_a_snapshot_took_the_place_of_a_dropped_save(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    toy, told = Toy(), []
    with toy.manager(
        tmp_path,
        memory_every=1,
        max_unsafe=0.2 / 60,
        on_event=lambda event, _fields: told.append(event),
    ) as manager:
        first, second = manager.save_async(step=1), manager.save_async(step=2)
        for step in (3, 4):  # the second of them needs the buffer of step 2, which waits
            manager.after_step(step)
        assert second.durable.result(30) is None
        slow_disk.set()
        manager.wait()
        assert first.durable.result() is not None
        assert manager.saved_step == 4
        time.sleep(0.3)
        told.clear()
        manager.after_step(5)
        assert not manager.unsafe
        assert "unsafe" not in told, "nothing that was wanted is missing"


def test_training_goes_on_while_it_is_written(tmp_path: Path, slow_disk: threading.Event) -> None:
    toy = Toy()
    with toy.manager(tmp_path) as manager:
        pending = manager.save_async(step=1)
        assert pending.staged.done()
        assert not pending.durable.done()
        expected = snapshot(toy.state)
        toy.step()
        slow_disk.set()
        saved = pending.durable.result()
        assert saved is not None
        assert_same(plain(expected["model"]), plain(load(saved.path, only="model")))


def test_a_failure_in_the_background_is_told_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int]] = []

    def tell(event: str, fields: dict[str, Any]) -> None:
        if event == "failed":
            told.append((fields["reason"], threading.get_ident()))

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    toy = Toy()
    with toy.manager(tmp_path, on_event=tell) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(filesystem, "allocate", full)
            pending = manager.save_async(step=1)
            with pytest.raises(SaveFailed, match="Step 1 could not be saved"):
                pending.durable.result()
        assert manager.after_step(2) is None
        assert [(words, where == threading.get_ident()) for words, where in told] == [
            ("[Errno 28] No space left on device", True)
        ]
        assert manager.save(step=3, strict=True) is not None


def test_a_slot_whose_copy_is_under_way_is_nobodys_though_the_disk_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given to the next snapshot, the end of this one's copy would mark that one as whole."""
    copied, settle = threading.Event(), copies.Copy.settle

    def late(copy: copies.Copy) -> None:
        assert copied.wait(20)
        settle(copy)

    def full(*_args: Any, **_keywords: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    toy = Toy()
    with toy.manager(tmp_path) as manager:
        monkeypatch.setattr(copies.Copy, "settle", late)
        with monkeypatch.context() as patch:
            patch.setattr(filesystem, "write_file", full)
            pending = manager.save_async(step=1)
            assert isinstance(pending.durable.exception(20), SaveFailed)
        assert manager.copying
        copied.set()
        assert manager.save(step=2, strict=True) is not None
        assert not manager.copying


def test_a_process_that_ends_without_closing_has_written_what_it_was_asked(
    tmp_path: Path,
) -> None:
    program = """
import sys, torch
from holdfast import CheckpointManager
manager = CheckpointManager(sys.argv[1], {"w": torch.arange(3_000_000)})
manager.save_async(step=1)
"""
    python(program, tmp_path / "run")
    assert load(tmp_path / "run" / "latest.pt", only="w").sum() == sum(range(3_000_000))


def test_without_memory_for_a_copy_saving_waits_for_the_disk_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.checkpoint.save.slots.available_memory", lambda: 1 << 20)
    told: list[str] = []
    toy = Toy()
    with toy.manager(tmp_path, on_event=lambda event, _fields: told.append(event)) as manager:
        for step in (1, 2):
            assert manager.save_async(step=step).durable.done()
    assert told.count("staging_off") == 1
    assert load(tmp_path / "latest.pt", only="global_step") == 2


def test_a_state_that_grows_gets_larger_buffers(tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": torch.ones(1000), "log": []}
    with CheckpointManager(tmp_path, state) as manager:
        for step, size in ((1, 1000), (2, 3_000_000), (3, 10)):
            state["w"] = torch.full((size,), float(step))
            saved = manager.save_async(step=step).durable.result()
            assert saved is not None
            assert load(saved.path, only="w").shape == (size,)
        state["log"] = ["x" * 1000] * 5000  # more values than the buffer was made for
        for step in (4, 5):
            assert manager.save_async(step=step).durable.result() is not None
        assert load(tmp_path / "latest.pt", only="log") == state["log"]


@pytest.mark.parametrize("count", [1, 3])
def test_more_threads_copy_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(copies, "SEGMENT", 4096)
    monkeypatch.setattr("os.cpu_count", lambda: 2 * count)
    torch.manual_seed(1)
    state = {f"w{i}": torch.randn(17 * i + 1, 33) for i in range(60)}
    with CheckpointManager(tmp_path, dict(state)) as manager:
        for step in range(1, 6):
            saved = manager.save_async(step=step).durable.result()
            assert saved is not None
            found = load(saved.path)
            assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_limited_writer_keeps_to_its_limit(tmp_path: Path) -> None:
    state = {"w": torch.zeros(2_000_000)}
    with CheckpointManager(tmp_path, state, io_limit=20e6) as manager:
        began = time.monotonic()
        manager.save(step=1, strict=True)
        assert time.monotonic() - began > 0.3, "8 MB at 20 MB/s"
