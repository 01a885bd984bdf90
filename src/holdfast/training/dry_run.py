"""`--dry-run`: what a training will take in time, memory, disk and money, measured, saving nothing.

Everything is prepared as for the real run and a few real steps are timed; the size of a checkpoint
comes from the code that will write it.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from holdfast.checkpoint import checkpoint_size
from holdfast.checkpoint.policy import Cost, EveryMinutes, EverySteps, RiskAware
from holdfast.checkpoint.rundir import Catalog, check_rights
from holdfast.checkpoint.save import MEMORY_SLOTS, lack_of_shared_memory
from holdfast.checkpoint.state import load, plan_restore
from holdfast.checkpoint.system import filesystem
from holdfast.checkpoint.system import signals as guard
from holdfast.errors import Interrupted, ResourceError
from holdfast.formatting import format_bytes, format_seconds
from holdfast.i18n import N_, _
from holdfast.training import continuing
from holdfast.training.console import Console
from holdfast.training.continuing import SavedRun
from holdfast.training.options.config import OPTIONS, CheckpointConfig, Config
from holdfast.training.options.fields import format_value
from holdfast.training.session import Workshop, prepare, save_policies
from holdfast.training.text.batches import EVALUATION_ROWS, validation_batch_count
from holdfast.training.trainer import Trainer

WARM_UP_STEPS = 3
TIMED_STEPS = 30
TIMED_SECONDS = 20.0  # enough is enough, even where a step takes a minute
EVALUATION_BATCHES = 4
DISK_PROBE = 64 << 20  # bytes written and synced to learn the speed of the disk


@dataclass(frozen=True, slots=True)
class Estimate:
    """Sizes in bytes, times in seconds."""

    config: Config  # in force
    parameters: int
    done_steps: int  # of the run that it goes on from
    steps: int  # that are left
    step_seconds: float
    tokens_per_second: float
    epoch_seconds: float
    total_seconds: float
    peak_memory: int
    checkpoint_bytes: int
    temp_seconds: float  # between two rolling checkpoints; infinite: there are none
    snapshot_bytes: int  # of memory, for copies of the state
    no_memory_tier: str  # why there will be none though it is asked for; mostly empty
    run_bytes: int
    free_bytes: int

    @property
    def cost(self) -> float | None:
        """In the currency of `price_per_hour`; None where that is not given."""
        price = self.config.training.price_per_hour
        return None if price is None else price * self.total_seconds / 3600

    def to_json(self) -> dict[str, Any]:
        """For scripts: every figure by its name, and each option with its value and its source."""
        figures = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "config"}
        if math.isinf(self.temp_seconds):
            figures["temp_seconds"] = None
        options = {
            name: {"value": value, "from": self.config.sources[name]}
            for values in self.config.to_dict().values()
            for name, value in values.items()
        }
        return {**figures, "cost": self.cost, "configuration": options}


def dry_run(
    config: Config, console: Console, tell: Callable[[Estimate], None] | None = None
) -> Estimate:
    """Measure, `tell` (None: a table on the console), and return the estimate. Raises ResourceError
    where it cannot work out."""
    directory = Path(config.checkpoint.checkpoint_dir)
    check_rights(directory)
    with guard.SignalGuard() as signals:
        contents = Catalog(directory).scan()
        start = continuing.decide(config, contents, ask=None)
        if start.choice is not None:
            saved = continuing.first_readable(start.choice.paths, named=start.named)
            start = replace(start, saved=saved)
        workshop = prepare(config, start, console, signals)
        if start.saved is not None:
            _go_on_from(start.saved, workshop.trainer, console)
        estimate = _measure(workshop, console, signals)
    if tell is None:
        _print(estimate, console)
    else:
        tell(estimate)
    here = sum(entry.size for entry in contents.entries)  # has its room already
    needed = max(0, estimate.run_bytes - here) + filesystem.RESERVE
    if estimate.free_bytes < needed:
        message = _(
            "This run needs {needed} on the disk of {directory}, which has {free} free. Lower "
            "--keep-last-n, or choose another --checkpoint-dir.",
            needed=format_bytes(needed),
            directory=directory,
            free=format_bytes(estimate.free_bytes),
        )
        raise ResourceError(message)
    return estimate


def _go_on_from(saved: SavedRun, trainer: Trainer, console: Console) -> None:
    """Take over the state of a run, so that only what is left of it is measured and counted.
    Nothing in its directory changes."""
    plan_restore(trainer.state, load(saved.path), strict=False).commit()
    trainer.settle(saved.data)
    age = max(0.0, time.time() - saved.path.stat().st_mtime)
    console.status.durable_step, console.status.durable_at = saved.step, time.monotonic() - age


def _measure(workshop: Workshop, console: Console, signals: guard.SignalGuard) -> Estimate:
    trainer, options = workshop.trainer, workshop.config.checkpoint
    done = trainer.progress.step
    left = 0 if trainer.finished else max(0, trainer.plan.total_steps - done)
    console.say(_("⏱️  Timing a few real steps..."))
    step = _time_steps(workshop, signals)
    began = time.perf_counter()
    trainer.evaluate(limit=EVALUATION_BATCHES)
    rows = max(EVALUATION_ROWS, workshop.config.training.batch_size)
    batches = validation_batch_count(workshop.data.val, trainer.context_length, rows)
    timed = max(1, min(batches, EVALUATION_BATCHES))
    evaluation = (time.perf_counter() - began) * batches / timed
    began = time.perf_counter()
    trainer.sample()
    sample = time.perf_counter() - began
    size = checkpoint_size(trainer.state, reserve=workshop.reserve)
    lack = lack_of_shared_memory(MEMORY_SLOTS * size) if options.memory_every != "0" else ""
    tier = options.memory_every != "0" and not lack
    place = _existing_parent(Path(options.checkpoint_dir))
    save = size / _disk_speed(place, size)

    plan = trainer.plan
    tokens = plan.accumulation * workshop.config.training.batch_size * trainer.context_length
    epoch_steps = plan.steps_per_epoch if plan.epochs else max(1, left)
    epochs = left / epoch_steps
    interval = _interval(options, step, save, size)
    temps = int(epoch_steps * step / interval + 1e-6)  # not one less for a rounding
    kept = epoch_steps // options.save_every if options.save_every else 0
    epoch = epoch_steps * step + evaluation + sample + (1 + temps + kept) * save
    return Estimate(
        config=workshop.config,
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        done_steps=done,
        steps=left,
        step_seconds=step,
        tokens_per_second=tokens / step,
        epoch_seconds=epoch,
        total_seconds=epoch * epochs,
        peak_memory=peak_memory(trainer.device),
        checkpoint_bytes=size,
        temp_seconds=interval,
        snapshot_bytes=size * (MEMORY_SLOTS if tier else 1),
        no_memory_tier=lack,
        run_bytes=size * _copies(workshop, temps, kept),
        free_bytes=filesystem.free_bytes(place),
    )


def _interval(options: CheckpointConfig, step: float, save: float, size: int) -> float:
    """Seconds from one rolling checkpoint to the next; infinite where there are none.

    The policy that chooses for itself is told what is known of a save before there was one.
    """
    intervals = [math.inf]
    for policy in save_policies(options):
        if isinstance(policy, EverySteps):
            intervals.append(policy.steps * step)
        elif isinstance(policy, EveryMinutes):
            intervals.append(60 * policy.minutes)
        elif isinstance(policy, RiskAware):
            intervals.append(policy.choose(Cost(0.0, save, size)).interval)
    return min(intervals)


def _time_steps(workshop: Workshop, signals: guard.SignalGuard) -> float:
    """Seconds of one step: the mean of real ones, the slow first ones left out."""
    trainer, times, began = workshop.trainer, [], time.perf_counter()
    last = max(0, trainer.plan.total_steps - 1)
    trainer.model.train()
    for number in range(WARM_UP_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        if trainer.progress.position == trainer.plan.steps_per_epoch:
            trainer.progress.position = 0
        trainer.progress.step = min(trainer.progress.step, last)  # a short plan: the last one again
        trainer.one_step()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        if number >= WARM_UP_STEPS:
            times.append(time.perf_counter() - start)
        if signals.requested is not None:
            raise Interrupted("The dry run was stopped; nothing was saved.", signals.requested)
        if times and time.perf_counter() - began > TIMED_SECONDS:
            break
    return statistics.fmean(times)


def _copies(workshop: Workshop, temps: int, kept: int) -> int:
    """Return the most distinct checkpoints on the disk at once, the one being written included."""
    options, plan = workshop.config.checkpoint, workshop.trainer.plan
    limit = options.keep_last_n or math.inf
    epochs = plan.epochs or 0
    lasting = min(limit, epochs) if options.save_every_epoch else 0
    lasting += min(limit, kept * max(1, epochs)) if kept else 0
    best = 1 if epochs > lasting or workshop.config.training.eval_every else 0
    rolling = 2 if temps else 0
    return max(3, int(lasting) + best + rolling + 1)


def peak_memory(device: torch.device) -> int:
    """The most memory this process has held so far, in bytes; on CUDA, of the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _disk_speed(place: Path, size: int) -> float:
    """Bytes a second that arrive durably at `place`; infinite where nothing can be written."""
    amount = min(size, DISK_PROBE)
    block = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            began = time.perf_counter()
            for _block in range(max(1, amount >> 20)):
                file.write(block)
            file.flush()
            filesystem.sync_file(file.fileno())
            return amount / (time.perf_counter() - began)
    except OSError:
        return math.inf


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _print(estimate: Estimate, console: Console) -> None:
    config, say = estimate.config, console.say
    say(_("Configuration:"), important=True)
    rows = []
    for name, option in OPTIONS.items():
        value = getattr(getattr(config, option.section), name)
        rows.append([name, format_value(value), _(SOURCES[config.sources[name]])])
    console.table(rows, header=[_("option"), _("value"), _("from")])
    lines = [
        (_("parameters"), f"{estimate.parameters:,}"),
        (_("peak memory"), format_bytes(estimate.peak_memory)),
        (
            _("speed"),
            _(
                "{rate} tokens/s, {seconds} s a step",
                rate=f"{estimate.tokens_per_second:,.0f}",
                seconds=f"{estimate.step_seconds:.3f}",
            ),
        ),
        (_("time for an epoch"), format_seconds(estimate.epoch_seconds)),
        (_("time in all"), _in_all(estimate)),
        (
            _("one checkpoint"),
            _(
                "{size} ({bytes} bytes)",
                size=format_bytes(estimate.checkpoint_bytes),
                bytes=f"{estimate.checkpoint_bytes:,}",
            ),
        ),
        (_("rolling checkpoints"), _rolling(estimate)),
        (_("memory for snapshots"), _snapshots(estimate)),
        (
            _("disk for the run"),
            _(
                "at most {size}; free: {free}",
                size=format_bytes(estimate.run_bytes),
                free=format_bytes(estimate.free_bytes),
            ),
        ),
    ]
    if estimate.cost is not None:
        lines.append((_("cost"), f"{estimate.cost:.2f}"))
    say()
    for name, value in lines:
        say(f"  {name}: {value}", important=True)
    say(_("Dry run: nothing was saved."), important=True)


def _in_all(estimate: Estimate) -> str:
    figures = {"time": format_seconds(estimate.total_seconds), "steps": f"{estimate.steps:,}"}
    if estimate.done_steps:
        return _(
            "{time} for {steps} steps that are left; {done} are done",
            done=f"{estimate.done_steps:,}",
            **figures,
        )
    return _("{time} for {steps} steps", **figures)


def _rolling(estimate: Estimate) -> str:
    if math.isinf(estimate.temp_seconds):
        return _("none")
    return _("every {time}", time=format_seconds(estimate.temp_seconds))


def _snapshots(estimate: Estimate) -> str:
    size = format_bytes(estimate.snapshot_bytes)
    if estimate.no_memory_tier:
        return _(
            "{size}; none that outlives a kill: {reason}", size=size, reason=estimate.no_memory_tier
        )
    if estimate.snapshot_bytes > estimate.checkpoint_bytes:
        return _("{size} in shared memory, beside the training's own", size=size)
    return _("{size}, twice that while saves overtake the disk", size=size)


SOURCES = {
    "flag": N_("flag"),
    "file": N_("config file"),
    "preset": N_("preset"),
    "default": N_("default"),
    "run": N_("saved run"),
}
