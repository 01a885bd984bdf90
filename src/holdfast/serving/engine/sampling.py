"""From logits to tokens, for all rows of a batch at once; each row with parameters of its own.

A row draws with one number of its own generator and with its own logits alone, so its text does not
depend on who else is in the batch.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from holdfast.serving.engine.json_text import JsonText, first_bytes

_NARROW = 1024  # tokens that are sorted for top-p; where their mass does not reach it, all are


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The parameters by which one text is made, as the OpenAI API has them."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy: always the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0: no such limit."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    """How many alternatives are told with each token; 0: only the token's own; None: nothing."""
    prompt_logprobs: bool = False
    ignore_eos: bool = False
    """The end-of-text token is never drawn: what has learned little ends early."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the text, as the end-of-text token does."""

    @property
    def penalises(self) -> bool:
        """True if what was generated changes what comes next."""
        return bool(self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True, slots=True)
class LogProb:
    """The natural logarithm of a token's probability, and the likeliest ones at its place."""

    value: float
    top: tuple[tuple[int, float], ...] = ()


class Row(Protocol):
    """The view that the sampler has of a row of the batch."""

    sampling: Sampling
    random: random.Random
    counts: dict[int, int]
    """How often each token was generated so far; kept where a penalty asks for it."""
    guide: JsonText | None
    """What the text must become; None: anything."""


class Sampler:
    """Chooses the next token of every row; their parameters are kept as tensors between steps."""

    def __init__(self, end_ids: Sequence[int]) -> None:
        self._end_ids = list(end_ids)
        self._rows: list[Row] = []
        self._temperature = self._top_k = self._top_p = torch.empty(0)
        self._limited = self._draws = False
        self._penalised: list[int] = []  # rows whose change is another at every step
        self._fixed: _Spread | None = None  # the change of the others
        self._guided: list[int] = []  # rows that may not go on with every token
        self._firsts: tuple[Sequence[bytes], torch.Tensor] = ((), torch.empty(0))

    def choose(
        self, logits: torch.Tensor, rows: Sequence[Row]
    ) -> tuple[list[int | None], list[LogProb | None]]:
        """Return a token for each row of `logits` [rows, vocabulary], fp32; changes `logits`.

        None stands for a row whose logits are no numbers: its weights are ruined. The probabilities
        are the model's own, before temperature, penalties and limits.
        """
        self._prepare(rows, logits.device)
        sane = torch.isfinite(logits.sum(-1)).tolist()
        asked = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None]
        told = logits[asked].log_softmax(-1) if asked else None
        self._change(logits, rows)
        best = logits.argmax(-1)
        if self._draws:
            # A dice for every row that draws; a greedy row needs none and keeps its generator.
            dice = [row.random.random() if row.sampling.temperature else 0.0 for row in rows]
            drawn = self._draw(logits, torch.tensor(dice, dtype=torch.float64))
            best = torch.where(self._temperature > 0, drawn, best)
        tokens = best.tolist()
        for i in self._guided:
            tokens[i] = self._guide(logits[i], i, rows[i])
        probabilities: list[LogProb | None] = [None] * len(rows)
        if told is not None:
            for place, i in enumerate(asked):
                wanted = rows[i].sampling.logprobs or 0
                probabilities[i] = describe(told[place], tokens[i], wanted)
        return [t if good else None for t, good in zip(tokens, sane, strict=True)], probabilities

    def _prepare(self, rows: Sequence[Row], device: torch.device) -> None:
        if len(rows) == len(self._rows) and all(map(_is, rows, self._rows)):
            return
        self._rows = list(rows)
        every = [row.sampling for row in rows]

        def tensor(values: list[Any]) -> torch.Tensor:
            return torch.tensor(values, device=device)

        self._temperature = tensor([s.temperature for s in every])
        self._top_k = tensor([s.top_k or 1 << 40 for s in every])
        self._top_p = tensor([s.top_p for s in every])
        self._draws = any(s.temperature for s in every)
        self._limited = any(s.temperature and (s.top_k or s.top_p < 1) for s in every)
        self._guided = [i for i, row in enumerate(rows) if row.guide is not None]
        self._penalised = [i for i, s in enumerate(every) if s.penalises]
        fixed = [(i, self._change_of(row)) for i, row in enumerate(rows) if not every[i].penalises]
        self._fixed = _spread(fixed, device) if any(change for _row, change in fixed) else None

    def _change(self, logits: torch.Tensor, rows: Sequence[Row]) -> None:
        """Add bias and penalties of all rows in one operation: one a row took a fifth of a step."""
        if self._fixed is not None:
            places, changes = self._fixed
            logits[places] += changes
        if self._penalised:
            moving = [(i, self._change_of(rows[i])) for i in self._penalised]
            places, changes = _spread(moving, logits.device)
            logits[places] += changes

    def _change_of(self, row: Row) -> dict[int, float]:
        """Return what is added to the logits of a row, by token."""
        wanted = row.sampling
        change = dict(wanted.logit_bias)
        for token, count in row.counts.items():
            penalty = wanted.presence_penalty + wanted.frequency_penalty * count
            change[token] = change.get(token, 0.0) - penalty
        if wanted.ignore_eos:
            change.update(dict.fromkeys(self._end_ids, -torch.inf))
        return change

    def _draw(self, logits: torch.Tensor, dice: torch.Tensor) -> torch.Tensor:
        """Return one token a row where its dice falls on the summed probabilities, in order of the
        ids: that order does not change when two of them swap their rank by a rounding error."""
        scaled = logits / self._temperature.clamp(min=1e-5)[:, None]
        if self._limited:
            scaled = limit(scaled, self._top_k, self._top_p)
        total = scaled.softmax(-1).cumsum(-1, dtype=torch.float64)
        point = dice.to(total.device)[:, None] * total[:, -1:]
        return torch.searchsorted(total, point, right=True)[:, 0].clamp(max=logits.size(-1) - 1)

    def _guide(self, logits: torch.Tensor, i: int, row: Row) -> int:
        """Return the token of row `i`, drawn from those that its guide allows; an end of text where
        there is none. `logits` [vocabulary].

        Tokens that cannot begin so are left out at once. The others are put in the order in which
        they would be drawn one after the other, and the first that is allowed is taken: that is a
        draw among the allowed ones, without asking for each of a hundred thousand.
        """
        guide = row.guide
        assert guide is not None, "only rows with a guide come here"
        may = torch.tensor(first_bytes(guide.state), device=logits.device)
        scores = logits.masked_fill(~may[self._first_bytes(guide, logits)], -torch.inf)
        orders = [scores]
        if row.sampling.temperature:
            scores = scores / self._temperature[i].clamp(min=1e-5)
            limited = limit(scores[None], self._top_k[i : i + 1], self._top_p[i : i + 1])[0]
            own = torch.Generator().manual_seed(row.random.getrandbits(63))
            dice = torch.rand(scores.shape, generator=own, dtype=torch.float64).to(logits.device)
            gumbel = -(-dice.log()).log()
            orders = [limited + gumbel, scores + gumbel]  # beyond the limits where they leave none
        for order in orders:
            for width in (min(_NARROW, len(order)), len(order)):
                best = order.topk(width)
                for token, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                    if score == -torch.inf:
                        break
                    if guide.allows(token):
                        return int(token)
        return self._end_ids[0]

    def _first_bytes(self, guide: JsonText, logits: torch.Tensor) -> torch.Tensor:
        """Return the first byte of each token [vocabulary]; 256 for one without any."""
        known, firsts = self._firsts
        if known is not guide.pieces or len(firsts) != len(logits):
            firsts = torch.full(logits.shape, 256, dtype=torch.long)
            bytes_ = torch.tensor([piece[0] if piece else 256 for piece in guide.pieces])
            count = min(len(bytes_), len(firsts))
            firsts[:count] = bytes_[:count]
            firsts = firsts.to(logits.device)
            self._firsts = guide.pieces, firsts
        return firsts


# Places in logits [rows, vocabulary], rows and tokens apart, and what is added there.
_Spread = tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]


def _spread(changes: Sequence[tuple[int, Mapping[int, float]]], device: torch.device) -> _Spread:
    """Return the changes of rows, by token, as tensors; each place is there once."""
    rows = [row for row, change in changes for _token in change]
    tokens = [token for _row, change in changes for token in change]
    values = [value for _row, change in changes for value in change.values()]
    places = (
        torch.tensor(rows, device=device, dtype=torch.long),
        torch.tensor(tokens, device=device, dtype=torch.long),
    )
    return places, torch.tensor(values, device=device, dtype=torch.float32)


def _is(a: object, b: object) -> bool:
    return a is b


def limit(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Put -inf where top-k leaves a token out, and of the rest top-p; the likeliest stays.

    `logits` [rows, vocabulary]; `top_k`, `top_p` [rows]. What is as likely as the last one that is
    kept is kept too.
    """
    size = logits.size(-1)
    widest = int(top_k.where(top_k < size, 0).max())
    width = min(size, max(widest, _NARROW))
    while True:
        values = logits.topk(width).values
        kept = torch.arange(width, device=logits.device) < top_k[:, None]
        whole = torch.where(
            top_k < size,
            values.masked_fill(~kept, -torch.inf).logsumexp(-1),
            logits.logsumexp(-1),
        )
        mass = (values - whole[:, None]).exp().cumsum(-1)
        reached = (mass[:, -1] >= top_p) | (top_k < size) | (top_p >= 1)
        if width == size or bool(reached.all()):
            break
        width = size
    kept &= (mass.roll(1, -1) < top_p[:, None]) | (top_p >= 1)[:, None]
    kept[:, 0] = True
    least = values.gather(-1, kept.sum(-1, keepdim=True) - 1)
    least = torch.where(((top_k < size) | (top_p < 1))[:, None], least, -torch.inf)
    return logits.masked_fill(logits < least, -torch.inf)


def describe(logprobs: torch.Tensor, token: int, alternatives: int) -> LogProb:
    """Return what is told of `token`; `logprobs` [vocabulary] are those of its place."""
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        best = logprobs.topk(min(alternatives, logprobs.numel()))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return LogProb(float(logprobs[token]), top)
