"""The command line of comparing: checkpoints by what they record, by their weights, by their words.

Arguments and printing. What is compared lives in holdfast.manage; what needs the model itself in
holdfast.training, which is imported when it is asked for.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import chop_cells

from holdfast.cli import common
from holdfast.cli.parsing import Parser
from holdfast.cli.progress import ProgressLine
from holdfast.errors import ConfigError
from holdfast.formatting import NOTHING, format_bytes, format_loss, format_seconds, wrap_cells
from holdfast.i18n import N_, _
from holdfast.manage.compare import manifests as compare
from holdfast.manage.progress import Progress
from holdfast.table import Column, Screen, printable, render

if TYPE_CHECKING:
    from holdfast.manage.compare.drift import Drift
    from holdfast.training.inference import Continuation, Evaluation

TOKENS, SEED, TEMPERATURE = 64, 0, 0.8

_ENDS = {
    "context": N_("the model can see no more"),
    "end": N_("it ended the text here"),
    "nan": N_("its weights are not numbers: nothing can be drawn from them"),
}


def run_compare(argv: Sequence[str], prog: str) -> int:
    """`holdfast compare`: 0."""
    given = _compare_parser(prog).parse_args(argv)
    _check(given, prog)
    found = compare.compare(given.sources)
    document, screen = found.to_json(), Screen.of(sys.stdout)
    if not given.json:
        common.show(found.lines(screen))
    if given.tensors or given.sections:
        drifts = _drifts(found.subjects, given, screen)
        document["drift"] = {one.labels[1]: one.to_json() for one in drifts}
    if given.prompt is not None or given.evaluate:
        document |= _ask_models(found.subjects, given, screen)
    if given.json:
        common.show_json(document)
    return 0


def _compare_parser(prog: str) -> Parser:
    parser = common.parser(
        prog,
        _(
            "Compare checkpoints: metrics and which is better, configuration, environment; with "
            "--tensors how far the weights have moved, with --prompt how each continues a text, "
            "with --eval how well each predicts one."
        ),
        _(
            "Examples:\n  {prog} runs/a runs/b\n"
            "  {prog} runs/a/model_epoch_1.pt runs/a --tensors\n"
            '  {prog} runs/a runs/b --prompt "今天" --tokens 40\n'
            "  {prog} runs/a runs/b --eval held_out.txt",
            prog=prog,
        ),
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="FILE|DIR",
        help=_("checkpoints; a directory stands for its best one"),
    )
    parser.add_argument(
        "--tensors", action="store_true", help=_("how far each layer is from that of the first")
    )
    parser.add_argument(
        "--sections",
        metavar="NAME,…",
        help=_("whose tensors: parts of the state, as in model,optimizer, or all (default: model)"),
    )
    parser.add_argument("--prompt", metavar="TEXT", help=_("let each model continue this text"))
    for flag, kind, default, text in (
        ("--tokens", int, TOKENS, _("tokens to continue with (default: {value})", value=TOKENS)),
        (
            "--seed",
            int,
            SEED,
            _("seed of the draw, the same for all (default: {value})", value=SEED),
        ),
        (
            "--temperature",
            float,
            TEMPERATURE,
            _("0 for the likeliest token always (default: {value})", value=TEMPERATURE),
        ),
    ):
        metavar = "N" if kind is int else "T"
        parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=text)
    parser.add_argument(
        "--eval",
        dest="evaluate",
        metavar="FILE",
        help=_("measure each model on this text (.txt, .jsonl, .parquet)"),
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help=_("use the beginning of the text only: N tokens of the first model's tokenizer"),
    )
    return parser


def _check(given: argparse.Namespace, prog: str) -> None:
    """Raise ConfigError over what cannot be meant, before anything is read."""
    if len(given.sources) < 2:
        raise ConfigError(
            "one checkpoint cannot be compared: name two or more; see {prog} --help", prog=prog
        )
    for flag, value, least in (
        ("--tokens", given.tokens, 1),
        ("--max-tokens", given.max_tokens, 1),
        ("--temperature", given.temperature, 0),
    ):
        if value is not None and not least <= value < float("inf"):
            raise ConfigError(
                "{flag} {value}: expected at least {least}; see {prog} --help",
                flag=flag,
                value=value,
                least=least,
                prog=prog,
            )


# --------------------------------------------------------------------------------------- weights


def _drifts(
    subjects: Sequence[compare.Subject], given: argparse.Namespace, screen: Screen
) -> list[Drift]:
    """The drift of each from the first, printed as it becomes known."""
    from holdfast.manage.compare import (
        drift,  # NumPy
        drift_table,  # NumPy
    )

    wanted = [name.strip() for name in (given.sections or "").split(",") if name.strip()]
    first, *others = ((subject.label, subject.path) for subject in subjects)
    found = []
    for number, other in enumerate(others, 1):
        bar = ProgressLine(_comparing)
        try:
            one = drift.drift(
                first, other, wanted=wanted, show=bar.show, file=(number, len(others))
            )
        finally:
            bar.clear()
        found.append(one)
        if not given.json:
            common.show(["", *drift_table.lines(one, screen)])
    return found


# ---------------------------------------------------------------------------------------- models


def _ask_models(
    subjects: Sequence[compare.Subject], given: argparse.Namespace, screen: Screen
) -> dict[str, Any]:
    """Load one model after the other and ask it what was asked for; prints and returns it."""
    bar = ProgressLine()
    try:
        continued, measured = _ask_each(subjects, given, bar)
    finally:
        bar.clear()
    document: dict[str, Any] = {}
    if continued:
        document["continuations"] = {
            "prompt": given.prompt,
            "tokens": given.tokens,
            "seed": given.seed,
            "temperature": given.temperature,
            "texts": {label: one.to_json() for label, one in continued.items()},
        }
    if measured:
        comparable = _comparable(measured)
        document["evaluation"] = {
            "file": given.evaluate,
            "same_tokenizer": comparable,
            "better": _best(measured),
            "measured": {label: one.to_json() for label, one in measured.items()},
        }
    if not given.json:
        if continued:
            common.show(["", *texts(subjects, given.prompt, continued, screen)])
        if measured:
            common.show(["", *_evaluations(given.evaluate, measured, screen)])
    return document


def _ask_each(
    subjects: Sequence[compare.Subject], given: argparse.Namespace, bar: ProgressLine
) -> tuple[dict[str, Continuation], dict[str, Evaluation]]:
    bar.note(_("loading {label}: {name}", label=subjects[0].label, name=subjects[0].path.name))
    from holdfast.training import inference
    from holdfast.training.models import tune_allocator

    tune_allocator()

    def warn(note: str) -> None:
        bar.clear()
        print(note, file=sys.stderr)

    documents = inference.read_text(given.evaluate, warn) if given.evaluate else []
    continued: dict[str, Continuation] = {}
    measured: dict[str, Evaluation] = {}
    for number, subject in enumerate(subjects, 1):
        label, name = subject.label, subject.path.name
        bar.note(_("loading {label}: {name}", label=label, name=name))
        loaded = inference.load_for_inference(subject.path)
        if given.prompt is not None:
            bar.note(_("continuing the prompt with {label}: {name}", label=label, name=name))
            continued[label] = inference.continue_text(
                loaded,
                given.prompt,
                tokens=given.tokens,
                seed=given.seed,
                temperature=given.temperature,
            )
        if given.evaluate:
            if number == 1 and given.max_tokens is not None:
                documents = inference.shorten(documents, loaded.tokenizer, given.max_tokens)
            show = _shower((number, len(subjects)), subject)
            measured[label] = inference.evaluate(loaded, documents, show)
        del loaded  # before the next one is read: one model in memory at a time
    return continued, measured


def _shower(file: tuple[int, int], subject: compare.Subject) -> Callable[[int, int], None]:
    began = time.monotonic()
    what = _("measuring {label}: {name}", label=subject.label, name=subject.path.name)
    bar = ProgressLine(lambda _progress: what)

    def show(done: int, total: int) -> None:
        bar.show(Progress(*file, Path(subject.path), done, total, time.monotonic() - began))

    return show


def _comparing(progress: Progress) -> str:
    return _("comparing {name}", name=progress.path.name)


# ----------------------------------------------------------------------------------------- texts


def texts(
    subjects: Sequence[compare.Subject],
    prompt: str,
    continued: Mapping[str, Continuation],
    screen: Screen,
) -> list[str]:
    """Return the lines that show the continuations, one below the other."""
    lines = [screen.bold(printable(_("Continuations of “{prompt}”", prompt=prompt)))]
    for subject in subjects:
        lines += [screen.bold(subject.label), *_told(continued[subject.label], screen.width)]
    return lines


def _told(continuation: Continuation, width: int | None) -> list[str]:
    lines = [printable(line) for line in continuation.text.split("\n")]
    if width is not None:
        lines = [part for line in lines for part in _wrapped(line, width - 1)]
    if continuation.ended in _ENDS:
        lines.append(f"[{_(_ENDS[continuation.ended])}]")
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in wrap_cells(text, width) for part in chop_cells(line, width) or [""]]


# ------------------------------------------------------------------------------------ evaluation


def _comparable(measured: Mapping[str, Evaluation]) -> bool:
    """Return True if all have the same tokenizer."""
    return len({one.tokenizer for one in measured.values()}) == 1


def _best(measured: Mapping[str, Evaluation]) -> str | None:
    """Return the label with the fewest bits a byte; None where two are equal."""
    bits = {label: one.bits_per_byte for label, one in measured.items()}
    known = {label: value for label, value in bits.items() if value == value}  # noqa: PLR0124 - NaN
    least = [label for label, value in known.items() if value == min(known.values())]
    return least[0] if len(least) == 1 else None


def _evaluations(source: str, measured: Mapping[str, Evaluation], screen: Screen) -> list[str]:
    one = next(iter(measured.values()))
    size = format_bytes(one.text_bytes)
    best, per_token = _best(measured), _comparable(measured)
    rows = [
        [
            _("bits per byte"),
            *(format_loss(m.bits_per_byte) for m in measured.values()),
            best or NOTHING,
        ],
        [
            _("loss (nats per token)"),
            *(format_loss(m.loss) for m in measured.values()),
            best if best and per_token else NOTHING,
        ],
        [
            _("perplexity"),
            *(format_loss(m.perplexity) for m in measured.values()),
            best if best and per_token else NOTHING,
        ],
        [_("tokens"), *(f"{m.tokens:,}" for m in measured.values()), ""],
        [_("context"), *(f"{m.context_length:,}" for m in measured.values()), ""],
        [_("precision"), *(m.precision for m in measured.values()), ""],
        [_("speed"), *(f"{format_bytes(round(m.speed))}/s" for m in measured.values()), ""],
        [_("time"), *(format_seconds(m.seconds) for m in measured.values()), ""],
    ]
    columns = [Column(""), *(Column(label, right=True) for label in measured), Column(_("better"))]
    title = screen.bold(printable(_("Measured on {file} ({size} of text)", file=source, size=size)))
    lines = [title, *render(columns, rows, screen)]
    if not per_token:
        lines.append(
            _(
                "The tokenizers differ: only bits per byte can be compared, what counts "
                "tokens cannot."
            )
        )
    return lines


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    "compare": (N_("compare checkpoints or runs"), run_compare),
}
