"""The nouns of a save and a resume, without behaviour: what each stage fills in and reads."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.checkpoint.rundir import Contents, Entry
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from holdfast.checkpoint.format import Sealer
    from holdfast.checkpoint.state import Tree
    from holdfast.checkpoint.system import Buffer, Slot


@dataclass(slots=True)
class Run:
    """The run that is being saved, as in the identity of its checkpoints."""

    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    generation: int = 1
    sequence: int = 0  # of the newest snapshot
    parent: dict[str, Any] | None = None
    settled: bool = False  # True once it is known what the checkpoints here are to this run


@dataclass(frozen=True, slots=True)
class Resumed:
    """The checkpoint that training goes on from."""

    entry: Entry
    path: Path
    generation: int  # of what is saved from now on
    skipped: list[tuple[str, str]] = field(default_factory=list)  # damaged, set aside, and why
    steps_lost: int = 0
    minutes_lost: float = 0.0
    contents: Contents = field(default_factory=Contents, repr=False)  # here, now
    rng: Mapping[str, Any] | None = field(default=None, repr=False)  # the streams in it

    @property
    def step(self) -> int:
        return self.entry.step

    @property
    def epoch(self) -> int | None:
        return self.entry.epoch

    def restore_rng(self) -> None:
        """Restore the random streams of Python, NumPy and torch once more, for a loop that seeds
        itself after `resume()`: call it right before the first step.

            resumed = manager.resume()
            seed_everything(1337 + epoch)           # the loop's own
            if resumed is not None:
                resumed.restore_rng()

        Raises `ConfigError` where the checkpoint has none.
        """
        from holdfast.checkpoint.state import RandomState  # needs torch: records do without

        if self.rng is None:
            raise ConfigError(
                "{path} has no random streams: it was saved with rng=False.", path=self.path
            )
        RandomState().load_state_dict(self.rng)


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is durable under all of its names."""

    entry: Entry
    path: Path
    seconds: float
    names: dict[str, str]  # name → "file", "link", "reflink" or "copy"
    is_best: bool
    previous_best: float | None
    stall: float = 0.0  # seconds that training has stood still for it


@dataclass(eq=False, slots=True)
class PendingSave:
    """The promises of a save on its way, which are kept at different times.

    `staged` is done when the live state may change: what is saved is a copy of exactly this step.
    `durable` is done when the copy is on the disk under its names, with a `Saved`; with None where
    a newer save has taken its place; it raises `SaveFailed` where it could not be saved.
    `settled` is done when it has been read back as well and old checkpoints are gone. Where the
    system could not read it back, `settled` has a `Saved` whose entry is not `verified`, and old
    ones stay. Where it was read and found damaged, and a second file did not help, `settled` raises
    `SaveFailed`, though `durable` was done and stays so. None of them needs to be waited for.
    """

    step: int
    staged: Future[None] = field(default_factory=Future)
    durable: Future[Saved | None] = field(default_factory=Future)
    settled: Future[Saved | None] = field(default_factory=Future)


@dataclass(eq=False, slots=True)
class Save:
    """One save. It walks from the saver through staging and writer to the publisher; each stage
    fills in its own fields and reads those before them."""

    # From the training loop.
    step: int
    epoch: int | None = None
    metrics: Mapping[str, float] | None = None
    kind: str = "temp"  # "epoch", "step", "best" or "temp"
    reason: str = "requested"
    kept: bool = False  # a newer save never takes its place
    to_disk: bool = True  # False: for the memory alone
    promises: PendingSave = field(init=False)

    # From the saver.
    asked: float = 0.0  # time.monotonic()
    manifest: Mapping[str, Any] = field(default_factory=dict)
    tree: Tree | None = None  # the live state, until its bytes are in the slot

    # From staging. `ranges` are parts of the file, `(offset, bytes)`: one, with all of it, today.
    slot: Slot | None = None
    stager: int = 0  # the thread that completes the image
    # Set when staging is done with the slot: the snapshot is complete, or the copy was torn.
    released: threading.Event = field(default_factory=threading.Event)
    stall: float = 0.0  # seconds that training has stood still for it
    processors: float = 0.0  # seconds of processors that its background threads have taken
    size: int = 0  # of the file
    ranges: list[tuple[int, Buffer]] = field(default_factory=list)
    sealer: Sealer | None = None  # puts in the checksums; None where they are there already

    # From the writer: returns when the bytes of the file before the given one are final.
    ready: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        self.step, self.epoch = int(self.step), None if self.epoch is None else int(self.epoch)
        self.metrics = dict(self.metrics) if self.metrics else None
        self.promises = PendingSave(self.step)
