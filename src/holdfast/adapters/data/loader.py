"""The loader: where it is in an epoch, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from holdfast.adapters.data.making import Call, Maker, Plan, Probe, WorkerStart, as_it_is
from holdfast.adapters.data.orders import Order, draw
from holdfast.checkpoint import calls
from holdfast.errors import ConfigError, StateMismatch


class ResumableLoader(DataLoader[Any]):
    """A map-style `DataLoader` that goes on at any batch, with the same bits.

        loader = ResumableLoader(DataLoader(dataset, 64, shuffle=True, num_workers=8), seed=0)
        run = holdfast.protect("runs/a", model=model, optimizer=optimizer, loader=loader)
        for epoch in range(loader.epoch, epochs):
            for batch in loader:
                ...

    It takes over dataset, batch size or batch sampler, `shuffle`, `drop_last`, `collate_fn`,
    workers and pinning. The order is a function of (seed, epoch) alone. The global random streams
    of Python, NumPy and PyTorch (CPU) are seeded for each batch where it is made, so that any
    number of workers gives the same bits; without workers the streams of this process are put back
    afterwards. `torch.initial_seed()` is the batch's seed there, for generators of your own.

    `iter()` goes on where the state is: (epoch, position). After the last batch of an epoch, the
    end of the `for` begins the next one. A loop that is left early, by `break`, has left the state
    where it is: the next `for` hands out the rest of the epoch. `set_epoch` drops the rest. One
    `for` at a time.

    Samplers and batch samplers of your own are kept: an epoch's order is drawn as a whole, with
    the global streams, and generators that are attributes of the sampler, seeded for it, and after
    its `set_epoch(epoch)` if it has one. Where one depends on something else, a resume says so.

    `accelerator.prepare` and `fabric.setup_dataloaders` take it; save the loader itself.

    Args:
        loader: what is wrapped; it is not used itself.
        seed: of the order, and of what is random in `__getitem__` and `collate_fn`; at least 0. A
            state that is loaded brings its own.
        rank, world: this process, of how many; from `torch.distributed` if None. `loader`'s
            batches are the global ones, of which each rank is handed its slice. So the position is
            the same in every world. Random draws are not: each slice has its own.
        fingerprint: a name for what is in the dataset, compared when a state is loaded; "" for the
            length alone. If None, a hash of three samples, or the fingerprint of Hugging Face.

    Raises ConfigError where `loader` cannot be gone on with.
    """

    _is_accelerate_prepared = True  # `prepare` does not build another loader of its parts

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        fingerprint: str | None = None,
    ) -> None:
        _refuse(loader)
        calls.check_number("seed", seed, 0, whole=True)
        if (rank is None) != (world is None):
            raise ConfigError("rank and world are given together.")
        if rank is not None and world is not None:
            calls.check_number("rank", rank, 0, whole=True)
            calls.check_number("world", world, rank + 1, whole=True)
        # What a DataLoader is asked for is asked for here: dataset, batch_size, sampler, ...
        vars(self).update(vars(loader))
        if fingerprint is not None:
            vars(self)["fingerprint"] = fingerprint
        self.seed, self._epoch, self._position = int(seed), 0, 0
        self._given = None if rank is None or world is None else (int(rank), int(world))
        self._turn: object = None  # whose the batches are: the newest iterator
        self._order: Order | None = None  # of this epoch
        self._plan = Plan()
        self._workers: DataLoader[Any] | None = None  # where they outlive an epoch

    # ------------------------------------------------------------------------------- positions

    @property
    def epoch(self) -> int:
        """The epoch that the next batch is of, counted from 0."""
        return self._epoch

    @property
    def position(self) -> int:
        """The number of batches of this epoch that were handed out."""
        return self._position

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch`, from 0, and drop the rest of this one; nothing if it is this one."""
        calls.check_number("epoch", epoch, 0, whole=True)
        if epoch != self._epoch:
            self._go_to(self.seed, int(epoch), 0, None)

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader is, and what data it is of; the same on every rank."""
        return {
            "seed": self.seed,
            "epoch": self._epoch,
            "position": self._position,
            "order": self._order.digest if self._order and self._position else "",
            "samples": len(self.dataset),  # type: ignore[arg-type]
            "fingerprint": self.fingerprint,
        }

    def state_at_step(self) -> dict[str, Any]:
        """Return what is saved for a step where an exception comes in a later batch."""
        return self.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was saved; the next `iter()` begins there.

        Raises StateMismatch, and nothing has changed, where the data are not those of the save: of
        another length or fingerprint, or in another order of batches.
        """
        samples = len(self.dataset)  # type: ignore[arg-type]
        if samples != state["samples"]:
            raise StateMismatch(
                "The dataset has {now} samples and had {then} when this was saved; its order is "
                "another one now. Use the dataset of the save.",
                now=samples,
                then=state["samples"],
            )
        if state["fingerprint"] and self.fingerprint not in ("", state["fingerprint"]):
            raise StateMismatch(
                "The dataset has other samples than when this was saved (fingerprint {now}, then "
                "{then}). Use the dataset of the save, or, where it is only read in another way, "
                "ResumableLoader(..., fingerprint={then}).",
                now=repr(self.fingerprint),
                then=repr(state["fingerprint"]),
            )
        seed, epoch, order = state["seed"], state["epoch"], None
        if state["order"]:
            order = draw(self, seed, epoch)
            if order.digest != state["order"]:
                raise StateMismatch(
                    "The batches of epoch {epoch} are not those of the save: another batch size, "
                    "drop_last or sampler. Use those of the save until the epoch has ended.",
                    epoch=epoch,
                )
        self._go_to(seed, epoch, state["position"], order)

    def _go_to(self, seed: int, epoch: int, position: int, order: Order | None) -> None:
        self.seed, self._epoch, self._position, self._order = seed, epoch, position, order
        self._turn = None

    # --------------------------------------------------------------------------------- batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        turn = self._turn = object()
        self.fingerprint  # noqa: B018 - computed before training, not in its first save
        if self._order is None:
            self._order = draw(self, self.seed, self._epoch)
        order = self._order
        with self._accelerate() as ends:
            for batch in self._made(order) if self._position < order.count else ():
                self._position += 1
                if ends is None:
                    yield batch
                else:
                    ends.end_of_dataloader = self._position == order.count
                    yield ends.place(batch)
                if self._turn is not turn:
                    raise ConfigError(
                        "This loop over the ResumableLoader has been left behind: another one has "
                        "begun, or a state or an epoch was set. Leave it and begin a new one."
                    )
        self._go_to(self.seed, self._epoch + 1, 0, None)

    def _made(self, order: Order) -> Iterator[Any]:
        """Return the batches of this epoch from the position on, made here or by workers."""
        self._plan.calls = self._calls(order)
        if self._workers is None:
            maker = Maker(self.dataset, self.collate_fn, batched=self.batch_sampler is not None)
            made = self._loader(maker, self._plan, self.num_workers)
            if not self.persistent_workers:
                return iter(made)
            self._workers = made
        return iter(self._workers)

    def _calls(self, order: Order) -> Iterator[Call]:
        """Yield what is to be made: the indices of each batch, and the numbers of its seeds."""
        rank, world = self._given or _of_distributed()
        if world > 1 and self.batch_sampler is None:
            raise ConfigError("Without batches (batch_size=None) there are no slices for ranks.")
        for position, batch in enumerate(order.after(self._position), self._position):
            start, part = 0, batch
            if world > 1:
                start, stop = (len(batch) * r // world for r in (rank, rank + 1))
                part = batch[start:stop]
                if not part:
                    raise ConfigError(
                        "A batch of {samples} samples has no slice for each of {world} ranks: use "
                        "drop_last=True.",
                        samples=len(batch),
                        world=world,
                    )
            yield part, (self.seed, self._epoch, position, start)

    def _loader(
        self, dataset: Dataset[Any], plan: Iterable[Any], num_workers: int
    ) -> DataLoader[Any]:
        """Return a DataLoader like the wrapped one that makes what `plan` says with `dataset`."""
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=plan,
            collate_fn=as_it_is,
            num_workers=num_workers,
            pin_memory=self.pin_memory,
            timeout=self.timeout,
            worker_init_fn=WorkerStart(self.worker_init_fn),
            multiprocessing_context=self.multiprocessing_context if num_workers else None,
            generator=torch.Generator(),  # else each iter() would draw from the global stream
            prefetch_factor=self.prefetch_factor if num_workers else None,
            persistent_workers=self.persistent_workers and num_workers > 0,
        )

    @contextmanager
    def _accelerate(self) -> Iterator[Any]:
        """Yield what Accelerate asks about the end of the data; None if it did not prepare this."""
        if "_is_accelerate_prepared" not in vars(self):
            yield None
            return
        from accelerate.data_loader import DataLoaderStateMixin
        from accelerate.state import GradientState, PartialState
        from accelerate.utils import send_to_device

        class Ends(DataLoaderStateMixin):  # type: ignore[misc]
            gradient_state = GradientState()

            def place(self, batch: Any) -> Any:
                return send_to_device(batch, PartialState().device)

        ends = Ends()
        ends.begin()
        try:
            yield ends
        finally:
            ends.end()

    # ------------------------------------------------------------------------------- identity

    @cached_property
    def fingerprint(self) -> str:
        """A mark of this dataset, which another one of its length does not have."""
        own = getattr(self.dataset, "_fingerprint", None)  # of datasets.Dataset
        samples = len(self.dataset)  # type: ignore[arg-type]
        if isinstance(own, str) or not samples:
            return own or ""
        # In a worker, where there are any: files that a dataset opens must not be open in this
        # process when workers are forked.
        which = [[0, samples // 2, samples - 1]]
        (found,) = self._loader(Probe(self.dataset), which, min(self.num_workers, 1))
        if not found:
            raise ConfigError(
                "Sample 0 of {kind} is another one each time, with all random streams seeded: it "
                "has a generator of its own, which cannot be gone on with. Seed that in "
                '__getitem__ with torch.initial_seed(), or use ResumableLoader(..., fingerprint="")'
                " to do without the same bits.",
                kind=type(self.dataset).__name__,
            )
        return str(found)


def _refuse(loader: Any) -> None:
    """Raise ConfigError where what `loader` hands out cannot be gone on with."""
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            "ResumableLoader wraps a DataLoader of PyTorch; this is a {kind}.",
            kind=type(loader).__name__,
        )
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__getitem__"):
        raise ConfigError(
            "{kind} is an IterableDataset, which has no position to go on from. Save the state of "
            "what has one, as it is: torchdata's StatefulDataLoader, or a streamed dataset of "
            "Hugging Face's datasets.",
            kind=type(loader.dataset).__name__,
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ConfigError(
            "A {kind} hands out batches in its own way. Wrap a plain DataLoader, and that before "
            "a framework prepares it.",
            kind=type(loader).__name__,
        )
    if not loader.in_order:
        raise ConfigError("With in_order=False the order is one of chance. Use in_order=True.")
    if isinstance(loader.sampler, DistributedSampler):
        raise ConfigError(
            "ResumableLoader takes each rank's slice of the batch itself: leave the "
            "DistributedSampler out, and give the batch size of all ranks together."
        )


def _of_distributed() -> tuple[int, int]:
    """Return this process' rank, and the number of ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
