"""The models that are served: names, the checkpoints they stand for, and which are in memory.

A name is a role or a file of the run; what is loaded is known by the checkpoint's identity, so that
two names of one checkpoint share one model. Only files that the catalogue of a run lists, or that
the user has named, are ever read.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from holdfast.checkpoint.format import read_manifest
from holdfast.checkpoint.rundir import ROLES, TEMP, Catalog, Entry, summary
from holdfast.errors import CheckpointError, HoldfastError
from holdfast.i18n import _
from holdfast.serving.api.chatting import ChatTemplate
from holdfast.serving.api.protocol import ApiError, server_error, too_many
from holdfast.serving.engine.engine import Engine, end_ids_of
from holdfast.serving.engine.rows import batch_for
from holdfast.serving.engine.streaming import Vocabulary
from holdfast.serving.metrics import Metrics
from holdfast.serving.names import Card, labels_of
from holdfast.training.inference import Loaded, load_for_inference

log = logging.getLogger("holdfast")

_LAST_STEP = 2.0  # seconds that the last step of a model may take at the end
_FRESH = 1.0  # seconds that a look into a run directory is good for
AGAIN = 60.0  # seconds after which what a lack of memory or a bad disk has kept out is tried again
_TRIES = 3  # looks at what a name stands for, where the trainer replaces it meanwhile


class Moved(HoldfastError):
    """The file that a name stood for is gone or another checkpoint by now: training goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Settings of the served models."""

    device: torch.device | None = None
    dtype: torch.dtype = torch.float32
    batch: int = 32
    """The most texts in one batch."""
    queue: int = 128
    """Texts that may wait for a row of one model; more are refused with 429."""
    loaded: int = 3
    """Models in memory; the one that was not asked for longest goes."""


class Served:
    """A model in memory, with its engine."""

    def __init__(self, entry: Entry, loaded: Loaded, engine: Engine) -> None:
        self.entry, self.engine = entry, engine
        self.context = loaded.max_context
        self.vocabulary = Vocabulary(loaded.tokenizer)
        self.template = ChatTemplate(loaded.tokenizer)
        self.template.start()
        # One thread: a template that takes its time keeps those waiting who ask for this model.
        self._rendering = ThreadPoolExecutor(1, "holdfast-template")
        self._to_render = 0
        self.tokenizer = loaded.tokenizer
        # Made now, in a thread that loads: for a large vocabulary they take half a second.
        self.longest, self.pieces = self.vocabulary.longest, self.vocabulary.pieces
        self.users = 0
        self.retired = False
        self.used = time.monotonic()

    async def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt for a conversation, made beside the event loop. Raises ApiError."""
        if not self.template.own:
            return self.template.render(messages)
        if self._to_render >= self.engine.room:
            raise too_many(
                _("The server is busy: too many conversations wait for their template."),
                1,
                "server_overloaded",
            )
        self._to_render += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._rendering, self.template.render, messages)
        finally:
            self._to_render -= 1

    def close(self) -> None:
        """Let the template's process and thread end; the engine ends by itself."""
        self._rendering.shutdown(wait=False, cancel_futures=True)
        self.template.close()

    @property
    def fingerprint(self) -> str:
        """Says which checkpoint has answered."""
        return f"step_{self.entry.step}_{self.entry.id[:8]}"


class Library:
    """The models of some sources; everything but `load` and `look_again` runs in one event loop."""

    def __init__(
        self,
        sources: Sequence[Path],
        options: Options,
        metrics: Metrics,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """`sources`: run directories and checkpoint files. Call `open` before anything else."""
        self.sources, self.options, self.metrics = list(sources), options, metrics
        self._labels = labels_of(self.sources)
        self._loop = loop
        self._current: dict[Path, Card] = {}  # what the first name of a source stands for
        self._served: dict[str, Served] = {}  # by the checkpoint's id
        self._closing: list[Served] = []  # let go, and perhaps still answering
        self._loading = asyncio.Lock()
        self._passed_over: set[tuple[Path, str]] = set()  # files that a warning was given of
        self._refused: dict[str, float] = {}  # checkpoint's id: time.monotonic() to try it again
        self._looked = 0.0
        self._cards: list[Card] = []
        self._contexts: dict[str, int] = {}
        self._look = threading.Lock()
        self._threads = torch.get_num_threads()
        metrics.watch(
            lambda: sum(one.engine.running for one in self._everyone()),
            lambda: sum(one.engine.waiting for one in self._everyone()),
        )

    def _everyone(self) -> list[Served]:
        return [*self._served.values(), *self._closing]

    # ------------------------------------------------------------------------------- the beginning

    def open(self) -> None:
        """Load what each source stands for: its best checkpoint that is intact.

        Raises HoldfastError where one has none.
        """
        for source in self.sources:
            card, served = self._first_intact(source)
            self._keep(card, served)
            self._current[source] = card
            self._show(card)

    def _first_intact(self, source: Path) -> tuple[Card, Served]:
        cards = self._cards_of(source)
        if not cards:
            raise CheckpointError(
                "There is no checkpoint in {directory} yet: train first (holdfast train), or "
                "name another run.",
                directory=source,
            )
        name = cards[0].name
        cards = list({card.path: card for card in cards}.values())  # one file has several names
        for card in cards:
            try:
                # The name stays: what is best is the best of what is intact.
                return replace(card, name=name), self.load(card)
            except (CheckpointError, Moved, OSError) as error:
                if card is cards[-1]:
                    raise
                log.warning(
                    _("{name} cannot be served: {reason}", name=card.path.name, reason=error)
                )
                self._refuse(card, error)
        raise AssertionError("the last one returns or raises")

    def load(self, card: Card) -> Served:
        """Return the model of `card`, verified. Raises HoldfastError or OSError; called in any
        thread.

        The work is done in a thread that ends with it. OpenMP keeps a team for each thread that has
        ever computed, and once there are more of them than cores it sends them all to sleep
        between two operations: a model of 4 M parameters then makes 190 tokens a second on two
        cores instead of 480.
        """
        with ThreadPoolExecutor(1, "holdfast-load") as own:
            return own.submit(self._load, card).result()

    def _share(self) -> int:
        """Return the threads that each model may compute with: more than cores in all would wait
        asleep."""
        return max(1, self._threads // max(1, len(self._served)))

    def _load(self, card: Card) -> Served:
        options = self.options
        moved = Moved("{path} was replaced just now; ask again.", path=card.path)
        try:
            loaded = load_for_inference(card.path, device=options.device, dtype=options.dtype)
        except HoldfastError as error:
            if card.path.exists():
                raise
            raise moved from error
        if loaded.entry.id != card.entry.id:  # the trainer's name for it has moved on
            raise moved
        engine = Engine(
            batch_for(loaded.model, options.batch, loaded.max_context),
            end_ids=end_ids_of(loaded.model, loaded.tokenizer.eos_id),
            queue=options.queue,
            loop=self._loop,
            observer=self.metrics,
            name=card.name,
            threads=self._share,
        )
        return Served(card.entry, loaded, engine)

    # ---------------------------------------------------------------------------------- the names

    def _prefix(self, source: Path) -> str:
        """Return the prefix that distinguishes the names of several runs."""
        return f"{self._labels[source]}/" if len(self.sources) > 1 else ""

    def _cards_of(self, source: Path) -> list[Card]:
        """Return the names of a source, the one that it is served by first."""
        if not source.is_dir():
            if not source.exists():
                raise CheckpointError("There is no checkpoint at {path}.", path=source)
            entry = summary(read_manifest(source), source.stat().st_size)
            return [Card(self._labels[source], source, entry)]
        catalog, prefix = Catalog(source), self._prefix(source)
        contents = catalog.scan(cached=True)
        for name, reason in contents.unreadable:  # it may be the best or the newest
            if (source, name) not in self._passed_over:
                self._passed_over.add((source, name))
                log.warning(_("{name} is passed over: {reason}", name=name, reason=reason))
        cards = []
        best = contents.best or contents.newest
        for name, found in (("best", best), ("latest", contents.newest)):
            if found is not None:
                cards.append(Card(prefix + name, catalog.path(found), found))
        for entry in contents.entries:
            for name in entry.names:
                if name not in ROLES and not name.startswith(f"{TEMP}/"):
                    cards.append(Card(prefix + name.removesuffix(".pt"), source / name, entry))
        return cards

    async def cards(self) -> list[Card]:
        """Return every name that can be asked for now, the default first."""
        if time.monotonic() - self._looked > _FRESH:
            self._cards = await asyncio.to_thread(self._all_cards)
            self._looked = time.monotonic()
        return self._cards

    def _all_cards(self) -> list[Card]:
        cards: dict[str, Card] = {}
        for source in self.sources:
            current = self._current[source]
            cards.setdefault(current.name, current)
            if source.is_dir():
                try:
                    found = self._cards_of(source)
                except OSError as error:  # the disk is away: what is in memory is still served
                    log.warning("%s", error)
                    continue
                for card in found:
                    cards.setdefault(card.name, card)
        return list(cards.values())

    def context_of(self, card: Card) -> int | None:
        """Return how many tokens the model sees; None where none of its run was loaded yet."""
        return self._contexts.get(card.entry.run_id)

    # ---------------------------------------------------------------------------------- the models

    async def acquire(self, name: str | None) -> tuple[str, Served]:
        """Return the full name that `name` stands for ("" or None: the default), and its model.

        It stays until `release`. Raises ApiError where there is none, or none that can be loaded.
        """
        card = await self.card(name)
        served = self._served.get(card.entry.id)
        if served is None:
            card, served = await self._load_for(name)
        served.users += 1
        served.used = time.monotonic()
        return card.name, served

    def release(self, served: Served) -> None:
        """Give a model back: the request is answered."""
        served.users -= 1
        if served.retired and served.users == 0:
            served.engine.close()
            served.close()
            self._closing.remove(served)

    async def card(self, name: str | None) -> Card:
        """Return the card of `name` ("" or None: the default). Raises ApiError where it is
        unknown."""
        first = self._current[self.sources[0]]
        if not name or name == first.name:
            return first
        for current in self._current.values():
            if current.name == name:
                return current
        for card in await self.cards():
            if card.name == name:
                return card
        raise ApiError(
            404,
            _(
                "The model '{name}' does not exist here; GET /v1/models lists those that do.",
                name=name[:200],
            ),
            param="model",
            code="model_not_found",
        )

    async def _load_for(self, name: str | None) -> tuple[Card, Served]:
        """Load what `name` stands for. One after the other: there is memory for as many as are
        kept, not for as many as are asked for at one moment."""
        async with self._loading:
            for look in range(1, _TRIES + 1):
                card = await self.card(name)
                if (known := self._served.get(card.entry.id)) is not None:
                    return card, known
                try:
                    served = await asyncio.to_thread(self.load, card)
                except (HoldfastError, OSError, RuntimeError, MemoryError) as error:
                    if look == _TRIES or not isinstance(error, Moved):
                        raise _unavailable(card, error) from error
                    self._looked = 0.0
                else:
                    self._keep(card, served)
                    return card, served
        raise AssertionError("the last look returns or raises")

    def _keep(self, card: Card, served: Served) -> None:
        self._served[card.entry.id] = served
        self._contexts[card.entry.run_id] = served.context
        pinned = self._pinned() | {card.entry.id}
        others = sorted(
            (one for id_, one in self._served.items() if id_ not in pinned), key=lambda s: s.used
        )
        while others and len(self._served) > self.options.loaded:
            self._retire(others.pop(0))
        self.metrics.models_loaded.set(len(self._served))

    def _pinned(self) -> set[str]:
        """Return the ids that must stay in memory: those that the sources stand for."""
        return {current.entry.id for current in self._current.values()}

    def _retire(self, served: Served) -> None:
        """Give it to no more requests; those that have it are answered to their end."""
        del self._served[served.entry.id]
        served.retired = True
        self._closing.append(served)
        served.users += 1
        self.release(served)

    # -------------------------------------------------------------------------------- better ones

    def look_again(self) -> bool:
        """Load what has become the best of a run since; called in the watcher's thread.

        The old one goes on answering until the new one is verified and in memory, and then ends
        what it has begun. Whether that was all: False asks for another look, though nothing new has
        come, since what failed may have failed for a reason that passes.
        """
        with self._look:
            settled = [self._look_at(source) for source in self.sources if source.is_dir()]
        return all(settled)

    def _look_at(self, source: Path) -> bool:
        current, now = self._current[source], time.monotonic()
        cards = self._cards_of(source)
        better = next((card for card in cards if self._refused.get(card.entry.id, 0) <= now), None)
        if better is None or better.name != current.name or better.entry.id == current.entry.id:
            return not any(now < self._refused.get(card.entry.id, 0) < math.inf for card in cards)
        try:
            served = self._served.get(better.entry.id) or self.load(better)
        except Moved:
            return False  # replaced or pruned just now: the next look sees what is there
        except (HoldfastError, OSError, RuntimeError, MemoryError) as error:
            self._refuse(better, error)
            self.metrics.reloads.labels("refused").inc()
            log.warning(
                _(
                    "{name} of step {step} is not served, step {old} goes on: {reason}",
                    name=better.path.name,
                    step=better.entry.step,
                    old=current.entry.step,
                    reason=error,
                )
            )
            return self._refused[better.entry.id] == math.inf
        self._loop.call_soon_threadsafe(self._adopt, source, better, served)
        return True

    def _refuse(self, card: Card, error: Exception) -> None:
        """Note not to load it again: for good where it is damaged or foreign, else for a while."""
        for_good = isinstance(error, CheckpointError)
        self._refused[card.entry.id] = math.inf if for_good else time.monotonic() + AGAIN

    def _adopt(self, source: Path, better: Card, served: Served) -> None:
        old = self._current[source]
        if served.retired:  # its memory was needed just now: it must be loaded again
            self._loop.run_in_executor(None, self.look_again)
            return
        self._current[source] = better
        self._keep(better, served)
        before = self._served.get(old.entry.id)
        if before is not None and old.entry.id not in self._pinned():
            self._retire(before)
        self._looked = 0.0
        self._show(better)
        self.metrics.reloads.labels("loaded").inc()
        log.info(
            _(
                "{name} is step {step} now (it was step {old})",
                name=better.name,
                step=better.entry.step,
                old=old.entry.step,
            )
        )

    def _show(self, card: Card) -> None:
        self.metrics.step.labels(card.name).set(card.entry.step)
        if card.entry.loss is not None:
            self.metrics.loss.labels(card.name).set(card.entry.loss)

    # -------------------------------------------------------------------------------------- the end

    def close(self) -> None:
        """Let every engine end; texts that are under way are told so."""
        everyone = self._everyone()
        for served in everyone:
            served.engine.stop()
            served.close()
        for served in everyone:  # a thread inside torch must not meet the end of the interpreter
            served.engine.join(_LAST_STEP)


def _unavailable(card: Card, error: Exception) -> ApiError:
    """Log why the model of `card` cannot be had, and return the error for the client."""
    log.warning(_("{name} cannot be served: {reason}", name=card.name, reason=error))
    if isinstance(error, HoldfastError | OSError):
        told = _("The model '{name}' cannot be loaded: {reason}", name=card.name, reason=error)
    else:  # torch's out of memory is a RuntimeError
        told = _("There is not enough memory for the model '{name}'.", name=card.name)
    return server_error(told, code="model_unavailable")
