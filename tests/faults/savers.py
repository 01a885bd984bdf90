"""Who is put to the faults: Holdfast, what people write by hand, and mutants of ours.

A saver trains nothing; it saves and restores a `Training` in a directory, in its own best way. The
control group (plain torch.save, a rename without fsync of the directory) and the mutants must be
caught, or the harness proves nothing. The libraries among the peers are in `peers.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import xxhash

from holdfast import CheckpointManager, load
from holdfast.checkpoint.format import container, reading
from holdfast.checkpoint.rundir import catalog, rollback, tidy
from holdfast.checkpoint.system import filesystem
from holdfast.errors import DamagedCheckpoint
from tests.support import bits

Announce = Callable[[int], None]


class Training:
    """A small training that goes another way if a single bit of its state differs: a model with
    dropout, AdamW, and random data from the global stream."""

    def __init__(self, width: int = 64) -> None:
        torch.manual_seed(20260101)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.Dropout(0.1), torch.nn.Linear(width, 1)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.losses: list[float] = []
        self.width = width

    @property
    def now(self) -> int:
        return len(self.losses)

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(4, self.width)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    def state_dict(self) -> dict[str, Any]:
        """Everything, as people save it by hand."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": list(self.losses),
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses[:] = state["losses"]
        torch.set_rng_state(state["rng"])

    def digest(self) -> str:
        """One text for every bit of the state."""
        found = hashlib.sha256()
        for parameter in self.model.parameters():
            found.update(bits(parameter))
        for number, entry in self.optimizer.state_dict()["state"].items():
            for name, value in sorted(entry.items()):
                found.update(f"{number}{name}".encode() + bits(value))
        found.update(json.dumps(self.losses).encode() + bits(torch.get_rng_state()))
        return found.hexdigest()


class Saver(ABC):
    """One way to save a training and to find it again."""

    name: ClassVar[str]
    control: ClassVar[bool] = False  # it must lose: the proof that the harness can see
    needs_shim: ClassVar[bool] = True  # what it does cannot be seen from Python

    def __init__(self, directory: Path, training: Training) -> None:
        self.directory, self.training = directory, training

    @classmethod
    def missing(cls) -> str:
        """Why this saver cannot be tried here; "" where it can."""
        return ""

    def start(self) -> None:  # noqa: B027 - most have nothing to do
        """Once, before the first save."""

    @abstractmethod
    def save(self, step: int, announce: Announce) -> None:
        """Save the training as it is now; `announce(step)` at the moment it counts as saved."""

    def finish(self) -> None:  # noqa: B027
        """After the last save."""

    @abstractmethod
    def resume(self) -> int:
        """In a new process: restore the newest state; its step, 0 where there is none."""

    def read(self) -> int:
        """The step of the newest state, looked at without changing anything on the disk."""
        return self.resume()


# -------------------------------------------------------------------------------------------- ours


class Ours(Saver):
    """`CheckpointManager` with everything that belongs to a save: rolling temporary checkpoints,
    epochs, a best one, kept steps; one epoch and one step are kept, so that old ones go."""

    name = "holdfast"
    needs_shim = False
    memory_every: ClassVar[int] = 0
    KINDS: ClassVar = {1: "epoch", 2: "temp", 3: "temp", 4: "epoch", 5: "temp", 6: "step"}
    EPOCH: ClassVar[int] = 0  # that everything is saved as; 0: the step

    def start(self) -> None:
        self.manager = self.open()
        self.manager.resume()

    def open(self) -> CheckpointManager:
        training = self.training
        return CheckpointManager(
            self.directory,
            {"model": training.model, "optimizer": training.optimizer, "losses": training.losses},
            keep_last=1,
            memory_every=self.memory_every,
        )

    def save(self, step: int, announce: Announce) -> None:
        kind = self.KINDS.get(step, "temp")
        pending = self.manager.save_async(
            step=step, epoch=self.EPOCH or step, kind=kind, metrics={"val_loss": 10.0 / (step + 1)}
        )

        def durable(outcome: Any) -> None:
            if outcome.exception() is None and outcome.result() is not None:
                announce(step)

        pending.durable.add_done_callback(durable)
        self.manager.wait()

    def finish(self) -> None:
        self.manager.close()

    def resume(self) -> int:
        self.manager = self.open()
        resumed = self.manager.resume()
        return resumed.step if resumed is not None else 0

    def read(self) -> int:
        return int(load(self.directory / "latest.pt", only="global_step"))


class Remembering(Ours):
    """With a snapshot in memory at each step."""

    name = "holdfast, with snapshots in memory"
    memory_every = 1


class OneName(Ours):
    """All saves under one name: each of them makes its predecessor go to the archive."""

    name = "holdfast, under one name"
    KINDS: ClassVar = dict.fromkeys(range(1, 100), "epoch")
    EPOCH = 1


class GoesBack(Ours):
    """Between two saves the user goes back to the checkpoint before the last: what is newer makes
    way, and training goes on from there in a new generation."""

    name = "holdfast, going back in the middle"
    BACK, GOES_ON = 3, 5  # steps
    begun = False  # not by a process that resumes

    def start(self) -> None:
        self.begun = True
        super().start()

    def save(self, step: int, announce: Announce) -> None:
        if step == self.GOES_ON and self.begun:
            self.manager.close()
            announce(self.BACK)  # a newer one is not asked for any more
            self.go_back()
            if self.training.now != self.BACK:
                raise RuntimeError(f"went back to {self.training.now}")
            while self.training.now < step:
                self.training.step()
        super().save(step, announce)

    def go_back(self) -> None:
        self.manager = self.open()
        self.manager.resume("temp/temp_epoch3_step3.pt")


class SetsAside(GoesBack):
    """Between two saves the newest checkpoint is damaged: the next start sets it aside and goes on
    from the one before."""

    name = "holdfast, the newest damaged in the middle"

    def go_back(self) -> None:
        file = self.directory / "model_epoch_4.pt"
        file.chmod(0o600)
        fd = os.open(file, os.O_WRONLY)
        os.pwrite(fd, b"\xff" * 64, file.stat().st_size // 2)
        os.fsync(fd)
        os.close(fd)
        self.start()


class StartsAgain(GoesBack):
    """Between two saves a process starts where another has died: it sweeps a temporary file and
    gives the newest checkpoint the names back that it lacks."""

    name = "holdfast, started over remains in the middle"
    BACK = 4

    def go_back(self) -> None:
        (self.directory / "temp" / ".holdfast-1-dead.tmp").write_bytes(b"half of a")
        (self.directory / "model_epoch_4.pt").unlink()
        (self.directory / "latest.pt").unlink()
        self.start()


class NoDirectorySync(Ours):
    """A mutant: names are not made durable."""

    name, control = "holdfast, mutant: no fsync of the directory", True

    def start(self) -> None:
        filesystem.sync_directory = lambda _path: None
        super().start()


class Believes(Ours):
    """A mutant: what was written is believed without reading it, and old ones go at once."""

    name, control = "holdfast, mutant: pruned before it is verified", True

    def start(self) -> None:
        tidy.verify_back = lambda *_args: None
        super().start()


class TrustsBytes(Ours):
    """A mutant: hashes are not compared."""

    name, control = "holdfast, mutant: hashes are not compared", True

    def start(self) -> None:
        self._blind()
        super().start()

    def resume(self) -> int:
        self._blind()
        return super().resume()

    @staticmethod
    def _blind() -> None:
        container.xxhash = SimpleNamespace(xxh3_128=_Blind)  # type: ignore[assignment]
        container.isal_zlib = SimpleNamespace(crc32=lambda *_data: _EqualNumber())  # type: ignore[assignment]


class _Blind:
    """A hash that has whatever value it is to have."""

    def update(self, _data: object) -> None: ...

    def reset(self) -> None: ...

    def digest(self) -> bytes:
        return _EqualBytes()


class _EqualBytes(bytes):
    """Equal to every digest."""

    def __ne__(self, _other: object) -> bool:
        return False

    __hash__ = bytes.__hash__


class _EqualNumber(int):
    """Equal to every CRC-32."""

    def __ne__(self, _other: object) -> bool:
        return False

    __hash__ = int.__hash__


class TempElsewhere(Ours):
    """A mutant: the temporary file lies on another device, and is moved (which means: copied)."""

    name, control = "holdfast, mutant: temp on another device", True

    def start(self) -> None:
        real = filesystem.write_file

        def write_file(target: Path, *args: Any, **keywords: Any) -> None:
            if target.suffix != ".pt":
                return real(target, *args, **keywords)
            with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
                real(Path(elsewhere) / target.name, *args, **keywords)
                shutil.move(Path(elsewhere) / target.name, target)
            return None

        filesystem.write_file = write_file  # type: ignore[assignment]
        super().start()


class Condemns(Ours):
    """A mutant: what the system does not let us read, once, is taken for damaged."""

    name, control = "holdfast, mutant: an error of the system condemns a file", True

    def start(self) -> None:
        self._condemn()
        super().start()

    def resume(self) -> int:
        self._condemn()
        return super().resume()

    @staticmethod
    def _condemn() -> None:
        reading.PAUSES = ()
        reading.File = _Condemning  # type: ignore[misc]


class _Condemning(reading.File):
    def __init__(self, *args: Any, **keywords: Any) -> None:
        with _condemning():
            super().__init__(*args, **keywords)

    def read(self, *args: Any, **keywords: Any) -> int:
        with _condemning():
            return super().read(*args, **keywords)


@contextlib.contextmanager
def _condemning() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedCheckpoint(str(error)) from error


class PrunesUnread(Ours):
    """A mutant: what cannot be read back counts as verified."""

    name, control = "holdfast, mutant: what cannot be read back is verified", True

    def start(self) -> None:
        reading.PAUSES, real = (), tidy.verify_back

        def verify_back(*args: Any) -> None:
            with contextlib.suppress(OSError):
                real(*args)

        tidy.verify_back = verify_back
        super().start()


class BelievesTheCache(Ours):
    """A mutant: metadata.json decides, as it stands there."""

    name, control = "holdfast, mutant: the cache is believed", True

    def resume(self) -> int:
        real = catalog.Catalog.scan
        catalog.Catalog.scan = lambda self, **_how: real(self, cached=True)  # type: ignore[method-assign]
        with contextlib.suppress(OSError):
            self._seal(self.directory / "metadata.json")
        return super().resume()

    @staticmethod
    def _seal(cache: Path) -> None:
        """Give the cache the checksum of what stands in it now."""
        _head, _found, rest = cache.read_bytes().partition(b'"files": ')
        digest = xxhash.xxh3_128_hexdigest(rest.removesuffix(b"\n}\n")).encode()
        text = b'{\n"format_version": 2,\n"xxh3_128": "%s",\n"files": %s' % (digest, rest)
        cache.chmod(0o644)
        cache.write_bytes(text)


class BelievesTheDisk(Remembering):
    """A mutant: memory is given back for a file that nobody has read."""

    name, control = "holdfast, mutant: memory goes before the file is read", True

    def resume(self) -> int:
        rollback.damage_of_all = lambda *_args: None
        return super().resume()


MUTANTS: list[type[Saver]] = [NoDirectorySync, Believes, TrustsBytes, TempElsewhere]


# --------------------------------------------------------------------------------------- by hand


class TorchSaveLatest(Saver):
    """What most scripts do."""

    name, control = "torch.save over latest.pt", True

    def save(self, step: int, announce: Announce) -> None:
        torch.save(self.training.state_dict(), self.directory / "latest.pt")
        announce(step)

    def resume(self) -> int:
        file = self.directory / "latest.pt"
        if not file.exists():
            return 0
        self.training.load_state_dict(torch.load(file, weights_only=True))
        return self.training.now


class RenameNoSync(TorchSaveLatest):
    """What careful scripts do."""

    name = "torch.save, rename"

    def save(self, step: int, announce: Announce) -> None:
        temporary = self.directory / "latest.pt.tmp"
        torch.save(self.training.state_dict(), temporary)
        temporary.replace(self.directory / "latest.pt")
        announce(step)


class RenameNoDirectorySync(TorchSaveLatest):
    """What very careful scripts do."""

    name = "torch.save, fsync, rename"

    def save(self, step: int, announce: Announce) -> None:
        temporary = self.directory / "latest.pt.tmp"
        with temporary.open("wb") as file:
            torch.save(self.training.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.directory / "latest.pt")
        announce(step)


BY_HAND: list[type[Saver]] = [TorchSaveLatest, RenameNoSync, RenameNoDirectorySync]
