"""The engine: one thread a model that takes waiting texts into the batch between two steps.

Requests come from an event loop and get their tokens back in it. What a text needs is decided
elsewhere; here it joins, gets its tokens, and leaves: at its end, or when it is cancelled.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from holdfast.i18n import _
from holdfast.serving.engine.json_text import JsonText
from holdfast.serving.engine.rows import Batch
from holdfast.serving.engine.sampling import LogProb, Sampler, Sampling, describe

log = logging.getLogger("holdfast")

# With more rows than a few, tokens are handed on so many seconds apart, several together: no
# reader sees the difference, and a piece costs more on its way to the client than a token in the
# model.
_FEW, _TOGETHER = 4, 0.02
PREFILL = 512  # tokens of new prompts that one step may take in: those under way wait for them


class QueueFull(Exception):
    """No room for more requests. `retry_after`: seconds until there should be some."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class Observer(Protocol):
    """A counter of steps and first tokens; called in the engine's thread."""

    def stepped(self, rows: int, seconds: float) -> None: ...

    def first_token(self, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Step:
    """A token of a text, its end, or what is known of its prompt."""

    token: int | None = None
    """With `finish` set: the token that ended the text, which is no part of what it says."""
    logprob: LogProb | None = None
    finish: str | None = None
    """"stop" (end of text), "length", "cancelled", or "error"."""
    prompt: list[LogProb | None] | None = None
    """Of the prompt's tokens, where they were asked for; None at the first."""


class Inbox:
    """The steps for one request, in the event loop of the request."""

    def __init__(self) -> None:
        self._items: list[tuple[Text, Step]] = []
        self._waiting: asyncio.Future[None] | None = None

    def put(self, item: tuple[Text, Step]) -> None:
        """Add an item; call it in the event loop."""
        self._items.append(item)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def get(self) -> list[tuple[Text, Step]]:
        """Return everything that has come, at least one item."""
        while not self._items:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        items, self._items = self._items, []
        return items


class Text:
    """One text under way."""

    __slots__ = (
        "arrived",
        "cancelled",
        "counts",
        "generated",
        "guide",
        "inbox",
        "index",
        "next",
        "prompt",
        "random",
        "sampling",
    )

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        sampling: Sampling,
        inbox: Inbox,
        guide: JsonText | None = None,
    ) -> None:
        """`index`: the number of its choice; with the seed it decides what is drawn."""
        self.guide = guide
        self.index, self.prompt, self.sampling, self.inbox = index, list(prompt), sampling, inbox
        seed = sampling.seed
        # A string, so that choice 1 of seed 0 is another text than choice 0 of seed 1.
        self.random = random.Random() if seed is None else random.Random(f"{seed}/{index}")
        self.counts: dict[int, int] = {}
        self.generated = 0
        self.next = 0  # the token that goes into the model at the next step
        self.cancelled = False
        self.arrived = time.monotonic()

    @property
    def longest(self) -> int:
        """Tokens that it has at its end at most."""
        return len(self.prompt) + self.sampling.max_tokens


class Engine:
    """Texts under way in one model. `submit` and `cancel` may be called from any thread."""

    def __init__(
        self,
        batch: Batch,
        *,
        end_ids: Iterable[int],
        queue: int,
        loop: asyncio.AbstractEventLoop,
        observer: Observer,
        name: str = "model",
        threads: Callable[[], int] = torch.get_num_threads,
    ) -> None:
        """`queue`: texts that may wait for a row; `end_ids`: tokens that end a text; `threads`: of
        the processor, that a step may use now."""
        self._batch, self._queue, self._loop, self._observer = batch, queue, loop, observer
        self._threads, self._using = threads, 0
        self._ends = frozenset(end_ids)
        self._sampler = Sampler(sorted(self._ends))
        self._rows: list[Text] = []
        self._waiting: collections.deque[Text] = collections.deque()
        self._changed = threading.Condition()
        self._closing = False
        self._events: list[tuple[Text, Step]] = []
        self._delivered = 0.0  # time.monotonic() of the last time that everything was handed on
        self._seconds = 1.0  # that a text took lately: what Retry-After is guessed from
        self._thread = threading.Thread(target=self._run, name=f"holdfast-{name}", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------- from other threads

    @property
    def running(self) -> int:
        """Texts in the batch now."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Texts that wait for a row."""
        return len(self._waiting)

    @property
    def room(self) -> int:
        """The most texts that are taken in at a time: rows and the places in the queue."""
        return self._batch.limit + self._queue

    def submit(self, texts: Sequence[Text]) -> None:
        """Take in all of `texts` or none: QueueFull where there is no room for them."""
        with self._changed:
            taken = len(self._waiting) + len(self._rows)
            if self._closing or taken + len(texts) > self.room:
                rounds = 1 + len(self._waiting) / self._batch.limit
                raise QueueFull(max(1, min(60, math.ceil(rounds * self._seconds))))
            self._waiting.extend(texts)
        # Two rounds of the event loop later: requests that come together begin together, where the
        # first alone would have the others wait for a pass and a step of its own.
        self._loop.call_soon_threadsafe(self._loop.call_soon, self._wake)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def cancel(self, texts: Iterable[Text]) -> None:
        """Cancel `texts`: their rows are free before the next step."""
        with self._changed:
            for text in texts:
                text.cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """Take no new texts; the thread ends, and lets the model go, when those here are done."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def stop(self) -> None:
        """End now: what is under way and what waits is told that it is cancelled."""
        with self._changed:
            self._closing = True
            for text in [*self._waiting, *self._rows]:
                text.cancelled = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds for the thread; return whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # --------------------------------------------------------------------------- the engine's own

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._rows or self._closing)
                if not self._waiting and not self._rows:
                    return
                self._drop_cancelled()
                joining = self._take_waiting()
            if self._using != (wanted := self._threads()):
                torch.set_num_threads(wanted)  # of this thread, and of those that begin later
                self._using = wanted
            try:
                self._join(joining)
                if joining and not self._deliver():  # a first token does not wait for a step
                    return
                if self._rows:
                    self._step()
            except Exception:  # out of memory, a bug in a model: the texts under way are lost,
                # and the server goes on with the next.
                log.exception(_("A step of the model failed; the texts under way are lost."))
                self._fail([*self._rows, *joining])
            if not self._deliver():
                return

    def _drop_cancelled(self) -> None:
        for text in [s for s in self._waiting if s.cancelled]:
            self._waiting.remove(text)
            self._events.append((text, Step(finish="cancelled")))
        for row in reversed(range(len(self._rows))):
            if self._rows[row].cancelled:
                self._leave(row, "cancelled")

    def _take_waiting(self) -> list[Text]:
        """Take waiting texts in the order they came: as many as there are rows and memory for, and
        as fit one pass."""
        joining: list[Text] = []
        tokens = 0
        farthest = max((text.longest for text in self._rows), default=0)
        while self._waiting and len(self._rows) + len(joining) < self._batch.limit:
            tokens += len(self._waiting[0].prompt)
            farthest = max(farthest, self._waiting[0].longest)
            if joining and tokens > PREFILL:
                break
            rows = len(self._rows) + len(joining)
            if rows and farthest * (rows + 1) > self._batch.capacity:
                break
            joining.append(self._waiting.popleft())
        return joining

    def _join(self, joining: list[Text]) -> None:
        """Take `joining` into the batch and give each its first token."""
        together = [s for s in joining if not s.sampling.prompt_logprobs]
        if together:
            self._enter(together, self._batch.add([s.prompt for s in together]))
        for text in joining:
            if text.sampling.prompt_logprobs:
                logits = self._batch.add_with_all(text.prompt)
                self._events.append((text, Step(prompt=_of_prompt(logits, text))))
                self._enter([text], logits[-1:].clone())

    def _enter(self, texts: list[Text], logits: torch.Tensor) -> None:
        first = len(self._rows)
        self._rows += texts
        tokens, probabilities = self._sampler.choose(logits, texts)
        now = time.monotonic()
        for text in texts:
            self._observer.first_token(now - text.arrived)
        self._give(first, tokens, probabilities)

    def _step(self) -> None:
        began = time.monotonic()
        logits = self._batch.step([text.next for text in self._rows])
        tokens, probabilities = self._sampler.choose(logits, self._rows)
        self._observer.stepped(len(self._rows), time.monotonic() - began)
        self._give(0, tokens, probabilities)

    def _give(
        self, first: int, tokens: list[int | None], probabilities: list[LogProb | None]
    ) -> None:
        """Give each row from `first` on its token; those that end leave."""
        for row in reversed(range(first, len(self._rows))):
            text = self._rows[row]
            token, wanted = tokens[row - first], text.sampling
            if token is None:
                log.error(_("The model's output is not a number: its weights are ruined."))
                self._leave(row, "error")
            elif wanted.max_tokens == 0:
                self._leave(row, "length")
            elif text.guide is not None and token in self._ends:
                self._leave(row, "length")  # no token goes on with what must become JSON
            elif token in self._ends or token in wanted.stop_token_ids:
                self._leave(row, "stop", token, probabilities[row - first])
            else:
                text.next = token
                text.generated += 1
                if wanted.penalises:
                    text.counts[token] = text.counts.get(token, 0) + 1
                self._events.append((text, Step(token, probabilities[row - first])))
                if text.guide is not None:
                    text.guide.take(token)
                if text.guide is not None and text.guide.done:
                    self._leave(row, "stop")
                elif text.generated >= wanted.max_tokens:
                    self._leave(row, "length")

    def _leave(
        self, row: int, finish: str, token: int | None = None, logprob: LogProb | None = None
    ) -> None:
        text = self._rows[row]
        self._batch.remove(row)
        self._rows[row] = self._rows[-1]
        self._rows.pop()
        self._events.append((text, Step(token, logprob, finish)))
        if finish in ("stop", "length"):
            self._seconds += 0.1 * (time.monotonic() - text.arrived - self._seconds)

    def _fail(self, texts: Iterable[Text]) -> None:
        self._rows.clear()
        self._batch.clear()
        over = {id(text) for text, step in self._events if step.finish}
        unique = {id(s): s for s in texts if id(s) not in over}
        self._events += [(text, Step(finish="error")) for text in unique.values()]

    def _deliver(self) -> bool:
        """Hand on what has come, in one call; False where there is no event loop any more."""
        events, now = self._events, time.monotonic()
        if len(self._rows) > _FEW and now - self._delivered < _TOGETHER:
            # First tokens and ends do not wait, nor what came before them.
            urgent = {text for text, step in events if step.finish or text.generated == 1}
            self._events = [event for event in events if event[0] not in urgent]
            events = [event for event in events if event[0] in urgent]
        else:
            self._events, self._delivered = [], now
        if events:
            try:
                self._loop.call_soon_threadsafe(_put, events)
            except RuntimeError:  # the loop is closed: the server has ended
                return False
        return True


def _put(events: list[tuple[Text, Step]]) -> None:
    for text, step in events:
        text.inbox.put((text, step))


def _of_prompt(logits: torch.Tensor, text: Text) -> list[LogProb | None]:
    """Return the probability of each token of the prompt, from `logits` [tokens, vocabulary]."""
    found: list[LogProb | None] = [None]
    for place, token in enumerate(text.prompt[1:]):
        logprobs = logits[place].log_softmax(-1)
        found.append(describe(logprobs, token, text.sampling.logprobs or 0))
    return found


def end_ids_of(model: Any, eos_id: int) -> set[int]:
    """Return every token that ends a text: the tokenizer's, and what the model's configuration
    names."""
    named = getattr(model.config, "eos_token_id", None)
    named = named if isinstance(named, list | tuple) else [named]
    return {eos_id, *(token for token in named if isinstance(token, int))}
