"""A callback for Lightning's `Trainer`: what its loops go on from is saved between two batches.

    loader = holdfast.ResumableLoader(DataLoader(data, batch_size=8, shuffle=True, num_workers=2))
    trainer = Trainer(max_epochs=3, callbacks=[Protect("runs/a")])
    trainer.fit(model, loader)                  # started again: it goes on by itself

A callback alone cannot be exact. Lightning calls none after a batch's validation, its plateau
schedules and its own counters, and on a restart it runs or skips validations by guessing from
those counters. So `Protect` also takes the place of five methods of the fit loop while it runs.
A `CheckpointIO` is not used: what it is given was collected in the middle of a batch, without
random streams, logged sums and position in the data.

A `Fabric` loop is a plain loop: `holdfast.protect` is all that it needs.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging
from lightning.pytorch.core.datamodule import LightningDataModule
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torchmetrics import Metric

from holdfast.checkpoint.policy import SavePolicy
from holdfast.errors import ConfigError
from holdfast.protection import Protected, protect

__all__ = ["Protect"]


class Protect(Callback):  # type: ignore[misc]
    """Saves a Lightning training and makes `trainer.fit` go on where it ended, bit for bit.

    It saves by risk, at the end of each epoch, and at a signal, after which the exit status is
    128 + its number. After an exception, or a signal in a long validation, the newest snapshot in
    memory becomes durable: between two steps Lightning's state is that of neither.

    Restored are weights, optimizers, schedules, random streams, loops, the states of callbacks and
    of the data module, what their `on_save_checkpoint` adds, the sums and metrics logged so far,
    and the position in the data, which `holdfast.ResumableLoader` and torchdata's
    `StatefulDataLoader` know. The files have Lightning's names inside:
    `Model.load_from_checkpoint("runs/a/best_model.pt")` and `trainer.test(ckpt_path=...)` read
    them. `ModelCheckpoint` works beside it. `fit(ckpt_path=...)` is only what a first start begins
    with.

    Args:
        directory: the run directory.
        also: objects that hold what no `state_dict` has, such as a callback that keeps averages
            and has no `state_dict`; as for `holdfast.protect`, and so are the others.
        metric: a name in `trainer.callback_metrics`.

    Raises, when the training starts:
        ConfigError: the position in the training data cannot be saved; another callback changes
            optimizers or schedules while training; or `ckpt_path` is a file of `directory`.
        And as `holdfast.protect` and its `resume`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        also: Sequence[Any] = (),
        quiet: bool = False,
        save_when: Sequence[SavePolicy] | None = None,
        keep_last: int = 3,
        metric: str = "val_loss",
        lower_is_better: bool = True,
        memory_every: int | Literal["auto"] = "auto",
    ) -> None:
        self._directory = directory
        self._options: dict[str, Any] = {
            # Every callback has a state_dict(): where it is Lightning's own, it is empty.
            "also": [vars(o) if _has_empty_state(o) else o for o in also],
            "quiet": quiet,
            "save_when": save_when,
            "keep_last": keep_last,
            "metric": metric,
            "lower_is_better": lower_is_better,
            "memory_every": memory_every,
        }
        self._run: Protected | None = None
        self._trainer: Trainer
        self._step = 0
        self.starting = False  # True until the first epoch begins
        self.within_epoch = False  # True if that is the rest of one

    # ------------------------------------------------------------------------ Lightning's hooks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        _check(trainer, self._directory)
        self._trainer, self.starting = trainer, True
        loop = trainer.fit_loop
        for one, kind in ((loop, _Epochs), (loop.epoch_loop, _Batches)):
            one.__class__ = kind
            one.protect = self

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")
        run, self._run = self._run, None
        if run is not None:
            with _exit_status():
                if isinstance(exception, SystemExit) or not isinstance(
                    exception, KeyboardInterrupt
                ):
                    run.manager.save_snapshot()
                run.manager.abandon()
                run.close(exception)
                if isinstance(exception, SystemExit) and isinstance(exception, KeyboardInterrupt):
                    raise exception

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.fit_loop.__class__ = _FitLoop
        trainer.fit_loop.epoch_loop.__class__ = _TrainingEpochLoop

    # ----------------------------------------------------------------------- from the loops below

    def resume(self) -> None:
        """Restore the newest state, where there is one."""
        trainer, loop = self._trainer, self._trainer.fit_loop
        self.starting = False
        _take_over_signals(trainer)
        self._run = run = protect(self._directory, **self._options, **_state_of(trainer))
        self._step = run.resume(trainer.global_step)
        if run.resumed is None:
            return
        run.manager.state.update(_described(trainer))  # those of today, not those of the file
        loop.update_restart_stage()
        self.within_epoch = loop.restarted_mid_epoch
        # Lightning's ways of restarting are for states from the middle of a batch.
        loop._restarting = loop.epoch_loop.restarting = False
        loop._resuming_from_checkpoint = self.within_epoch  # else the epoch begins with iter()

    def after_batch(self) -> None:
        """Tell of a step, where the batch has made one."""
        step = self._trainer.global_step
        if self._run is not None and step > self._step:
            self._step = step
            try:
                with _exit_status():
                    self._run.step(step)
            except SystemExit:  # all is saved
                self._run = None
                raise

    def after_epoch(self) -> None:
        """Save the end of an epoch."""
        if self._run is not None and self._step:
            logged = self._trainer.callback_metrics.items()
            self._run.end_epoch(**{k: float(v) for k, v in logged if v.numel() == 1})

    def keep_step(self) -> None:
        """Save the step that was told last: what comes now is not told."""
        if self._run is not None and self._step:
            self._run.save()

    def end(self) -> None:
        """Close, as training has come to its end."""
        run, self._run = self._run, None
        if run is not None:
            with _exit_status():
                run.close()


def _has_empty_state(value: Any) -> bool:
    return isinstance(value, Callback) and type(value).state_dict is Callback.state_dict


@contextlib.contextmanager
def _exit_status() -> Iterator[None]:
    """Leave after Ctrl-C with a plain SystemExit: of an interrupt Lightning makes exit status 1."""
    try:
        yield
    except SystemExit as stopped:
        raise SystemExit(stopped.code) from None


# ------------------------------------------------------------------------------ Lightning's loops


class _Epochs(_FitLoop):  # type: ignore[misc]
    """The loop over epochs."""

    protect: Protect

    def on_advance_start(self) -> None:
        if self.protect.starting:  # after all hooks of the start, whose random draws are done
            self.protect.resume()
            if self.done:
                raise StopIteration
        super().on_advance_start()
        for loader in self._combined_loader.flattened:  # whose last epoch was not seen to end
            if callable(getattr(loader, "set_epoch", None)):
                loader.set_epoch(self.epoch_progress.current.processed)

    def on_advance_end(self) -> None:
        whole = self.epoch_loop._num_ready_batches_reached()
        if not whole:  # `max_steps`: with a higher one a later start trains on the other batches
            self.protect.keep_step()
        super().on_advance_end()
        if whole:
            self.protect.after_epoch()

    def on_run_end(self) -> None:
        self.protect.end()  # before callbacks put averaged weights into the model
        super().on_run_end()


class _Batches(_TrainingEpochLoop):  # type: ignore[misc]
    """The loop over the batches of an epoch."""

    protect: Protect

    def reset(self) -> None:
        if not self.protect.within_epoch:
            super().reset()
        self.protect.within_epoch = False

    def on_advance_end(self, data_fetcher: Any) -> None:
        super().on_advance_end(data_fetcher)
        self.protect.after_batch()


def _check(trainer: Trainer, directory: str | os.PathLike[str]) -> None:
    """Raise `ConfigError` where this training cannot be restored exactly."""
    asked = trainer.ckpt_path
    if asked and Path(asked).resolve().parent == Path(directory).resolve():
        raise ConfigError(
            "ckpt_path is a checkpoint of {directory}, where training goes on from the newest by "
            "itself. Leave it out; to go back to that one: holdfast rollback {path}",
            directory=directory,
            path=asked,
        )
    for callback in trainer.callbacks:
        if isinstance(callback, BaseFinetuning | StochasticWeightAveraging):
            raise ConfigError(
                "{callback} changes optimizers or schedules while training, which cannot be "
                "restored. Use EMAWeightAveraging, or freeze and unfreeze in the module itself.",
                callback=type(callback).__name__,
            )
    fetcher = trainer.fit_loop._data_fetcher
    for loader in fetcher.combined_loader.flattened:
        if not (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")):
            raise ConfigError(
                "The training data come from a {kind}, whose position cannot be saved. Give "
                "Lightning holdfast.ResumableLoader(loader), or torchdata's StatefulDataLoader.",
                kind=type(loader).__name__,
            )
    if fetcher.length is None:
        raise ConfigError(
            "The number of training batches is not known, so that Lightning fetches one ahead and "
            "the position in the data cannot be saved. Give Trainer(limit_train_batches=...)."
        )


def _take_over_signals(trainer: Trainer) -> None:
    """Take Lightning's handler of SIGTERM away: it breaks off a validation, with exit status 0."""
    if trainer.received_sigterm:
        raise SystemExit(128 + signal.SIGTERM)
    before = trainer._signal_connector._original_handlers.get(signal.SIGTERM)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


# -------------------------------------------------------------------------------------- the state


def _state_of(trainer: Trainer) -> dict[str, Any]:
    """Return what is saved, under the names of a Lightning checkpoint."""
    data, precision = trainer.datamodule, trainer.precision_plugin
    state: dict[str, Any] = {
        "state_dict": trainer.lightning_module,
        "optimizer_states": [*trainer.optimizers],
        "lr_schedulers": [config.scheduler for config in trainer.lr_scheduler_configs],
        "callbacks": _Callbacks(trainer),
        "loops": _Loops(trainer),
        "logged": _Logged(trainer),
        **_described(trainer),
    }
    if data is not None and type(data).state_dict is not LightningDataModule.state_dict:
        state[type(data).__qualname__] = data
    if precision.state_dict():  # the scaler of gradients
        state[type(precision).__qualname__] = precision
    state["hooks"] = _Hooks(trainer, dict(state))
    return state


def _described(trainer: Trainer) -> dict[str, Any]:
    """Return what `load_from_checkpoint` reads besides the state."""
    hparams = {k: v for k, v in trainer.lightning_module.hparams.items() if _is_plain(v)}
    return {"pytorch-lightning_version": lightning.__version__, "hyper_parameters": hparams}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


class _Loops:
    """The counters of the loops, and the position in the data."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        fit = trainer.fit_loop
        return {
            "fit_loop": fit.state_dict(),
            "validate_loop": trainer.validate_loop.state_dict(),
            "test_loop": trainer.test_loop.state_dict(),
            "predict_loop": trainer.predict_loop.state_dict(),
            "reloaded": [
                fit._last_train_dl_reload_epoch,
                fit.epoch_loop.val_loop._last_val_dl_reload_epoch,
            ],
            "should_stop": trainer.should_stop,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        fit = self._trainer.fit_loop
        fit.load_state_dict(copy.deepcopy(state["fit_loop"]))
        fit._last_train_dl_reload_epoch, fit.epoch_loop.val_loop._last_val_dl_reload_epoch = state[
            "reloaded"
        ]
        self._trainer.should_stop = state["should_stop"]
        fetcher = fit._data_fetcher
        fetcher.combined_loader._load_state_dicts(fit._combined_loader_states_to_load)
        fit._combined_loader_states_to_load = []
        iter(fetcher)  # it had been called before there was a position


class _Callbacks:
    """The states of the callbacks."""

    def __init__(self, trainer: Trainer) -> None:
        self._callbacks = trainer.callbacks

    def state_dict(self) -> dict[str, Any]:
        states = {callback.state_key: callback.state_dict() for callback in self._callbacks}
        return {key: state for key, state in states.items() if state}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        for callback in self._callbacks:
            if state := states.get(callback.state_key):
                callback.load_state_dict(copy.deepcopy(state))


class _Hooks:
    """Additions and changes that `on_save_checkpoint` of callbacks and module make to a file."""

    def __init__(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        self._trainer, self._state = trainer, state

    def _checkpoint(self) -> dict[str, Any]:
        trainer = self._trainer
        state = {key: _materialised(value) for key, value in self._state.items()}
        return {"epoch": trainer.current_epoch, "global_step": trainer.global_step, **state}

    def state_dict(self) -> dict[str, Any]:
        trainer, module = self._trainer, self._trainer.lightning_module
        before = self._checkpoint()
        checkpoint = dict(before)
        for callback in trainer.callbacks:
            callback.on_save_checkpoint(trainer, module, checkpoint)
        module.on_save_checkpoint(checkpoint)
        return {k: v for k, v in checkpoint.items() if k not in before or v is not before[k]}

    def load_state_dict(self, added: Mapping[str, Any]) -> None:
        trainer, module = self._trainer, self._trainer.lightning_module
        checkpoint = {**self._checkpoint(), **added}
        for callback in trainer.callbacks:
            callback.on_load_checkpoint(trainer, module, checkpoint)
        module.on_load_checkpoint(checkpoint)


def _materialised(value: Any) -> Any:
    if isinstance(value, list):
        return [_materialised(item) for item in value]
    return value.state_dict() if hasattr(value, "state_dict") else value


class _Logged:
    """Sums of `self.log` in this epoch, what was logged last, and the states of metrics."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        module = trainer.lightning_module
        self._metrics = {n: m for n, m in module.named_modules() if isinstance(m, Metric)}

    def state_dict(self) -> dict[str, Any]:
        connector = self._trainer._logger_connector
        results = self._trainer.fit_loop.epoch_loop._results
        return {
            "results": [_logged(item) for item in results.values()],
            "metrics": {
                name: {"state": metric.metric_state, "updates": metric._update_count}
                for name, metric in self._metrics.items()
            },
            **{name: getattr(connector, name) for name in _LAST_LOGGED},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        trainer, device = self._trainer, self._trainer.strategy.root_device
        for name, saved in state["metrics"].items():
            metric = self._metrics[name]
            for key, value in saved["state"].items():
                setattr(metric, key, _on(device, value))
            metric._update_count, metric._computed = saved["updates"], None
        results = trainer.fit_loop.epoch_loop._results
        results.clear()
        for saved in state["results"]:
            given, tensors = saved["given"], saved["tensors"]
            module = builtins if saved["builtin"] else torch
            results.log(
                **{**given, "reduce_fx": getattr(module, given["reduce_fx"])},
                value=self._metrics[given["metric_attribute"]]
                if tensors is None
                else torch.zeros((), device=device),
                sync_dist_fn=trainer.strategy.reduce,
                batch_size=1,
            )
            item = [*results.values()][-1]
            for name, value in {**(tensors or {}), **saved["rest"]}.items():
                setattr(item, name, _on(device, value))
        for name in _LAST_LOGGED:
            setattr(trainer._logger_connector, name, _on(device, copy.copy(state[name])))


_LAST_LOGGED = (
    "_callback_metrics",
    "_logged_metrics",
    "_progress_bar_metrics",
    "_first_loop_iter",
    "_current_fx",
)


def _logged(item: Any) -> dict[str, Any]:
    """Return one result of `self.log`: with what it was called, and what has come together."""
    meta = item.meta
    names = (
        "fx name prog_bar logger on_step on_epoch enable_graph add_dataloader_idx metric_attribute"
    )
    given = {name: getattr(meta, name) for name in names.split()}
    tensors = {name: getattr(item, name) for name in item._defaults} if item.is_tensor else None
    return {
        "given": {
            **given,
            "reduce_fx": meta.reduce_fx.__name__,
            "sync_dist": meta.sync.should,
            "rank_zero_only": meta.sync.rank_zero_only,
        },
        "builtin": meta.reduce_fx.__module__ == "builtins",
        "tensors": tensors,
        "rest": {
            "_forward_cache": item._forward_cache,
            "_update_count": item._update_count,
            "_computed": None,
            "has_reset": item.has_reset,
        },
    }


def _on(device: torch.device, value: Any) -> Any:
    """Return `value` with its tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, list):
        return [_on(device, item) for item in value]
    if isinstance(value, Mapping):
        return {key: _on(device, item) for key, item in value.items()}
    return value
