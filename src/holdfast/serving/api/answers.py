"""From the engine's tokens to the answers of the API: whole, or as a stream of events.

A `Generation` is one request under way, whatever its form; `CompletionForm` and `ChatForm` put it
into the words of the two APIs.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from holdfast.i18n import _
from holdfast.serving.api.protocol import server_error, tokenizer_failed
from holdfast.serving.engine.engine import Engine, Inbox, Step, Text
from holdfast.serving.engine.json_text import JsonText
from holdfast.serving.engine.sampling import LogProb, Sampling
from holdfast.serving.engine.streaming import BROKEN, StopFilter, TextStream, Vocabulary

DONE = "data: [DONE]\n\n"
# Made once: `json.dumps` with options makes one a call, and a stream has a call a token.
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
# JSON lets them stand; `str.splitlines`, and with it many a client, ends a line there.
_SEPARATOR = re.compile("[\x85\u2028\u2029]")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as tokens and as text."""

    tokens: list[int]
    text: str

    def within(self, wanted: int, context: int) -> int:
        """Return the tokens that may be generated: what is wanted, as far as the model can see.

        The original refuses what would not fit; models of ours see 128 tokens and more, and would
        refuse what most clients ask for by default. `finish_reason` says "length" instead.
        """
        return min(wanted, context - len(self.tokens))


@dataclass(frozen=True, slots=True)
class Told:
    """A token with its probability; `offset`: characters of prompt and text before it."""

    token: int
    logprob: LogProb | None
    offset: int


@dataclass(slots=True)
class Piece:
    """The part of a choice that has come since its last piece."""

    choice: Choice
    text: str = ""
    told: list[Told] = field(default_factory=list)


class Choice:
    """One text of a request as it is shown: stop strings taken out, whole characters."""

    def __init__(
        self, text: Text, prompt: Prompt, vocabulary: Vocabulary, stops: Sequence[str], echo: bool
    ) -> None:
        self.index = text.index
        self.finish: str | None = None  # "stop", "length", or what ended it badly
        self.tokens = 0  # generated, as far as they count
        self._prompt, self._vocabulary = prompt, vocabulary
        self._echo: str | None = prompt.text if echo else None
        self._stream = TextStream(vocabulary, prompt.tokens)
        self._filter = StopFilter(stops)
        self._told: list[Told] = []  # whose text is not shown yet
        self._come = self._shown = len(prompt.text)

    def take(self, step: Step) -> Piece:
        """Take in `step`; return what can be shown after it."""
        piece = Piece(self)
        if self.finish is not None:
            return piece
        if self._echo is not None:
            piece.text, self._echo = self._echo, None
        if step.prompt is not None:
            piece.told += self._of_prompt(step.prompt)
        elif step.finish is not None:
            self._show(piece, self._filter.finish())
            piece.told += self._told
            if step.token is not None:  # the end of text: a token that was drawn, without a text
                self.tokens += 1
                piece.told.append(Told(step.token, step.logprob, self._come))
            self.finish = step.finish
        elif step.token is not None:
            self.tokens += 1
            self._told.append(Told(step.token, step.logprob, self._come))
            come = self._stream.push(step.token)
            self._come += len(come)
            self._show(piece, self._filter.push(come))
            if self._filter.stopped:
                self.finish = "stop"
        return piece

    def _show(self, piece: Piece, text: str) -> None:
        piece.text += text
        self._shown += len(text)
        while self._told and self._told[0].offset < self._shown:
            piece.told.append(self._told.pop(0))

    def _of_prompt(self, logprobs: Sequence[LogProb | None]) -> list[Told]:
        told, stream, offset = [], TextStream(self._vocabulary), 0
        for token, logprob in zip(self._prompt.tokens, logprobs, strict=True):
            told.append(Told(token, logprob, offset))
            offset += len(stream.push(token))
        return told


class Generation:
    """One request under way: all of its texts."""

    def __init__(
        self,
        engine: Engine,
        vocabulary: Vocabulary,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        context: int,
        n: int = 1,
        stops: Sequence[str] = (),
        echo: bool = False,
        json_object: bool = False,
    ) -> None:
        """`n` texts for each prompt, each as long as it is wanted and `context` has room for that
        prompt; with `json_object` each becomes a JSON object. Raises QueueFull, and has begun
        nothing then."""
        self.prompt_tokens = sum(len(prompt.tokens) for prompt in prompts)
        self._engine, self._inbox = engine, Inbox()
        self._choices: dict[Text, Choice] = {}
        for i, prompt in enumerate(prompts):
            own = replace(sampling, max_tokens=prompt.within(sampling.max_tokens, context))
            for j in range(n):
                guide = JsonText(vocabulary.pieces) if json_object else None
                text = Text(i * n + j, prompt.tokens, own, self._inbox, guide)
                self._choices[text] = Choice(text, prompt, vocabulary, stops, echo)
        engine.submit(list(self._choices))

    @property
    def choices(self) -> list[Choice]:
        """The choices in the order of their index."""
        return list(self._choices.values())

    @property
    def generated_tokens(self) -> int:
        """Tokens of all choices so far."""
        return sum(choice.tokens for choice in self._choices.values())

    def usage(self) -> dict[str, int]:
        """Return the API's `usage`."""
        prompt, generated = self.prompt_tokens, self.generated_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        }

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield what comes, a choice at a time, until all have ended.

        What has come together is one piece: a slow reader gets fewer and larger ones. Raises
        ApiError where a text has ended badly.
        """
        left = {text for text, choice in self._choices.items() if choice.finish is None}
        while left:
            together: dict[Text, Piece] = {}
            for text, step in await self._inbox.get():
                choice = self._choices[text]
                try:
                    new = choice.take(step)
                except (KeyboardInterrupt, SystemExit):
                    raise
                except BaseException as error:  # a panic of the tokenizer's Rust is no Exception
                    raise tokenizer_failed(error) from error
                piece = together.setdefault(text, new)
                if piece is not new:
                    piece.text += new.text
                    piece.told += new.told
                if choice.finish is not None and text in left:
                    left.discard(text)
                    if step.finish is None:  # a stop string: the engine does not know of it
                        self._engine.cancel([text])
            for piece in together.values():
                if piece.choice.finish not in (None, "stop", "length"):
                    raise server_error(_("The model could not go on with this text."))
                yield piece

    def cancel(self) -> None:
        """Cancel the rest."""
        self._engine.cancel(self._choices)


# ---------------------------------------------------------------------------------- the two forms


class Form(Protocol):
    """The form of an answer."""

    def beginning(self, generation: Generation) -> list[dict[str, Any]]:
        """Return the chunks before the first piece of a stream."""
        ...

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """Return a piece of a stream; None where it says nothing."""
        ...

    def usage(self, generation: Generation) -> dict[str, Any]:
        """Return the last event of a stream whose client wants to know what it used."""
        ...

    def whole(self, pieces: Sequence[Piece], generation: Generation) -> dict[str, Any]:
        """Return the answer at once; `pieces`: one a choice, in order."""
        ...


class _Form:
    kind, prefix = "", ""

    def __init__(
        self, model: str, fingerprint: str, vocabulary: Vocabulary, *, logprobs: bool, usage: bool
    ) -> None:
        """`usage`: whether the chunks of a stream have that field."""
        self._vocabulary, self._logprobs = vocabulary, logprobs
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": self.kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._tail: dict[str, Any] = {"usage": None} if usage else {}

    def usage(self, generation: Generation) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": generation.usage()}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": [choice], **self._tail}

    def _name(self, token: int) -> str:
        """Return a token as text; bytes that are no text by themselves are spelled out."""
        data = self._vocabulary.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class CompletionForm(_Form):
    """`/v1/completions`."""

    kind, prefix = "text_completion", "cmpl"

    def beginning(self, generation: Generation) -> list[dict[str, Any]]:
        return []

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        if not piece.text and not piece.choice.finish and not (self._logprobs and piece.told):
            return None
        return self._chunk(self._choice(piece))

    def whole(self, pieces: Sequence[Piece], generation: Generation) -> dict[str, Any]:
        choices = [self._choice(piece) for piece in pieces]
        return {**self._head, "choices": choices, "usage": generation.usage()}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.choice.index,
            "text": piece.text,
            "logprobs": self._told(piece.told) if self._logprobs else None,
            "finish_reason": piece.choice.finish,
        }

    def _told(self, told: Sequence[Told]) -> dict[str, Any]:
        return {
            "tokens": [self._name(one.token) for one in told],
            "token_logprobs": [one.logprob.value if one.logprob else None for one in told],
            "top_logprobs": [self._top(one.token, one.logprob) for one in told],
            "text_offset": [one.offset for one in told],
        }

    def _top(self, token: int, logprob: LogProb | None) -> dict[str, float] | None:
        """Return the likeliest tokens, and the one that was taken: it may be one more."""
        if logprob is None:
            return None
        return {self._name(one): value for one, value in (*logprob.top, (token, logprob.value))}


class ChatForm(_Form):
    """`/v1/chat/completions`."""

    kind, prefix = "chat.completion", "chatcmpl"

    def beginning(self, generation: Generation) -> list[dict[str, Any]]:
        self._head["object"] = f"{self.kind}.chunk"
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk(
                {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
            )
            for choice in generation.choices
        ]

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        if not piece.text and not piece.choice.finish:
            return None
        return self._chunk(
            {
                "index": piece.choice.index,
                "delta": {"content": piece.text} if piece.text else {},
                "logprobs": self._told(piece.told) if self._logprobs else None,
                "finish_reason": piece.choice.finish,
            }
        )

    def whole(self, pieces: Sequence[Piece], generation: Generation) -> dict[str, Any]:
        choices = [
            {
                "index": piece.choice.index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._told(piece.told) if self._logprobs else None,
                "finish_reason": piece.choice.finish,
            }
            for piece in pieces
        ]
        return {**self._head, "choices": choices, "usage": generation.usage()}

    def _told(self, told: Sequence[Told]) -> dict[str, Any]:
        content = [
            {
                **self._token(one.token, one.logprob.value),
                "top_logprobs": [self._token(token, value) for token, value in one.logprob.top],
            }
            for one in told
            if one.logprob is not None
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, value: float) -> dict[str, Any]:
        # The bytes of all tokens together are the text: the end of one adds nothing to it.
        special = token in self._vocabulary.special
        data = b"" if special else self._vocabulary.bytes_of(token)
        return {"token": self._name(token), "logprob": value, "bytes": list(data)}


# ------------------------------------------------------------------------------------ two ways out


async def whole(generation: Generation, form: Form) -> dict[str, Any]:
    """Return the answer when every text has ended. Raises ApiError where one has ended badly."""
    pieces = {choice.index: Piece(choice) for choice in generation.choices}
    async for piece in generation.pieces():
        pieces[piece.choice.index].text += piece.text
        pieces[piece.choice.index].told += piece.told
    return form.whole([pieces[index] for index in sorted(pieces)], generation)


async def events(generation: Generation, form: Form, *, usage: bool) -> AsyncIterator[str]:
    """Return the answer as server-sent events, as it comes; ends with [DONE]."""
    for chunk in form.beginning(generation):
        yield event(chunk)
    async for piece in generation.pieces():
        told = form.chunk(piece)
        if told is not None:
            yield event(told)
    if usage:
        yield event(form.usage(generation))
    yield DONE


def event(value: dict[str, Any]) -> str:
    """Return one server-sent event, on one line whatever a client takes for the end of one."""
    return f"data: {_SEPARATOR.sub(_escaped, _JSON.encode(value))}\n\n"


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def shown(text: str) -> str:
    """Return a prompt given as tokens, as text: the bytes of a character cut at its end are left
    out."""
    return text.rstrip(BROKEN)
