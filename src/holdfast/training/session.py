"""Run one start of `holdfast train`, from its options to its end: everything but the loop.

The order matters: the lock first, then what to go on from, then the data in the tokens of that
run, then the model, then the state, and only then training.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from holdfast.checkpoint import CheckpointManager, Resumed, checkpoint_size, ranks
from holdfast.checkpoint.format import NewerFormat
from holdfast.checkpoint.policy import EveryMinutes, EverySteps, RiskAware, SavePolicy
from holdfast.checkpoint.rundir import (
    Catalog,
    Contents,
    EventHandler,
    Reporter,
    check_rights,
    recovery,
    space,
    words,
)
from holdfast.checkpoint.save import rescue
from holdfast.checkpoint.state import load_weights, plan_restore
from holdfast.checkpoint.system import PAGE
from holdfast.checkpoint.system import signals as guards
from holdfast.errors import (
    CheckpointError,
    DamagedCheckpoint,
    DataError,
    Interrupted,
    ResourceError,
)
from holdfast.formatting import format_bytes
from holdfast.i18n import _
from holdfast.training import continuing, loop, models
from holdfast.training.console import Console
from holdfast.training.continuing import SavedRun, Start
from holdfast.training.notify import Notifier
from holdfast.training.options.config import OPTIONS, CheckpointConfig, Config
from holdfast.training.options.config_files import save_config
from holdfast.training.options.fields import flag_of, format_value
from holdfast.training.records import CONFIG, TOKENIZER, Records
from holdfast.training.telling import tell_event
from holdfast.training.text.prepare import PreparedData, prepare_data, reopen_data
from holdfast.training.text.tokenizer import TextTokenizer
from holdfast.training.trainer import Trainer

SAMPLE = Path(__file__).parents[1] / "samples" / "zh_sample.txt"  # what data/ links to
BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments, all of them fp32


@dataclass(slots=True)
class Workshop:
    """All that training needs, made once for a start or a dry run."""

    config: Config
    data: PreparedData
    trainer: Trainer
    reserve: int
    contents: Contents | None = None  # what lies in the run directory; None in a dry run
    records: Records | None = None


def run(config: Config, console: Console, *, log: bool, yes: bool, command: str) -> None:
    """Train as `config` says, until it is done or a signal asks to stop.

    `log`: write a log file. `yes`: answer yes to questions. `command`: how the user called us, to
    say how to go on. Raises `HoldfastError`s; `Interrupted` after a signal, with the state safe.
    """
    ranks.refuse()
    directory = Path(config.checkpoint.checkpoint_dir)
    check_rights(directory)
    notifier = Notifier(config.checkpoint.notify, directory, console.warn)
    catalog = Catalog(directory)
    with catalog.run_lock, notifier:
        options = config.checkpoint
        named = options.checkpoint is not None or options.resume not in (None, "auto")
        reporter = Reporter(catalog, partial(tell_event, console))
        contents = rescue(catalog, reporter, make_room=not named)
        can_ask = console.terminal and sys.stdin.isatty() and not yes
        start = continuing.decide(config, contents, console.ask if can_ask else None)
        if log:
            stamp = time.strftime("%Y%m%d_%H%M%S")
            console.open_log(directory / "logs" / f"training_{stamp}.log")
        with guards.SignalGuard() as guard:  # from here on Ctrl-C means: save, then stop
            _tell_found(contents, start, console)
            found = _find(catalog, start, reporter)
            if found is not None:
                start = replace(start, saved=continuing.read_saved(found.path))
            _heed(guard)
            workshop = prepare(config, start, console, guard, held=found.entry.size if found else 0)
            workshop.contents = contents
            manager = make_manager(workshop, console, catalog, notifier)
            try:
                resumed = _restore(workshop, manager, start, found, console)
                del found  # as large as the state
                notifier.begin(lambda: manager.saved_step)
                _train(workshop, manager, resumed, console, command, notifier=notifier)
            except KeyboardInterrupt as error:  # a second Ctrl-C means now: nothing is waited for
                manager.abandon()
                if not manager.saved_step:
                    raise
                raise KeyboardInterrupt(
                    _("Stopped at once; the last durable step is {step}.", step=manager.saved_step)
                ) from error
            except BaseException:  # whatever ended it: what was being saved is finished first
                manager.close(save=False)
                raise
            manager.close(save=False)  # the loop has saved its end


def _find(catalog: Catalog, start: Start, reporter: Reporter) -> recovery.Found | None:
    """Read the state to go on from before anything is set up: settings, data and model are those of
    the checkpoint that is found intact, which need not be the newest."""
    if start.choice is None:
        return None
    try:
        return recovery.find(catalog, start.choice, reporter.tell)
    except DamagedCheckpoint as error:
        if start.named:
            raise
        raise DamagedCheckpoint(
            "{error} Or begin a new run with --fresh.", error=error, why=error.why
        ) from error


def _restore(
    workshop: Workshop,
    manager: CheckpointManager,
    start: Start,
    found: recovery.Found | None,
    console: Console,
) -> Resumed | None:
    trainer = workshop.trainer
    if found is None:
        if start.weights is not None:
            weights = {"model": load_weights(start.weights)}
            plan_restore({"model": trainer.model}, weights).commit()
            console.say(_("Starting a new run from the weights of {path}.", path=start.weights))
        elif not start.anew:
            manager.begin(workshop.contents)
        return None
    resumed = manager.resume(found)
    assert resumed is not None and start.saved is not None
    workshop.contents = resumed.contents
    for note in trainer.settle(start.saved.data):
        console.warn(note)
    return resumed


def prepare(
    config: Config, start: Start, console: Console, guard: guards.SignalGuard, *, held: int = 0
) -> Workshop:
    """Make data, model, optimizer and state as the start and the options want them.

    `held`: bytes of a state that is in memory already, to become that of the model and optimizer.
    """
    origin = start.saved or _model_of(start.weights)
    if origin is not None:
        config = continuing.merged(config, origin, start=start)
        if start.saved is not None and start.named and config.checkpoint.checkpoint:
            text = _(
                "--checkpoint: --epochs and --num-steps count from step {step} of {name}.",
                step=start.saved.step,
                name=start.saved.path.name,
            )
            console.say(text)
        if start.saved is not None:
            rows = continuing.differences(start.saved, config)
            if rows:
                console.say(_("Different from the saved run:"), important=True)
                header = [_("option"), _("saved"), _("now"), _("what it means")]
                console.table(rows, header=header)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    models.tune_allocator()
    _seed(config.training.seed)
    device = models.choose_device()
    precision = models.choose_precision(config.model.precision, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, where something stays fp32
    if origin is None:  # else the checkpoint says what the model is, wherever it came from once
        models.check_model_exists(config.model.model)
    data = _data(config, origin, console, guard)
    for note in data.notes:
        console.warn(note)
    _heed(guard)
    model = _model(config, origin, data, device, held)
    _heed(guard)
    if origin is not None:
        continuing.check_model(origin, models.plain_config(model))
    context = models.context_of(model, config.model.context_length)
    trainer = Trainer(
        config,
        model,
        data,
        device=device,
        precision=precision,
        context_length=context,
        guard=guard,
        console=console,
    )
    _introduce(trainer, console)
    return Workshop(config, data, trainer, _reserve(trainer))


def make_manager(
    workshop: Workshop, console: Console, catalog: Catalog, notifier: Notifier
) -> CheckpointManager:
    """Return the checkpoint manager of the trainer's state."""
    options = workshop.config.checkpoint
    return CheckpointManager(
        options.checkpoint_dir,
        workshop.trainer.state,
        keep_last=options.keep_last_n,
        save_when=save_policies(options),
        reserve=workshop.reserve,
        overlap=True,  # our own loop changes weights in optimizer.step() and nowhere else
        memory_every="auto" if options.memory_every == "auto" else int(options.memory_every),
        io_limit=options.io_limit * 1e6,
        max_unsafe=options.max_unsafe,
        on_event=_listener(workshop, console, notifier),
        catalog=catalog,
    )


def _listener(workshop: Workshop, console: Console, notifier: Notifier) -> EventHandler:
    """Return the handler of the manager's events: console, `--notify`, and held records."""

    def on_event(event: str, fields: dict[str, Any]) -> None:
        tell_event(console, event, fields)
        if event == "unsafe" and fields["first"]:
            notifier.send(event, words.sentence(event, fields) or "")
        elif event == "archived" and workshop.records is not None:
            workshop.records.take_over(Path(fields["to"]))

    return on_event


def _heed(guard: guards.SignalGuard) -> None:
    """Raise `Interrupted` if a signal has come; called between two stages before the first step."""
    if guard.requested is not None:
        raise Interrupted(
            "Stopped before the first step; what was saved before is as it was.", guard.requested
        )


def save_policies(options: CheckpointConfig) -> list[SavePolicy]:
    """Return when to save rolling checkpoints: as asked for, else by risk and cost."""
    if options.temp_every_steps is None and options.temp_every_minutes is None:
        return [RiskAware(write_budget=1e9 * options.write_budget)]
    when: list[SavePolicy] = []
    if options.temp_every_steps:
        when.append(EverySteps(options.temp_every_steps))
    if options.temp_every_minutes:
        when.append(EveryMinutes(options.temp_every_minutes))
    return when


def _train(
    workshop: Workshop,
    manager: CheckpointManager,
    resumed: Resumed | None,
    console: Console,
    command: str,
    *,
    notifier: Notifier,
) -> None:
    trainer, config = workshop.trainer, workshop.config
    directory = Path(config.checkpoint.checkpoint_dir)
    if trainer.finished:
        _write_missing(workshop, manager, directory)
        _tell_finished(trainer, console, command, before=True)
        return
    _heed(trainer.guard)
    needed = checkpoint_size(trainer.state, reserve=workshop.reserve)
    contents = workshop.contents
    assert contents is not None
    run = contents.of(manager.run_id)
    space.check_room(manager.catalog, run, needed + _moments_to_come(trainer))
    records = workshop.records = Records(
        directory,
        tensorboard=config.training.tensorboard,
        resumed_step=trainer.progress.step,
        # A rescue may have brought this run's first checkpoint; the records are still the other's.
        held=len(run.entries) < len(contents.entries),
    )
    records.do(partial(_write_descriptions, workshop, directory))
    try:
        trainer.bind(manager, records)
        records.event("started", trainer.progress.step, **_facts(trainer))
        if resumed is not None:
            records.event("resumed", resumed.step, generation=resumed.generation)
        trainer.epoch_began = time.monotonic()
        loop.train(trainer)
        records.event("finished", trainer.progress.step)
        _tell_finished(trainer, console, command, before=False)
        notifier.send("finished", _finished_words(trainer))
    except BaseException as error:  # so that who watches can tell an end from a kill
        records.event("ended", trainer.progress.step, reason=type(error).__name__)
        raise
    finally:
        records.close()


def _write_missing(workshop: Workshop, manager: CheckpointManager, directory: Path) -> None:
    """Write what a kill after the last save of a finished run kept from its records."""
    trainer = workshop.trainer
    step, tensorboard = trainer.progress.step, workshop.config.training.tensorboard
    lines = [*trainer.progress.lines, {"event": "finished", "step": step}]
    if not Records(directory, tensorboard=False, resumed_step=step).missing(step, lines):
        return
    with contextlib.closing(
        Records(directory, tensorboard=tensorboard, resumed_step=step)
    ) as records:
        trainer.bind(manager, records)
        trainer.tell()
        records.event("finished", step)


# --------------------------------------------------------------------------------------- the parts


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _data(
    config: Config, origin: SavedRun | None, console: Console, guard: guards.SignalGuard
) -> PreparedData:
    """Return the data in the tokens of the run, or of the model, that training goes on from."""
    data = config.data
    source = Path(data.data_file)
    # A configuration that --save-config wrote names the default too, and is used anywhere.
    is_default = data.data_file == OPTIONS["data_file"].default
    unasked = is_default and config.sources["data_file"] != "flag"
    if unasked and not source.exists():
        source = SAMPLE  # installed with pip, or called from elsewhere
    tokenizer, vocabulary = None, 0
    if origin is not None:
        tokenizer = TextTokenizer.from_state(origin.tokenizer)
    elif not models.is_shape(config.model.model):
        tokenizer = TextTokenizer.from_directory(config.model.model)
    else:
        vocabulary = models.vocabulary_of(config.model)

    def progress(label: str, done: int, total: int) -> None:
        if guard.requested is not None:
            raise Interrupted(
                "Stopped while preparing the data; nothing had been trained.", guard.requested
            )
        console.working(label, done, total)

    shared: dict[str, Any] = {
        "val_fraction": data.val_fraction,
        "seed": config.training.seed,
        "text_field": data.text_field,
        "cache_dir": data.cache_dir,
    }
    try:
        return prepare_data(
            source,
            vocab_size=vocabulary,
            tokenizer=tokenizer,
            strict=data.strict_text,
            progress=progress,
            **shared,
        )
    except DataError:
        if origin is None or tokenizer is None or source.exists():
            raise
        # The text has been moved; its tokens may still be here, known by their content.
        found = reopen_data(origin.data["content_hash"], tokenizer, **shared)
        if found is None:
            raise
        console.warn(_("{file} is gone; its tokens were found in the cache.", file=data.data_file))
        return found


def _model(
    config: Config, origin: SavedRun | None, data: PreparedData, device: torch.device, held: int
) -> Any:
    if not models.is_shape(config.model.model):
        if origin is not None:
            return models.rebuild_model(origin.model_config, config.model).to(device)
        return models.load_model(config.model).to(device)
    sizes = {"vocab_size": data.tokenizer.vocab_size, "eos_id": data.tokenizer.eos_id}
    with torch.device("meta"):
        parameters = sum(p.numel() for p in models.build_model(config.model, **sizes).parameters())
    needed, free = BYTES_PER_PARAMETER * parameters, models.free_memory(device)
    if device.type == "cpu":
        free += held
    if needed > free:
        message = _(
            "{model} needs at least {needed} of memory to train, and {free} is free. Choose a "
            "smaller --model.",
            model=config.model.model,
            needed=format_bytes(needed),
            free=format_bytes(free),
        )
        raise ResourceError(message)
    return models.build_model(config.model, **sizes).to(device)


def _model_of(weights: Path | None) -> SavedRun | None:
    """Return the run that a file of weights comes from, if it is one of ours: its tokenizer is
    needed."""
    if weights is None:
        return None
    try:
        return continuing.read_saved(weights)
    except (DamagedCheckpoint, NewerFormat):
        raise
    except CheckpointError:
        return None


def _reserve(trainer: Trainer) -> int:
    """Return the bytes to reserve behind the tensors: an upper bound, so that all files have one
    size.

    Text twice (pickle and manifest, where it is escaped), some hundred bytes a tensor in each, and
    an epoch's three entries in the history.
    """
    values = [trainer.state[name] for name in ("tokenizer", "config", "model_config")]
    text = sum(2 * len(json.dumps(value, ensure_ascii=False).encode()) for value in values)
    text += len(json.dumps(json.dumps(values[0], ensure_ascii=False), ensure_ascii=False).encode())
    tensors = 4 * sum(1 for _p in trainer.model.parameters()) + 64
    epochs = trainer.plan.epochs or 64
    step = 64 << 10
    return -(-(text + 900 * tensors + 160 * epochs + step) // step) * step


def _moments_to_come(trainer: Trainer) -> int:
    """Return the bytes of the two moments that AdamW makes for each parameter in its first step:
    two thirds of a checkpoint, and none of it is there before."""
    groups, state = trainer.optimizer.param_groups, trainer.optimizer.state
    new = [p for group in groups for p in group["params"] if p.requires_grad and not state.get(p)]
    return sum(2 * (p.nbytes + PAGE) for p in new)


def _write_descriptions(workshop: Workshop, directory: Path) -> None:
    save_config(workshop.config, directory / CONFIG)
    workshop.data.tokenizer.save(directory / TOKENIZER)


# ------------------------------------------------------------------------------------ the talking


def _introduce(trainer: Trainer, console: Console) -> None:
    device, data, config = trainer.device, trainer.data, trainer.config
    parameters = sum(p.numel() for p in trainer.model.parameters())
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    precision = "bf16" if trainer.precision is torch.bfloat16 else "fp32"
    threads = _(", {count} threads", count=torch.get_num_threads()) if device.type == "cpu" else ""
    text = _(
        "🖥️  Device: {device}{threads}; precision {precision}",
        device=name,
        threads=threads,
        precision=precision,
    )
    console.say(text)
    text = _(
        "🧠 Model: {model}, {parameters} parameters, context {context} tokens",
        model=config.model.model,
        parameters=f"{parameters:,}",
        context=trainer.context_length,
    )
    console.say(text)
    text = _(
        "📚 Data: {file}: {documents} documents, {tokens} tokens ({train} to learn from, {val} "
        "to validate), {ratio} characters per token",
        file=config.data.data_file,
        documents=f"{data.documents:,}",
        tokens=f"{data.tokens:,}",
        train=f"{len(data.train):,}",
        val=f"{len(data.val):,}",
        ratio=f"{data.characters_per_token:.2f}",
    )
    console.say(text)
    plan = trainer.plan
    text = _(
        "🗓️  Plan: {steps} steps, {per_epoch} an epoch; batch {batch} × {accumulation}",
        steps=f"{plan.total_steps:,}",
        per_epoch=f"{plan.steps_per_epoch:,}",
        batch=config.training.batch_size,
        accumulation=plan.accumulation,
    )
    console.say(text)


def _facts(trainer: Trainer) -> dict[str, Any]:
    """Return the facts of a run that its watchers show from the start on."""
    plan = trainer.plan
    return {
        "total_steps": plan.total_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "epochs": plan.epochs,
        "model": trainer.config.model.model,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "context_length": trainer.context_length,
        "device": trainer.device.type,
        "precision": str(trainer.precision).removeprefix("torch."),
        "tokens": len(trainer.data.train),
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }


def _tell_found(contents: Any, start: Start, console: Console) -> None:
    if not (contents.entries or contents.damaged):
        console.say(_("📁 Checkpoints: none yet; a new run begins."))
        return
    newest = contents.newest
    text = _(
        "📁 Checkpoints: {count} found, the newest of step {step}.",
        count=len(contents.entries) + len(contents.damaged),
        step=newest.step if newest else "?",
    )
    console.say(text)
    if start.anew:
        console.say(
            _("   A new run begins; these go to archive/ when its first checkpoint is verified.")
        )


def _finished_words(trainer: Trainer) -> str:
    return _("✅ Finished: {step} steps.", step=trainer.progress.step)


def _tell_finished(trainer: Trainer, console: Console, command: str, *, before: bool) -> None:
    progress, best = trainer.progress, trainer.state["best_loss"]
    say: Callable[..., None] = console.say
    what = (
        _(
            "✅ This run is finished: {step} steps, {epochs} epochs.",
            step=progress.step,
            epochs=progress.epoch - 1,
        )
        if before
        else _finished_words(trainer)
    )
    say(what, important=True)
    if best is not None:
        say(
            _("   Best validation loss: {loss} (best_model.pt)", loss=f"{best:.4f}"), important=True
        )
    more = (
        f"--epochs {2 * (trainer.plan.epochs or 1)}"
        if trainer.plan.epochs
        else f"--num-steps {2 * trainer.plan.total_steps}"
    )
    if before:  # nothing was trained: what the user asked for is recorded nowhere yet
        more = " ".join([more, *_asked_for(trainer.config)])
    say(_("   To train further: {command} --resume {more}", command=command, more=more))


def _asked_for(config: Config) -> Iterator[str]:
    """Yield the flags of this start that say how to train, as they can be typed again."""
    for name, option in OPTIONS.items():
        elsewhere = name in ("epochs", "num_steps", "checkpoint_dir") or option.meta.of_this_start
        if config.sources[name] != "flag" or elsewhere:
            continue
        value = getattr(getattr(config, option.section), name)
        if isinstance(value, bool):
            yield option.flag if value else flag_of(f"no_{name}")
        else:
            yield f"{option.flag} {'none' if value is None else shlex.quote(format_value(value))}"
