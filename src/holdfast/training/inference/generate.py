"""Text from a model, piece by piece: sampling with a cache and a generator of its own.

No run is disturbed by it: the global random streams stay as they are. Batches of many requests are
the server's business; here one text is continued.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from holdfast.training.text.tokenizer import TextTokenizer

_WINDOW = 32  # tokens decoded together: more than any character, or any word's spaces, spans
_COLDEST = 1e-5  # temperature: below it the logits would become infinite, and nothing changes
_BROKEN = "\ufffd"  # what bytes become that are no whole character (yet)

# Why a text ended.
END_OF_TEXT, LENGTH, CONTEXT = "end_of_text", "length", "context"
STOPPED, RUINED = "stopped", "not_a_number"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The way to draw the next token from the logits."""

    seed: int
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token each time."""
    top_k: int = 50
    """Only the k most likely tokens may be drawn; 0 for all."""
    top_p: float = 1.0
    """Above 0: of these only the fewest that together have this share of the probability."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for every time it was generated, as OpenAI's API has it."""


class TextStream:
    """`prompt` and up to `length` tokens more, in pieces; an end-of-text token or `stop()` ends it.

    Iterated once, it gives the text piece by piece: first the prompt, then what is generated. A
    piece ends with a whole character: bytes of one that is not complete are held back. The prompt
    is as the model read it (normalised, special tokens left out). When it has ended, `tokens` is
    how many were generated and `ended` why: one of END_OF_TEXT, LENGTH, CONTEXT, STOPPED, RUINED.
    `prompt_tokens` is what the prompt has, `read_tokens` what of it (its end) the model reads, and
    `moved` how often the window was moved.

    With `may_end=False` the end-of-text token is never drawn: a model that has learned little ends
    early, and a person would see nothing of what it has learned. Where the context is full the text
    ends, unless `slide`: then the model reads the last half of its context anew and goes on, and
    what lies before that no longer counts. The same seed gives the same text on the same machine.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: TextTokenizer,
        prompt: str,
        length: int,
        *,
        context_length: int,
        sampling: Sampling,
        may_end: bool = True,
        slide: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
        self.prompt_tokens = len(self.ids)
        # A window that will be moved is first filled so far that it need not be at once.
        limit = _kept(context_length) if slide and len(self.ids) >= context_length else None
        self.read_tokens = min(self.prompt_tokens, limit or context_length)
        self.tokens = self.moved = 0
        self.ended = ""
        self._model, self._tokenizer, self._length = model, tokenizer, length
        self._context, self._sampling, self._slide = context_length, sampling, slide
        self._may_end, self._stop = may_end, stop

    def __iter__(self) -> Iterator[str]:
        yield _whole(self._tokenizer.decode(self.ids))
        pieces = Pieces(self._tokenizer, self.ids)
        was_training = self._model.training
        self._model.eval()
        try:
            for token in self._drawn():
                self.ids.append(token)
                self.tokens += 1
                if piece := pieces.add(token):
                    yield piece
        finally:
            self._model.train(was_training)

    @torch.no_grad()
    def _drawn(self) -> Iterator[int]:
        """The tokens, one by one; sets `ended`."""
        device = next(self._model.parameters()).device
        draw = Draw(self._sampling, forbidden=None if self._may_end else self._tokenizer.eos_id)
        given, cache, seen = self.ids[-self.read_tokens :], None, 0
        self.ended = LENGTH
        for _token in range(self._length):
            if seen + len(given) >= self._context:
                if not self._slide:
                    self.ended = CONTEXT
                    return
                given, cache, seen = self.ids[-_kept(self._context) :], None, 0
                self.moved += 1
            if self._stop():
                self.ended = STOPPED
                return
            inputs = torch.tensor([given], device=device)
            output = self._model(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache, seen = output.past_key_values, seen + len(given)
            logits = output.logits[0, -1].float().cpu()
            if logits.isnan().any():
                self.ended = RUINED  # the weights are: there is nothing to draw from
                return
            token = draw(logits)
            if token == self._tokenizer.eos_id:
                self.ended = END_OF_TEXT
                return
            given = [token]
            yield token


def sample_text(
    model: Any,
    tokenizer: TextTokenizer,
    prompt: str,
    length: int,
    *,
    context_length: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int = 50,
    may_end: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> str:
    """Return the text of a `TextStream`, never past the context, without broken bytes at its
    end."""
    sampling = Sampling(seed=seed, temperature=temperature, top_k=top_k)
    stream = TextStream(
        model,
        tokenizer,
        prompt,
        length,
        context_length=context_length,
        sampling=sampling,
        may_end=may_end,
        stop=stop,
    )
    return "".join(stream).rstrip(_BROKEN)


def _kept(context_length: int) -> int:
    """Tokens that stay in the window when it is moved: half, so that the reading is paid once for
    as many new ones."""
    return max(1, context_length // 2)


class Draw:
    """Draws tokens from logits [vocabulary] (float32, on the CPU), with a generator of its own."""

    def __init__(self, sampling: Sampling, forbidden: int | None) -> None:
        self._sampling, self._forbidden = sampling, forbidden
        self._generator = torch.Generator("cpu").manual_seed(sampling.seed)
        self._drawn: Counter[int] = Counter()

    def __call__(self, logits: torch.Tensor) -> int:
        how = self._sampling
        for token, count in self._drawn.items() if how.frequency_penalty else ():
            logits[token] -= how.frequency_penalty * count
        if self._forbidden is not None:
            logits[self._forbidden] = -torch.inf
        if how.temperature == 0:
            token = int(logits.argmax())
        else:
            scaled = logits / max(how.temperature, _COLDEST)
            best = torch.topk(scaled, min(how.top_k or len(logits), len(logits)))
            probabilities = torch.softmax(best.values, 0)
            if how.top_p < 1:
                before = probabilities.cumsum(0) - probabilities  # of what is more likely
                probabilities[before >= how.top_p] = 0.0
            choice = torch.multinomial(probabilities, 1, generator=self._generator)
            token = int(best.indices[choice])
        self._drawn[token] += 1
        return token


class Pieces:
    """Token ids to pieces of text, each of whole characters.

    A tokenizer may write a token differently at the beginning than after another (spaces), and a
    character may span tokens: the last few are decoded together and the new part is given out.
    """

    def __init__(self, tokenizer: TextTokenizer, ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._begin(ids)

    def _begin(self, ids: list[int]) -> None:
        self._ids = ids[-_WINDOW:]
        self._said = _whole(self._tokenizer.decode(self._ids))

    def add(self, token: int) -> str:
        """Return what `token` adds to the text; "" while a character is not complete."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        whole = _whole(text)
        if not whole.startswith(self._said):
            return ""
        piece = whole[len(self._said) :]
        self._said = whole
        count = len(self._ids)
        if count > 2 * _WINDOW and (whole == text or count > 8 * _WINDOW):
            self._begin(self._ids)
        return piece


def _whole(text: str) -> str:
    """`text` without what may be the beginning of a character at its end: three bytes at most.

    A model that has learned nothing draws bytes that are none, one after the other: these are shown
    as what they are, or the user would not see that it writes.
    """
    kept = len(text.rstrip(_BROKEN))
    return text[: max(kept, len(text) - 3)]
