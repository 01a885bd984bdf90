"""The figures and events of a run as its view hands them out: plain values that read nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Point:
    """One logging interval. Losses in nats a token; `time` ISO 8601 with the zone."""

    step: int
    time: str
    epoch: int | None
    loss: float | None
    smoothed: float | None
    learning_rate: float | None
    tokens_per_second: float | None
    durable_step: int | None
    memory_step: int | None
    gpu_bytes: int | None = None  # of GPU memory, at most so far


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A measured validation loss."""

    step: int
    time: str
    val_loss: float | None
    perplexity: float | None
    bits_per_byte: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """A text of the model at the end of an epoch."""

    step: int
    epoch: int
    text: str
    time: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened on the way; `kind` is the name of its event, or "interrupted"."""

    kind: str
    step: int | None
    time: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Safety:
    """The cost of a failure now; None where nothing is safe, or where it is not known.

    `disk_*` after a power cut, `memory_*` after a kill of the process.
    """

    step: int  # the newest that is known
    disk_step: int | None
    disk_seconds: float | None  # of work since that state; of this start where there is none
    memory_step: int | None
    counted: bool = True  # whether it is known at which step the run is, not only what it saved

    @property
    def disk_steps(self) -> int:
        """Steps that a power cut would cost."""
        return max(0, self.step - (self.disk_step or 0))

    @property
    def disk_unknown(self) -> bool:
        """True if the number of steps at risk on the disk is unknown; `disk_seconds` tells then."""
        return not self.counted and not self.disk_steps

    @property
    def memory_unknown(self) -> bool:
        """The same of a kill of the process."""
        return not self.counted and not self.memory_steps

    @property
    def memory_steps(self) -> int:
        """Steps that a kill of the process would cost."""
        return max(0, self.step - max(self.memory_step or 0, self.disk_step or 0))


def integer(value: object) -> int | None:
    """Return a whole number, else None; a line of a run may hold anything."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
