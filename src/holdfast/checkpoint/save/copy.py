"""Live tensors → host buffers that are laid out like the file: the snapshot of exactly one step.

Nothing is serialised and nothing is written to a disk here. Several threads may help one copy
along: its own, and a training thread that has come to its next optimizer step and would otherwise
only wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from holdfast.checkpoint.format import Record
from holdfast.checkpoint.state import StorageSlice
from holdfast.checkpoint.system import Slot, together
from holdfast.errors import HoldfastError
from holdfast.i18n import _

SEGMENT = 32 << 20  # bytes that one thread copies before it asks for more


class Torn(HoldfastError):
    """A copy was interrupted: the live state may be another one by now."""

    def __init__(self) -> None:
        super().__init__(_("the copy of the state was interrupted"))


class Copy:
    """The bytes of one snapshot on their way into a slot.

    `run` copies what must be copied at once, `help` whatever is left, in any thread and in the
    order of the file; `await_bytes` lets a writer follow behind. Storages are kept alive meanwhile.

    An exception in the middle of copying (a signal's) gives the copy up: who awaits it gets `Torn`.
    """

    def __init__(
        self,
        slot: Slot,
        placed: Sequence[tuple[StorageSlice, Record]],
        later: Collection[int] = (),
    ) -> None:
        """Args:
        placed: what to copy, and the record that says where to.
        later: addresses of storages that stay as they are until `wait`.
        """
        self._slot = slot
        self.asked_by = threading.get_ident()
        self._change = threading.Condition()
        self._events: list[tuple[torch.device, torch.cuda.Event]] = []
        self._alive = [storage for storage, _record in placed]
        now: list[_Move] = []
        rest: list[_Move] = []
        at_once: list[_Placed] = []
        devices: list[_Placed] = []
        for storage, record in placed:
            start = storage.source.data_ptr()
            if storage.source.device.type == "cpu":
                moves = rest if start in later else now
                moves.append((slot.address + record.offset, start + storage.start, storage.nbytes))
            elif storage.nbytes:
                (devices if start in later else at_once).append((storage, record.offset))
        self._now, self._rest = deque(_segments(now)), deque(_segments(rest))
        self._unfinished = {segment[0][0] for segment in (*self._now, *self._rest)}
        self._first = len(self._now)  # segments of `now` that are not finished
        self._busy = 0  # threads that are copying
        self._given_up = False
        # Here: a thread that awaits bytes must find their events.
        self._copy_devices(at_once)
        for device, event in self._events:  # the next forward may change them already
            torch.cuda.current_stream(device).wait_event(event)
        self._copy_devices(devices)

    def run(self, threads: int) -> None:
        """Copy what may change as soon as this returns, in up to `threads` threads."""
        try:
            together(partial(self._copy_all, self._now), min(threads, len(self._now)))
            with self._change:
                self._change.wait_for(lambda: not self._first or self._given_up)
        except BaseException:
            self.give_up()
            raise

    def give_up(self) -> None:
        """Copy nothing more: the training thread goes on with the state as it likes."""
        with self._change:
            self._given_up = True
            self._now.clear()
            self._rest.clear()
            self._change.notify_all()

    @property
    def finished(self) -> bool:
        """True once every byte has been copied."""
        return not self._unfinished and not self._events

    def help(self) -> None:
        """Copy segments until each of them has been begun by a thread."""
        try:
            self._copy_all(self._now)
            self._copy_all(self._rest)
        except BaseException:
            self.give_up()
            raise

    def wait(self) -> None:
        """Return when the live tensors may change."""
        self.help()
        with self._change:
            self._change.wait_for(lambda: not self._unfinished or self._given_up)
        for device, event in self._events:  # a GPU waits by itself: the CPU goes on
            torch.cuda.current_stream(device).wait_event(event)

    def settle(self) -> None:
        """Return when every byte is in the slot, and no thread writes into it any more. Raises
        `Torn`."""
        try:
            self.help()
            self.await_bytes(self._slot.capacity)
        finally:
            with self._change:
                self._change.wait_for(lambda: not self._busy)
            self._alive.clear()

    def await_bytes(self, end: int) -> None:
        """Return when the first `end` bytes of the slot have been copied. Raises `Torn`."""
        for _device, event in self._events:
            event.synchronize()
        end += self._slot.address
        with self._change:
            self._change.wait_for(
                lambda: self._given_up or min(self._unfinished, default=end) >= end
            )
            if self._given_up:
                raise Torn

    def _copy_all(self, segments: deque[list[_Move]]) -> None:
        with self._change:
            self._busy += 1
        try:
            while segments:
                with contextlib.suppress(IndexError):  # another thread was faster
                    self._copy(segments.popleft(), first=segments is self._now)
        finally:
            with self._change:
                self._busy -= 1
                self._change.notify_all()

    def _copy(self, segment: list[_Move], *, first: bool) -> None:
        for target, source, size in segment:
            ctypes.memmove(target, source, size)  # gives the interpreter lock away meanwhile
        with self._change:
            self._unfinished.discard(segment[0][0])
            self._first -= first
            self._change.notify_all()

    def _copy_devices(self, devices: Sequence[_Placed]) -> None:
        """Copy from a GPU on a side stream into pinned memory; from anything else at once."""
        slot = self._slot
        cuda = [move for move in devices if move[0].source.device.type == "cuda"]
        for storage, offset in devices:
            if storage.source.device.type != "cuda":
                slot.tensor(offset, storage.nbytes).copy_(storage.tensor())
        if not cuda:
            return
        slot.pin()
        for device in {storage.source.device for storage, _offset in cuda}:
            with torch.cuda.device(device):
                side = _side_stream(device)
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for storage, offset in cuda:
                        if storage.source.device == device:
                            target = slot.tensor(offset, storage.nbytes)
                            target.copy_(storage.tensor(), non_blocking=True)
                    self._events.append((device, side.record_event()))


_Move = tuple[int, int, int]  # target and source address, bytes
_Placed = tuple[StorageSlice, int]  # what to copy, and its offset in the slot
_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]


def _segments(moves: Sequence[_Move]) -> list[list[_Move]]:
    """Return portions of about `SEGMENT` bytes: large storages cut up, small ones put together."""
    segments: list[list[_Move]] = []
    room = 0
    for target, source, size in moves:
        done = 0
        while done < size:
            if room <= 0:
                segments.append([])
                room = SEGMENT
            part = min(size - done, room)
            segments[-1].append((target + done, source + done, part))
            done += part
            room -= part
    return segments


def stable_storages(state: Any, *, cpu: bool) -> set[int]:
    """Return the addresses of the storages that change in an optimizer's step and at no other time;
    without `cpu`, of those on a GPU only.

    These are the parameters that an optimizer in `state` holds, and what it keeps for them.
    Everything else (buffers of a model, the weights of an average, a second model) may change in
    the next forward already.
    """
    return {
        tensor.untyped_storage().data_ptr()
        for optimizer in optimizers_of(state)
        for tensor in _tensors(
            [[group["params"] for group in optimizer.param_groups], *optimizer.state.values()]
        )
        if cpu or tensor.is_cuda
    }


def optimizers_of(state: Any) -> list[Optimizer]:
    """Return the optimizers anywhere in `state`."""
    if isinstance(state, Optimizer):
        return [state]
    if isinstance(state, Mapping):
        return [found for value in state.values() for found in optimizers_of(value)]
    if isinstance(state, list | tuple):
        return [found for value in state for found in optimizers_of(value)]
    return []


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
