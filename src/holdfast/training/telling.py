"""Tell a person of evaluations, epochs, and what the checkpoint manager has done.

Words only: the callers decide when something is said."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from holdfast.checkpoint.policy import MOST_OFTEN, RAREST, TIME_BUDGET, WRITE_TIME, WRITES
from holdfast.checkpoint.rundir import words
from holdfast.formatting import format_bytes, format_seconds, parse_time
from holdfast.i18n import _
from holdfast.training.console import Console
from holdfast.training.plan import Progress

if TYPE_CHECKING:
    from holdfast.checkpoint import Resumed, Saved
    from holdfast.checkpoint.policy import Choice

_TELL_STALL = 0.5  # seconds of standing still that are worth a word
_ROLE_ORDER = ["best_model.pt", "latest.pt", "model.pt"]


def tell_evaluation(
    console: Console, step: int, metrics: dict[str, float], progress: Progress
) -> None:
    """Say the losses of an evaluation, unless its epoch ends and says them."""
    say = console.say
    if progress.stopped_early:
        text = _(
            "🛑 No better validation loss in {count} evaluations: stopping early.",
            count=progress.stale,
        )
        say(text, important=True)
    if all(line["event"] != "epoch" for line in progress.lines):
        text = _(
            "📊 Step {step}: validation loss {loss}, bits per byte {bits}",
            step=step,
            loss=f"{metrics['val_loss']:.4f}",
            bits=f"{metrics['bits_per_byte']:.3f}",
        )
        say(text)


def tell_epoch(
    console: Console, metrics: dict[str, Any], epochs: int | None, seconds: float
) -> None:
    """Say the losses of an epoch, of `epochs` in all, and the seconds that it took."""
    say = console.say
    say()
    total = f"/{epochs}" if epochs else ""
    say(
        _("📊 Epoch {epoch} results", epoch=f"{metrics['epoch']}{total}"),
        style="bold",
        important=True,
    )
    text = _(
        "  ⏱️  Time: {seconds} s ({minutes} min)",
        seconds=f"{seconds:.1f}",
        minutes=f"{seconds / 60:.1f}",
    )
    say(text)
    say(_("  📉 Training loss: {loss}", loss=f"{metrics['train_loss']:.4f}"), important=True)
    if "val_loss" in metrics:
        say(_("  📊 Validation loss: {loss}", loss=f"{metrics['val_loss']:.4f}"), important=True)
        text = _(
            "  🔢 Perplexity: {perplexity} · bits per byte: {bits}",
            perplexity=f"{metrics['perplexity']:.2f}",
            bits=f"{metrics['bits_per_byte']:.3f}",
        )
        say(text)


# ------------------------------------------------------------------------------ the manager's


def tell_event(console: Console, event: str, fields: dict[str, Any]) -> None:
    """Say what the checkpoint manager has done; its `on_event`."""
    if event == "durable":
        _on_durable(console, fields["saved"])
    elif event == "resumed":
        _on_resumed(console, fields["resumed"])
    elif event == "archived":
        console.say(words.sentence(event, fields) or "")
    elif event == "rescued":
        text = _(
            "🛟 Step {step} was found in memory, where a killed process had left it, and is "
            "durable now.",
            step=fields["step"],
        )
        console.say(text, important=True)
    elif event == "memory_off":
        text = _(
            "No snapshots in shared memory ({reason}): after a kill training goes on from "
            "the newest checkpoint on the disk.",
            reason=fields["reason"],
        )
        console.say(text)
    elif event == "interval":
        _on_interval(console, fields["choice"])
    elif event == "staging_off":
        console.warn(
            _("Saving makes training wait for the disk: {reason}.", reason=fields["reason"])
        )
    elif event == "configured":
        console.say(words.sentence(event, fields) or "", important=True)
    elif event == "threads":
        text = _(
            "This run computes with {saved} CPU threads, this machine would take {live}: "
            "{saved} are used, so that the results stay bit-exact.",
            saved=fields["saved"],
            live=fields["live"],
        )
        console.warn(text)
    elif sentence := words.sentence(event, fields):
        _tell_trouble(console, event, fields, sentence)


def _on_interval(console: Console, choice: Choice) -> None:
    why = {
        TIME_BUDGET: _("so that saving takes no more than 1 % of the time"),
        WRITES: _("so that no more than --write-budget is written"),
        WRITE_TIME: _("a write takes that long"),
        MOST_OFTEN: _("the shortest there is"),
        RAREST: _("the longest there is"),
    }[choice.bound]
    text = _(
        "🛡️  Rolling checkpoints every {interval} ({why}). A power cut then costs {loss} "
        "minutes of work on average; the saves cost {share} of the time and {bytes} of "
        "writes a day.",
        interval=format_seconds(choice.interval),
        why=why,
        loss=f"{choice.expected_loss / 60:.1f}",
        share=f"{100 * choice.cost / choice.interval:.2f} %",
        bytes=format_bytes(int(choice.bytes_per_day)),
    )
    console.say(text)


def _on_durable(console: Console, saved: Saved) -> None:
    console.status.durable_step = saved.entry.step
    console.status.durable_at = time.monotonic()
    size = format_bytes(saved.entry.size)
    first, *others = saved.names
    if saved.entry.kind == "temp":
        console.say(
            _(
                "💾 step {step} is durable: {name} ({size}, {seconds})",
                step=saved.entry.step,
                name=first,
                size=size,
                seconds=format_seconds(saved.seconds),
            )
            + _stall(saved)
        )
        return
    kinds = {
        "epoch": _("✓ Epoch checkpoint: {name} ({size})", name=first, size=size),
        "best": _("✓ Best so far: {name} ({size})", name=first, size=size),
    }
    default = _("✓ Step checkpoint: {name} ({size})", name=first, size=size)
    console.say(f"  {kinds.get(saved.entry.kind, default)}" + _stall(saved), important=True)
    for name in sorted(others, key=_ROLE_ORDER.index):
        console.say(f"  {_role(name, saved)}", important=True)


def _role(name: str, saved: Saved) -> str:
    copied = saved.names[name] == "copy"
    space = (
        _("a copy, {size} more", size=format_bytes(saved.entry.size))
        if copied
        else _("the same data, no extra space")
    )
    if name == "best_model.pt":
        now, before = saved.entry.loss, saved.previous_best
        if before is None or now is None:
            why = _("first best")
        else:
            why = _(
                "improved by {by} ({percent})",
                by=f"{before - now:.4f}",
                percent=f"{100 * (before - now) / abs(before):.1f} %",
            )
        return _("🏆 Best model: {name} ({space}) [{why}]", name=name, space=space, why=why)
    if name == "latest.pt":
        return _("📌 Newest model: {name} [to resume training]", name=name)
    return _("📍 Main checkpoint: {name}", name=name)


def _on_resumed(console: Console, resumed: Resumed) -> None:
    saved_at = parse_time(resumed.entry.created)
    age = 0.0 if saved_at is None else time.time() - saved_at.timestamp()
    console.status.durable_step = resumed.step
    console.status.durable_at = time.monotonic() - max(0.0, age)
    where = _("epoch {epoch}, step {step}", epoch=resumed.epoch, step=resumed.step)
    console.say(
        _("▶️  Going on from {name} ({where}).", name=resumed.path.name, where=where),
        important=True,
    )
    if resumed.steps_lost:
        text = _(
            "{steps} steps ({time} of work) that were saved are lost with the damaged files.",
            steps=resumed.steps_lost,
            time=format_seconds(60 * resumed.minutes_lost),
        )
        console.warn(text)


def _tell_trouble(console: Console, event: str, fields: dict[str, Any], text: str) -> None:
    """Say that saving does not go as it should, as loudly as it deserves."""
    if event == "failed":
        console.status.durable_step = fields.get("durable", console.status.durable_step)
    if event == "recovered":
        console.say(text, important=True)
    elif event == "unsafe":
        console.alarm(text)
    elif fields.get("repeated"):  # said a short while ago; the bar shows that it is still so
        console.note(text)
    else:
        console.warn(text)


def _stall(saved: Saved) -> str:
    """Return words about how long training has waited for a save, if it was long."""
    if saved.stall < _TELL_STALL:
        return ""
    return _("; training waited {seconds}", seconds=format_seconds(saved.stall))
