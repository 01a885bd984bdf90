"""The command line of generating: a text that appears as the model writes it.

Arguments, the terminal and its interruptions; sampling lives in holdfast.training.inference.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.cli import common
from holdfast.cli.parsing import Parser
from holdfast.errors import CheckpointError, ConfigError
from holdfast.formatting import format_loss
from holdfast.i18n import N_, _
from holdfast.manage.rundir import number
from holdfast.table import Screen, printable

if TYPE_CHECKING:
    from holdfast.training.inference import Loaded, Sampling, TextStream

_INTERRUPTED = 130  # 128 + SIGINT
_TOKENS, _TEMPERATURE, _TOP_K = 200, 0.8, 50
_LONGEST_PROMPT = 1 << 20  # bytes of a prompt in a pipe: the model reads the end of it only
_SEEDS = 1_000_000  # short enough to be typed again
_LARGEST_SEED = 2**63 - 1


def run_generate(argv: Sequence[str], prog: str) -> int:
    """`holdfast generate`: 0, or 130 where Ctrl-C ended it."""
    given = _generate_parser(prog).parse_args(argv)
    _check(given, prog)
    source = given.checkpoint or common.DIRECTORY
    if given.checkpoint is None and not Path(source).exists():
        message = _(
            "There is no checkpoint at {source}: train a model first, or name one with "
            "--checkpoint FILE|DIR.",
            source=source,
        )
        raise CheckpointError(message)
    # A pipe is read before the model is loaded: what is wrong with it is told at once.
    piped = _from_pipe() if given.prompt is None and not sys.stdin.isatty() else None
    common.before_torch()
    from holdfast.training.inference import load_for_inference

    loaded = load_for_inference(source)
    prompt = given.prompt if given.prompt is not None else piped
    if prompt is None:
        return _talk(loaded, given)
    _note(_name_of(loaded))
    return _INTERRUPTED if _Writing(loaded, prompt, given).show() else 0


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    "generate": (N_("let a model continue a text, in the terminal"), run_generate),
}


# --------------------------------------------------------------------------------- the arguments


def _generate_parser(prog: str) -> Parser:
    parser = common.parser(
        prog,
        _(
            "Let a trained model continue a text. The text appears as it is written; Ctrl-C ends "
            "it. Without PROMPT it is read from a pipe, or line by line from the terminal until "
            "Ctrl-D."
        ),
        _(
            "Examples:\n  {prog} 今天天气\n"
            "  {prog} 春江潮水 --checkpoint runs/a/model_epoch_3.pt --tokens 100 --seed 1\n"
            "  head -c 300 book.txt | {prog} --temperature 0.6 > more.txt\n"
            "  {prog} 你好 --json",
            prog=prog,
        ),
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help=_("the beginning of the text"))
    parser.add_argument(
        "--checkpoint",
        metavar="FILE|DIR",
        help=_(
            "a checkpoint, or a run directory for its best one, else its newest (default: {value})",
            value=common.DIRECTORY,
        ),
    )
    help_of = {
        "tokens": _(
            "length of what is written (default: {value}). Where it is more than the model "
            "can see at once, the model reads the last half of that anew and goes on",
            value=_TOKENS,
        ),
        "temperature": _(
            "below 1 more cautious, above more daring, 0 always takes the likeliest "
            "token (default: {value})",
            value=_TEMPERATURE,
        ),
        "top_p": _(
            "draw only from the likeliest tokens that together have this probability "
            "(default: 1, all)"
        ),
        "top_k": _(
            "draw only from the k likeliest tokens, 0 for all (default: {value})", value=_TOP_K
        ),
        "frequency_penalty": _(
            "makes a token less likely each time it was written; 0.5 helps "
            "against loops (default: 0)"
        ),
        "seed": _("the same seed gives the same text (default: another one each time)"),
    }
    whole: dict[str, Any] = {"type": int, "metavar": "N"}
    real: dict[str, Any] = {"type": float, "metavar": "X"}
    for name, kind, default in (
        ("tokens", whole, _TOKENS),
        ("temperature", real, _TEMPERATURE),
        ("top_p", real, 1.0),
        ("top_k", whole, _TOP_K),
        ("frequency_penalty", real, 0.0),
        ("seed", whole, None),
    ):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, default=default, help=help_of[name].replace("%", "%%"), **kind)
    return parser


def _check(given: argparse.Namespace, prog: str) -> None:
    """Raise ConfigError with every value that is out of its range."""
    ranges = (
        ("tokens", given.tokens >= 1, _("expected 1 or more")),
        ("temperature", 0 <= given.temperature < math.inf, _("expected 0 or more")),
        ("top-p", 0 < given.top_p <= 1, _("expected more than 0 and at most 1")),
        ("top-k", given.top_k >= 0, _("expected 0 or more")),
        ("frequency-penalty", -100 <= given.frequency_penalty <= 100, _("expected -100 to 100")),
        ("seed", given.seed is None or 0 <= given.seed <= _LARGEST_SEED, _("expected 0 or more")),
    )
    wrong = [
        _(
            "--{flag} {value}: {expected}; see {prog} --help",
            flag=flag,
            expected=expected,
            value=getattr(given, flag.replace("-", "_")),
            prog=prog,
        )
        for flag, good, expected in ranges
        if not good
    ]
    try:
        (given.prompt or "").encode()
    except UnicodeEncodeError:  # bytes of another encoding, as Python hands them on
        wrong.append(_("The prompt is not UTF-8 text."))
    if wrong:
        raise ConfigError("\n".join(wrong))


def _from_pipe() -> str:
    """Return stdin without the line break at its end."""
    data = sys.stdin.buffer.read(_LONGEST_PROMPT + 1)
    if len(data) > _LONGEST_PROMPT:
        message = _(
            "The prompt in the pipe is longer than 1 MiB; give only its end, for "
            "example with tail -c 2000."
        )
        raise ConfigError(message)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start > 0 and len(data) - error.start < 4:  # `head -c` cut a character: so be it
            return data[: error.start].decode("utf-8-sig")
        raise ConfigError("The prompt in the pipe is not UTF-8 text.") from error
    return text.removesuffix("\n").removesuffix("\r")


# -------------------------------------------------------------------------------------- the text


def _talk(loaded: Loaded, given: argparse.Namespace) -> int:
    """A line at a time from the terminal. Ctrl-C ends a text, and where there is none, all."""
    _note(_name_of(loaded))
    _note(_("Write the beginning of a text. Ctrl-C stops the model, Ctrl-D ends."))
    while True:
        try:
            line = _read_line()
        except KeyboardInterrupt:
            _note("")
            return _INTERRUPTED
        if line is None:
            _note("")
            return 0
        if line.strip():
            _Writing(loaded, line, given).show()


def _read_line() -> str | None:
    """A line from the terminal; None at its end. What invites to write never gets into a pipe."""
    if not sys.stdout.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    with contextlib.suppress(ImportError):  # Windows has none and edits lines by itself
        import readline  # noqa: F401 - input() then edits the line, wide characters too
    try:
        return input("> ")
    except EOFError:
        return None


@dataclass(slots=True)
class _Writing:
    """One text: shown piece by piece, or as one JSON document when it has ended."""

    loaded: Loaded
    prompt: str
    given: argparse.Namespace

    def show(self) -> bool:
        """Write the text to stdout; whether Ctrl-C ended it."""
        from holdfast.training.inference import RUINED

        stream, sampling = self._begin()
        if stream.read_tokens < stream.prompt_tokens:
            _warn(
                _(
                    "The prompt has {tokens} tokens; the model reads the last {read} of them.",
                    tokens=stream.prompt_tokens,
                    read=stream.read_tokens,
                )
            )
        pieces: list[str] = []
        began, first, interrupted = time.monotonic(), None, False
        try:
            with contextlib.closing(iter(stream)) as text:  # type: ignore[type-var]
                for piece in text:
                    if pieces:
                        first = first or time.monotonic()
                    pieces.append(piece)
                    if not self.given.json:
                        _write(piece)
        except KeyboardInterrupt:
            interrupted = True
        took = _Took(began, first or time.monotonic(), time.monotonic())
        if self.given.json:
            common.show_json(self._to_json(stream, sampling, pieces, took, interrupted))
        elif not "".join(pieces).endswith("\n"):
            _write("\n")
        if stream.ended == RUINED:
            message = _(
                "{path}: what the model says is not a number; its weights are ruined. Choose an "
                "earlier checkpoint.",
                path=self.loaded.path,
            )
            raise CheckpointError(message)
        if not self.given.json:
            self._tell(stream, sampling, took)
        return interrupted

    def _begin(self) -> tuple[TextStream, Sampling]:
        from holdfast.training.inference import Sampling, TextStream

        given, loaded = self.given, self.loaded
        seed = random.randrange(_SEEDS) if given.seed is None else given.seed
        sampling = Sampling(
            seed=seed,
            temperature=given.temperature,
            top_k=given.top_k,
            top_p=given.top_p,
            frequency_penalty=given.frequency_penalty,
        )
        stream = TextStream(
            loaded.model,
            loaded.tokenizer,
            self.prompt,
            given.tokens,
            sampling=sampling,
            context_length=loaded.context_length,
            slide=True,
        )
        return stream, sampling

    def _tell(self, stream: TextStream, sampling: Sampling, took: _Took) -> None:
        facts = [
            _("{count} tokens", count=stream.tokens),
            _("{rate} tokens/s", rate=f"{took.rate(stream.tokens):.1f}"),
            _("seed {seed}", seed=sampling.seed),
        ]
        if stream.moved:
            facts.append(
                _("the model sees {count} tokens at once", count=self.loaded.context_length)
            )
        _note(" · ".join(facts))

    def _to_json(
        self,
        stream: TextStream,
        sampling: Sampling,
        pieces: list[str],
        took: _Took,
        interrupted: bool,
    ) -> dict[str, Any]:
        entry = self.loaded.entry
        return {
            "checkpoint": {
                "file": str(self.loaded.path),
                "step": entry.step,
                "epoch": entry.epoch,
                "val_loss": number(entry.metrics.get("val_loss")),
            },
            "prompt": "".join(pieces[:1]),
            "text": "".join(pieces[1:]),
            "ended": "interrupted" if interrupted else stream.ended,
            "prompt_tokens": stream.prompt_tokens,
            "read_tokens": stream.read_tokens,
            "tokens": stream.tokens,
            "context_length": self.loaded.context_length,
            "window_moves": stream.moved,
            "sampling": asdict(sampling),
            "first_token_seconds": round(took.first - took.began, 4),
            "tokens_per_second": round(took.rate(stream.tokens), 2),
        }


@dataclass(frozen=True, slots=True)
class _Took:
    """Times of one text, in seconds of one clock."""

    began: float
    first: float
    ended: float

    def rate(self, tokens: int) -> float:
        """Tokens a second after the first one, which waits for the prompt to be read."""
        seconds = self.ended - self.first
        return (tokens - 1) / seconds if tokens > 1 and seconds > 0 else 0.0


# ----------------------------------------------------------------------------------- the terminal


def _name_of(loaded: Loaded) -> str:
    """Return the checkpoint's file in its folder, step, epoch, and validation loss."""
    entry = loaded.entry
    file = Path(*loaded.path.parts[-2:])  # short enough for one line
    facts = [printable(str(file)), _("step {step}", step=entry.step)]
    if entry.epoch is not None:
        facts.append(_("epoch {epoch}", epoch=entry.epoch))
    loss = number(entry.metrics.get("val_loss"))
    if loss is not None:
        facts.append(_("val loss {loss}", loss=format_loss(loss)))
    return " · ".join(facts)


def _write(text: str) -> None:
    """To stdout at once; a model's control characters must not drive a terminal."""
    sys.stdout.write("".join(_harmless(text)) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _harmless(text: str) -> Iterator[str]:
    for character in text:
        control = unicodedata.category(character) == "Cc" and character not in "\n\t"
        yield character.encode("unicode_escape").decode() if control else character


def _note(text: str) -> None:
    """For a person at a terminal only: a script's error stream stays empty."""
    if sys.stderr.isatty():
        dim, plain = ("\x1b[2m", "\x1b[0m") if Screen.of(sys.stderr).colour else ("", "")
        sys.stderr.write(f"{dim}{text}{plain}\n")
        sys.stderr.flush()


def _warn(text: str) -> None:
    sys.stderr.write(f"holdfast: {text}\n")
    sys.stderr.flush()
