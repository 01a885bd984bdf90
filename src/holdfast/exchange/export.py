"""`holdfast export`: a checkpoint in the forms that other tools read, checked before it is kept.

The order matters: what the original answers is taken first; then the export is written beside its
target, read back from there and asked the same; only then is it made durable and gets its name.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from holdfast.checkpoint.state import load_weights
from holdfast.errors import ConfigError, ForeignCheckpoint
from holdfast.exchange import export_check as checking
from holdfast.exchange import export_formats as formats
from holdfast.exchange import export_onnx, export_raw, model_card
from holdfast.exchange.target import (
    check_room,
    check_target,
    files_of,
    interruptible,
    making,
)
from holdfast.formatting import format_bytes, format_seconds
from holdfast.i18n import _
from holdfast.training.inference import Loaded, find_checkpoint, load_for_inference
from holdfast.training.options.fields import did_you_mean, nearest
from holdfast.training.text.tokenizer import TextTokenizer

FORMATS = ("hf", "safetensors", "onnx", "weights")
_MEANT = {
    "huggingface": "hf",
    "hugging-face": "hf",
    "transformers": "hf",
    "gguf": "hf",
    "pt": "weights",
    "pth": "weights",
    "torch": "weights",
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The largest difference that is allowed between two logits, as a share of the largest logit. The
# same weights in the same dtype compute the same but for the order of sums; other kernels (ONNX)
# order them otherwise; fp16 has 11 bits and bf16 8, and their roundings add up from layer to layer.
SAME = 1e-5
ALLOWED = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}

_OVERHEAD = 32 << 20  # bytes beside the weights: tokenizer, graph, manifest


@dataclass(frozen=True, slots=True)
class Exported:
    """An export that was made and checked."""

    target: Path
    form: str
    dtype: str
    source: Path
    step: int | None
    files: list[tuple[str, int]]
    seconds: float
    check: checking.Check | None  # None where there is no model to ask: only weights were compared
    tensors: int
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the lines that a person is told."""
        size = sum(size for _name, size in self.files)
        step = "" if self.step is None else " " + _("of step {step}", step=self.step)
        done = _(
            "✓ {source}{step} → {target} ({form}, {dtype}), {size} in {time}",
            source=self.source,
            step=step,
            target=self.target,
            form=self.form,
            dtype=self.dtype,
            size=format_bytes(size),
            time=format_seconds(self.seconds),
        )
        if self.check is not None:
            checked = _("Read back and checked: {line}.", line=self.check.line())
        else:
            checked = _(
                "Read back and checked: all {count} tensors are the same, bit by bit. The "
                "file does not say what its model is, so it was not asked for logits.",
                count=self.tensors,
            )
        return [done, "  " + checked, *("  " + note for note in self.notes)]

    def to_json(self) -> dict[str, Any]:
        """Return the form of `holdfast export --json`."""
        return {
            "target": str(self.target),
            "to": self.form,
            "dtype": self.dtype,
            "source": str(self.source),
            "step": self.step,
            "files": [{"name": name, "bytes": size} for name, size in self.files],
            "seconds": round(self.seconds, 3),
            "check": None if self.check is None else self.check.to_json(),
            "tensors": self.tensors,
            "notes": self.notes,
        }


def export(
    source: str,
    form: str,
    *,
    out: str | None = None,
    dtype: str | None = None,
    progress: Callable[[str], object] = str,
) -> Exported:
    """Export the checkpoint `source` (a run directory stands for its best one) as `form`.

    `progress` is told what is being done.

    Raises ConfigError for what cannot be asked for, CheckpointError for a checkpoint that cannot be
    read, ResourceError where there is no room, Deviation where the export does not compute what was
    trained; nothing is left at the target then.
    """
    _check_request(form, dtype)
    path, _entry = find_checkpoint(source)
    target = Path(out) if out else default_target(source, form)
    if form == "weights" and target.is_dir():
        told = _(
            "{path} is a directory, and --to weights makes one file: name it with --out.",
            path=target,
        )
        raise ConfigError(told)
    check_target(target)
    job = _Job(path, form, target, dtype, progress, time.monotonic())
    with interruptible(_("Stopped; nothing was exported.")):
        try:
            return job.export_model()
        except _NoModel as error:
            if form not in export_raw.FORMS:
                load_weights(path)  # a file without weights is told as that
                raise _only_weights(error, path) from error
        return job.export_tensors()


class _NoModel(ForeignCheckpoint):
    """A file that does not say what its model is."""


def default_target(source: str, form: str) -> Path:
    """Return `<run or file>-<form>` in the working directory."""
    path = Path(source)
    name = path.stem if path.suffix == ".pt" else path.resolve().name
    return Path(f"{name}-weights.pt" if form == "weights" else f"{name}-{form}")


def _check_request(form: str, dtype: str | None) -> None:
    if form not in FORMATS:
        meant = _MEANT.get(form.lower()) or nearest(form, FORMATS)
        raise ConfigError(
            "--to {value}: expected one of {choices}{hint}",
            value=form,
            choices=", ".join(FORMATS),
            hint=did_you_mean(meant),
        )
    if dtype is not None and dtype not in DTYPES:
        meant = _MEANT.get(dtype.lower()) or nearest(dtype, DTYPES)
        raise ConfigError(
            "--dtype {value}: expected one of {choices}{hint}",
            value=dtype,
            choices=", ".join(DTYPES),
            hint=did_you_mean(meant),
        )
    if form == "onnx":
        export_onnx.check_packages()
        if dtype == "bf16":
            raise ConfigError(
                "--to onnx --dtype bf16: onnxruntime does not compute in bf16 on "
                "a CPU; take fp16 or fp32"
            )


def _only_weights(error: ForeignCheckpoint, path: Path) -> ForeignCheckpoint:
    return ForeignCheckpoint(
        "{error} Its weights alone can be exported, with --to safetensors or --to weights. To "
        "make a run of it: holdfast import {path} --model-config FILE --tokenizer DIR",
        error=error,
        path=path,
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """One export: what was asked for, and the way from the file to the target."""

    source: Path
    form: str
    target: Path
    dtype: str | None
    progress: Callable[[str], object]
    began: float

    def export_model(self) -> Exported:
        """Write, read back, compare: the order that the module speaks of.

        One copy of the weights is in memory at a time: what is let go here is held nowhere else.
        """
        self.progress(_("loading"))
        try:
            loaded = load_for_inference(self.source, device="cpu")
        except ForeignCheckpoint as error:
            raise _NoModel(str(error)) from error
        saved = NAMES.get(loaded.model.dtype, "fp32")
        # onnxruntime has no bf16 on a CPU: what was saved in it becomes wider, which loses nothing.
        wanted = self.dtype or ("fp32" if self.form == "onnx" and saved == "bf16" else saved)
        size = sum(p.numel() for p in loaded.model.parameters()) * DTYPES[wanted].itemsize
        check_room(self.target, size + _OVERHEAD)
        self.progress(_("asking the original"))
        parts = model_card.parts_of(loaded)
        data = model_card.data_of(loaded, parts)
        text = checking.text_for(loaded, data)
        expected = checking.logits_of(loaded.model, text.ids)
        checking.insist(checking.compare(text, expected, expected, SAME))  # no number: ruined
        card = model_card.card(loaded, parts, data, wanted) if self.form == "hf" else ""
        entry, tensors = loaded.entry, len(list(loaded.model.parameters()))
        if wanted != saved:
            loaded = dataclasses.replace(loaded, model=None)
            loaded = load_for_inference(self.source, device="cpu", dtype=DTYPES[wanted])
        with making(self.target, folder=self.form != "weights") as draft:
            self.progress(_("writing"))
            notes = self._write(loaded, draft, parts, card)
            tokenizer = loaded.tokenizer
            del loaded
            self.progress(_("reading back"))
            found = self._read(draft, tokenizer)(text.ids)
            check = checking.compare(text, expected, found, self._allowed(saved, wanted))
            checking.insist(check)
        return self._done(wanted, entry.step, check, tensors, notes)

    def export_tensors(self) -> Exported:
        """Export the weights of a file that does not say what its model is."""
        raw = export_raw.read(self.source, None if self.dtype is None else DTYPES[self.dtype])
        check_room(self.target, raw.nbytes + _OVERHEAD)
        with making(self.target, folder=self.form != "weights") as draft:
            self.progress(_("writing"))
            export_raw.write(raw, self.form, draft)
            self.progress(_("reading back"))
            export_raw.insist_on_bits(raw, self.form, draft)
        return self._done(raw.dtype, raw.step, None, len(raw.tensors), raw.notes)

    # ------------------------------------------------------------------------------------ details

    def _write(self, loaded: Loaded, draft: Path, parts: Mapping[str, Any], card: str) -> list[str]:
        if self.form == "weights":
            state = {"config": public_options(loaded.config), "history": parts["history"]}
            formats.write_weights(loaded, state, draft)
            return []
        if self.form == "safetensors":
            formats.write_safetensors(loaded.model, draft)
            return []
        if self.form == "hf":
            formats.write_hf(loaded.model, loaded.tokenizer, draft)
            (draft / "README.md").write_text(card, "utf-8")
            return []
        cached = export_onnx.write_onnx(loaded.model, draft)
        loaded.tokenizer.save(draft)
        slow = _(
            "The graph has no cache: torch could not make one of what this model keeps. "
            "Each token is computed from the whole text."
        )
        return [] if cached else [slow]

    def _read(self, draft: Path, tokenizer: TextTokenizer) -> checking.Answer:
        if self.form == "onnx":
            return export_onnx.Session(draft / export_onnx.MODEL).logits
        if self.form == "weights":
            model = formats.read_weights(draft)
        else:
            model = formats.read_pretrained(draft)
        if self.form == "hf":
            formats.check_tokenizer(draft, tokenizer)
        return partial(checking.logits_of, model)

    def _allowed(self, saved: str, wanted: str) -> float:
        if saved == wanted and self.form != "onnx":
            return SAME
        return max(ALLOWED[saved], ALLOWED[wanted])

    def _done(
        self,
        dtype: str,
        step: int | None,
        check: checking.Check | None,
        tensors: int,
        notes: list[str],
    ) -> Exported:
        seconds = time.monotonic() - self.began
        return Exported(
            self.target,
            self.form,
            dtype,
            self.source,
            step,
            files_of(self.target),
            seconds,
            check,
            tensors,
            notes,
        )


def public_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a training without the places of its files."""
    found = {
        name: dict(config[name])
        for name in ("model", "data", "training")
        if isinstance(config.get(name), Mapping)
    }
    for section, name in (("model", "model"), ("data", "data_file")):
        if name in found.get(section, {}):
            found[section][name] = model_card.base_name(found[section][name])
    found.get("data", {}).pop("cache_dir", None)
    return found
