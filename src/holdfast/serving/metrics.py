"""The counters of the server, in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The server's figures, in a registry of its own: several servers may share a process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "holdfast_requests",
            "Requests answered, by path and status",
            ["path", "status"],
            registry=registry,
        )
        self.tokens = Counter(
            "holdfast_tokens", "Tokens read in prompts and generated", ["kind"], registry=registry
        )
        self.cancelled = Counter(
            "holdfast_cancelled_requests", "Requests whose client went away", registry=registry
        )
        self.reloads = Counter(
            "holdfast_reloads",
            "Better checkpoints that were loaded or refused",
            ["outcome"],
            registry=registry,
        )
        self.models_loaded = Gauge("holdfast_models_loaded", "Models in memory", registry=registry)
        self.step = Gauge(
            "holdfast_model_step",
            "Training step of the checkpoint that a name serves",
            ["model"],
            registry=registry,
        )
        self.loss = Gauge(
            "holdfast_model_loss",
            "Loss of the checkpoint that a name serves",
            ["model"],
            registry=registry,
        )
        self._first = Histogram(
            "holdfast_time_to_first_token_seconds",
            "From arrival to the first token",
            registry=registry,
            buckets=_SECONDS,
        )
        self._steps = Histogram(
            "holdfast_step_seconds", "A step of a batch", registry=registry, buckets=_SECONDS
        )
        self._rows = Histogram(
            "holdfast_batch_size",
            "Texts in the batch, at each step",
            registry=registry,
            buckets=_ROWS,
        )
        for kind in ("prompt", "generated"):
            self.tokens.labels(kind)  # there from the start: a rate needs a zero

    def stepped(self, rows: int, seconds: float) -> None:
        """Count a step of a batch of `rows` texts that took `seconds`."""
        self._rows.observe(rows)
        self._steps.observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Count a first token that came `seconds` after its text was asked for."""
        self._first.observe(seconds)

    def watch(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Ask these for the texts in batches and in queues at every reading."""
        for name, text, ask in (
            ("holdfast_running_texts", "Texts in batches now", running),
            ("holdfast_waiting_texts", "Texts that wait for a row now", waiting),
        ):
            gauge = Gauge(name, text, registry=self.registry)
            gauge.set_function(lambda ask=ask: float(ask()))  # type: ignore[misc]

    def render(self) -> bytes:
        """Return everything, as Prometheus' text."""
        return generate_latest(self.registry)
