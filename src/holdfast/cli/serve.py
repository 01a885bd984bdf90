"""The command line of the server: arguments, what is said at its start and its end.

What is served and how lives in holdfast.serving; torch comes in only when the arguments are right.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.cli import common
from holdfast.errors import CheckpointError, ConfigError
from holdfast.i18n import N_, _
from holdfast.table import printable

if TYPE_CHECKING:
    import torch

    from holdfast.cli.parsing import Parser
    from holdfast.serving.server import Ready, Settings

_CHECKPOINT, _KEY = "LLM_CHECKPOINT", "HOLDFAST_API_KEY"
_PRECISIONS = ("fp32", "bf16", "fp16")


def run_serve(argv: Sequence[str], prog: str) -> int:
    """Run `holdfast serve`: 0 when everything was answered at the end, 130 after a second
    Ctrl-C."""
    given = _serve_parser(prog).parse_args(argv)
    sources = _sources(given)
    common.before_torch()
    from holdfast.serving.server import serve

    with _speaking():
        if serve(sources, _settings(given), _show_ready if given.json else _say_ready):
            return 0
    raise KeyboardInterrupt(_("Ended at once; requests under way were not answered."))


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    "serve": (N_("serve models through the OpenAI API, with a page to chat in"), run_serve),
}


def _serve_parser(prog: str) -> Parser:
    parser = common.parser(
        prog,
        _(
            "Serve trained models through the OpenAI API, and a page to chat in. A run directory "
            "is served by its best checkpoint, and a better one is loaded when training has made "
            "it."
        ),
        _(
            "Examples:\n  {prog}\n  {prog} checkpoints/best_model.pt --port 9000\n"
            "  {prog} runs/a runs/b\n  {prog} --host 0.0.0.0 --api-key $(openssl rand -hex 16)",
            prog=prog,
        ),
    )
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="FILE|RUN",
        help=_(
            "checkpoints or run directories (default: ${variable}, else {value})",
            variable=_CHECKPOINT,
            value=common.DIRECTORY,
        ),
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="HOST",
        help=_("address to listen on (default: {value}: this machine alone)", value="127.0.0.1"),
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=8000,
        metavar="N",
        help=_("port to listen on, 0 for any (default: {value})", value=8000),
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=_(
            "what clients must send (default: ${variable}); needed for a host "
            "that others can reach",
            variable=_KEY,
        ),
    )
    common.add_ways_in(parser)
    parser.add_argument(
        "--device",
        metavar="NAME",
        help=_("where the model computes: cpu, cuda, cuda:1, mps (default: the fastest there is)"),
    )
    parser.add_argument(
        "--precision",
        choices=_PRECISIONS,
        metavar="|".join(_PRECISIONS),
        default="fp32",
        help=_(
            "of the weights (default: {value}; with fewer bits the same seed "
            "may give another text when others are answered too)",
            value="fp32",
        ),
    )
    parser.add_argument(
        "--models",
        type=_count,
        default=3,
        metavar="N",
        help=_("checkpoints in memory at once (default: {value})", value=3),
    )
    return parser


def _sources(given: argparse.Namespace) -> list[Path]:
    """Return what to serve. Raises CheckpointError, before torch is loaded, where it is not
    there."""
    named = given.sources or [os.environ.get(_CHECKPOINT) or common.DIRECTORY]
    sources = list(dict.fromkeys(map(Path, named)))
    for source in sources:
        if not source.exists():
            raise CheckpointError(
                "There is no checkpoint at {path} yet: train first (holdfast train), or name "
                "another FILE or RUN.",
                path=source,
            )
    return sources


def _settings(given: argparse.Namespace) -> Settings:
    import torch

    from holdfast.serving.library import Options
    from holdfast.serving.server import Settings, check

    key = given.api_key or os.environ.get(_KEY) or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError("--api-key has characters that no header can carry.")
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    settings = Settings(
        host=given.host,
        port=given.port,
        api_key=key,
        allowed_hosts=given.allowed_host,
        allowed_origins=given.allowed_origin,
        options=Options(
            device=_device(given.device),
            dtype=precisions[given.precision],
            loaded=given.models,
        ),
    )
    check(settings)
    return settings


def _device(name: str | None) -> torch.device | None:
    import torch

    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            "--device {name} is not there: {reason}",
            name=name,
            reason=str(error).strip().partition("\n")[0],
        ) from error
    return device


def _say_ready(ready: Ready) -> None:
    first, *others = ready.cards
    lines = [
        _(
            "Serving {name} (step {step}, {path}) at {url}",
            name=first.name,
            step=first.entry.step,
            path=first.path,
            url=ready.url,
        )
    ]
    if others:
        shown = ", ".join(card.name for card in others[:8]) + (" …" if len(others) > 8 else "")
        lines.append(_("Also: {names}", names=shown))
    lines.append(_("OpenAI API: {url}/v1 · page: {url}/ · Ctrl-C ends", url=ready.url))
    common.show([printable(line) for line in lines])


def _show_ready(ready: Ready) -> None:
    """Print one document when the server answers: with --port 0 a script learns the address by
    it."""
    models = [
        {"id": card.name, "step": card.entry.step, "path": str(card.path)} for card in ready.cards
    ]
    common.show_json({"url": ready.url, "api": f"{ready.url}/v1", "models": models})


@contextlib.contextmanager
def _speaking() -> Iterator[None]:
    """Print what the server logs, a line each, to stderr, and leave the loggers as they were."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s holdfast: %(message)s", "%H:%M:%S"))
    handler.addFilter(_worth_saying)
    levels = {"holdfast": logging.INFO, "uvicorn.error": logging.WARNING}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).removeHandler(handler)
            logging.getLogger(name).setLevel(level)


def _worth_saying(record: logging.LogRecord) -> bool:
    """Return False for a request that was cancelled at the end: that is no error."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, asyncio.CancelledError)


# -------------------------------------------------------------------------------------- arguments


def _count(text: str) -> int:
    return _whole(text, 1, 1 << 20)


def _port(text: str) -> int:
    return _whole(text, 0, 65535)


def _whole(text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(
            _(
                "{value} is not a whole number from {least} to {most}",
                value=repr(text),
                least=least,
                most=most,
            )
        )
    return int(text)
