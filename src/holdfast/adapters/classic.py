"""The names of the original guides (`CheckpointManager(save_dir=…)`, `train_model(…)`), thin over
the engine: durable, verified, and recovered from by itself.

    outputs/checkpoints/apt_model_epoch5_step2500_best.pt   a second name of the engine's file
    outputs/metadata.json                                   the list of them; rebuilt at each save
    outputs/tokenizer/
    .cache/temp/temp_epoch3_step1500.pt                     between epochs; goes with the next epoch

`outputs/checkpoints/` is an ordinary run directory: everything that works on one works on it. Files
that the guides' own code has written there are read too.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from holdfast import checkpoint
from holdfast.checkpoint import Catalog, Entry, Saved, SignalGuard, calls, load
from holdfast.checkpoint.format import read_manifest
from holdfast.checkpoint.rundir import sentence
from holdfast.checkpoint.state import load_foreign, plan_restore
from holdfast.checkpoint.system import filesystem, signals
from holdfast.errors import (
    CheckpointError,
    ConfigError,
    DamagedCheckpoint,
    DataError,
    ForeignCheckpoint,
)
from holdfast.i18n import _

__all__ = ["CheckpointManager", "train_model"]

log = logging.getLogger("holdfast")

_MODEL, _OPTIMIZER, _SCHEDULER = "model_state_dict", "optimizer_state_dict", "scheduler_state_dict"
_BEST = "best"  # the reason of a checkpoint that the caller called the best
_NAMES = re.compile(  # of the guides' files
    r"(?:.+_epoch(\d+)_step(\d+)(?:_best)?|checkpoint_step_(\d+)_ts_\d+)\.pt"
)
_DATE = "%Y-%m-%d %H:%M:%S"

Progress = tuple[int, int, list[Any], dict[str, Any]]  # epoch, global_step, loss_history, metrics


class CheckpointManager:
    """Saves and restores a training under the names of the original guides.

        manager = CheckpointManager(save_dir="outputs", model_name="apt_model")
        if manager.has_checkpoints():
            epoch, step, losses, metrics = manager.load_checkpoint(
                model, optimizer, scheduler, latest=True
            )
        path = manager.save_checkpoint(
            model, optimizer, scheduler, epoch, step, losses, {"avg_loss": 2.1}, is_best=True
        )

    The directory is locked by the first save or load of a training, until the process ends. A
    training that is begun without loading moves the earlier one to `checkpoints/archive/`.

    Args:
        save_dir: files lie in `save_dir/checkpoints`; `.cache/temp` beside `save_dir` shows those
            between epochs.
        model_name: what the names of the files begin with.
        save_freq: how many epochs lie between checkpoints that are kept; those between, unless
            they are the best, go when two later ones are verified.
        logger: gets what is to be told; by default the logger "holdfast".
        step_names: True to call files `checkpoint_step_500_ts_1234567894.pt`, with a JSON beside.

    Raises ConfigError where an argument is none that can be meant.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        model_name: str = "apt_model",
        save_freq: int = 1,
        logger: logging.Logger | None = None,
        *,
        step_names: bool = False,
    ) -> None:
        calls.check_number("save_freq", save_freq, 1, whole=True)
        if not model_name or Path(model_name).name != model_name:
            raise ConfigError(
                "model_name={name}: it is a part of a file name.", name=repr(model_name)
            )
        self.save_dir, self.model_name, self.save_freq = save_dir, model_name, save_freq
        self._place = calls.checked_directory(save_dir)
        self._directory = self._place / "checkpoints"
        self._temp = self._place.absolute().parent / ".cache" / "temp"
        self.log, self._step_names = logger or log, step_names
        self._state: dict[str, Any] = {}
        self._engine: checkpoint.CheckpointManager | None = None

    # --------------------------------------------------------------------------------------- save

    def save_checkpoint(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        scheduler: Any,
        epoch: int,
        global_step: int,
        loss_history: Sequence[Any],
        metrics: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        config: Any = None,
        is_best: bool = False,
    ) -> str | None:
        """Save the whole state of the training; return its path when it is durable and verified.

        None where that failed, which is told: training goes on, and what was there is intact.

        Args:
            epoch, global_step: as the loop counts them, global_step over all epochs.
            loss_history, metrics: come back from `load_checkpoint`.
            tokenizer: an object with `save_pretrained`, saved into `save_dir/tokenizer`.
            config: a dictionary, or an object with `to_dict`.
            is_best: whether `load_checkpoint(best=True)` is to mean this one.

        Raises: as `holdfast.CheckpointManager.save`.
        """
        calls.check_save(global_step, epoch, "epoch", metrics)
        engine = self._prepared(model, optimizer, scheduler, loss_history, metrics, config)
        kept = is_best or epoch % self.save_freq == 0
        saved = engine.save(
            step=global_step,
            epoch=epoch,
            metrics=metrics,
            kind="step" if kept else "temp",
            reason=_BEST if is_best else "epoch",
        )
        if saved is None:
            return None
        name = self._give_name(engine, saved, epoch, global_step, is_best=is_best)
        self._clean_temps()
        if tokenizer is not None:
            save = getattr(tokenizer, "save_pretrained", None) or tokenizer.save
            save(str(self._place / "tokenizer"))
        filesystem.write_json(self._place / "metadata.json", self.metadata)
        return os.path.join(os.fspath(self.save_dir), "checkpoints", name)  # noqa: PTH118 - as given

    def save_temp(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        scheduler: Any,
        epoch: int,
        global_step: int,
        loss_history: Sequence[Any],
        batch_idx: int = 0,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Save in the middle of an epoch, while training goes on: `temp_epoch3_step1500.pt`.

        `batch_idx` counts the batches of this epoch that are done; it is in the file.
        Raises: as `save_checkpoint`.
        """
        engine = self._prepared(model, optimizer, scheduler, loss_history, metrics, None, batch_idx)
        engine.save_async(step=global_step, epoch=epoch, kind="temp")
        self._show_temps()

    def _prepared(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        scheduler: Any,
        loss_history: Sequence[Any] = (),
        metrics: Mapping[str, Any] | None = None,
        config: Any = None,
        batch_idx: int = 0,
    ) -> checkpoint.CheckpointManager:
        """Return the engine over these objects, which a caller may exchange at any save."""
        config = config.to_dict() if hasattr(config, "to_dict") else config
        self._state.update(
            {
                _MODEL: model,
                _OPTIMIZER: optimizer,
                _SCHEDULER: scheduler,
                "loss_history": list(loss_history),
                "metrics": dict(metrics or {}),
                "config": config if config is not None else self._state.get("config"),
                "batch_idx": batch_idx,
            }
        )
        if self._engine is None:
            self._engine = checkpoint.CheckpointManager(
                self._directory, self._state, keep_last=0, metric="avg_loss", on_event=self._tell
            )
        return self._engine

    def _give_name(
        self,
        engine: checkpoint.CheckpointManager,
        saved: Saved,
        epoch: int,
        step: int,
        *,
        is_best: bool,
    ) -> str:
        """Give a durable checkpoint its name of the guides; return that."""
        name = f"{self.model_name}_epoch{epoch}_step{step}{'_best' if is_best else ''}"
        if self._step_names:
            name = f"checkpoint_step_{step}_ts_{int(time.time())}"
        catalog = engine.catalog
        with catalog.lock():
            if f"{name}.pt" in catalog.scan().foreign:
                catalog.replace(f"{name}.pt")  # of the guides' own code: nothing is overwritten
            catalog.publish(saved.entry, [f"{name}.pt"])
        if self._step_names:
            about = _about(saved.entry, f"{name}.pt")
            filesystem.write_json(self._directory / f"{name}.json", about)
        return f"{name}.pt"

    def _show_temps(self) -> None:
        """Let `.cache/temp` show the engine's temporary checkpoints, by a link that moves along."""
        try:
            if self._temp.is_dir() and not self._temp.is_symlink():
                self._temp.rmdir()  # the guides' code made it; not empty: its files are kept
            filesystem.make_directory(self._temp.parent)
            self._temp.symlink_to(self._link, target_is_directory=True)
        except OSError as error:  # there already, or of another run: they are found without it
            self.log.debug("%s: %s", self._temp, error)

    def _clean_temps(self) -> None:
        """Clean `.cache/temp` at the end of an epoch. The engine lets its files go as soon as two
        later states are verified."""
        for path in self._old_temps():
            filesystem.remove(path)
        if self._temp.is_symlink() and str(self._temp.readlink()) == self._link:
            filesystem.remove(self._temp)

    @property
    def _link(self) -> str:
        return os.path.relpath(self._directory.absolute() / "temp", self._temp.parent)

    def close(self) -> None:
        """Wait for what is being saved and give the directory back."""
        if self._engine is not None:
            self._engine.close(save=False)
            self._engine = None

    # --------------------------------------------------------------------------------------- load

    def has_checkpoints(self) -> bool:
        """Return True if there is anything that `load_checkpoint(latest=True)` would load."""
        return bool(self._entries()) or bool(self._old(temps=True))

    def load_checkpoint(
        self,
        model: torch.nn.Module,
        optimizer: Any = None,
        scheduler: Any = None,
        checkpoint_path: str | os.PathLike[str] | None = None,
        best: bool = False,
        latest: bool = False,
    ) -> Progress:
        """Restore a checkpoint into the objects, all of it or nothing.

        With an optimizer training goes on from it, exactly: random streams are restored as well,
        and what is newer than a chosen one goes to the archive. Without one only the model is
        loaded, and nothing else changes.

        Args:
            checkpoint_path: a file of ours or of the guides' own code.
            best: the newest that was saved with `is_best`.
            latest: the newest intact one, of the middle of an epoch or from memory too.

        Returns epoch, global_step, loss_history and metrics as they were saved.

        Raises:
            ConfigError: none of the three is given.
            CheckpointError: there is none, it is damaged, or does not fit; nothing was changed.
        """
        if checkpoint_path is None and not best and not latest:
            raise ConfigError("Give one of checkpoint_path=, best=True and latest=True.")
        paths = self._candidates(checkpoint_path, best=best)
        if not paths:
            raise CheckpointError("There is no checkpoint at {source}.", source=self._directory)
        if optimizer is not None and not self._is_old(paths[0]):
            engine = self._prepared(model, optimizer, scheduler)
            if scheduler is None:
                del self._state[_SCHEDULER]  # until the next save
            newest = checkpoint_path is None and not best
            resumed = engine.resume(None if newest else paths[0])
            assert resumed is not None, "there is one, or it raises"
            progress = self._state["loss_history"], self._state["metrics"]
            return resumed.epoch or 0, resumed.step, list(progress[0]), dict(progress[1])
        live = {_MODEL: model, _OPTIMIZER: optimizer, _SCHEDULER: scheduler}
        return self._read(paths, live, named=checkpoint_path is not None)

    def _candidates(self, path: str | os.PathLike[str] | None, *, best: bool) -> list[Path]:
        """Return the files that are meant; the first intact one counts."""
        if path is not None:
            return [p for p in (Path(path), self._place / path) if p.exists()][:1]
        entries = [entry for entry in self._entries() if not best or entry.reason == _BEST]
        if entries:
            return [self._directory / entry.names[0] for entry in entries]
        old = [p for p in self._old(temps=True) if not best or "_best." in p.name]
        return sorted(old, key=lambda p: _numbers_in(p)[1], reverse=True)

    def _read(self, paths: Sequence[Path], live: Mapping[str, Any], *, named: bool) -> Progress:
        """Restore the first of `paths` that is intact into `live`, and nothing else."""
        for path in paths:
            try:
                found = _payload(path)
            except DamagedCheckpoint as error:
                if named or path is paths[-1]:
                    raise
                self.log.warning("%s", error)
                continue
            wanted = {key: value for key, value in live.items() if value is not None}
            for key in wanted.keys() - {_MODEL}:
                if found.get(key) is None:  # saved without one
                    self.log.warning("%s", _("{path} has no {name}.", path=path, name=key))
                    del wanted[key]
            plan_restore(wanted, found).commit()
            losses = found.get("loss_history", found.get("train_losses"))
            numbers = [found.get(key) or 0 for key in ("epoch", "global_step")]
            return numbers[0], numbers[1], list(losses or ()), dict(found.get("metrics") or {})
        raise AssertionError("the last one returns or raises")

    # ----------------------------------------------------------------------------- what there is

    @property
    def metadata(self) -> dict[str, Any]:
        """The content of `metadata.json`: `model_name`, `created_at`, `last_updated`, and the
        checkpoints, oldest first, with paths relative to `save_dir`. Read from the files."""
        named = [
            _about(entry, name)
            for entry in reversed(self._entries())
            for name in [n for n in entry.names if _NAMES.fullmatch(n)][:1]
        ]
        old: list[dict[str, Any]] = [
            {
                "path": os.path.relpath(path, self._place),
                "epoch": _numbers_in(path)[0],
                "global_step": _numbers_in(path)[1],
                "is_best": "_best." in path.name,
                "created_at": time.strftime(_DATE, time.localtime(path.stat().st_mtime)),
                "metrics": {},
            }
            for path in sorted(self._old(), key=lambda p: _numbers_in(p)[1])
        ]
        checkpoints = [*old, *named]
        dates = [each["created_at"] for each in checkpoints] or [time.strftime(_DATE)]
        return {
            "model_name": self.model_name,
            "created_at": min(dates),
            "last_updated": max(dates),
            "checkpoints": checkpoints,
        }

    @property
    def batch_idx(self) -> int:
        """Batches of the epoch that were done when the last save or load was; 0 between epochs."""
        return int(self._state.get("batch_idx", 0))

    def _is_old(self, path: Path) -> bool:
        try:
            read_manifest(path)
        except ForeignCheckpoint:
            return True
        except CheckpointError:
            pass  # the engine says what is wrong, and takes the one before it if it may
        return False

    def _entries(self) -> list[Entry]:
        return Catalog(self._directory).scan().entries

    def _old(self, *, temps: bool = False) -> list[Path]:
        """Return the files that the guides' own code has written, in any order."""
        foreign = Catalog(self._directory).scan().foreign
        found = [self._directory / name for name in foreign if _NAMES.fullmatch(name)]
        return found + (self._old_temps() if temps else [])

    def _old_temps(self) -> list[Path]:
        return [] if self._temp.is_symlink() else list(self._temp.glob("temp_epoch*_step*.pt"))

    def _tell(self, event: str, fields: dict[str, Any]) -> None:
        text = sentence(event, fields)
        if text:
            self.log.warning("%s: %s", self._directory, text)
        elif event == "durable":
            self.log.info("%s", fields["saved"].path)


def _payload(path: Path) -> Mapping[str, Any]:
    try:
        found = load(path)
    except ForeignCheckpoint:  # of the guides' own code
        found = load_foreign(path)
    if not isinstance(found, Mapping) or not isinstance(found.get(_MODEL), Mapping):
        raise ForeignCheckpoint("{path} has no {name}.", path=path, name=_MODEL)
    return found


def _about(entry: Entry, name: str) -> dict[str, Any]:
    return {
        "path": f"checkpoints/{name}",
        "epoch": entry.epoch,
        "global_step": entry.step,
        "is_best": entry.reason == _BEST,
        "created_at": entry.created[:19].replace("T", " "),
        "metrics": dict(entry.metrics),
    }


def _numbers_in(path: Path) -> tuple[int | None, int]:
    """Return epoch and step that the name of a file says."""
    found = _NAMES.fullmatch(path.name)
    numbers = [int(text) for text in found.groups() if text] if found else [0]
    return (numbers[0] if len(numbers) > 1 else None), numbers[-1]


# ------------------------------------------------------------------------------------ train_model


def train_model(
    epochs: int = 20,
    batch_size: int = 8,
    learning_rate: float = 3e-5,
    checkpoint_dir: str | os.PathLike[str] = "./outputs",
    resume_from: str | os.PathLike[str] | None = None,
    temp_checkpoint_freq: int = 100,
    *,
    texts: Sequence[str] | None = None,
    tokenizer: Any = None,
    logger: logging.Logger | None = None,
    seed: int = 42,
) -> tuple[Any, Any, Any]:
    """Train a small Chinese language model; return it with its tokenizer and configuration.

    The same call again goes on where it was, in the middle of an epoch, bit for bit. At Ctrl-C or
    SIGTERM the step is saved first. `holdfast train` does the same with everything around it.

    Args:
        epochs, batch_size, learning_rate: of AdamW over windows of 128 tokens.
        checkpoint_dir: the `save_dir` of the checkpoints.
        resume_from: a checkpoint to go on from in place of the newest here.
        temp_checkpoint_freq: steps between checkpoints within an epoch; 0: none.
        texts: documents; the sample of the package if not given.
        tokenizer: an object with `encode` and `vocab_size`; trained on `texts` if not given.
        logger: gets a line an epoch.

    Raises: as `CheckpointManager`. ConfigError: an argument is none that can be meant. DataError.
    """
    from holdfast.training import models
    from holdfast.training.options.config import ModelConfig
    from holdfast.training.session import SAMPLE
    from holdfast.training.text.tokenizer import train_tokenizer

    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        calls.check_number(name, value, 1, whole=True)
    calls.check_number("temp_checkpoint_freq", temp_checkpoint_freq, 0, whole=True)
    documents = list(texts) if texts is not None else SAMPLE.read_text("utf-8").split("\n\n")
    tokenizer = tokenizer or train_tokenizer(documents, 2048)
    windows = _windows(documents, tokenizer, context=128)
    torch.manual_seed(seed)
    device = models.choose_device()
    end = getattr(tokenizer, "eos_id", 0)
    model = models.build_model(ModelConfig(), vocab_size=tokenizer.vocab_size, eos_id=end)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    total_steps = epochs * math.ceil(len(windows) / batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
    objects = model, optimizer, scheduler
    manager = CheckpointManager(checkpoint_dir, logger=logger)
    epoch, step = 0, 0
    history: list[float] = []
    metrics: dict[str, Any] = {}
    if resume_from is not None or manager.has_checkpoints():
        epoch, step, history, metrics = manager.load_checkpoint(
            *objects, resume_from, latest=resume_from is None
        )
    done, total = manager.batch_idx, metrics.get("loss_sum", 0.0)
    first = epoch if done or not step else epoch + 1
    with SignalGuard() as guard:
        for epoch in range(first, epochs):
            shuffled = torch.Generator().manual_seed(seed + epoch)
            batches = torch.randperm(len(windows), generator=shuffled).split(batch_size)  # type: ignore[no-untyped-call]
            for batch in batches[done:]:
                rows = windows[batch].to(device)
                loss = _learn(model, optimizer, rows)
                scheduler.step()
                step, done, total = step + 1, done + 1, total + loss
                due = temp_checkpoint_freq and step % temp_checkpoint_freq == 0
                if due or guard.requested is not None:
                    sums = {"loss_sum": total}
                    manager.save_temp(*objects, epoch, step, history, done, sums)
                if guard.requested is not None:
                    manager.close()
                    raise signals.stopped(guard.requested)
            history.append(total / len(batches))
            is_best = history[-1] <= min(history)
            metrics = {"avg_loss": history[-1], "best_loss": min(history)}
            manager.save_checkpoint(
                *objects, epoch, step, history, metrics, tokenizer, model.config, is_best
            )
            done, total = 0, 0.0
            manager.log.info("epoch %d/%d: avg_loss %.4f", epoch + 1, epochs, history[-1])
    manager.close()
    return model, tokenizer, model.config


def _learn(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: torch.Tensor) -> float:
    """Take one optimizer step on `rows` of tokens; return the mean loss before it, in nats."""
    from holdfast.training import models

    loss = models.next_token_loss(model(input_ids=rows[:, :-1]).logits, rows[:, 1:])
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _windows(documents: Sequence[str], tokenizer: Any, *, context: int) -> torch.Tensor:
    """Return all tokens in rows of `context` + 1, int64. Raises DataError for too little text."""
    end = [tokenizer.eos_id] if hasattr(tokenizer, "eos_id") else []
    tokens = [token for text in documents for token in [*tokenizer.encode(text), *end]]
    rows = len(tokens) // (context + 1)
    if not rows:
        raise DataError(
            "The texts have {tokens} tokens; {least} are needed.",
            tokens=len(tokens),
            least=context + 1,
        )
    return torch.tensor(tokens[: rows * (context + 1)]).view(rows, context + 1)
