"""The command line of export and import: arguments and printing.

What is written and read lives in holdfast.exchange, imported where it is used: `--help` needs no
torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from holdfast.cli import common
from holdfast.cli.progress import ProgressLine
from holdfast.formatting import wrap_cells
from holdfast.i18n import N_, _
from holdfast.table import Screen, printable


def run_export(argv: Sequence[str], prog: str) -> int:
    """Run `holdfast export`: 0; 1 where what was written is not the model (nothing is left
    then)."""
    parser = common.parser(
        prog,
        _(
            "Export a checkpoint for other tools. What was written is read back and compared with "
            "the original before it is kept: its logits on real text."
        ),
        _(
            "Examples:\n  {prog} checkpoints --to hf\n"
            "  {prog} checkpoints/best_model.pt --to onnx --out model-onnx\n"
            "  {prog} checkpoints --to weights --dtype bf16 --out small.pt",
            prog=prog,
        ),
    )
    parser.add_argument(
        "source",
        nargs="?",
        default=common.DIRECTORY,
        metavar="FILE|RUN",
        help=_(
            "checkpoint; a run directory stands for its best one (default: {value})",
            value=common.DIRECTORY,
        ),
    )
    parser.add_argument(
        "--to",
        required=True,
        metavar="hf|safetensors|onnx|weights",
        help=_(
            "hf: a directory for transformers, vLLM and the rest; safetensors: "
            "one file of weights and the configuration; onnx: a graph for "
            "onnxruntime; weights: a .pt without the optimizer"
        ),
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help=_("where to (default: <run or file>-<form> in this directory)"),
    )
    parser.add_argument(
        "--dtype", metavar="fp32|bf16|fp16", help=_("of the weights (default: as they were saved)")
    )
    given = parser.parse_args(argv)
    from holdfast.exchange.export import export

    line = ProgressLine()
    try:
        done = export(given.source, given.to, out=given.out, dtype=given.dtype, progress=line.note)
    finally:
        line.clear()
    if given.json:
        common.show_json(done.to_json())
    else:
        common.show(_fitting(done.lines()))
    return 0


def run_import(argv: Sequence[str], prog: str) -> int:
    """Run `holdfast import`: 0."""
    given = _import_parser(prog).parse_args(argv)
    from holdfast.exchange.importing import import_model

    line = ProgressLine()
    try:
        done = import_model(
            given.source,
            given.out,
            tokenizer=given.tokenizer,
            model_config=given.model_config,
            context_length=given.context_length,
            progress=line.note,
        )
    finally:
        line.clear()
    if given.json:
        common.show_json(done.to_json())
    else:
        common.show(_fitting(done.lines()))
    return 0


def _import_parser(prog: str) -> argparse.ArgumentParser:
    parser = common.parser(
        prog,
        _(
            "Make a run directory of a model from elsewhere, so that training goes on from it: a "
            "Hugging Face directory, or a .pt of another training script."
        ),
        _(
            "Examples:\n  {prog} path/to/hf-model --out runs/mine\n"
            "  {prog} checkpoint.pt --model-config config.json --tokenizer path/to/tokenizer\n"
            "Then: holdfast train --checkpoint-dir runs/mine --resume --data-file text.txt",
            prog=prog,
        ),
    )
    parser.add_argument("source", metavar="DIR|FILE", help=_("a Hugging Face directory, or a .pt"))
    parser.add_argument(
        "--out",
        default=common.DIRECTORY,
        metavar="RUN",
        help=_("the new run directory (default: {value})", value=common.DIRECTORY),
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help=_("directory of the tokenizer, where the source has none"),
    )
    parser.add_argument(
        "--model-config",
        metavar="FILE",
        help=_("config.json of the model, where the source has none"),
    )
    parser.add_argument(
        "--context-length",
        type=int,
        metavar="TOKENS",
        help=_("tokens of a training sample (default: what the model sees, at most 1024)"),
    )
    return parser


def _fitting(lines: Iterable[str]) -> Iterator[str]:
    """Break lines between words to fit a terminal, indented as they were; leave them whole in a
    pipe."""
    width = Screen.of(sys.stdout).width
    for line in map(printable, lines):
        text = line.lstrip()
        indent = line[: len(line) - len(text)]
        pieces = [text] if width is None else wrap_cells(text, max(20, width - len(indent) - 2))
        for number, piece in enumerate(pieces):
            yield indent + ("  " if number else "") + piece


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    "export": (N_("export a checkpoint for transformers, ONNX and other tools"), run_export),
    "import": (N_("make a run of a model from elsewhere"), run_import),
}
